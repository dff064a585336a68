"""Tests of device code: through Triton's interpreter on the CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/kernels/device
python -m pytest -m gpu
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter multiplies bfloat16 as integers and truncates when it rounds to it.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "kernels/device/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing but the kernel may answer: what it cannot do is an error, not the reference."""
    monkeypatch.setenv(dispatch.MODE_VARIABLE, getattr(request, "param", "triton"))
    dispatch.mode.cache_clear()
    yield
    dispatch.mode.cache_clear()


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels run; everything they allocate is poisoned, so that nothing stays unwritten."""
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1: no device code ran")
    _poison(monkeypatch)
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def cuda() -> torch.device:
    """A GPU, for what only a GPU shows: races, CUDA graphs, compiled kernels."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("no GPU: races, CUDA graphs and compiled kernels were not tried")
    return torch.device("cuda")


def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else 123_456_789)

        return fill

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
