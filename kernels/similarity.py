"""The best match of every token among other tokens, without the table of all products.

Dimension key: Q = query sets, G = key sets (Q = G * sets that share one), N = queries of a set,
M = keys of a set, X = queries that share a key set (Q / G * N), C = channels, S = parts that the
keys are split into.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import on_device_of, unsupported_dtype, unsupported_span, use_triton
from kernels.precision import SHORTEST_NORM, check_alike, full_precision, wide_dtype, widen
from kernels.tiles import tiles

# Products that the reference holds at a time: 64 MiB of float32. More gains nothing measurable.
CHUNK_ELEMENTS = 1 << 24


class BestMatch(NamedTuple):
    """`values_QN`, the highest dot product of each query, and `indices_QN`, the key that has it."""

    values: Tensor
    indices: Tensor


def max_similarity(queries_QNC: Tensor, keys_GMC: Tensor, *, normalize: bool = False) -> BestMatch:
    """Highest dot product of each query with the keys of its set, and which key it is.

    Compared in float32 at least and without gradient (gather the winners where one is needed). The
    first key wins a tie. Never holds all N * M products of a large batch.

    Args:
        queries_QNC: Queries. Of two number formats, the narrower is widened to the other first.
        keys_GMC: Keys; G divides Q, and every Q / G neighbouring query sets share one key set: an
            image's crops its tokens, or all of them one reference (G = 1).
        normalize: Values are cosines, of tokens of any length (a token of zeros has cosine 0). The
            tokens themselves are not rewritten. Leave it out where both sides have unit norm.

    Returns:
        Values in float32 at least, indices in int64. A query with a product that is NaN or
        overflows has the value NaN and the index of such a key.

    Raises:
        ValueError: the shapes do not go together, or there is no key.

    Source: the "max over j of cos" of UniRefiner's similarity filters and target matching,
    arXiv:2605.19622.
    """
    check_sets(queries_QNC, keys_GMC)
    return BestMatch(*_max_similarity(queries_QNC.detach(), keys_GMC.detach(), normalize))


def check_sets(tokens_QNC: Tensor, others_GMC: Tensor) -> None:
    """Refuse token sets that cannot be paired, or nothing to pair with.

    Raises:
        ValueError: saying what does not go together.
    """
    if tokens_QNC.ndim != 3 or others_GMC.ndim != 3:
        shapes = f"{tuple(tokens_QNC.shape)} and {tuple(others_GMC.shape)}"
        raise ValueError(f"token sets have the shape [sets, tokens, channels], not {shapes}")
    check_alike(tokens=tokens_QNC, others=others_GMC)
    (num_sets, _, channels), (num_others, num_tokens, other_channels) = (
        tokens_QNC.shape,
        others_GMC.shape,
    )
    if channels != other_channels:
        raise ValueError(f"tokens of {channels} channels and of {other_channels} have no products")
    if num_others == 0 or num_sets % num_others:
        raise ValueError(f"{num_sets} token sets cannot share {num_others} sets evenly")
    if num_tokens == 0:
        raise ValueError("a set that tokens are compared with is empty")


def group_by_image(tokens_QNC: Tensor, num_images: int) -> Tensor:
    """The tokens of neighbouring sets joined, so that one set is left for each image: [G, X, C]."""
    num_sets, num_tokens, channels = tokens_QNC.shape
    return tokens_QNC.reshape(num_images, num_sets // num_images * num_tokens, channels)


@full_precision
@torch.no_grad()
def max_similarity_reference(
    queries_QNC: Tensor, keys_GMC: Tensor, *, normalize: bool = False
) -> BestMatch:
    """The same by plain PyTorch, some queries at a time."""
    num_sets, num_queries, _ = queries_QNC.shape
    queries_QNC, keys_GMC = (widen(part) for part in _same_format(queries_QNC, keys_GMC))
    grouped_GXC = group_by_image(queries_QNC, len(keys_GMC))
    keys_GCM = keys_GMC.mT
    key_scale_G1M = _inverse_norm(keys_GMC)[:, None] if normalize else None
    chunk = max(1, CHUNK_ELEMENTS // (keys_GMC.shape[0] * keys_GMC.shape[1]))
    best = []
    for queries_GxC in grouped_GXC.split(chunk, dim=1):
        products_GxM = queries_GxC @ keys_GCM
        if key_scale_G1M is not None:
            products_GxM *= key_scale_G1M
        best.append(products_GxM.max(dim=-1))
    values_QN = torch.cat([part.values for part in best], dim=1).view(num_sets, num_queries)
    indices_QN = torch.cat([part.indices for part in best], dim=1).view(num_sets, num_queries)
    values_QN = values_QN.masked_fill(values_QN == torch.inf, torch.nan)
    if normalize:
        values_QN *= _inverse_norm(queries_QNC)
    return BestMatch(values_QN, indices_QN)


@triton.jit
def _max_similarity_kernel(
    queries_ptr,  # [Q, N, C]
    keys_ptr,  # [G, M, C]
    key_scale_ptr,  # [G, M] float32, or None where SCALED is false
    values_ptr,  # [S, G, X] float32
    indices_ptr,  # [S, G, X] int64
    num_queries,  # N
    num_rows,  # X
    num_keys,  # M
    num_channels,  # C
    tiles_per_part,
    stride_qq,
    stride_qn,
    stride_qc,
    stride_kg,
    stride_km,
    stride_kc,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)

    # Rows and keys beyond the last repeat it: loads need a mask for channels only.
    row_in = tl.minimum(row, num_rows - 1)
    query_set = group * (num_rows // num_queries) + row_in // num_queries
    query = (row_in % num_queries).to(tl.int64)
    channel = tl.arange(0, BLOCK_C)
    query_rows_ptr = queries_ptr + query_set * stride_qq + query * stride_qn
    query_tile_ptr = query_rows_ptr[:, None] + channel[None, :] * stride_qc
    keys_ptr += group * stride_kg

    best = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    best_key = tl.zeros([BLOCK_N], dtype=tl.int32)
    first_tile = part * tiles_per_part
    last_tile = tl.minimum(first_tile + tiles_per_part, tl.cdiv(num_keys, BLOCK_M))
    for tile in tl.range(first_tile, last_tile):
        key = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        key_in = tl.minimum(key, num_keys - 1)
        key_tile_ptr = (
            keys_ptr + key_in.to(tl.int64)[None, :] * stride_km + channel[:, None] * stride_kc
        )
        products = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.float32)
        for start in tl.range(0, num_channels, BLOCK_C):
            is_channel = start + channel < num_channels
            query_block = tl.load(
                query_tile_ptr + start * stride_qc, mask=is_channel[None, :], other=0.0
            )
            key_block = tl.load(
                key_tile_ptr + start * stride_kc, mask=is_channel[:, None], other=0.0
            )
            products = tl.dot(query_block, key_block, products, input_precision=PRECISION)
        if SCALED:
            products *= tl.load(key_scale_ptr + group * num_keys + key_in)[None, :]
        # NaN wins as the highest number does, and is told again when it is stored.
        products = tl.where(products == products, products, float("inf"))
        products = tl.where((key < num_keys)[None, :], products, float("-inf"))
        highest, at = tl.max(products, axis=1, return_indices=True)
        is_better = highest > best
        best = tl.where(is_better, highest, best)
        best_key = tl.where(is_better, tile * BLOCK_M + at, best_key)

    out = (part * tl.num_programs(1) + group) * num_rows + row
    best = tl.where(best == float("inf"), float("nan"), best)
    tl.store(values_ptr + out, best, mask=row < num_rows)
    tl.store(indices_ptr + out, best_key.to(tl.int64), mask=row < num_rows)


def launch_max_similarity(
    queries_QNC: Tensor, keys_GMC: Tensor, *, normalize: bool = False
) -> BestMatch:
    """The same by the kernel. Rewrites queries or keys only where their formats differ."""
    queries_QNC, keys_GMC = _same_format(queries_QNC, keys_GMC)
    num_sets, num_queries, channels = queries_QNC.shape
    num_groups, num_keys, _ = keys_GMC.shape
    num_rows = num_sets // num_groups * num_queries
    key_scale_GM = _inverse_norm(keys_GMC) if normalize else None

    settings = tiles("max_similarity", keys_GMC.device, element_bytes=keys_GMC.element_size())
    num_blocks = triton.cdiv(num_rows, settings["BLOCK_N"])
    num_tiles = triton.cdiv(num_keys, settings["BLOCK_M"])
    tiles_per_part = _tiles_per_part(num_blocks * num_groups, num_tiles, settings.pop("num_sms"))
    num_parts = triton.cdiv(num_tiles, tiles_per_part)

    values_SQN = torch.empty(
        (num_parts, num_sets, num_queries), dtype=torch.float32, device=keys_GMC.device
    )
    indices_SQN = torch.empty_like(values_SQN, dtype=torch.int64)
    if num_rows:
        _max_similarity_kernel[(num_blocks, num_groups, num_parts)](
            queries_QNC,
            keys_GMC,
            key_scale_GM,
            values_SQN,
            indices_SQN,
            num_queries,
            num_rows,
            num_keys,
            channels,
            tiles_per_part,
            *queries_QNC.stride(),
            *keys_GMC.stride(),
            SCALED=normalize,
            PRECISION="tf32x3" if keys_GMC.dtype == torch.float32 else "tf32",
            enable_fp_fusion=True,
            **settings,
        )
    values_QN, indices_QN = values_SQN[0], indices_SQN[0]
    if num_parts > 1:
        values_QN, part_QN = values_SQN.max(dim=0)  # the first part wins a tie
        indices_QN = indices_SQN.gather(0, part_QN[None])[0]
    if normalize:
        values_QN *= _inverse_norm(queries_QNC)
    return BestMatch(values_QN, indices_QN)


@functools.cache
def _tiles_per_part(num_programs: int, num_tiles: int, num_sms: int) -> int:
    """Tiles of keys that a program sweeps, so that whole waves of programs take the least time."""

    def duration(tiles_per_part: int) -> int:
        num_parts = triton.cdiv(num_tiles, tiles_per_part)
        return int(triton.cdiv(num_programs * num_parts, num_sms)) * tiles_per_part

    return min(range(num_tiles, 0, -1), key=duration)


def _same_format(queries_QNC: Tensor, keys_GMC: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(queries_QNC.dtype, keys_GMC.dtype)
    return queries_QNC.to(dtype), keys_GMC.to(dtype)


def _inverse_norm(tokens_QNC: Tensor) -> Tensor:
    norm_QN: Tensor = torch.linalg.vector_norm(tokens_QNC, dim=-1, dtype=wide_dtype(tokens_QNC))
    return norm_QN.clamp(min=SHORTEST_NORM).reciprocal()


@torch.library.custom_op("refinery::max_similarity", mutates_args=())
def _max_similarity(queries: Tensor, keys: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    unsupported = unsupported_dtype(queries.dtype, keys.dtype) or unsupported_span(queries, keys)
    if use_triton("max_similarity", queries, unsupported=unsupported):
        with on_device_of(queries):
            return launch_max_similarity(queries, keys, normalize=normalize)
    return max_similarity_reference(queries, keys, normalize=normalize)


@_max_similarity.register_fake
def _(queries: Tensor, keys: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    del normalize
    shape = queries.shape[:2]
    return queries.new_empty(shape, dtype=wide_dtype(queries, keys)), queries.new_empty(
        shape, dtype=torch.int64
    )
