"""Attention launches of real use: every head dim that is served, the row of every table."""

from collections.abc import Callable, Iterator

import torch

from kernels._attention_device import launch_attention
from kernels.window import TokenWindow
from tests.kernels.aot.case import Case

_SO400M = TokenWindow((32, 32), border=1)  # SigLIP2 So400m/16 at 512 px
_GIANT = TokenWindow((37, 37), border=1, prefix=1)  # ViT-g/14 at 518 px
_EVA_8B = TokenWindow((32, 32), border=1, prefix=1)
_BASE = TokenWindow((14, 14), border=1, prefix=1)
_ALL_OF_1024 = TokenWindow((0, 0), prefix=1024)
_ALL_OF_1029 = TokenWindow((0, 0), prefix=1029)

_LAUNCHES = [
    # heads, head dim, window, dtype, log-sum-exp too
    (12, 64, _BASE, torch.bfloat16, True),
    (24, 64, _ALL_OF_1024, torch.bfloat16, False),
    (16, 72, _SO400M, torch.bfloat16, False),
    (16, 72, _SO400M, torch.bfloat16, True),
    (16, 72, _ALL_OF_1029, torch.float16, False),
    (16, 72, _ALL_OF_1024, torch.bfloat16, False),
    (16, 80, _ALL_OF_1029, torch.bfloat16, True),
    (16, 88, _GIANT, torch.bfloat16, False),
    (16, 88, _GIANT, torch.bfloat16, True),
    (16, 88, _ALL_OF_1024, torch.float16, False),
    (16, 96, _ALL_OF_1029, torch.bfloat16, True),
    (32, 128, _EVA_8B, torch.bfloat16, True),
    (32, 128, _ALL_OF_1024, torch.float16, True),
    (12, 8, _BASE, torch.bfloat16, True),
    (12, 32, _BASE, torch.bfloat16, True),
    (12, 40, _BASE, torch.bfloat16, True),
    (12, 48, _BASE, torch.bfloat16, True),
    (12, 56, _BASE, torch.bfloat16, True),
    (3, 24, _BASE, torch.bfloat16, False),
    (1, 72, _BASE, torch.bfloat16, False),
    (3, 72, _BASE, torch.bfloat16, False),
    (16, 104, _ALL_OF_1029, torch.bfloat16, True),
    (16, 112, _ALL_OF_1029, torch.bfloat16, True),
    (16, 120, _ALL_OF_1029, torch.bfloat16, True),
    (12, 64, _BASE, torch.float32, True),
    (16, 72, _SO400M, torch.float32, True),
    (16, 96, _ALL_OF_1029, torch.float32, False),
    (32, 128, _EVA_8B, torch.float32, True),
]


def cases() -> Iterator[Case]:
    for num_heads, head_dim, window, dtype, with_lse in _LAUNCHES:
        name = f"D={head_dim} {dtype} T={window.num_tokens} border={window.border} lse={with_lse}"
        launch = _launch(num_heads, head_dim, window, dtype, with_lse)
        yield Case(name, launch, has_mma=True)


def _launch(
    num_heads: int, head_dim: int, window: TokenWindow, dtype: torch.dtype, with_lse: bool
) -> Callable[[], object]:
    def launch() -> object:
        shape = (8, window.num_tokens, 3, num_heads, head_dim)
        qkv = torch.empty(shape, dtype=dtype, device="cuda").permute(2, 0, 3, 1, 4)
        return launch_attention(*qkv, window, head_dim**-0.5, with_lse=with_lse)

    return launch
