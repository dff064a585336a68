"""The floored logsumexp, averaged."""

from functools import partial

import pytest
import torch

from kernels import contrastive, mean_logsumexp
from kernels.contrastive import mean_logsumexp_reference

FLOOR = {"detach": {}, "replace": {"replacement": 0.3}}
# Elements of a chunk, so that a small table is kept or made in chunks; and channels: tracing
# remembers the outputs of a shape, and must not take those of the other for it.
KEPT_AND_CHUNKED = [(1 << 22, 8), (50, 9)]


def unit(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)


def settings_of(below):
    return {"temperature": 0.2, "threshold": 0.1, "below": below, **FLOOR[below]}


def value_and_gradients(function, *inputs, **settings):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = function(*inputs, **settings)
    return value, *torch.autograd.grad(3 * value, inputs)


def assert_equal_to_the_reference(*inputs, **settings):
    results = value_and_gradients(mean_logsumexp, *inputs, **settings)
    expected = value_and_gradients(mean_logsumexp_reference, *inputs, **settings)
    for result, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference)


def test_without_a_floor_it_is_the_mean_of_the_plain_logsumexp():
    rows, columns = unit(2, 5, 4, seed=0), unit(2, 7, 4, seed=1)

    result = mean_logsumexp(rows, columns, temperature=0.2, threshold=-2.0, below="detach")

    torch.testing.assert_close(result, ((rows @ columns.mT) / 0.2).logsumexp(-1).mean())


