"""Attention that each token receives."""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.flex_inflow import attention_inflow_by_flex
from kernels import attention_flow, attention_inflow

VARIANTS = ["paper", "release"]


def heads(seed, dtype=torch.float32):
    return torch.randn(3, 2, 10, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_paper_flow_is_what_scaled_dot_product_attention_spreads():
    q, k = heads(0), heads(1)
    # Attention over one-hot values is the attention matrix itself.
    one_hot = torch.eye(10).expand(3, 2, 10, 10)

    inflow = attention_inflow(q, k, variant="paper")

    attention = F.scaled_dot_product_attention(q, k, one_hot)
    torch.testing.assert_close(inflow, attention.mean(dim=1).sum(dim=1))


def test_paper_flow_equals_attention_that_masks_the_rejected_keys():
    q, k = heads(0), heads(1)
    rejected = torch.rand(3, 10, generator=torch.Generator().manual_seed(2)) < 0.4

    inflow = attention_inflow(q, k, variant="paper", rejected_BN=rejected)

    attention = F.scaled_dot_product_attention(
        q, k, torch.eye(10).expand(3, 2, 10, 10), attn_mask=~rejected[:, None, None, :]
    )
    torch.testing.assert_close(inflow, attention.mean(dim=1).sum(dim=1))
    assert not inflow[rejected].any()


def test_release_flow_joins_the_heads_and_ignores_the_norm_of_q_and_k():
    q, k = heads(0), heads(1)
    as_one_head = [tensor.transpose(1, 2).flatten(2)[:, None] for tensor in (q, k)]

    inflow = attention_inflow(q, k, variant="release")

    torch.testing.assert_close(attention_inflow(*as_one_head, variant="release"), inflow)
    torch.testing.assert_close(attention_inflow(q * 3, k * 0.2, variant="release"), inflow)


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_attention_arrives_somewhere(variant):
    inflow = attention_inflow(heads(0), heads(1), variant=variant)

    torch.testing.assert_close(inflow.mean(dim=-1), torch.ones(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_sample_with_all_keys_rejected_stays_finite(variant):
    rejected = torch.zeros(3, 10, dtype=torch.bool)
    rejected[1] = True

    inflow = attention_inflow(heads(0), heads(1), variant=variant, rejected_BN=rejected)

    assert inflow.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_sixteen_bit_heads_are_computed_in_float32_under_autocast(variant):
    q, k = heads(0, torch.bfloat16), heads(1, torch.bfloat16)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        inflow = attention_inflow(q, k, variant=variant)

    assert inflow.dtype == torch.float32
    exact = attention_inflow(q.double(), k.double(), variant=variant)
    torch.testing.assert_close(inflow.double(), exact, rtol=1e-5, atol=1e-5)


def test_no_gradient_is_recorded():
    inflow = attention_inflow(heads(0).requires_grad_(), heads(1), variant="paper")

    assert not inflow.requires_grad


def rejected_keys(num_tokens=10):
    return torch.rand(3, num_tokens, generator=torch.Generator().manual_seed(2)) < 0.4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rejected", [None, rejected_keys()], ids=["all keys", "some rejected"])
def test_paper_flow_equals_flex_attention_with_the_roles_swapped(rejected):
    q, k = heads(0), heads(1)

    inflow = attention_inflow(q, k, variant="paper", rejected_BN=rejected)

    torch.testing.assert_close(inflow, attention_inflow_by_flex(q, k, rejected_BN=rejected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_of_queries_at_a_time_gives_what_all_at_once_give(variant, monkeypatch):
    q, k = heads(0), heads(1)
    at_once = attention_inflow(q, k, variant=variant, rejected_BN=rejected_keys())

    monkeypatch.setattr(attention_flow, "_CHUNK_NUMBERS", 3 * 10 * 4)  # blocks of 4, 4 and 2
    in_blocks = attention_inflow(q, k, variant=variant, rejected_BN=rejected_keys())

    torch.testing.assert_close(in_blocks, at_once)


def test_log_sum_exp_of_attention_saves_the_first_pass():
    q, k = heads(0), heads(1)
    lse = (q @ k.mT / 2).logsumexp(dim=-1)

    inflow = attention_inflow(q, k, variant="paper", lse_BHN=lse)

    torch.testing.assert_close(inflow, attention_inflow(q, k, variant="paper"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_index_equals_tokens_selected_beforehand(variant):
    q, k = heads(0), heads(1)
    index = torch.tensor([7, 0, 3, 4, 9])
    rejected = rejected_keys(5)

    inflow = attention_inflow(q, k, variant=variant, index_N=index, rejected_BN=rejected)

    selected = attention_inflow(
        q[:, :, index], k[:, :, index], variant=variant, rejected_BN=rejected
    )
    assert torch.equal(inflow, selected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_added_up_in_place(variant):
    first, second = (heads(0), heads(1)), (heads(2), heads(3))
    total = attention_inflow(*first, variant=variant)

    returned = attention_inflow(*second, variant=variant, into_BN=total)

    assert returned is total
    layers = [attention_inflow(*layer, variant=variant) for layer in (first, second)]
    torch.testing.assert_close(total, torch.stack(layers).sum(dim=0))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"variant": "papper"}, "no flow 'papper'"),
        ({"k_BHTD": torch.zeros(3, 2, 9, 4)}, "one type"),
        ({"k_BHTD": torch.zeros(3, 2, 10, 4).half()}, "one type"),
        ({"index_N": torch.tensor([1, 2], dtype=torch.int32)}, "1-D int64"),
        ({"rejected_BN": torch.zeros(3, 10)}, "must be bool"),
        ({"rejected_BN": torch.zeros(3, 9, dtype=torch.bool)}, "rejected is"),
        ({"into_BN": torch.zeros(3, 10).half()}, "float32 at least"),
        ({"into_BN": torch.zeros(10)}, "into is"),
        ({"lse_BHN": torch.zeros(3, 10)}, "lse is"),
        ({"lse_BHN": torch.zeros(3, 2, 10), "variant": "release"}, "leave it out"),
        ({"lse_BHN": torch.zeros(3, 2, 10), "index_N": torch.arange(10)}, "leave it out"),
        ({"lse_BHN": torch.zeros(3, 2, 10), "rejected_BN": rejected_keys()}, "leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(changed, complaint):
    arguments = {"q_BHTD": heads(0), "k_BHTD": heads(1), "variant": "paper"} | changed

    with pytest.raises(ValueError, match=complaint):
        attention_inflow(**arguments)


def packed_heads():
    """q and k as views of one packed projection."""
    generator = torch.Generator().manual_seed(4)
    return torch.randn(3, 10, 3, 2, 4, generator=generator).permute(2, 0, 3, 1, 4)[:2]


OPERATION_CASES = {
    "paper": lambda: (heads(0), heads(1), torch.zeros(3, 10), None, None, None, "paper"),
    "with LSE": lambda: (
        *(heads(0), heads(1), torch.zeros(3, 10)),
        *(None, None, (heads(0) @ heads(1).mT / 2).logsumexp(dim=-1), "paper"),
    ),
    "packed, some tokens": lambda: (
        *(*packed_heads(), torch.zeros(3, 5)),
        *(torch.tensor([7, 0, 3, 4, 9]), rejected_keys(5), None, "paper"),
    ),
    "release": lambda: (
        *(*packed_heads(), torch.zeros(3, 5)),
        *(torch.tensor([7, 0, 3, 4, 9]), rejected_keys(5), None, "release"),
    ),
}


@pytest.mark.parametrize("case", OPERATION_CASES)
def test_the_operation_keeps_the_contract_of_custom_operations(case):
    arguments = OPERATION_CASES[case]()

    torch.library.opcheck(torch.ops.refinery.attention_inflow.default, arguments)


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_added_up_in_one_compiled_graph(variant):
    layers = [(heads(0), heads(1)), (heads(2), heads(3))]
    index = torch.tensor([7, 0, 3, 4, 9])

    def mean_over_layers(layers):
        total = None
        for q, k in layers:
            total = attention_inflow(q, k, variant=variant, index_N=index, into_BN=total)
        return total / len(layers)

    compiled = torch.compile(mean_over_layers, fullgraph=True, backend="aot_eager")

    torch.testing.assert_close(compiled(layers), mean_over_layers(layers))


def test_a_compiled_graph_adds_to_the_tensor_that_it_is_given():
    q, k = heads(0), heads(1)
    total = torch.ones(3, 10)

    compiled = torch.compile(attention_inflow, fullgraph=True, backend="aot_eager")
    compiled(q, k, variant="paper", into_BN=total)

    torch.testing.assert_close(total, 1 + attention_inflow(q, k, variant="paper"))
