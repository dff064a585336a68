"""python -m trainer.evaluate zeroshot --model REFINED --text TOWER --data voc21=DIR"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backbone.value_path import ValuePath
from trainer.evaluate.commands import common
from trainer.evaluate.datasets import SEGMENTATION_LAYOUTS
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.images import ShortSide
from trainer.evaluate.progress import Progress, stderr_console
from trainer.evaluate.results import Result, class_table
from trainer.evaluate.subjects import LocalSubject, Subject, add_subject_arguments, subjects_of
from trainer.evaluate.windows import Windows
from trainer.evaluate.zeroshot import (
    NAMED,
    AlignedSubject,
    ClassEmbeddings,
    TextTower,
    ZeroshotError,
    ZeroshotSettings,
    benchmark_table,
    check_pair,
    default_path,
    evaluate_zeroshot,
    find_tower,
    open_text_tower,
    read_head,
    read_templates,
)
from trainer.evaluate.zeroshot.jobs import SHORT_SIDE, SHORT_SIDES, THRESHOLD, plan_jobs

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

logger = logging.getLogger(__name__)

_TEXT_CACHE = "runs/text"
_SCALE = 40.0  # SCLIP's (arXiv:2312.01597)


def add_parser(commands: Commands) -> None:
    """Add the subcommand and its arguments."""
    parser = commands.add_parser(
        "zeroshot",
        help="open-vocabulary segmentation from text embeddings",
        description="Semantic segmentation without training: every patch is compared with the "
        "embeddings of class names, by the text tower that the backbone was trained with. mIoU, "
        "mean accuracy and pixel accuracy of the raw and of the refined backbone; of several data "
        "sets a table of mIoUs with their mean.",
    )
    layouts = [name for name in SEGMENTATION_LAYOUTS if name != "auto"]
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[LAYOUT=]DIR",
        help="of a data set, may be given several times; layouts: "
        + "; ".join(f"{name}: {SEGMENTATION_LAYOUTS[name]}" for name in layouts),
    )
    group.add_argument(
        "--layout",
        choices=("auto", *layouts),
        default="auto",
        metavar="NAME",
        help="of every --data that names none (default: what is found there)",
    )
    add_subject_arguments(parser)
    _add_text_arguments(parser)
    _add_feature_arguments(parser)
    common.add_output_arguments(parser)
    parser.add_argument("--classes", action="store_true", help="print the IoU of each class too")


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text")
    add = group.add_argument
    add(
        "--text",
        required=True,
        metavar="TOWER",
        help="text tower: folder in transformers' layout (CLIP, EVA-CLIP, SigLIP, SigLIP 2), "
        "checkpoint file of EVA-CLIP or OpenCLIP, or a hub id as openai/clip-vit-base-patch16",
    )
    add(
        "--projection",
        metavar="CHECKPOINT",
        help="where the visual projection or pooling head is (default: in --text)",
    )
    add("--tokenizer", metavar="FOLDER", help="folder or hub id (default: in --text)")
    add(
        "--templates",
        default="imagenet80",
        metavar="NAME|FILE",
        help=f"prompts: {', '.join(NAMED)}, or a file with one per line, {{}} for the name "
        "(default imagenet80)",
    )
    add(
        "--class-names",
        action="append",
        default=[],
        metavar="[LAYOUT=]FILE",
        help="a line per class, several names separated by commas (default: the data set's names)",
    )
    add(
        "--background",
        choices=("names", "threshold", "none"),
        help="how pixels come to be background where there is such a class: by names of things "
        "around objects, by a low probability, or never (default: names for VOC21 and "
        "COCO-Object, threshold for Context60)",
    )
    add("--background-names", metavar="FILE", help="a name per line, for --background names")
    add(
        "--threshold",
        type=float,
        metavar="P",
        help="pixels whose best name has a lower softmax probability are background (default "
        f"{THRESHOLD:g} with --background threshold, else no such rule)",
    )
    add(
        "--scale",
        default=f"{_SCALE:g}",
        metavar="X|own",
        help="cosines times this before the softmax, own: the tower's; decides nothing without a "
        f"threshold (default {_SCALE:g})",
    )
    add(
        "--text-cache",
        default=_TEXT_CACHE,
        metavar="DIR|none",
        help=f"where embeddings of class names are kept (default {_TEXT_CACHE})",
    )
    add(
        "--unrelated-towers",
        action="store_true",
        help="compare towers of different weights, as a trial of the command",
    )


def _add_feature_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("features").add_argument
    add(
        "--path",
        choices=("attention", "block", "none"),
        help="of patch tokens through the last block: attention, each token's own value through "
        "the output projection; block, with the residual and the MLP too; none, the block as it "
        "is (default attention, of SigLIP none: its value path is that of its pooling head)",
    )
    add(
        "--short-side",
        action="append",
        default=[],
        metavar="[LAYOUT=]S",
        help="of images in pixels, e.g. 336, 448, 560 (default the model's own side, but at least "
        f"{SHORT_SIDE}, and for Cityscapes {SHORT_SIDES['cityscapes']})",
    )
    add(
        "--window",
        type=int,
        nargs=2,
        metavar=("SIZE", "STRIDE"),
        help="sliding window in pixels; 0 0: images at once (default the model's own side, half)",
    )
    add(
        "--features",
        default="none",
        metavar="DIR|none",
        help="where embeddings of patches are kept, for a run that goes on or that tries other "
        "names: 2 * (H / patch) * (W / patch) * channels bytes an image (default none)",
    )
    add("--batch-size", type=common.positive, default=8, metavar="B", help="images encoded at once")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    common.check_output(arguments)
    if arguments.url is not None:
        raise ZeroshotError(
            "zero-shot segmentation needs the value path of a model in this process, which a "
            "service does not give: leave --url out, and name the folder with --model"
        )
    templates = read_templates(arguments.templates)
    jobs = plan_jobs(
        arguments.data,
        arguments.layout,
        class_names=arguments.class_names,
        short_sides=arguments.short_side,
        rule=arguments.background,
        background_names=arguments.background_names,
        threshold=arguments.threshold,
    )
    tower, subjects, path = _open(arguments)
    scale = tower.scale if arguments.scale == "own" else _number("--scale", arguments.scale)
    windows = _windows(arguments.window, subjects[-1])
    cache = None if arguments.text_cache == "none" else Path(arguments.text_cache)
    embeddings = ClassEmbeddings(tower, templates, cache)
    store = None if arguments.features == "none" else FeatureStore(Path(arguments.features))
    progress = Progress(stderr_console())
    results = []
    for job in jobs:
        settings = ZeroshotSettings(
            size=ShortSide(job.short_side(subjects[-1].native_size)),
            windows=windows,
            path=path,
            family=tower.family,
            scale=scale,
            threshold=job.threshold,
            batch_size=arguments.batch_size,
            notes={
                "text tower": arguments.text,
                "text digest": tower.digest[:12],
                "path": path,
                "templates": arguments.templates,
            },
        )
        result = evaluate_zeroshot(
            job.dataset,
            job.vocabulary,
            embeddings.embed(job.vocabulary.names, progress=progress),
            subjects,
            settings=settings,
            store=store,
            progress=progress,
        )
        logger.info("%s: mIoU %s", result.dataset, _in_short(result))
        results.append(result)
    common.publish(results[0] if len(results) == 1 else benchmark_table(results), arguments)
    if arguments.classes:
        for result in results:
            sys.stdout.write(f"\n{result.dataset}\n\n{class_table(result)}")
    return 0


def _open(arguments: argparse.Namespace) -> tuple[TextTower, list[AlignedSubject], ValuePath]:
    files = find_tower(arguments.text, tokenizer=arguments.tokenizer)
    tower = open_text_tower(files)
    visual = find_tower(arguments.projection) if arguments.projection else files
    head = read_head(visual, tower.family)
    path: ValuePath = arguments.path or default_path(tower.family)
    logger.info(
        "text tower %s: %s family, %d channels, digest %s, own scale %.1f",
        arguments.text,
        tower.family,
        tower.dim,
        tower.digest[:12],
        tower.scale,
    )
    found: list[Subject] = subjects_of(arguments)
    subjects = []
    for subject in found:
        assert isinstance(subject, LocalSubject)  # without --url there is no other
        check_pair(
            subject.encoder.backbone,
            head,
            visual,
            family=tower.family,
            text_dim=tower.dim,
            are_unrelated=arguments.unrelated_towers,
        )
        width = arguments.register_width if subject is found[-1] else None
        subjects.append(AlignedSubject(subject, head, path, register_width=width))
    return tower, subjects, path


def _number(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ZeroshotError(f"{flag} {text} is not a number above 0")
    return number


def _windows(given: Sequence[int] | None, subject: AlignedSubject) -> Windows | None:
    if given is not None:
        return Windows(*given) if any(given) else None
    patch = subject.patch_size
    patches = min(subject.native_size) // patch
    return Windows(patches * patch, max(1, patches // 2) * patch)


def _in_short(result: Result) -> str:
    return ", ".join(f"{row.subject} {row.scores[0].interval.mean:.2f}" for row in result.rows)
