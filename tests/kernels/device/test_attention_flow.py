"""The kernels of the attention flows against their reference."""

import pytest
import torch
from torch.nn import functional as F

from kernels import attention_inflow
from kernels.attention_flow import attention_inflow_reference
from tests.kernels.accuracy import assert_as_exact

VARIANTS = ["paper", "release"]
# Sums of a few hundred shares of about 1 in float32.
FLOOR = 1e-5


def packed(device, dtype, *, samples=2, heads=2, tokens=70, head_dim=64, seed=0):
    """q and k as views of one packed projection."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(samples, tokens, 3, heads, head_dim, generator=generator)
    q, k, _ = qkv.to(device, dtype).permute(2, 0, 3, 1, 4)
    return q, k


def separate(device, dtype, **sizes):
    """q and k as a norm of each head leaves them."""
    return tuple(tensor.contiguous() for tensor in packed(device, dtype, **sizes))


def some_rejected(device, samples, tokens):
    generator = torch.Generator().manual_seed(9)
    return (torch.rand(samples, tokens, generator=generator) < 0.3).to(device)


def eager_inflow(q, k, *, variant, index_N=None, rejected_BN=None):
    """By whole attention maps, in the number format of q and k."""
    if index_N is not None:
        q, k = q[:, :, index_N], k[:, :, index_N]
    if variant == "release":
        q, k = (F.normalize(x.transpose(1, 2).flatten(2), dim=-1)[:, None] for x in (q, k))
        if rejected_BN is not None:
            k = k.masked_fill(rejected_BN[:, None, :, None], 0)
        return (q @ k.mT).softmax(dim=-1).sum(dim=-2).mean(dim=1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if rejected_BN is not None:
        scores = scores.masked_fill(rejected_BN[:, None, None, :], torch.finfo(q.dtype).min)
    inflow = scores.softmax(dim=-1).sum(dim=-2).mean(dim=1)
    return inflow if rejected_BN is None else inflow.masked_fill(rejected_BN, 0)


def assert_matches(q, k, **arguments):
    inflow = attention_inflow(q, k, **arguments)

    exact = attention_inflow_reference(q.double(), k.double(), **arguments)
    assert inflow.dtype == torch.float32
    assert_as_exact(inflow, eager_inflow(q, k, **arguments), exact, floor=FLOOR)


@pytest.mark.parametrize("variant", VARIANTS)
def test_index_and_mask_may_lie_apart_in_memory(device, variant):
    q, k = packed(device, torch.float32)
    index_N = torch.arange(70, device=device)[::2]
    rejected_BN = some_rejected(device, 35, 2).T

    assert not index_N.is_contiguous()
    assert not rejected_BN.is_contiguous()
    assert_matches(q, k, variant=variant, index_N=index_N, rejected_BN=rejected_BN)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("make", "head_dim"),
    [(packed, 64), (packed, 72), (separate, 72), (separate, 88), (separate, 128)],
)
def test_inflow_of_the_head_widths_of_real_models(device, dtype, variant, make, head_dim):
    q, k = make(device, dtype, head_dim=head_dim)

    assert_matches(q, k, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens", [1, 63, 133])
def test_inflow_of_any_number_of_tokens(device, dtype, variant, tokens):
    q, k = packed(device, dtype, tokens=tokens, samples=1)

    assert_matches(q, k, variant=variant)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head_dim", [20, 72])
def test_inflow_among_some_tokens_with_some_keys_rejected(device, dtype, variant, head_dim):
    q, k = packed(device, dtype, tokens=190, samples=1, heads=4, head_dim=head_dim)
    index = torch.randperm(190, generator=torch.Generator().manual_seed(3))[:141].to(device)
    rejected = some_rejected(device, 1, 141)

    assert_matches(q, k, variant=variant, index_N=index, rejected_BN=rejected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_that_take_no_part_are_not_looked_at(device, dtype, variant):
    q, k = packed(device, dtype, samples=1)
    index = torch.arange(3, 60, device=device)
    without = attention_inflow(q, k, variant=variant, index_N=index)

    for tensor in (q, k):
        tensor[:, :, :3] = torch.nan
        tensor[:, :, 60:] = torch.nan

    assert torch.equal(attention_inflow(q, k, variant=variant, index_N=index), without)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_with_all_keys_rejected_stays_finite(device, dtype, variant):
    q, k = packed(device, dtype)
    rejected = torch.zeros(2, 70, dtype=torch.bool, device=device)
    rejected[1] = True

    inflow = attention_inflow(q, k, variant=variant, rejected_BN=rejected)

    assert inflow.isfinite().all()
    rest = attention_inflow(q[:1], k[:1], variant=variant)
    torch.testing.assert_close(inflow[:1], rest, rtol=1e-5, atol=1e-5)


def test_whole_blocks_of_keys_may_be_rejected(device, dtype):
    q, k = packed(device, dtype, tokens=300)
    rejected = torch.zeros(2, 300, dtype=torch.bool, device=device)
    rejected[:, :200] = True

    assert_matches(q, k, variant="paper", rejected_BN=rejected)


def test_large_scores_do_not_overflow(device, dtype):
    q, k = packed(device, dtype)

    inflow = attention_inflow(q * 5, k * 5, variant="paper")  # exp(88) is the most in float32

    exact = attention_inflow_reference((q * 5).double(), (k * 5).double(), variant="paper")
    torch.testing.assert_close(inflow.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head_dim", [64, 72])
def test_log_sum_exp_of_attention_saves_the_first_pass(device, dtype, head_dim):
    q, k = packed(device, dtype, head_dim=head_dim)
    lse = (q.double() @ k.double().mT * head_dim**-0.5).logsumexp(dim=-1).float()

    given = attention_inflow(q, k, variant="paper", lse_BHN=lse)
    of_any_strides = attention_inflow(
        q, k, variant="paper", lse_BHN=lse.transpose(0, 2).contiguous().transpose(0, 2)
    )

    computed = attention_inflow(q, k, variant="paper")
    torch.testing.assert_close(given, computed, rtol=1e-5, atol=1e-5)
    assert torch.equal(of_any_strides, given)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_added_up_in_place(device, dtype, variant):
    layers = [packed(device, dtype, seed=seed) for seed in range(2)]
    total = attention_inflow(*layers[0], variant=variant)

    returned = attention_inflow(*layers[1], variant=variant, into_BN=total)

    assert returned is total
    alone = [attention_inflow(*layer, variant=variant) for layer in layers]
    torch.testing.assert_close(total, alone[0] + alone[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_channels_that_do_not_lie_together_are_read_where_they_are(device, dtype, variant):
    q, k = packed(device, dtype, head_dim=40)
    spread = [torch.stack([x, torch.full_like(x, torch.nan)], dim=-1)[..., 0] for x in (q, k)]

    assert_matches(*spread, variant=variant)


def test_one_head_of_all_channels_serves_the_release_flow(device, dtype):
    q, k = packed(device, dtype, samples=1, heads=1, head_dim=192)

    assert_matches(q, k, variant="release")


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_comes_of_no_samples(device, variant):
    q, k = packed(device, torch.float32, samples=0)

    assert attention_inflow(q, k, variant=variant).shape == (0, 70)


@pytest.mark.parametrize("variant", VARIANTS)
def test_repeats_are_equal_to_the_bit(cuda, dtype, variant):
    q, k = packed(cuda, dtype, samples=6, heads=16, tokens=1444, head_dim=72)
    arguments = {
        "variant": variant,
        "index_N": torch.arange(200, 1229, device=cuda),
        "rejected_BN": some_rejected(cuda, 6, 1029),
    }
    first = attention_inflow(q, k, **arguments)

    for _ in range(20):
        assert torch.equal(attention_inflow(q, k, **arguments), first)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_graph_gives_what_a_launch_gives(cuda, dtype, variant):
    q, k = packed(cuda, dtype, heads=16, tokens=576)
    rejected = some_rejected(cuda, 2, 576)

    def run():
        return attention_inflow(q, k, variant=variant, rejected_BN=rejected)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()

    for tensor in (q, k):
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()

    assert torch.equal(captured, run())


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_added_up_in_one_compiled_graph(cuda, dtype, variant):
    layers = [packed(cuda, dtype, seed=seed) for seed in range(2)]
    index = torch.arange(5, 60, device=cuda)

    def mean_over_layers(layers):
        total = None
        for q, k in layers:
            total = attention_inflow(q, k, variant=variant, index_N=index, into_BN=total)
        return total / len(layers)

    compiled = torch.compile(mean_over_layers, fullgraph=True)

    torch.testing.assert_close(compiled(layers), mean_over_layers(layers))


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_attention_map_is_kept(cuda, variant):
    q, k = packed(cuda, torch.bfloat16, heads=16, tokens=4096)
    attention_inflow(q, k, variant=variant)  # compiles
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    attention_inflow(q, k, variant=variant)

    # One map of one head alone would be 32 MiB in float16.
    assert torch.cuda.max_memory_allocated() - before < 4 * 2**20
