"""Operations of the package compute in float32 at least, autocast or not."""

import pytest
import torch

from kernels import full_precision, widen
from kernels.precision import check_alike, wide_dtype


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_widen_lifts_sixteen_bits_and_leaves_the_rest(given, wanted):
    assert widen(torch.ones(2, dtype=given)).dtype == wanted


def test_matrix_products_stay_in_float32_under_autocast():
    @full_precision
    def product(tensor):
        return tensor @ tensor

    with torch.autocast("cpu", dtype=torch.bfloat16):
        outside = torch.ones(2, 2) @ torch.ones(2, 2)
        inside = product(torch.ones(2, 2))

    assert outside.dtype == torch.bfloat16
    assert inside.dtype == torch.float32


def test_integers_and_tensors_of_two_devices_are_refused():
    with pytest.raises(ValueError, match=r"keys are torch.int64; floating point"):
        check_alike(queries=torch.ones(1), keys=torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="queries on cpu, keys on meta: all must be on one device"):
        check_alike(queries=torch.ones(1), keys=torch.ones(1, device="meta"))


def test_results_are_as_wide_as_the_widest_and_float32_at_least():
    half, double = torch.ones(1, dtype=torch.float16), torch.ones(1, dtype=torch.float64)

    assert wide_dtype(half, half) == torch.float32
    assert wide_dtype(half, double) == torch.float64
