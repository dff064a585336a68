"""How much attention each token receives, without keeping the N x N attention.

The kernels are in `kernels._flow_paper_device` and `kernels._flow_release_device`.

Dimension key: B = samples, H = heads, T = all tokens, N = tokens that take part, n = some of them,
D = channels of a head, C = channels of all heads.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels._flow_paper_device import launch_paper_inflow
from kernels._flow_release_device import launch_release_inflow, recut_heads
from kernels.dispatch import on_device_of, unsupported_dtype, unsupported_span, use_triton
from kernels.precision import check_alike, full_precision, wide_dtype, widen

Flow = Literal["paper", "release"]

_MAX_HEAD_DIM = 128  # of the kernels
_CHUNK_NUMBERS = 2**21  # scores that the reference holds; 8 MB was fastest on two CPU cores


@full_precision
@torch.no_grad()
def attention_inflow_reference(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    *,
    variant: Flow,
    index_N: Tensor | None = None,
    rejected_BN: Tensor | None = None,
    lse_BHN: Tensor | None = None,
) -> Tensor:
    """`attention_inflow` in plain PyTorch, a head and a block of queries at a time."""

    def taking_part(tokens_BTx: Tensor) -> Tensor:
        return widen(tokens_BTx if index_N is None else tokens_BTx.index_select(1, index_N))

    if variant == "release":
        q_BNC, k_BNC = (
            F.normalize(taking_part(tensor.transpose(1, 2)).flatten(2), dim=-1)
            for tensor in (q_BHTD, k_BHTD)
        )
        if rejected_BN is not None:
            k_BNC = k_BNC.masked_fill(rejected_BN[..., None], 0)
        return _inflow_of_one_head(q_BNC, k_BNC)

    num_heads, head_dim = q_BHTD.shape[1], q_BHTD.shape[3]
    inflow_BN: Tensor | None = None
    for head in range(num_heads):
        head_BN = _inflow_of_one_head(
            taking_part(q_BHTD[:, head]) * head_dim**-0.5,
            taking_part(k_BHTD[:, head]),
            rejected_BN,
            None if lse_BHN is None else lse_BHN[:, head],
        )
        inflow_BN = head_BN if inflow_BN is None else inflow_BN.add_(head_BN)
    assert inflow_BN is not None
    if rejected_BN is not None:
        inflow_BN.masked_fill_(rejected_BN, 0)
    return inflow_BN.div_(num_heads)


def _inflow_of_one_head(
    q_BNC: Tensor,
    k_BNC: Tensor,
    rejected_BN: Tensor | None = None,
    lse_BN: Tensor | None = None,
) -> Tensor:
    num_samples, num_tokens, _ = q_BNC.shape
    inflow_BN = q_BNC.new_zeros(num_samples, num_tokens)
    chunk = max(1, _CHUNK_NUMBERS // max(1, num_samples * num_tokens))
    for first in range(0, num_tokens, chunk):
        scores_BnN = q_BNC[:, first : first + chunk] @ k_BNC.mT
        if rejected_BN is not None:
            # Not -inf: a sample whose keys are all rejected must not turn into NaN.
            floor = torch.finfo(scores_BnN.dtype).min
            scores_BnN.masked_fill_(rejected_BN[:, None, :], floor)
        if lse_BN is None:
            attention_BnN = scores_BnN.softmax(dim=-1)
        else:
            attention_BnN = scores_BnN.sub_(lse_BN[:, first : first + chunk, None]).exp_()
        inflow_BN += attention_BnN.sum(dim=-2)
    return inflow_BN


@torch.library.custom_op("refinery::attention_inflow", mutates_args=("into",))
def _attention_inflow(
    q: Tensor,
    k: Tensor,
    into: Tensor,
    index: Tensor | None,
    rejected: Tensor | None,
    lse: Tensor | None,
    variant: str,
) -> None:
    if use_triton("attention_inflow", q, unsupported=_unsupported(q, k, variant)):
        if not into.numel():
            return
        index = None if index is None else index.contiguous()
        with on_device_of(q):
            if variant == "release":
                launch_release_inflow(q, k, into, index_N=index, rejected_BN=rejected)
            else:
                launch_paper_inflow(q, k, into, index_N=index, rejected_BN=rejected, lse_BHN=lse)
        return
    flow: Flow = "release" if variant == "release" else "paper"
    into += attention_inflow_reference(
        q, k, variant=flow, index_N=index, rejected_BN=rejected, lse_BHN=lse
    )


def _unsupported(q_BHTD: Tensor, k_BHTD: Tensor, variant: str) -> str | None:
    if unsupported := unsupported_dtype(q_BHTD.dtype) or unsupported_span(q_BHTD, k_BHTD):
        return unsupported
    head_dim = (recut_heads(q_BHTD, k_BHTD)[0] if variant == "release" else q_BHTD).shape[3]
    if head_dim > _MAX_HEAD_DIM:
        return f"heads are {head_dim} channels wide, {_MAX_HEAD_DIM} is the most"
    return None


@torch.no_grad()
def attention_inflow(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    *,
    variant: Flow,
    index_N: Tensor | None = None,
    rejected_BN: Tensor | None = None,
    lse_BHN: Tensor | None = None,
    into_BN: Tensor | None = None,
) -> Tensor:
    """Sum of the attention that each token gets from all tokens: the column sums of the attention.

    A token that gets little of it has no say in the other tokens' values, while being overwritten
    by theirs. The mean of a sample is 1 in either variant when no key is left out.

    Args:
        q_BHTD, k_BHTD: Queries and keys of one layer as projected, before rotary embedding. Of
            any strides: views of a packed projection are read where they lie.
        variant: `paper` is scaled dot-product attention per head, averaged over heads; a rejected
            key gets none of it. `release` joins the heads, scales q and k to unit norm and uses no
            other scale; a rejected key is a vector of zeros, which still takes its share.
        index_N: Positions, int64 and less than T, of the tokens that take part, as queries and as
            keys; default all. The kernels do not check them.
        rejected_BN: True = leave this key out.
        lse_BHN: Natural logarithm of the sum of exp(scaled scores) of every query, as attention
            returns it, for `paper` of all tokens with no key rejected: saves half of the work.
        into_BN: What the inflow is added to, in place; so the layers of a model are summed.

    Returns:
        `inflow_BN`, float32 at least, or `into_BN`. Entries of rejected tokens mean nothing.

    Raises:
        ValueError: shapes or types do not fit, or `lse_BHN` is of other attention than is asked.

    Source: UniRefiner, arXiv:2605.19622, attention-flow path (attention hijackees); `release`: the
    authors' code.
    """
    _check(q_BHTD, k_BHTD, variant, index_N, rejected_BN, lse_BHN, into_BN)
    if into_BN is None:
        num_tokens = q_BHTD.shape[2] if index_N is None else index_N.shape[0]
        shape = (q_BHTD.shape[0], num_tokens)
        into_BN = q_BHTD.new_zeros(shape, dtype=wide_dtype(q_BHTD))
    _attention_inflow(q_BHTD, k_BHTD, into_BN, index_N, rejected_BN, lse_BHN, variant)
    return into_BN


def _check(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    variant: Flow,
    index_N: Tensor | None,
    rejected_BN: Tensor | None,
    lse_BHN: Tensor | None,
    into_BN: Tensor | None,
) -> None:
    if variant not in get_args(Flow):
        raise ValueError(f"there is no flow {variant!r}; use one of {', '.join(get_args(Flow))}")
    if q_BHTD.ndim != 4 or q_BHTD.shape != k_BHTD.shape or q_BHTD.dtype != k_BHTD.dtype:
        raise ValueError(
            f"q {tuple(q_BHTD.shape)} {q_BHTD.dtype} and k {tuple(k_BHTD.shape)} {k_BHTD.dtype} "
            "must both be [samples, heads, tokens, head width] of one type"
        )
    check_alike(q=q_BHTD, k=k_BHTD)
    if index_N is not None and (index_N.ndim != 1 or index_N.dtype != torch.int64):
        raise ValueError(f"index is {index_N.ndim}-D {index_N.dtype}; it must be 1-D int64")
    num_samples, num_heads, num_tokens, _ = q_BHTD.shape
    if index_N is not None:
        num_tokens = index_N.shape[0]
    if rejected_BN is not None and rejected_BN.dtype != torch.bool:
        raise ValueError(f"rejected is {rejected_BN.dtype}; it must be bool")
    if into_BN is not None and into_BN.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the sums to add to are {into_BN.dtype}; they must be float32 at least")
    for name, tensor, shape in (
        ("rejected", rejected_BN, (num_samples, num_tokens)),
        ("into", into_BN, (num_samples, num_tokens)),
        ("lse", lse_BHN, (num_samples, num_heads, num_tokens)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}; {shape} is wanted")
    if lse_BHN is not None and (
        variant != "paper" or index_N is not None or rejected_BN is not None
    ):
        raise ValueError(
            "lse is that of attention among all tokens per head: it serves only the paper flow "
            "without index and rejected keys; leave it out"
        )
