"""The floored logsumexp."""

import pytest
import torch

from kernels import similarity_logsumexp

FLOOR = {"detach": {}, "replace": {"replacement": 0.3}}


def unit(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)


def test_without_a_floor_it_is_the_plain_logsumexp():
    rows, columns = unit(2, 5, 4, seed=0), unit(2, 7, 4, seed=1)

    result = similarity_logsumexp(rows, columns, temperature=0.2, threshold=-2.0, below="detach")

    torch.testing.assert_close(result, ((rows @ columns.mT) / 0.2).logsumexp(-1))


def test_detach_keeps_the_value_and_drops_the_gradient_of_pairs_below():
    rows = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    columns = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]], requires_grad=True)

    result = similarity_logsumexp(rows, columns, temperature=1.0, threshold=0.5, below="detach")
    result.sum().backward()

    near = torch.tensor([0.8, 0.0]).softmax(0)[0]
    torch.testing.assert_close(result, torch.tensor([0.8, 0.0]).logsumexp(0).view(1, 1))
    torch.testing.assert_close(rows.grad, near * torch.tensor([[[0.8, 0.6]]]))
    torch.testing.assert_close(columns.grad, near * torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


def test_replace_puts_the_constant_in_place_of_pairs_below():
    rows = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    columns = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])

    result = similarity_logsumexp(
        rows, columns, temperature=0.5, threshold=0.5, below="replace", replacement=0.6
    )

    expected = torch.tensor([0.8 / 0.5, 0.6 / 0.5]).logsumexp(0).view(1, 1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("below", ["detach", "replace"])
@pytest.mark.parametrize("num_sets", [1, 2, 4])
def test_shared_columns_equal_repeated_columns(below, num_sets):
    rows, columns = unit(4, 5, 6, seed=0), unit(num_sets, 7, 6, seed=1)
    settings = {"temperature": 0.2, "threshold": 0.1, "below": below, **FLOOR[below]}

    shared = similarity_logsumexp(rows, columns, **settings)
    repeated = similarity_logsumexp(
        rows, columns.repeat_interleave(4 // num_sets, dim=0), **settings
    )

    torch.testing.assert_close(shared, repeated)


@pytest.mark.parametrize("below", ["replace", "detach"])
def test_gradcheck(below):
    rows = unit(2, 3, 4, seed=0, dtype=torch.float64).requires_grad_()
    columns = unit(2, 5, 4, seed=1, dtype=torch.float64).requires_grad_()
    threshold = -2.0 if below == "detach" else 0.1  # A detached value is no derivative of anything.

    assert torch.autograd.gradcheck(
        lambda r, c: similarity_logsumexp(
            r, c, temperature=0.5, threshold=threshold, below=below, **FLOOR[below]
        ),
        (rows, columns),
    )


def test_sixteen_bit_tokens_are_summed_in_float32_under_autocast():
    rows, columns = unit(2, 5, 4, seed=0).bfloat16(), unit(2, 7, 4, seed=1).bfloat16()
    settings = {"temperature": 0.2, "threshold": 0.1, "below": "detach"}

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = similarity_logsumexp(rows, columns, **settings)

    assert result.dtype == torch.float32
    exact = similarity_logsumexp(rows.double(), columns.double(), **settings)
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("below", "replacement"), [("detach", 0.3), ("replace", None)])
def test_a_replacement_without_its_mode_or_the_reverse_is_refused(below, replacement):
    with pytest.raises(ValueError, match="does not go with"):
        similarity_logsumexp(
            unit(1, 2, 3, seed=0),
            unit(1, 2, 3, seed=1),
            temperature=0.2,
            threshold=0.1,
            below=below,
            replacement=replacement,
        )
