"""Launches of the attention flows."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels._flow_paper_device import launch_paper_inflow
from kernels._flow_release_device import launch_release_inflow
from tests.kernels.aot.case import Case


def cases() -> Iterator[Case]:
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    # So400m/16 at 512 px: 16 heads of 72, crops of 32 x 32 on composites of 32 x 44 tokens.
    for name, heads, head_dim, dtype in (
        ("B", 12, 64, bf16),
        ("B fp16", 12, 64, fp16),
        ("So400m", 16, 72, bf16),
        ("So400m fp32", 16, 72, fp32),
        ("giant-opt", 16, 96, bf16),
        ("g", 16, 88, bf16),
        ("EVA 8B", 32, 128, bf16),
        ("EVA 8B fp32", 32, 128, fp32),
    ):
        yield Case(f"paper {name}", partial(_paper, heads, head_dim, dtype), has_mma=True)
    for name, heads, head_dim, dtype, packed in (
        ("B", 12, 64, bf16, True),
        ("So400m", 16, 72, bf16, True),
        ("So400m fp32", 16, 72, fp32, True),
        ("So400m with q norm", 16, 72, bf16, False),
        ("g with q norm", 16, 88, bf16, False),
        ("EVA 8B with q norm", 32, 128, bf16, False),
        ("EVA 8B with q norm fp32", 32, 128, fp32, False),
    ):
        launch = partial(_release, heads, head_dim, dtype, packed)
        yield Case(f"release {name}", launch, has_mma=True)
    yield Case("paper So400m with LSE", _paper_with_lse, has_mma=True)
    yield Case("paper So400m with q norm, ragged", _paper_ragged, has_mma=True)
    yield Case("release B, ragged", partial(_release, 12, 64, bf16, True, 1029), has_mma=True)


def _heads(
    num_heads: int, head_dim: int, dtype: torch.dtype, *, packed: bool, num_tokens: int = 1408
) -> tuple[torch.Tensor, torch.Tensor]:
    if packed:
        shape = (6, num_tokens, 3, num_heads, head_dim)
        qkv = torch.empty(shape, dtype=dtype, device="cuda").permute(2, 0, 3, 1, 4)
        return qkv[0], qkv[1]
    shape = (6, num_heads, num_tokens, head_dim)
    return (
        torch.empty(shape, dtype=dtype, device="cuda"),
        torch.empty(shape, dtype=dtype, device="cuda"),
    )


def _crop(num_tokens: int = 1024) -> dict[str, torch.Tensor]:
    return {
        "index_N": torch.empty(num_tokens, dtype=torch.int64, device="cuda"),
        "rejected_BN": torch.empty(6, num_tokens, dtype=torch.bool, device="cuda"),
    }


def _into(num_tokens: int = 1024) -> torch.Tensor:
    return torch.empty(6, num_tokens, dtype=torch.float32, device="cuda")


def _paper(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    q, k = _heads(num_heads, head_dim, dtype, packed=True)
    launch_paper_inflow(q, k, _into(), **_crop())


def _paper_with_lse() -> None:
    q, k = _heads(16, 72, torch.bfloat16, packed=True, num_tokens=1024)
    lse = torch.empty(6, 16, 1024, dtype=torch.float32, device="cuda")
    launch_paper_inflow(q, k, _into(), lse_BHN=lse)


def _paper_ragged() -> None:
    q, k = _heads(16, 72, torch.bfloat16, packed=False, num_tokens=1029)
    launch_paper_inflow(q, k, _into(1029))


def _release(
    num_heads: int, head_dim: int, dtype: torch.dtype, packed: bool, num_tokens: int = 1024
) -> None:
    q, k = _heads(num_heads, head_dim, dtype, packed=packed)
    launch_release_inflow(q, k, _into(num_tokens), **_crop(num_tokens))
