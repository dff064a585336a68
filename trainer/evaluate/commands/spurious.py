"""`python -m trainer.evaluate spurious`: what can be measured without labels."""

import argparse
import sys
from pathlib import Path

from trainer.config import Recipe
from trainer.data import BadImages, find_images, square_image
from trainer.errors import DataError
from trainer.evaluate.commands import common
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.layers import layer_table, score_table
from trainer.evaluate.norms import DEVIATIONS
from trainer.evaluate.pictures import Pictures, check_square_size, read_pictures
from trainer.evaluate.progress import Progress, stderr_console
from trainer.evaluate.record import record, result_section, write_text
from trainer.evaluate.results import Result, write
from trainer.evaluate.subjects import LocalSubject, Subject, add_subject_arguments, subjects_of
from trainer.evaluate.unlabelled import SpuriousSettings, evaluate_spurious
from trainer.reference_image import SHIPPED

_EPILOG = """\
FP, GP: shares of image tokens that resemble a reference image, or a strip of it on the same canvas.
Norm outliers: tokens far longer than their image's median. View margin and retrieval: how far two
crops of an image agree about the places that both show. trainer/evaluate/spurious.py, norms.py and
views.py say more.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand and its arguments."""
    parser = commands.add_parser(
        "spurious",
        help="shares of spurious tokens, norm outliers, view consistency; no labels",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_subject_arguments(parser)
    add = parser.add_argument_group("how").add_argument
    add(
        "--images",
        required=True,
        metavar="DIR|FILE",
        help="folder of images, searched recursively; a list; or tar shards",
    )
    add(
        "--num-images", type=common.positive, default=64, help="used, chosen by --seed (default 64)"
    )
    add("--seed", type=int, default=0)
    add(
        "--size",
        type=common.positive,
        help="side of the square images in pixels; default the model's own",
    )
    add("--threshold", type=float, default=0.5, help="cosine of FP and GP (default 0.5)")
    add("--sigma", type=float, help="instead: mean plus so many deviations of the raw one's scores")
    add("--norm-deviations", type=float, default=DEVIATIONS, help="of outliers (default 5)")
    add("--attention-layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="count AH too")
    add("--by-layer", action="store_true", help="shares and norms of every block too")
    add("--reference", type=Path, default=SHIPPED, help="reference image; default what ships")
    add("--skip-bad-images", action="store_true", help="skip unreadable ones instead of stopping")
    common.add_output_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print, write."""
    common.check_output(arguments)
    subjects = subjects_of(arguments)
    bad = BadImages(skip=arguments.skip_bad_images)
    pictures = _read(arguments, subjects[-1], bad)
    result = evaluate_spurious(
        subjects,
        pictures,
        SpuriousSettings(
            threshold=arguments.threshold,
            sigma=arguments.sigma,
            attention_layers=_layers(arguments.attention_layers),
            deviations=arguments.norm_deviations,
            by_layer=arguments.by_layer,
        ),
        dataset=Path(arguments.images).name,
        channels=_channels(subjects[-1]),
        register_width=arguments.register_width,
        progress=Progress(stderr_console()),
    )
    parts = score_table(result), layer_table(result), _footer(result, pictures, bad)
    sys.stdout.write("\n".join(filter(None, parts)))
    write(result, arguments.json)
    if arguments.markdown is not None:
        write_text(arguments.markdown, result_section(result))
    if arguments.record:
        record(Path(arguments.model), result)
    return 0


def _footer(result: Result, pictures: Pictures, bad: BadImages) -> str:
    """What the table is of, and how to read it."""
    num = len(pictures.images_BSS)
    higher = [score.name for score in result.rows[0].scores if score.better == "higher"]
    intervals = "; intervals: 95 %, bootstrap over images" if num > 1 else ""
    return (
        f"{num} image{'s' * (num > 1)} used, {len(bad.paths)} skipped{intervals}. "
        f"Higher is better: {', '.join(higher)}; lower: all others.\n"
    )


def _read(arguments: argparse.Namespace, subject: Subject, bad: BadImages) -> Pictures:
    size = arguments.size or min(subject.native_size)
    check_square_size(size, subject.patch_size, subject.name)
    recipe = Recipe()
    source = find_images(arguments.images, seed=arguments.seed, max_images=arguments.num_images)
    try:
        reference_3SS = square_image(arguments.reference, size=size, section=recipe.data)
    except OSError as error:
        raise DataError(
            f"the reference image {arguments.reference} cannot be read: {error}"
        ) from error
    return read_pictures(
        source,
        range(len(source)),
        recipe,
        bad,
        reference_3SS=reference_3SS,
        patch_size=subject.patch_size,
        count=len(source),
    )


def _layers(asked: list[int] | None) -> tuple[int, ...]:
    if asked is None:
        return ()
    first, last = asked
    if first > last:
        raise EvaluationError(
            f"--attention-layers {first} {last}: the first comes after the last; give the smaller "
            "number first"
        )
    return tuple(range(first, last + 1))


def _channels(subject: Subject) -> tuple[int, ...]:
    manifest = subject.encoder.manifest if isinstance(subject, LocalSubject) else None
    return manifest.channel_mask if manifest else ()
