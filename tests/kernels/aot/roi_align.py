"""Launches of ROI-align to compile: backbones, number formats, every row of the tile tables."""

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch

from kernels._roi_align_launch import (
    launch_normalize_backward,
    launch_roi_align,
    launch_roi_align_backward,
)
from kernels.window import TokenWindow
from tests.kernels.aot.case import Case


class Shape(NamedTuple):
    window: TokenWindow
    channels: int
    num_boxes: list[int]
    output_size: tuple[int, int]


# Trained: as many bins as tokens for four crops of eight images; served: a few boxes of 7x7 bins.
SHAPES = {
    "ViT-B/16 224 px, trained": Shape(TokenWindow((14, 14), 1), 768, [4] * 32, (14, 14)),
    "ViT-B/16 224 px, served": Shape(TokenWindow((14, 14), 1, 1), 768, [1, 0, 3], (7, 7)),
    "So400m/16 512 px, trained": Shape(TokenWindow((32, 32), 1), 1152, [4] * 8, (32, 32)),
    "ViT-g/14 518 px, trained": Shape(TokenWindow((37, 37), 1, 1), 1408, [4] * 8, (37, 37)),
    "ViT-g/14 518 px, served": Shape(TokenWindow((37, 37), 1, 5), 1536, [1, 0, 3], (7, 7)),
    "ViT-bigG/14 224 px, trained": Shape(TokenWindow((16, 16), 1), 1664, [4] * 16, (16, 16)),
    "ViT-bigG/14 224 px, served": Shape(TokenWindow((16, 16), 1, 1), 1664, [1, 0, 3], (7, 7)),
    "EVA-8B/14 448 px, trained": Shape(TokenWindow((32, 32), 0, 1), 4096, [4] * 8, (32, 32)),
    "EVA-8B/14 448 px, served": Shape(TokenWindow((32, 32), 0, 1), 4096, [1, 0, 3], (7, 7)),
    "channels that no 16 divide": Shape(TokenWindow((37, 37), 0, 1), 392, [20], (7, 7)),
    "an odd number of such tokens": Shape(TokenWindow((35, 33)), 392, [20, 20], (7, 7)),
    "a long grid": Shape(TokenWindow((100, 10)), 768, [2], (3, 5)),
    "a longer grid": Shape(TokenWindow((10, 300)), 768, [2], (3, 5)),
}


def cases() -> Iterator[Case]:
    bfloat16, float16, float32 = torch.bfloat16, torch.float16, torch.float32
    for name, shape in SHAPES.items():
        for dtype in (bfloat16, float32):
            launch = partial(forward, shape, dtype, float32)
            yield Case(f"{name}, {str(dtype)[6:]} forward", launch, has_mma=False)
        if name.endswith("served"):
            for dtype in (bfloat16, float32):
                launch = partial(forward, shape, dtype, dtype, normalize=True)
                yield Case(f"{name}, {str(dtype)[6:]} unit norm", launch, has_mma=False)
        if name.endswith("trained"):
            launch = partial(backward, shape, float32, bfloat16)
            yield Case(f"{name}, backward to bfloat16", launch, has_mma=False)
    shape = SHAPES["So400m/16 512 px, trained"]
    for wanted in (float16, float32):
        launch = partial(forward, shape, float16, wanted, normalize=True)
        yield Case(f"float16 unit norm to {str(wanted)[6:]}", launch, has_mma=False)
    for given, wanted in ((float32, float32), (bfloat16, bfloat16), (float16, float16)):
        launch = partial(backward, shape, given, wanted)
        yield Case(f"{str(given)[6:]} backward", launch, has_mma=False)


def forward(
    shape: Shape, given: torch.dtype, wanted: torch.dtype, *, normalize: bool = False
) -> object:
    tokens_BNC = torch.empty(
        len(shape.num_boxes), shape.window.num_tokens, shape.channels, dtype=given, device="cuda"
    )
    return launch_roi_align(
        tokens_BNC,
        torch.empty(sum(shape.num_boxes), 4, device="cuda"),
        num_boxes=shape.num_boxes,
        window=shape.window,
        output_size=shape.output_size,
        normalize=normalize,
        dtype=wanted,
    )


def backward(shape: Shape, given: torch.dtype, wanted: torch.dtype) -> object:
    """The gradient of vectors that were normalised."""
    num_rois, num_bins = sum(shape.num_boxes), shape.output_size[0] * shape.output_size[1]
    gradient_RPC = torch.empty(num_rois, num_bins, shape.channels, dtype=given, device="cuda")
    norms_RP = torch.empty(num_rois, num_bins, device="cuda")
    return launch_roi_align_backward(
        launch_normalize_backward(gradient_RPC, torch.empty_like(gradient_RPC), norms_RP),
        torch.empty(num_rois, 4, device="cuda"),
        num_boxes=shape.num_boxes,
        window=shape.window,
        output_size=shape.output_size,
        dtype=wanted,
    )
