"""python -m trainer.evaluate segmentation --model models/demo --data DIR"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from backbone import find_devices
from trainer.evaluate.commands import common
from trainer.evaluate.datasets import SEGMENTATION_LAYOUTS, open_segmentation
from trainer.evaluate.probe import ProbeSettings
from trainer.evaluate.progress import Progress, stderr_console
from trainer.evaluate.results import class_table
from trainer.evaluate.segmentation import evaluate_segmentation
from trainer.evaluate.subjects import add_subject_arguments, subjects_of

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(commands: Commands) -> None:
    """Add the subcommand and its arguments."""
    parser = commands.add_parser(
        "segmentation",
        help="linear probe on a labelled data set",
        description="Semantic segmentation by a linear probe on frozen features: mIoU, mean "
        "accuracy and pixel accuracy of the raw and of the refined backbone.",
    )
    common.add_data_arguments(parser, SEGMENTATION_LAYOUTS)
    add_subject_arguments(parser)
    common.add_size_arguments(parser)
    defaults = ProbeSettings()
    common.add_probe_arguments(
        parser,
        steps=defaults.num_steps,
        rates=defaults.learning_rates,
        normalization=defaults.normalization,
    )
    common.add_output_arguments(parser)
    parser.add_argument("--classes", action="store_true", help="print the IoU of each class too")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    common.check_output(arguments)
    store = common.chosen_store(arguments)
    dataset = open_segmentation(arguments.data, arguments.layout)
    subjects = subjects_of(arguments)
    result = evaluate_segmentation(
        dataset,
        subjects,
        store=store,
        size=common.chosen_size(arguments, subjects),
        windows=common.chosen_windows(arguments, subjects),
        batch_size=arguments.batch_size,
        settings_by_seed=[
            ProbeSettings(
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
    if arguments.classes:
        sys.stdout.write("\n" + class_table(result))
    return 0
