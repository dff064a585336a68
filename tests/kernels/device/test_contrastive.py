"""mean_logsumexp with its kernel against its reference."""

import pytest
import torch

from kernels import contrastive, mean_logsumexp
from kernels.contrastive import mean_logsumexp_reference
from tests.kernels.accuracy import assert_as_exact

# Row sets, their rows, column sets, their columns, channels.
SHAPES = [
    (1, 1, 1, 1, 8),
    (6, 16, 2, 12, 24),
    (2, 33, 1, 257, 40),
    (3, 7, 3, 1029, 16),
    (1, 5, 1, 2100, 16),
]
LEVELS = {"detach": {"threshold": 0.1}, "replace": {"threshold": 0.1, "replacement": 0.2}}


def unit(*shape, seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(*shape, generator=generator) + 0.3
    return torch.nn.functional.normalize(tokens, dim=-1).to(device, dtype)


def value_and_gradients(function, *inputs, **settings):
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    value = function(*inputs, temperature=0.2, **settings)
    return value, *torch.autograd.grad(value, inputs)


def assert_equal_to_the_reference(rows, columns, **settings):
    """Against the reference on the inputs in float32, where they were rounded to 16 bits."""
    value, *gradients = value_and_gradients(mean_logsumexp, rows, columns, **settings)
    single, *single_gradients = value_and_gradients(
        mean_logsumexp_reference, rows.float(), columns.float(), **settings
    )
    if settings.get("weights_QN") is not None:
        settings |= {"weights_QN": settings["weights_QN"].double()}
    exact, *exact_gradients = value_and_gradients(
        mean_logsumexp_reference, rows.double(), columns.double(), **settings
    )
    assert value.dtype == torch.float32
    assert_as_exact(value, single, exact, floor=1e-6)
    for result, one, right in zip(gradients, single_gradients, exact_gradients, strict=True):
        assert result.dtype == rows.dtype
        assert_as_exact(result, one.to(rows.dtype), right, floor=1e-6 * float(right.abs().max()))


@pytest.mark.parametrize("below", LEVELS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients_equal_the_reference(shape, below, device, dtype):
    num_rows, length, num_columns, num_tokens, channels = shape
    rows = unit(num_rows, length, channels, seed=0, device=device, dtype=dtype)
    columns = unit(num_columns, num_tokens, channels, seed=1, device=device, dtype=dtype)

    assert_equal_to_the_reference(rows, columns, below=below, **LEVELS[below])


@pytest.mark.parametrize("below", LEVELS)
def test_chunks_weights_and_levels_on_the_device(below, device, dtype, monkeypatch):
    monkeypatch.setattr(contrastive, "CHUNK_ELEMENTS", 2 * 50 * 7)
    rows = unit(6, 13, 24, seed=0, device=device, dtype=dtype)
    columns = unit(2, 50, 24, seed=1, device=device, dtype=dtype)
    weights = torch.rand(6, 13, generator=torch.Generator().manual_seed(2)).to(device)
    weights[:, ::3] = 0
    levels = {name: torch.tensor(level, device=device) for name, level in LEVELS[below].items()}

    assert_equal_to_the_reference(rows, columns, below=below, weights_QN=weights, **levels)


def test_strided_tokens(device, dtype):
    rows = unit(2, 40, 30, seed=0, device=device, dtype=dtype)[:, 3:37:2, :24]
    columns = unit(1, 24, 30, seed=1, device=device, dtype=dtype).mT

    assert_equal_to_the_reference(rows, columns, below="detach", threshold=0.1)


def test_value_alone(device, dtype):
    rows = unit(2, 40, 30, seed=0, device=device, dtype=dtype)
    columns = unit(1, 300, 30, seed=1, device=device, dtype=dtype)

    value = mean_logsumexp(rows, columns, temperature=0.2, threshold=0.1, below="detach")

    exact = (rows.double() @ columns.double().mT / 0.2).logsumexp(-1).mean()
    assert_as_exact(value, value, exact, floor=1e-6)


def test_a_row_of_weight_zero_does_not_count_whatever_it_holds(device):
    rows = unit(1, 9, 24, seed=0, device=device)
    columns = unit(1, 50, 24, seed=1, device=device)
    weights = torch.full((1, 9), 0.125, device=device)
    rows[0, 8], weights[0, 8] = torch.nan, 0
    settings = {"temperature": 0.2, "threshold": 0.1, "below": "detach"}
    rows.requires_grad_()

    value = mean_logsumexp(rows, columns, **settings, weights_QN=weights)
    (gradient,) = torch.autograd.grad(value, rows)

    torch.testing.assert_close(value, mean_logsumexp(rows[:, :8], columns, **settings))
    assert gradient[0, :8].abs().sum(-1).min() > 0
    assert not gradient[0, 8].any()


def uniformity(rows, columns, level):
    return mean_logsumexp(rows, columns, temperature=0.2, threshold=level, below="detach")


# Registers, whose table is kept for the backward pass; tokens, whose table is made in chunks.
NUM_COLUMNS = [132, 1024]


def training_inputs(num_columns, device, dtype):
    """Tokens and a level that about half of the pairs lie above: both kinds of pairs count."""
    rows = unit(12, 1024, 1152, seed=0, device=device, dtype=dtype).requires_grad_()
    columns = unit(4, num_columns, 1152, seed=1, device=device, dtype=dtype).requires_grad_()
    return rows, columns, torch.tensor(0.08, device=device)


def assert_alike(results, expected):
    """Gradients are small numbers, so the tolerance is a share of the largest; none may be zero."""
    for result, wanted in zip(results, expected, strict=True):
        largest = wanted.abs().max().item()
        assert largest > 0
        torch.testing.assert_close(result, wanted, rtol=1e-2, atol=1e-4 * largest)


@pytest.mark.parametrize("num_columns", NUM_COLUMNS)
def test_it_gives_the_same_bits_every_time(num_columns, cuda):
    rows, columns, level = training_inputs(num_columns, cuda, torch.float32)

    first = value_and_gradients(lambda r, c, **_: uniformity(r, c, level), rows, columns)

    assert all(result.abs().max() > 0 for result in first)
    for _ in range(20):
        again = value_and_gradients(lambda r, c, **_: uniformity(r, c, level), rows, columns)
        assert all(map(torch.equal, again, first))


@pytest.mark.parametrize("num_columns", NUM_COLUMNS)
@pytest.mark.parametrize("form", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_it_with_its_backward(form, num_columns, cuda):
    rows, columns, level = training_inputs(num_columns, cuda, form)

    def step():
        value = uniformity(rows, columns, level)
        return value, *torch.autograd.grad(value, (rows, columns))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    level.fill_(0.06)
    with torch.no_grad():
        rows.copy_(rows.roll(1, dims=-1))
    for result in captured:
        result.detach().zero_()
    graph.replay()

    assert_alike(captured, step())


@pytest.mark.parametrize("num_columns", NUM_COLUMNS)
def test_it_compiles_in_one_graph_with_its_backward(num_columns, cuda):
    rows, columns, level = training_inputs(num_columns, cuda, torch.float32)
    compiled = torch.compile(uniformity, fullgraph=True)

    value = compiled(rows, columns, level)
    gradients = torch.autograd.grad(value, (rows, columns))

    expected = uniformity(rows, columns, level)
    wanted = torch.autograd.grad(expected, (rows, columns))
    assert_alike((value, *gradients), (expected, *wanted))
