"""The denominator of a contrastive loss: logsumexp over similarities, with a floor.

A large table of similarities is made in chunks of rows. While a chunk is there, its gradient is
taken too, so that neither the forward nor the backward pass ever holds the whole table. A small
one is kept for the backward pass, which is then as cheap as any.

Dimension key: Q = row sets, G = column sets (Q = G * sets that share one), N = rows of a set,
M = columns of a set, C = channels, X = rows that share a column set (Q / G * N), x = rows of a
chunk.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels._contrastive_device import floored_logsumexp, launch_floored_logsumexp
from kernels.dispatch import on_device_of, unsupported_dtype, use_triton
from kernels.precision import full_precision, wide_dtype
from kernels.similarity import check_sets, group_by_image

Below = Literal["detach", "replace"]

# Similarities held at a time: 16 MiB of float32, which stays in the cache of a large GPU (estimate)
# and fills it with work.
CHUNK_ELEMENTS = 1 << 22


def mean_logsumexp(
    rows_QNC: Tensor,
    columns_GMC: Tensor,
    *,
    temperature: float,
    threshold: float | Tensor,
    below: Below,
    replacement: float | Tensor | None = None,
    weights_QN: Tensor | None = None,
) -> Tensor:
    """Mean over rows i of `logsumexp_j(a_ij / temperature)`, a_ij = dot product of row i, column j.

    Pairs that are already dissimilar (`a_ij < threshold`) must not be pushed further apart, so
    they pass no gradient: `below="detach"` keeps their value, `below="replace"` puts the constant
    `replacement` in its place. Differentiable in rows and columns, without second derivatives.
    Gradients of a large table are made along with the value, where they are wanted, and scaled in
    place by the backward pass, which PyTorch then refuses to run again (`retain_graph`).

    Args:
        rows_QNC: Unit norm; computed in float32 at least.
        columns_GMC: Unit norm; G divides Q, neighbouring row sets share a column set.
        temperature: Divides every similarity; above 0.
        threshold: A similarity, before the temperature; a number, or a tensor of one.
        below: What becomes of the pairs below the threshold.
        replacement: A similarity, before the temperature; for `below="replace"` alone.
        weights_QN: Weight of each row in the mean, which is a sum if they do not sum to 1. Rows of
            weight 0 do not count. All alike by default.

    Returns:
        A scalar, float32 at least.

    Raises:
        ValueError: shapes that do not go together, or no rows; a replacement without its mode, or
            the reverse; a temperature that is not above 0.

    Source: the uniformity terms of L_regu, L_uni and L_spu of UniRefiner, arXiv:2605.19622.
    """
    check_sets(rows_QNC, columns_GMC)
    if below not in get_args(Below):
        raise ValueError(f"below={below!r} is unknown; use one of {', '.join(get_args(Below))}")
    if (replacement is not None) != (below == "replace"):
        raise ValueError(f"replacement={replacement} does not go with below={below!r}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it divides, and must be above 0")
    shape = rows_QNC.shape[:2]
    if shape.numel() == 0:
        raise ValueError(f"there is no mean over no rows: {tuple(rows_QNC.shape)}")
    dtype = wide_dtype(rows_QNC, columns_GMC)
    if weights_QN is None:
        weights_QN = rows_QNC.new_full(shape, 1 / shape.numel(), dtype=dtype)
    elif weights_QN.shape != shape:
        raise ValueError(f"weights of shape {tuple(weights_QN.shape)} for rows {tuple(shape)}")
    takes_gradients = torch.is_grad_enabled()
    total: Tensor = _mean_logsumexp(
        rows_QNC,
        columns_GMC,
        weights_QN.detach().to(dtype),
        _scalar(threshold, rows_QNC, dtype),
        None if replacement is None else _scalar(replacement, rows_QNC, dtype),
        temperature,
        takes_gradients and rows_QNC.requires_grad,
        takes_gradients and columns_GMC.requires_grad,
    )[0]
    return total


@full_precision
def mean_logsumexp_reference(
    rows_QNC: Tensor,
    columns_GMC: Tensor,
    *,
    temperature: float,
    threshold: float | Tensor,
    below: Below,
    replacement: float | Tensor | None = None,
    weights_QN: Tensor | None = None,
) -> Tensor:
    """The same by plain PyTorch and autograd, with the whole table of similarities."""
    dtype = wide_dtype(rows_QNC, columns_GMC)
    rows_GXC = group_by_image(rows_QNC.to(dtype), columns_GMC.shape[0])
    similarity_GXM = rows_GXC @ columns_GMC.to(dtype).mT
    constant = similarity_GXM.detach()
    is_below_GXM = constant < threshold
    if below == "replace" and replacement is not None:
        constant = constant.new_zeros(()) + replacement
    floored_GXM = torch.where(is_below_GXM, constant, similarity_GXM)
    logsumexp_QN = (floored_GXM / temperature).logsumexp(dim=-1).view(rows_QNC.shape[:2])
    if weights_QN is None:
        return logsumexp_QN.mean()
    return (weights_QN * logsumexp_QN).where(weights_QN != 0, 0).sum()


@full_precision
def _by_chunks(
    rows_QNC: Tensor,
    columns_GMC: Tensor,
    weights_QN: Tensor,
    threshold: Tensor,
    replacement: Tensor | None,
    *,
    temperature: float,
    wants_rows: bool,
    wants_columns: bool,
    by_kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted sum, and what its gradients are made of, empty where they are not wanted.

    That is the table of coefficients `[G, X, M]` where it is kept; else the gradients themselves,
    those of the rows (`[G, X, C]`) and of the columns (`[G, M, C]`).
    """
    num_groups, num_columns, _ = columns_GMC.shape
    finish_chunk = launch_floored_logsumexp if by_kernel else floored_logsumexp
    dtype = weights_QN.dtype
    rows_GXC = group_by_image(rows_QNC, num_groups)
    columns_GMC = columns_GMC.to(dtype)
    weights_GX = weights_QN.reshape(num_groups, -1)
    num_rows = rows_GXC.shape[1]
    keeps_table = _is_small(rows_QNC, columns_GMC)
    size = num_rows if keeps_table else max(1, CHUNK_ELEMENTS // (num_groups * num_columns))
    logsumexp_GX = torch.empty_like(weights_GX)
    table = weights_QN.new_empty(0)
    grad_rows = weights_QN.new_empty(rows_GXC.shape if wants_rows and not keeps_table else 0)
    grad_columns = weights_QN.new_empty(
        columns_GMC.shape if wants_columns and not keeps_table else 0
    )

    def do_chunk(chunk: slice) -> Tensor:
        """In a function, so that a chunk is gone before the next one comes."""
        rows_GxC = rows_GXC[:, chunk].to(dtype)
        similarity_GxM = rows_GxC @ columns_GMC.mT
        logsumexp_GX[:, chunk] = finish_chunk(
            similarity_GxM,
            weights_GX[:, chunk],
            threshold,
            replacement,
            temperature=temperature,
            wants_gradient=wants_rows or wants_columns,
        )
        if grad_rows.numel():
            torch.bmm(similarity_GxM, columns_GMC, out=grad_rows[:, chunk])
        if grad_columns.numel():
            beta = 0 if chunk.start == 0 else 1
            grad_columns.baddbmm_(similarity_GxM.mT, rows_GxC, beta=beta)
        return similarity_GxM

    if keeps_table and (wants_rows or wants_columns):
        table = do_chunk(slice(0, num_rows))
    else:
        for start in range(0, num_rows, size):
            do_chunk(slice(start, min(start + size, num_rows)))
    total = (weights_GX * logsumexp_GX).where(weights_GX != 0, 0).sum()
    return total, table, grad_rows, grad_columns


def _is_small(rows_QNC: Tensor, columns_GMC: Tensor) -> bool:
    """Whether the table of similarities is no more than a chunk, or than a quarter of the rows."""
    (num_sets, length, channels), num_columns = rows_QNC.shape, columns_GMC.shape[1]
    return num_sets * length * num_columns <= CHUNK_ELEMENTS or 4 * num_columns <= channels


def _scalar(value: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """On the device, where the kernel reads it: nobody waits for a level computed there."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"a level of shape {tuple(value.shape)} came; one number is wanted")
        return value.detach().to(like.device, dtype).reshape(())
    return like.new_full((), value, dtype=dtype)


@torch.library.custom_op("refinery::mean_logsumexp", mutates_args=())
def _mean_logsumexp(
    rows: Tensor,
    columns: Tensor,
    weights: Tensor,
    threshold: Tensor,
    replacement: Tensor | None,
    temperature: float,
    wants_rows: bool,
    wants_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    unsupported = unsupported_dtype(rows.dtype, columns.dtype, weights.dtype)
    by_kernel = use_triton("mean_logsumexp", rows, unsupported=unsupported)
    with on_device_of(rows):
        return _by_chunks(
            rows,
            columns,
            weights,
            threshold,
            replacement,
            temperature=temperature,
            wants_rows=wants_rows,
            wants_columns=wants_columns,
            by_kernel=by_kernel,
        )


@_mean_logsumexp.register_fake
def _(
    rows: Tensor,
    columns: Tensor,
    weights: Tensor,
    threshold: Tensor,
    replacement: Tensor | None,
    temperature: float,
    wants_rows: bool,
    wants_columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del threshold, replacement, temperature
    num_groups, num_columns, channels = columns.shape
    num_rows = rows.shape[0] // num_groups * rows.shape[1]
    keeps_table = _is_small(rows, columns)

    def empty(*shape: int, is_wanted: bool) -> Tensor:
        return weights.new_empty(shape if is_wanted else 0)

    return (
        weights.new_empty(()),
        empty(
            num_groups,
            num_rows,
            num_columns,
            is_wanted=keeps_table and (wants_rows or wants_columns),
        ),
        empty(num_groups, num_rows, channels, is_wanted=wants_rows and not keeps_table),
        empty(num_groups, num_columns, channels, is_wanted=wants_columns and not keeps_table),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    rows, columns, *_, ctx.wants_rows, ctx.wants_columns = inputs
    _, *made = output
    ctx.keeps_table = _is_small(rows, columns)
    ctx.rows_shape, ctx.dtypes = rows.shape, (rows.dtype, columns.dtype)
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*made, *((rows, columns) if ctx.keeps_table else ()))


@once_differentiable
def _give_gradients(ctx: Any, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grad_rows: Tensor | None = None
    grad_columns: Tensor | None = None
    if grad_total is not None:
        table, made_rows, made_columns, *inputs = ctx.saved_tensors
        if ctx.keeps_table:
            rows, columns = inputs
            made_rows, made_columns = _gradients_of_table(
                table, grad_total, rows, columns, ctx.wants_rows, ctx.wants_columns
            )
        else:
            made_rows = _scaled(made_rows, grad_total)
            made_columns = _scaled(made_columns, grad_total)
        if ctx.wants_rows:
            grad_rows = made_rows.view(ctx.rows_shape).to(ctx.dtypes[0])
        if ctx.wants_columns:
            grad_columns = made_columns.to(ctx.dtypes[1])
    return grad_rows, grad_columns, None, None, None, None, None, None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """In place: a copy would double the memory. A compiler that traces plans memory itself."""
    return gradient.mul_(scale) if type(gradient) is Tensor else gradient * scale


@full_precision
def _gradients_of_table(
    table_GXM: Tensor,
    grad_total: Tensor,
    rows_QNC: Tensor,
    columns_GMC: Tensor,
    wants_rows: bool,
    wants_columns: bool,
) -> tuple[Tensor | None, Tensor | None]:
    table_GXM = table_GXM * grad_total
    rows_GXC = group_by_image(rows_QNC, len(columns_GMC))
    return (
        table_GXM @ columns_GMC.to(table_GXM.dtype) if wants_rows else None,
        table_GXM.mT @ rows_GXC.to(table_GXM.dtype) if wants_columns else None,
    )


_mean_logsumexp.register_autograd(_give_gradients, setup_context=_keep_for_backward)
