"""max_similarity's kernel against its reference."""

import pytest
import torch

from kernels import BestMatch, max_similarity, similarity
from kernels.similarity import max_similarity_reference
from tests.kernels.accuracy import assert_as_exact

# Query sets, their tokens, key sets, their tokens, channels.
SHAPES = [
    (2, 1, 2, 1, 16),
    (3, 130, 1, 300, 72),
    (4, 70, 2, 260, 96),
    (1, 257, 1, 129, 200),
]


def unit(*shape, seed, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)
    return tokens.to(device, dtype)


def small_integers(*shape, seed, device, dtype):
    """Products of these are exact in every format, and many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).to(device, dtype)


def assert_best(best: BestMatch, queries, keys, *, normalize=False):
    """As exact as the reference; a key within rounding of the best may win."""
    reference = max_similarity_reference(queries, keys, normalize=normalize)
    wide = queries.double(), keys.double()
    if normalize:
        wide = tuple(torch.nn.functional.normalize(part, dim=-1) for part in wide)
    products = wide[0] @ wide[1].repeat_interleave(len(queries) // len(keys), dim=0).mT
    # Matrix units round sums of 16 bit products a little less well than float32 does.
    assert_as_exact(best.values, reference.values, products.amax(dim=-1), floor=1e-5)
    chosen = products.gather(-1, best.indices[..., None])[..., 0]
    torch.testing.assert_close(chosen, products.amax(dim=-1), rtol=0, atol=2e-5)
    assert best.indices.dtype == torch.int64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_indices_equal_the_reference(shape, device, dtype):
    num_queries, length, num_keys, num_tokens, channels = shape
    queries = unit(num_queries, length, channels, seed=0, device=device, dtype=dtype)
    keys = unit(num_keys, num_tokens, channels, seed=1, device=device, dtype=dtype)

    best = max_similarity(queries, keys)

    assert_best(best, queries, keys)


@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_the_first_key_wins_however_the_keys_are_split(num_sms, device, dtype, monkeypatch):
    settings = similarity.tiles
    monkeypatch.setattr(
        similarity, "tiles", lambda *a, **k: settings(*a, **k) | {"num_sms": num_sms}
    )
    queries = small_integers(2, 90, 8, seed=0, device=device, dtype=dtype)
    keys = small_integers(2, 600, 8, seed=1, device=device, dtype=dtype)

    best = max_similarity(queries, keys)

    expected = max_similarity_reference(queries, keys)
    assert torch.equal(best.values, expected.values)
    assert torch.equal(best.indices, expected.indices)


def test_cosines_of_tokens_of_any_length(device, dtype):
    queries = unit(2, 140, 72, seed=0, device=device, dtype=dtype) * 30
    lengths = torch.rand(1, 200, 1, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    keys = unit(1, 200, 72, seed=1, device=device, dtype=dtype) * lengths
    queries[0, 0] = 0

    best = max_similarity(queries, keys, normalize=True)

    assert_best(best, queries, keys, normalize=True)
    assert best.values[0, 0] == 0


def test_strided_tokens(device, dtype):
    queries = unit(2, 300, 100, seed=0, device=device, dtype=dtype)[:, 5:150:2, :72]
    keys = unit(1, 72, 140, seed=1, device=device, dtype=dtype).mT

    best = max_similarity(queries, keys)

    assert_best(best, queries, keys)


def test_of_two_formats_the_narrower_is_widened(device):
    queries = unit(1, 20, 72, seed=0, device=device, dtype=torch.float16)
    keys = unit(1, 30, 72, seed=1, device=device)

    best = max_similarity(queries, keys)

    assert_best(best, queries, keys)


def test_products_that_are_no_numbers_win(device, dtype):
    queries = small_integers(1, 20, 8, seed=0, device=device, dtype=dtype)
    keys = small_integers(1, 300, 8, seed=1, device=device, dtype=dtype)
    queries[0, 3], queries[0, 7] = torch.nan, 1
    poisoned = keys.clone()
    poisoned[0, 200, 0] = torch.nan

    best = max_similarity(queries, keys)
    broken = max_similarity(queries, poisoned)

    expected = max_similarity_reference(queries, keys)
    assert torch.equal(best.values.isnan(), expected.values.isnan())
    assert torch.equal(best.indices, expected.indices)
    assert broken.values.isnan().all()
    assert broken.indices[0, 7] == 200


def test_nothing_of_the_rim_of_the_tiles_is_taken(device, dtype):
    """Every product is negative, so a padded key of zeros would win."""
    queries = unit(1, 3, 16, seed=0, device=device, dtype=dtype).abs()
    keys = -unit(1, 5, 16, seed=1, device=device, dtype=dtype).abs()

    best = max_similarity(queries, keys)

    assert_best(best, queries, keys)


def test_it_gives_the_same_bits_every_time(cuda):
    queries = unit(12, 1024, 1152, seed=0, device=cuda, dtype=torch.bfloat16)
    keys = unit(4, 1024, 1152, seed=1, device=cuda, dtype=torch.bfloat16)

    first = max_similarity(queries, keys)

    assert_best(first, queries, keys)
    for _ in range(20):
        again = max_similarity(queries, keys)
        assert torch.equal(again.values, first.values)
        assert torch.equal(again.indices, first.indices)


@pytest.mark.parametrize("normalize", [False, True])
def test_a_captured_graph_replays_it(normalize, cuda):
    queries = unit(3, 196, 768, seed=0, device=cuda, dtype=torch.bfloat16)
    keys = unit(1, 1029, 768, seed=1, device=cuda, dtype=torch.bfloat16)
    max_similarity(queries, keys, normalize=normalize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = max_similarity(queries, keys, normalize=normalize)

    queries.copy_(unit(3, 196, 768, seed=2, device=cuda, dtype=torch.bfloat16))
    graph.replay()

    eager = max_similarity(queries, keys, normalize=normalize)
    assert torch.equal(captured.values, eager.values)
    assert torch.equal(captured.indices, eager.indices)


def test_it_compiles_in_one_graph(cuda):
    queries = unit(3, 196, 768, seed=0, device=cuda, dtype=torch.bfloat16)
    keys = unit(1, 1029, 768, seed=1, device=cuda, dtype=torch.bfloat16)

    best = torch.compile(max_similarity, fullgraph=True)(queries, keys, normalize=True)

    eager = max_similarity(queries, keys, normalize=True)
    assert torch.equal(best.values, eager.values)
    assert torch.equal(best.indices, eager.indices)
