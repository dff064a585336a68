"""Attention that each token receives."""

import pytest
import torch
from torch.nn import functional as F

from kernels import attention_inflow

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
