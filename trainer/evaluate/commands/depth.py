"""python -m trainer.evaluate depth --model models/demo --data DIR"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from backbone import find_devices
from trainer.evaluate.commands import common
from trainer.evaluate.datasets import DEPTH_LAYOUTS, open_depth
from trainer.evaluate.depth import evaluate_depth
from trainer.evaluate.depth_probe import DepthSettings
from trainer.evaluate.progress import Progress, stderr_console
from trainer.evaluate.subjects import add_subject_arguments, subjects_of

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Commands) -> None:
    """Add the subcommand and its arguments."""
    parser = commands.add_parser(
        "depth",
        help="linear probe on images with measured depth",
        description="Monocular depth by a linear probe on frozen features: the errors of the raw "
        "and of the refined backbone.",
    )
    common.add_data_arguments(parser, DEPTH_LAYOUTS)
    add_subject_arguments(parser)
    common.add_size_arguments(parser)
    defaults = DepthSettings()
    common.add_probe_arguments(
        parser,
        steps=defaults.num_steps,
        rates=defaults.learning_rates,
        normalization=defaults.normalization,
    )
    common.add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    common.check_output(arguments)
    store = common.chosen_store(arguments)
    dataset = open_depth(arguments.data, arguments.layout)
    subjects = subjects_of(arguments)
    result = evaluate_depth(
        dataset,
        subjects,
        store=store,
        size=common.chosen_size(arguments, subjects),
        windows=common.chosen_windows(arguments, subjects),
        batch_size=arguments.batch_size,
        settings_by_seed=[
            DepthSettings(
                learning_rates=tuple(arguments.learning_rates),
                num_steps=arguments.steps,
                normalization=arguments.normalization,
                seed=seed,
            )
            for seed in range(arguments.seeds)
        ],
        device=find_devices(arguments.device or "auto")[0],
        progress=Progress(stderr_console()),
    )
    common.publish(result, arguments)
    return 0
