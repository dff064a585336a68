"""Measure a backbone.

python -m trainer.evaluate segmentation --model MODEL --data DIR
python -m trainer.evaluate spurious --model REFINED --baseline RAW --images DIR
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from backbone import DenseEncoder, open_model
from backbone.errors import RefineryError
from kernels.dispatch import KernelError, mode
from trainer.config import DataSection
from trainer.data import ImageFolder, square_image
from trainer.errors import TrainerError
from trainer.evaluate.probe import ProbeSettings
from trainer.evaluate.segmentation import (
    SegmentationDataset,
    SegmentationResult,
    evaluate_segmentation,
)
from trainer.evaluate.spurious import SpuriousReport, compare_spurious
from trainer.reference_image import SHIPPED

logger = logging.getLogger("trainer.evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        mode()
        command = _segmentation if arguments.command == "segmentation" else _spurious
        return command(arguments)
    except (RefineryError, KernelError) as error:
        logger.error("%s", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    segmentation = commands.add_parser(
        "segmentation",
        help="linear probe on a labelled data set (see trainer/evaluate/segmentation.py)",
    )
    segmentation.add_argument("--model", required=True, help="artifact, timm folder or timm name")
    segmentation.add_argument("--weights", type=Path, help="checkpoint file for a timm name")
    segmentation.add_argument("--random-weights", action="store_true", help="as a baseline")
    segmentation.add_argument(
        "--data", type=Path, required=True, help="folder with train, val, classes.json"
    )
    segmentation.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="in pixels; default the model's own"
    )
    segmentation.add_argument(
        "--seeds", type=int, default=1, help="probes with this many seeds, from 0 (default 1)"
    )
    segmentation.add_argument("--register-width", type=int, help="in patches; default the model's")
    segmentation.add_argument("--device", default="cpu")
    segmentation.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    segmentation.add_argument("--json", type=Path, help="write the scores here")
    _add_spurious(commands.add_parser("spurious", help="shares of spurious tokens; no labels"))
    return parser


def _add_spurious(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="artifact, timm folder or timm name")
    add("--random-weights", action="store_true", help="of --model, as a trial")
    add("--baseline", help="the raw backbone it was refined from: sets thresholds and patterns")
    add("--images", type=Path, required=True, help="folder of images, searched recursively")
    add("--num-images", type=int, default=64, help="images used, chosen by --seed (default 64)")
    add("--seed", type=int, default=0)
    add("--size", type=int, help="side of the square images in pixels; default the model's own")
    add("--threshold", type=float, default=0.5, help="cosine of both kinds (default 0.5)")
    add("--sigma", type=float, help="instead: mean plus so many deviations of the first backbone")
    add("--attention-layers", type=int, nargs=2, metavar=("FIRST", "LAST"), help="count AH too")
    add("--reference", type=Path, default=SHIPPED, help="reference image; default what ships")
    add("--device", default="cpu")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    add("--json", type=Path, help="write the shares here")


def _segmentation(arguments: argparse.Namespace) -> int:
    torch.manual_seed(0)  # for --random-weights
    dataset = SegmentationDataset.open(arguments.data)
    encoder = open_model(
        arguments.model,
        weights=arguments.weights,
        random_weights=arguments.random_weights,
        device=arguments.device,
        precision=arguments.precision,
    )
    height, width = arguments.size or encoder.native_size
    encoder.register_width(height, width, arguments.register_width)  # refuses impossible sizes now
    results = evaluate_segmentation(
        dataset,
        _Encode(encoder, arguments.register_width),
        size=(height, width),
        settings=[ProbeSettings(seed=seed) for seed in range(arguments.seeds)],
    )
    sys.stdout.write(_table(results))
    if arguments.json:
        report = {
            "model": arguments.model,
            "digest": encoder.digest,
            "precision": encoder.precision,
            "results": [dataclasses.asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _spurious(arguments: argparse.Namespace) -> int:
    torch.manual_seed(0)  # for --random-weights
    place = {"device": arguments.device, "precision": arguments.precision}
    encoder = open_model(arguments.model, random_weights=arguments.random_weights, **place)
    baseline = open_model(arguments.baseline, **place) if arguments.baseline else None
    size = arguments.size or min(encoder.native_size)
    encoder.register_width(size, size)  # refuses impossible sizes now
    first, last = arguments.attention_layers or (0, -1)
    for layer in arguments.attention_layers or ():
        if not 0 <= layer < encoder.backbone.depth:
            raise TrainerError(
                f"layer {layer} does not exist: {encoder.backbone.name} has blocks 0 to "
                f"{encoder.backbone.depth - 1}"
            )
    folder = ImageFolder.scan(
        arguments.images, seed=arguments.seed, max_images=arguments.num_images
    )
    section = DataSection()
    images = [square_image(path, size=size, section=section) for path in folder.files]
    report = compare_spurious(
        encoder,
        baseline,
        images,
        square_image(arguments.reference, size=size, section=section),
        sigma=arguments.sigma,
        threshold=arguments.threshold,
        channels=encoder.manifest.channel_mask if encoder.manifest else (),
        attention_layers=range(first, last + 1),
    )
    sys.stdout.write(_spurious_table(report))
    if arguments.json:
        shares = {name: share._asdict() for name, share in report.shares.items()}
        content = report._asdict() | {"thresholds": report.thresholds._asdict(), "shares": shares}
        models = {"model": arguments.model, "baseline": arguments.baseline}
        arguments.json.write_text(json.dumps(models | content, indent=2) + "\n")
    return 0


def _spurious_table(report: SpuriousReport) -> str:
    fixed, proxy = report.thresholds
    lines = [
        f"{report.num_images} images at {report.size} px; cosine thresholds FP {fixed:.3f}, "
        f"GP {proxy:.3f}; shares of image tokens in percent",
        f"{'':<24}{'FP':>8}{'GP':>8}{'FP or GP':>10}{'AH':>8}{'clean':>8}",
    ]
    for name, share in report.shares.items():
        values = [100 * value for value in share]
        lines.append(
            f"{name:<24}{values[0]:>8.1f}{values[1]:>8.1f}{values[2]:>10.1f}"
            f"{values[3]:>8.1f}{values[4]:>8.1f}"
        )
    return "\n".join(lines) + "\n"


@dataclasses.dataclass(frozen=True)
class _Encode:
    """The encoder's last layer as `evaluate_segmentation` calls it."""

    encoder: DenseEncoder
    register_width: int | None

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        features = self.encoder.encode(images_B3HW, register_width=self.register_width)[0]
        return features.tokens.cpu()


def _table(results: Sequence[SegmentationResult]) -> str:
    first = results[0]
    scores = [result.probe.scores for result in results]
    mious = torch.tensor([score.miou for score in scores], dtype=torch.float64)
    spread = (
        f" (std {100 * float(mious.std()):.2f} over {len(scores)} seeds)" if len(scores) > 1 else ""
    )
    height, width = first.size
    lines = [
        f"{first.dataset} at {height}x{width}: mIoU {100 * float(mious.mean()):.2f}{spread}",
        f"  pixel accuracy {100 * scores[0].pixel_accuracy:.2f}, "
        f"mean accuracy {100 * scores[0].mean_accuracy:.2f}",
    ]
    for name, iou in zip(first.classes, scores[0].class_iou, strict=True):
        lines.append(f"  {name:<16} {'absent' if iou is None else f'{100 * iou:.1f}'}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
