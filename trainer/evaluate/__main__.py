"""Measure a backbone: `python -m trainer.evaluate segmentation --model MODEL --data DIR`."""

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
from trainer.evaluate.probe import ProbeSettings
from trainer.evaluate.segmentation import (
    SegmentationDataset,
    SegmentationResult,
    evaluate_segmentation,
)

logger = logging.getLogger("trainer.evaluate")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit status."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        return _segmentation(arguments)
    except RefineryError as error:
        logger.error("%s", error)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__)
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
    return parser


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
