"""The best match of every token."""

import pytest
import torch
from torch.nn import functional as F

from kernels import max_similarity, similarity
from kernels.similarity import max_similarity_reference


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_sets", [1, 2, 6])
def test_values_and_indices_equal_the_full_table(num_sets):
    queries, keys = tokens(6, 7, 5), tokens(num_sets, 11, 5, seed=1)

    best = max_similarity(queries, keys)

    table = queries @ keys.repeat_interleave(6 // num_sets, dim=0).mT
    torch.testing.assert_close(best.values, table.amax(dim=-1))
    assert torch.equal(best.indices, table.argmax(dim=-1))


def test_chunks_give_the_same_as_one_piece(monkeypatch):
    queries, keys = tokens(2, 23, 5), tokens(2, 11, 5, seed=1)
    whole = max_similarity(queries, keys)

    monkeypatch.setattr(similarity, "CHUNK_ELEMENTS", 2 * 11 * 4)
    chunked = max_similarity(queries, keys)

    torch.testing.assert_close(chunked.values, whole.values)
    assert torch.equal(chunked.indices, whole.indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_normalized_it_gives_cosines_of_tokens_of_any_length(dtype):
    queries, keys = tokens(4, 7, 5) * 300, tokens(2, 11, 5, seed=1) * tokens(2, 11, 1, seed=2)
    queries, keys = queries.to(dtype), keys.to(dtype)

    best = max_similarity(queries, keys, normalize=True)

    wide = torch.promote_types(dtype, torch.float32)
    units = (F.normalize(part.to(wide), dim=-1) for part in (queries, keys))
    expected = max_similarity(*units)
    assert best.values.dtype == wide
    torch.testing.assert_close(best.values, expected.values)
    assert torch.equal(best.indices, expected.indices)


def test_a_token_of_zeros_has_cosine_zero():
    best = max_similarity(torch.zeros(1, 1, 3), tokens(1, 4, 3), normalize=True)

    assert best.values.item() == 0


def test_the_first_key_wins_a_tie():
    best = max_similarity(torch.ones(1, 3, 2), torch.ones(1, 9, 2))

    assert best.indices.tolist() == [[0, 0, 0]]


def test_a_product_that_is_no_number_wins():
    queries = torch.tensor([[[1.0, 0.0], [torch.nan, 1.0], [3e38, 0.0]]])
    keys = torch.tensor([[[0.0, 1.0], [0.5, 0.0], [torch.nan, 0.0]]])

    finite = max_similarity(queries, keys[:, :2])
    broken = max_similarity(queries[:, :1], keys)
    overflowing = max_similarity(queries, keys[:, :2] * 10)

    assert finite.values.isnan().tolist() == [[False, True, False]]
    assert broken.values.isnan().all()
    assert broken.indices.tolist() == [[2]]
    assert overflowing.values.isnan().tolist() == [[False, True, True]]
    assert overflowing.indices[0, 2] == 1


def test_no_gradient_is_recorded():
    best = max_similarity(tokens(1, 3, 2).requires_grad_(), tokens(1, 4, 2).requires_grad_())

    assert not best.values.requires_grad


def test_sixteen_bit_tokens_are_compared_in_float32_under_autocast():
    queries, keys = tokens(1, 20, 8).bfloat16(), tokens(1, 30, 8, seed=1).bfloat16()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        best = max_similarity(queries, keys)

    exact = (queries.double() @ keys.double().mT).max(dim=-1)
    assert torch.equal(best.indices, exact.indices)
    torch.testing.assert_close(best.values.double(), exact.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("formats", "wider"),
    [
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float64, torch.float16), torch.float64),
        ((torch.bfloat16, torch.float16), torch.float32),
    ],
)
def test_of_two_formats_the_narrower_is_widened(formats, wider):
    queries, keys = tokens(1, 20, 8).to(formats[0]), tokens(1, 30, 8, seed=1).to(formats[1])

    best = max_similarity(queries, keys)

    exact = (queries.to(wider) @ keys.to(wider).mT).max(dim=-1)
    torch.testing.assert_close(best.values, exact.values)
    assert torch.equal(best.indices, exact.indices)


def test_without_queries_there_are_no_matches():
    best = max_similarity(tokens(2, 0, 5), tokens(1, 3, 5))

    assert best.values.shape == best.indices.shape == (2, 0)


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        ((3, 4, 2), (2, 4, 2), "3 token sets cannot share 2 sets"),
        ((3, 4, 2), (0, 4, 2), "3 token sets cannot share 0 sets"),
        ((2, 4, 2), (2, 4, 3), "2 channels and of 3"),
        ((2, 4, 2), (2, 0, 2), "is empty"),
        ((4, 2), (2, 4, 2), r"not \(4, 2\) and \(2, 4, 2\)"),
    ],
)
def test_sets_that_do_not_go_together_are_refused(queries, keys, message):
    with pytest.raises(ValueError, match=message):
        max_similarity(torch.ones(queries), torch.ones(keys))


@pytest.mark.parametrize("normalize", [False, True])
def test_opcheck(normalize):
    strided = tokens(3, 9, 5).mT

    torch.library.opcheck(
        torch.ops.refinery.max_similarity, (tokens(2, 7, 4), tokens(1, 5, 4, seed=1), normalize)
    )
    torch.library.opcheck(
        torch.ops.refinery.max_similarity,
        (strided, tokens(1, 6, 9, seed=1)[:, ::2].bfloat16(), normalize),
    )


def test_it_compiles_in_one_graph():
    queries, keys = tokens(4, 7, 5).requires_grad_(), tokens(2, 11, 5, seed=1)
    compiled = torch.compile(max_similarity, fullgraph=True, backend="aot_eager")

    best = compiled(queries, keys, normalize=True)

    expected = max_similarity_reference(queries, keys, normalize=True)
    assert torch.equal(best.values, expected.values)
    assert torch.equal(best.indices, expected.indices)
