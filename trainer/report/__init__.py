"""python -m trainer.report: one HTML page that shows what refining did to a backbone.

    python -m trainer.report --model models/demo --images photos --output report.html \\
        --results camvid.json voc.json --run runs/demo

The page loads nothing, so it can be sent and opened anywhere. A click on a patch of a photograph
shows what the raw and the refined backbone find similar to it.
"""

import argparse
import datetime
import logging
import shlex
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from backbone import DenseEncoder, is_artifact
from backbone.errors import RefineryError
from kernels.dispatch import KernelError, mode
from trainer.errors import TrainerError
from trainer.evaluate.files import replace_file
from trainer.evaluate.progress import Progress
from trainer.evaluate.subjects import LocalSubject, open_subjects
from trainer.reference_image import SHIPPED
from trainer.report.inputs import gather_results, read_card, read_run, read_table
from trainer.report.measure import Options, choose_images, measure, read_image, read_images
from trainer.report.page import Content, counted, write_page
from trainer.report.verdict import summary

EXIT_USER_ERROR = 2
_DISTRIBUTIONS = ("vit-refinery", "torch", "timm", "pillow", "numpy")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    console = Console(stderr=True)
    words = list(argv) if argv is not None else sys.argv[1:]
    try:
        mode()
        content = _content(options, shlex.join(["python", "-m", "trainer.report", *words]), console)
        page = write_page(content)
        _write(options.output, page)
    except (RefineryError, KernelError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return EXIT_USER_ERROR
    for given in content.results:
        for text in given.warnings:
            console.print(f"[yellow]{escape(given.source)}:[/] {escape(text)}", soft_wrap=True)
    findings = counted(content)
    size = len(page.encode(errors="backslashreplace")) / 1e6
    sys.stdout.write("".join(f"{line}\n" for line in summary(findings)))
    sys.stdout.write(f"{options.output}: {len(content.measured.shown)} images, {size:.1f} MB\n")
    return 0


def _content(options: argparse.Namespace, command: str, console: Console) -> Content:
    """Everything cheap first: what is wrong with it must not cost a measurement."""
    if options.output.is_dir() or not options.output.parent.is_dir():
        raise TrainerError(
            f"the page cannot be written to {options.output}; give --output a file in a folder "
            "that exists"
        )
    folder = Path(options.model.removeprefix("local-dir:"))
    artifact = folder if is_artifact(folder) else None
    table = read_table(options.ablation) if options.ablation else None
    records = read_run(options.run, artifact)
    paths = choose_images(options.images, num_images=options.num_images, seed=options.seed)
    reference_3HW = read_image(options.reference, "reference image")
    subjects = _subjects(options)
    encoders = {one.name: one.encoder for one in subjects}
    refined = subjects[-1].encoder
    digests = {one.name: one.digest for one in subjects}
    given = gather_results(options.results, refined.manifest, digests)
    layers = _layers(options.attention_layers, encoders)
    images = read_images(paths, size=options.size, patch_size=refined.patch_size)
    settings = Options(
        size=options.size,
        threshold=options.threshold,
        sigma=options.sigma,
        attention_layers=layers,
        register_width=options.register_width,
        reference_3HW=reference_3HW,
    )
    with Progress(console).stage("images", total=len(images)) as advance:
        measured = measure(
            encoders,
            _names(paths, options.images),
            images,
            settings,
            channels=refined.manifest.channel_mask if refined.manifest else (),
            advance=advance,
        )
    return Content(
        title=_title(subjects),
        facts=_facts(subjects),
        specs={one.name: one.spec for one in subjects},
        digests=digests,
        measured=measured,
        results=given,
        ablation=table,
        records=records,
        card=read_card(artifact),
        manifest=refined.manifest,
        versions=_versions(),
        command=command,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _subjects(options: argparse.Namespace) -> list[LocalSubject]:
    """The backbones of this process, raw first, all of one patch size."""
    found = open_subjects(
        options.model,
        options.baseline,
        weights=options.weights,
        random_weights=options.random_weights,
        register_width=options.register_width,
        device=options.device,
        precision=options.precision,
    )
    subjects = [one for one in found if isinstance(one, LocalSubject)]
    raw, refined = subjects[0], subjects[-1]
    for what, first, last in (
        ("patches of {} px", raw.patch_size, refined.patch_size),
        (
            "tokens of {} channels",
            raw.encoder.backbone.embed_dim,
            refined.encoder.backbone.embed_dim,
        ),
    ):
        if first != last:
            raise TrainerError(
                f"{raw.spec} has {what.format(first)}, {refined.spec} {what.format(last)}: they "
                "cannot stand side by side; give --baseline the backbone that was refined, or none"
            )
    return subjects


def _layers(asked: Sequence[int] | None, encoders: dict[str, DenseEncoder]) -> tuple[int, ...]:
    if asked is None:
        return ()
    first, last = asked
    for encoder in encoders.values():
        depth = encoder.backbone.depth
        if not 0 <= first <= last < depth:
            raise TrainerError(
                f"--attention-layers {first} {last} is not possible: {encoder.backbone.name} has "
                f"blocks 0 to {depth - 1}, and the first comes before the last"
            )
    return tuple(range(first, last + 1))


def _names(paths: Sequence[Path], places: Sequence[Path]) -> list[str]:
    """Paths below the folders that were given: where those lie is nobody else's business."""
    folders = [place for place in places if place.is_dir()]
    names = []
    for path in paths:
        inside = next((place for place in folders if path.is_relative_to(place)), path.parent)
        names.append(str(path.relative_to(inside)))
    return names


def _title(subjects: Sequence[LocalSubject]) -> str:
    last = subjects[-1].spec
    return f"{last}, refined against raw" if len(subjects) > 1 else last


def _facts(subjects: Sequence[LocalSubject]) -> str:
    last = subjects[-1]
    manifest = last.encoder.manifest
    parts = [last.encoder.backbone.name]
    if manifest is not None:
        parts.append(f"recipe {manifest.recipe.get('name', 'unknown')}")
    if len(subjects) > 1:
        parts.append(f"beside {subjects[0].spec}")
    return "; ".join([*parts, f"weights {last.digest[:12]}", last.encoder.precision])


def _versions() -> dict[str, str]:
    found = {}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _write(path: Path, page: str) -> None:
    try:
        # Names of files may hold bytes that are no text.
        replace_file(path, page.encode(errors="backslashreplace"))
    except OSError as error:
        raise TrainerError(f"the page cannot be written to {path}: {error.strerror}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="artifact, timm folder or timm name")
    add("--baseline", help="the raw backbone, or none; default what the artifact was refined from")
    add("--weights", type=Path, help="checkpoint for a --model that is a timm name")
    add("--random-weights", action="store_true", help="--model with random weights, as a trial")
    add("--images", type=Path, nargs="+", required=True, metavar="PLACE",
        help="image files, or folders of images")  # fmt: skip
    add("--output", type=Path, default=Path("report.html"), help="page (default report.html)")
    add("--num-images", type=_positive, default=8, metavar="N",
        help="of each folder, chosen by --seed (default 8)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--size", type=_positive, default=448, metavar="PX",
        help="longest side, aspect kept in whole patches (default 448)")  # fmt: skip
    add("--threshold", type=float, default=0.5, help="cosine of FP and GP (default 0.5)")
    add("--sigma", type=float, help="instead: the raw backbone's mean plus so many deviations")
    add("--attention-layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="show AH too")
    add("--register-width", type=int, metavar="R", help="border in patches; default the model's")
    add("--reference", type=Path, default=SHIPPED, help="reference image; default what ships")
    add("--run", type=Path, metavar="DIR", help="folder of the training run; default the "
        "artifact's parent, where that is one")  # fmt: skip
    add("--results", type=Path, nargs="+", default=[], metavar="FILE",
        help="JSON of python -m trainer.evaluate, beside what the artifact records")  # fmt: skip
    add("--ablation", type=Path, metavar="FILE", help="table.json of python -m trainer.ablate")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of 1 or more")
    return int(text)
