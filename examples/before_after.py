"""Draw raw and refined features of photographs side by side, in one colour basis.

    python examples/before_after.py --raw models/demo-pretrained --refined models/demo \\
        --size 448 --output before_after.png examples/photographs/cat.jpg
"""

import argparse
from pathlib import Path

import torch

from backbone import open_model
from backbone.preprocess import load_image, resize_image
from trainer.preview import draw_preview


def central_square(path: Path, side: int) -> torch.Tensor:
    """The middle of a photograph as a square of `side` pixels, uint8 [3, side, side]."""
    pixels = load_image(path)
    height, width = pixels.shape[-2:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    return resize_image(pixels[:, top : top + short, left : left + short], (side, side))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--raw", required=True, help="backbone before refining")
    parser.add_argument("--refined", required=True, help="artifact")
    parser.add_argument("--size", type=int, default=448, help="pixels, whole patches")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("photographs", type=Path, nargs="+")
    arguments = parser.parse_args()

    images = torch.stack([central_square(p, arguments.size) for p in arguments.photographs])
    (raw,) = open_model(arguments.raw).encode(images)
    (refined,) = open_model(arguments.refined).encode(images)
    picture = draw_preview(images, raw.tokens, refined.tokens, raw.grid)
    arguments.output.write_bytes(picture)


if __name__ == "__main__":
    main()
