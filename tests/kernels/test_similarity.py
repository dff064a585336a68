"""The best match of every token."""

import pytest
import torch

from kernels import max_similarity, similarity


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


def test_the_first_key_wins_a_tie():
    best = max_similarity(torch.ones(1, 3, 2), torch.ones(1, 9, 2))

    assert best.indices.tolist() == [[0, 0, 0]]


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


def test_sets_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="3 token sets cannot share 2 sets"):
        max_similarity(tokens(3, 4, 2), tokens(2, 4, 2))
