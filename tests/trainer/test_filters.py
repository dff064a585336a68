"""The filters against the authors' values and, one by one, at their edges."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.filters import (
    attention_hijack,
    below_threshold,
    crop_inflow,
    max_cosine_scores,
    register_guided,
    sample_candidates,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def test_similarity_path_equals_the_authors():
    golden = load_file(GOLDEN / "fp_gp.safetensors")

    scores = max_cosine_scores(golden["tokens"], golden["comparison"])

    torch.testing.assert_close(scores, golden["max_cosine"], rtol=1e-5, atol=1e-5)
    by_cosine = below_threshold(scores, criterion="cosine", threshold=0.5)
    by_zscore = below_threshold(scores, criterion="zscore", threshold=0.5)
    assert torch.equal(by_cosine, golden["clean_cosine"])
    assert torch.equal(by_zscore, golden["clean_zscore"])


def test_register_guided_equals_the_authors():
    golden = load_file(GOLDEN / "register_guided.safetensors")

    clean = register_guided(golden["tokens"], golden["registers"], threshold=0.55)

    assert torch.equal(clean, golden["clean"])


def golden_flow(**rejected):
    """Inflow of the golden composites; their q and k have the heads joined: one head of all."""
    golden = load_file(GOLDEN / "attention_hijack.safetensors")
    taps = [(golden[f"q{layer}"][:, None], golden[f"k{layer}"][:, None]) for layer in (2, 3, 4)]
    crop_index = golden["crop_mask"][0].nonzero().flatten()
    return golden, crop_inflow(taps, crop_index, variant="release", **rejected)


def test_attention_flow_path_equals_the_authors():
    rejected = load_file(GOLDEN / "attention_hijack.safetensors")["rejected"]

    golden, inflow = golden_flow(rejected_QN=rejected)

    torch.testing.assert_close(inflow, golden["inflow"], rtol=1e-5, atol=1e-5)
    clean = attention_hijack(inflow, ~rejected, threshold=-0.5)
    assert torch.equal(clean, golden["clean"])


def test_attention_flow_path_without_earlier_filters_equals_the_authors():
    golden, inflow = golden_flow()

    clean = attention_hijack(inflow, torch.ones_like(golden["clean"]), threshold=-0.5)

    assert torch.equal(clean, golden["clean_no_rejected"])


def test_inflow_counts_only_the_tokens_of_the_crop():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 9, 4, generator=generator)
    crop_index = torch.tensor([1, 4, 5, 8])
    rest = torch.tensor([0, 2, 3, 6, 7])

    for variant in ("paper", "release"):
        inflow = crop_inflow([(q, k)], crop_index, variant=variant)
        changed = [tensor.index_fill(2, rest, 7.0) for tensor in (q, k)]
        assert torch.equal(crop_inflow([tuple(changed)], crop_index, variant=variant), inflow)


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_inflow_is_the_mean_over_layers(variant):
    taps = torch.randn(3, 2, 2, 2, 9, 4, generator=torch.Generator().manual_seed(0)).unbind()
    crop_index = torch.tensor([1, 4, 5, 8])

    inflow = crop_inflow(taps, crop_index, variant=variant)

    alone = [crop_inflow([layer], crop_index, variant=variant) for layer in taps]
    torch.testing.assert_close(inflow, torch.stack(alone).mean(dim=0))


def test_inflow_of_no_layer_is_refused():
    with pytest.raises(ValueError, match="no layer was tapped"):
        crop_inflow([], torch.arange(3), variant="paper")


def test_hijack_statistics_cover_only_kept_tokens_of_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    inflow = torch.rand(3, 50, generator=generator)
    kept = torch.rand(3, 50, generator=generator) < 0.5
    wild = torch.where(kept, inflow, 1e6)

    clean = attention_hijack(wild, kept, threshold=-0.5)

    floor = inflow[kept].mean() - 0.5 * inflow[kept].std()
    assert torch.equal(clean, kept & (inflow > floor))


@pytest.mark.parametrize("num_kept", [0, 1])
def test_too_few_tokens_for_statistics_stay_as_they_were(num_kept):
    kept = torch.zeros(2, 4, dtype=torch.bool)
    kept[0, :num_kept] = True

    clean = attention_hijack(torch.rand(2, 4), kept, threshold=-0.5)

    assert torch.equal(clean, kept)


def test_one_reference_serves_all_crops_and_registers_of_an_image_all_of_its_crops():
    generator = torch.Generator().manual_seed(0)
    tokens, reference, detectors = (
        torch.nn.functional.normalize(torch.randn(n, 12, 6, generator=generator), dim=-1)
        for n in (6, 1, 2)
    )

    shared = max_cosine_scores(tokens, reference)
    clean = register_guided(tokens, detectors, threshold=0.5)

    torch.testing.assert_close(shared, max_cosine_scores(tokens, reference.expand(6, -1, -1)))
    repeated = detectors.repeat_interleave(3, dim=0)
    assert torch.equal(clean, register_guided(tokens, repeated, threshold=0.5))


def test_zscore_is_taken_sample_by_sample():
    scores = torch.tensor([[0.1, 0.1, 0.1, 0.5], [0.6, 0.6, 0.6, 1.0]])

    clean = below_threshold(scores, criterion="zscore", threshold=0.5)

    assert clean.tolist() == [[True, True, True, False]] * 2


def test_candidates_come_from_the_tokens_with_the_highest_scores_and_from_each_of_them():
    scores = torch.rand(3, 25, generator=torch.Generator().manual_seed(0))
    draws = torch.rand(3, 400, generator=torch.Generator().manual_seed(1))

    candidates = sample_candidates(scores, draws, share=0.4)

    for row, best in zip(candidates, scores.topk(10).indices, strict=True):
        assert set(row.tolist()) == set(best.tolist())


def test_candidates_are_drawn_evenly():
    # An even grid of draws must give every eligible token the same number of candidates.
    draws = torch.linspace(0, 1, 401)[None, :-1]

    candidates = sample_candidates(torch.arange(10.0)[None], draws, share=0.4)

    assert candidates[0].bincount(minlength=10).tolist() == [0] * 6 + [100] * 4


@pytest.mark.parametrize("share", [0.01, 1.0])
def test_the_largest_draw_is_still_a_token(share):
    largest = torch.tensor([[1.0]]).nextafter(torch.zeros(1, 1))

    candidates = sample_candidates(torch.rand(1, 7), largest, share=share)

    assert 0 <= candidates.item() < 7


def test_the_same_inputs_and_draws_give_the_same_candidates():
    scores, draws = torch.rand(2, 30), torch.rand(2, 8)

    assert torch.equal(sample_candidates(scores, draws), sample_candidates(scores, draws))


def test_filters_of_sixteen_bit_tokens_decide_in_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.nn.functional.normalize(torch.randn(2, 40, 16, generator=generator), dim=-1)
    tokens, comparison = tokens.bfloat16(), tokens.flip(0, 1).bfloat16()
    qk = (torch.randn(2, 2, 40, 8, generator=generator).bfloat16(),) * 2
    index = torch.arange(40)

    def decisions():
        scores = max_cosine_scores(tokens, comparison)
        inflow = crop_inflow([qk], index, variant="paper")
        return (
            scores,
            inflow,
            below_threshold(scores, criterion="zscore", threshold=0.5),
            register_guided(tokens, comparison, threshold=0.5),
            attention_hijack(inflow, torch.ones(2, 40, dtype=torch.bool), threshold=-0.5),
        )

    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = decisions()

    for result, exact in zip(under_autocast, decisions(), strict=True):
        assert torch.equal(result, exact)
    assert under_autocast[0].dtype == under_autocast[1].dtype == torch.float32
