"""Launches of max_similarity to compile: backbones, number formats, unit norm or not."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels.similarity import launch_max_similarity
from tests.kernels.aot.case import Case

# Tokens of a crop, of what it is compared with, channels. Odd lengths: registers, class tokens.
SHAPES = {
    "So400m/16 512 px": (1024, 1024, 1152),
    "ViT-g/14 518 px": (1369, 1369, 1536),
    "EVA-8B/14 448 px": (1024, 132, 4096),
    "ViT-B/16 224 px": (196, 1029, 768),
    "channels that no tile divides": (196, 196, 1200),
}


def cases() -> Iterator[Case]:
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield Case(f"{name} {str(dtype)[6:]}", partial(launch, shape, dtype), has_mma=True)
    shape = SHAPES["So400m/16 512 px"]
    for dtype in (torch.bfloat16, torch.float32):
        name = f"So400m/16 512 px {str(dtype)[6:]} cosines"
        yield Case(name, partial(launch, shape, dtype, normalize=True), has_mma=True)
    yield Case("So400m/16 512 px float16", partial(launch, shape, torch.float16), has_mma=True)


def launch(shape: tuple[int, int, int], dtype: torch.dtype, *, normalize: bool = False) -> object:
    num_queries, num_keys, channels = shape
    return launch_max_similarity(
        torch.empty(12, num_queries, channels, dtype=dtype, device="cuda"),
        torch.empty(4, num_keys, channels, dtype=dtype, device="cuda"),
        normalize=normalize,
    )
