"""Operations of the package compute in float32 at least, autocast or not."""

import pytest
import torch

from kernels import full_precision, widen


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