def test_detach_keeps_the_value_and_drops_the_gradient_of_pairs_below():
    rows = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    columns = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]], requires_grad=True)

    result = mean_logsumexp(rows, columns, temperature=1.0, threshold=0.5, below="detach")
    result.backward()

    near = torch.tensor([0.8, 0.0]).softmax(0)[0]
    torch.testing.assert_close(result, torch.tensor([0.8, 0.0]).logsumexp(0))
    torch.testing.assert_close(rows.grad, near * torch.tensor([[[0.8, 0.6]]]))
    torch.testing.assert_close(columns.grad, near * torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


def test_replace_puts_the_constant_in_place_of_pairs_below():
    rows = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    columns = torch.tensor([[[0.8, 0.6], [0.0, 1.0]]])

    result = mean_logsumexp(
        rows, columns, temperature=0.5, threshold=0.5, below="replace", replacement=0.6
    )

    expected = torch.tensor([0.8 / 0.5, 0.6 / 0.5]).logsumexp(0)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("below", ["detach", "replace"])
@pytest.mark.parametrize("num_sets", [1, 2, 4])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_values_and_gradients_equal_the_reference(below, num_sets, is_weighted):
    rows, columns = unit(4, 5, 6, seed=0), unit(num_sets, 7, 6, seed=1)
    weights = torch.rand(4, 5, generator=torch.Generator().manual_seed(2))

    assert_equal_to_the_reference(
        rows, columns, **settings_of(below), weights_QN=weights if is_weighted else None
    )


@pytest.mark.parametrize("below", ["detach", "replace"])
def test_chunks_give_the_same_as_one_piece(below, monkeypatch):
    rows, columns = unit(4, 23, 6, seed=0), unit(2, 7, 6, seed=1)

    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", 2 * 7 * 5)

    assert_equal_to_the_reference(rows, columns, **settings_of(below))


def test_strided_tokens_equal_contiguous_ones():
    rows, columns = unit(4, 6, 9, seed=0).mT, unit(2, 14, 6, seed=1)[:, ::2]

    assert_equal_to_the_reference(rows, columns, **settings_of("detach"))


@pytest.mark.parametrize("below", ["detach", "replace"])
def test_shared_columns_equal_repeated_columns(below):
    rows, columns = unit(4, 5, 6, seed=0), unit(2, 7, 6, seed=1)

    shared = mean_logsumexp(rows, columns, **settings_of(below))
    repeated = mean_logsumexp(rows, columns.repeat_interleave(2, dim=0), **settings_of(below))

    torch.testing.assert_close(shared, repeated)


def test_levels_may_be_tensors_and_pass_no_gradient():
    rows, columns = unit(4, 5, 6, seed=0).requires_grad_(), unit(2, 7, 6, seed=1)
    level = torch.tensor(0.1, requires_grad=True)
    settings = settings_of("replace") | {"threshold": level, "replacement": level + 0.2}

    result = mean_logsumexp(rows, columns, **settings)

    torch.testing.assert_close(result, mean_logsumexp(rows, columns, **settings_of("replace")))
    assert torch.autograd.grad(result, level, allow_unused=True) == (None,)


def test_a_row_of_weight_zero_does_not_count_whatever_it_holds():
    rows, columns = unit(1, 3, 4, seed=0), unit(1, 7, 4, seed=1)
    kept = rows[:, :2].clone().requires_grad_()
    rows[:, 2] = torch.nan
    rows.requires_grad_()
    weights = torch.tensor([[0.5, 0.5, 0.0]])

    result = mean_logsumexp(rows, columns, **settings_of("detach"), weights_QN=weights)
    expected = mean_logsumexp(kept, columns, **settings_of("detach"))
    result.backward()
    expected.backward()

    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(rows.grad[:, :2], kept.grad)
    assert not rows.grad[:, 2].any()


@pytest.mark.parametrize("below", ["replace", "detach"])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_gradcheck(below, is_weighted):
    rows = unit(2, 3, 4, seed=0, dtype=torch.float64).requires_grad_()
    columns = unit(2, 5, 4, seed=1, dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 3, generator=torch.Generator().manual_seed(2)) if is_weighted else None
    # A detached value is no derivative of anything.
    settings = settings_of(below) | ({"threshold": -2.0} if below == "detach" else {})

    assert torch.autograd.gradcheck(
        partial(mean_logsumexp, **settings, weights_QN=weights), (rows, columns)
    )


@pytest.mark.parametrize(
    ("chunk_elements", "of_rows", "of_columns"),
    [(30, [1, 30, 0, 0], [1, 30, 0, 0]), (29, [1, 0, 24, 0], [1, 0, 0, 40])],
)
def test_what_nobody_wants_is_not_made(chunk_elements, of_rows, of_columns, monkeypatch):
    """A table of 2 * 3 * 5 is kept when it fits in a chunk; else gradients are made at once."""
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", chunk_elements)
    rows, columns = unit(2, 3, 4, seed=0), unit(2, 5, 4, seed=1)
    given = rows, columns, torch.full((2, 3), 1 / 6), torch.tensor(0.1), None, 0.2

    for wanted, sizes in (
        ((True, False), of_rows),
        ((False, True), of_columns),
        ((False, False), [1, 0, 0, 0]),
    ):
        made = torch.ops.refinery.mean_logsumexp(*given, *wanted)

        assert [part.numel() for part in made] == sizes


def test_without_gradients_the_value_is_the_same():
    rows, columns = unit(2, 3, 4, seed=0).requires_grad_(), unit(2, 5, 4, seed=1)

    with torch.no_grad():
        value = mean_logsumexp(rows, columns, **settings_of("detach"))

    assert not value.requires_grad
    torch.testing.assert_close(value, mean_logsumexp(rows, columns, **settings_of("detach")))


def test_the_gradients_of_a_large_table_are_given_once(monkeypatch):
    rows, columns = unit(2, 3, 4, seed=0).requires_grad_(), unit(2, 5, 4, seed=1)

    small = mean_logsumexp(rows, columns, **settings_of("detach"))
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", 1)
    large = mean_logsumexp(rows, columns, **settings_of("detach"))

    first, again = (torch.autograd.grad(small, rows, retain_graph=True) for _ in range(2))
    assert torch.equal(*first, *again)
    torch.autograd.grad(large, rows, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(large, rows)


@pytest.mark.parametrize("chunk_elements", [1 << 22, 1])
def test_a_second_derivative_is_refused(chunk_elements, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", chunk_elements)
    rows, columns = unit(1, 3, 4, seed=0).requires_grad_(), unit(1, 5, 4, seed=1)

    result = mean_logsumexp(rows, columns, **settings_of("detach"))
    (gradient,) = torch.autograd.grad(result**2, rows, create_graph=True)

    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_sixteen_bit_tokens_are_summed_in_float32_under_autocast():
    rows, columns = (
        unit(2, 5, 4, seed=0).bfloat16().requires_grad_(),
        unit(2, 7, 4, seed=1).half().requires_grad_(),
    )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = mean_logsumexp(rows, columns, **settings_of("detach"))
    result.backward()

    assert result.dtype == torch.float32
    exact = value_and_gradients(
        mean_logsumexp, rows.double(), columns.double(), **settings_of("detach")
    )
    torch.testing.assert_close(result.double(), exact[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.grad, exact[1].bfloat16() / 3)
    torch.testing.assert_close(columns.grad, (exact[2] / 3).half())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the check's own copies
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("replacement", [None, 0.3])
@pytest.mark.parametrize(("chunk_elements", "channels"), KEPT_AND_CHUNKED)
def test_opcheck(wanted, replacement, chunk_elements, channels, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", chunk_elements)
    inputs = unit(4, channels, 6, seed=0).mT, unit(2, 14, channels, seed=1)[:, ::2]
    inputs = [
        tensor.requires_grad_(is_wanted) for tensor, is_wanted in zip(inputs, wanted, strict=True)
    ]
    levels = [torch.tensor(0.1), None if replacement is None else torch.tensor(replacement)]

    torch.library.opcheck(
        torch.ops.refinery.mean_logsumexp,
        (*inputs, torch.full((4, 6), 1 / 24), *levels, 0.2, *wanted),
    )


@pytest.mark.parametrize("below", ["detach", "replace"])
@pytest.mark.parametrize(("chunk_elements", "channels"), KEPT_AND_CHUNKED)
def test_it_compiles_in_one_graph_with_its_backward(below, chunk_elements, channels, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", chunk_elements)
    rows, columns = unit(4, 5, channels, seed=0), unit(2, 7, channels, seed=1)
    weights = torch.rand(4, 5, generator=torch.Generator().manual_seed(2))
    compiled = torch.compile(mean_logsumexp, fullgraph=True, backend="aot_eager")

    for weights_QN in (None, weights):
        settings = settings_of(below) | {"weights_QN": weights_QN}
        results = value_and_gradients(compiled, rows, columns, **settings)

        expected = value_and_gradients(mean_logsumexp, rows, columns, **settings)
        for result, eager in zip(results, expected, strict=True):
            torch.testing.assert_close(result, eager)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replacement": 0.3}, "does not go with"),
        ({"below": "replace"}, "does not go with"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"weights_QN": torch.ones(3)}, r"weights of shape \(3,\)"),
        ({"rows_QNC": torch.ones(1, 0, 3)}, "no mean over no rows"),
        ({"rows_QNC": torch.ones(2, 4, 5)}, "5 channels and of 3"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    given = {"rows_QNC": unit(1, 2, 3, seed=0), "columns_GMC": unit(1, 2, 3, seed=1)}
    given |= {"temperature": 0.2, "threshold": 0.1, "below": "detach"} | changes

    with pytest.raises(ValueError, match=message):
        mean_logsumexp(given.pop("rows_QNC"), given.pop("columns_GMC"), **given)


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="'keep' is unknown; use one of detach, replace"):
        mean_logsumexp(
            unit(1, 2, 3, seed=0),
            unit(1, 2, 3, seed=1),
            temperature=0.2,
            threshold=0.1,
            below="keep",
        )


def test_a_threshold_is_one_number():
    with pytest.raises(ValueError, match="one number is wanted"):
        mean_logsumexp(
            unit(1, 2, 3, seed=0),
            unit(1, 2, 3, seed=1),
            temperature=0.2,
            threshold=torch.zeros(3),
            below="detach",
        )
