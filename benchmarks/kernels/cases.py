"""Inputs of real use, and for each operation the contenders that get them.

Dimension key: B = images, K = boxes of an image, N = tokens of the image, T = all tokens,
C = channels, H = heads, D = channels of a head.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.flex_inflow import attention_inflow_by_flex
from benchmarks.kernels import eager
from benchmarks.kernels.measure import Contender
from kernels import (
    TokenWindow,
    attention,
    attention_inflow,
    attention_with_lse,
    max_similarity,
    mean_logsumexp,
    roi_align,
)

OURS = "ours"
TEMPERATURE, THRESHOLD = 0.2, 0.1
CROPS = 3  # of an image, as in the recipes


class Shape(NamedTuple):
    """A backbone at the size it is used at, with its register border."""

    name: str
    window: TokenWindow
    heads: int
    head_dim: int

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim


SHAPES = (
    Shape("ViT-B/16 224 px", TokenWindow((14, 14), border=1, prefix=1), 12, 64),
    Shape("So400m/16 512 px", TokenWindow((32, 32), border=1), 16, 72),
    Shape("DINOv2 g/14 518 px", TokenWindow((37, 37), border=1, prefix=1), 24, 64),
    Shape("CLIP g/14 448 px", TokenWindow((32, 32), border=1, prefix=1), 16, 88),
    Shape("EVA-8B/14 448 px", TokenWindow((32, 32), border=1, prefix=1), 32, 128),
)


class Case(NamedTuple):
    """One measurement: the same work by every contender.

    Attributes:
        contenders: Ours first. Each returns the tensor that is compared.
        exact: The same in float64.
        alike: Contender whose error is the measure of ours.
        num_bytes: Read and written at least: every input and output once.
        flops: Multiplications and additions of the matrix products.
    """

    operation: str
    shape: str
    batch: int
    mode: str
    dtype: str
    contenders: Mapping[str, Contender]
    exact: Contender
    alike: str
    num_bytes: int
    flops: int


def roi_align_cases(shape: Shape, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Features of detector-like boxes, as the service gives them; of crops, as the trainer does."""
    window, generator = shape.window, _generator(0)
    tokens = _normal((batch, window.num_tokens, shape.channels), generator, dtype)
    for name, num_boxes, size, sides in (
        ("16 boxes to 7x7", 16, (7, 7), (0.05, 0.6)),
        ("3 crops to the grid", CROPS, window.grid, (0.5, 0.7)),
    ):
        extent = sides[0] + (sides[1] - sides[0]) * torch.rand(
            batch, num_boxes, 2, generator=generator
        )
        start = torch.rand(batch, num_boxes, 2, generator=generator) * (1 - extent)
        boxes = torch.cat([start, start + extent], dim=-1)
        leaf = tokens.clone().requires_grad_()
        (h, w) = window.grid
        rois = boxes * torch.tensor([w, h, w, h])
        theirs = partial(eager.roi_align, rois_BK4=rois, window=window, output_size=size)
        runs: dict[str, Callable[[Tensor], Tensor]] = {
            OURS: partial(_by_kernel, boxes=boxes, window=window, size=size),
            "torchvision": theirs,
        }
        results = {key: run(leaf) for key, run in runs.items()}
        upstream = _normal(tuple(results[OURS].shape), generator, dtype)
        num_values = batch * window.num_image_tokens * shape.channels + upstream.numel()
        forwards: dict[str, Contender] = {key: partial(run, tokens) for key, run in runs.items()}
        backwards: dict[str, Contender] = {
            key: partial(_gradient, result, leaf, upstream) for key, result in results.items()
        }
        for mode, contenders, exact in (
            ("forward", forwards, partial(_exactly, theirs, tokens, None)),
            ("backward", backwards, partial(_exactly, theirs, tokens, upstream)),
        ):
            yield Case(
                "roi_align",
                f"{shape.name}, {name}",
                batch,
                mode,
                _name(dtype),
                contenders,
                exact,
                "torchvision",
                num_values * dtype.itemsize,
                0,
            )


def _by_kernel(x: Tensor, *, boxes: Tensor, window: TokenWindow, size: tuple[int, int]) -> Tensor:
    return roi_align(
        x,
        boxes,
        grid=window.grid,
        output_size=size,
        border=window.border,
        num_prefix_tokens=window.prefix,
        dtype=x.dtype,
    )


def _gradient(result: Tensor, leaf: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(result, leaf, upstream, retain_graph=True)[0]


def _exactly(run: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor | None) -> Tensor:
    wide = x.double().requires_grad_()
    result = run(wide)
    return result if upstream is None else _gradient(result, wide, upstream.double())


def attention_flow_cases(shape: Shape, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Inflow of one layer, both variants."""
    q, k = _queries_and_keys(shape, batch, dtype)[:2]
    num_tokens = shape.window.num_tokens
    products = 2 * batch * num_tokens**2 * shape.channels
    num_bytes = 2 * q.numel() * dtype.itemsize
    contenders: dict[str, Contender] = {
        OURS: lambda: attention_inflow(q, k, variant="paper"),
        "eager maps": lambda: eager.attention_inflow(q, k),
    }
    lse = attention_with_lse(q, k, k).lse_BHQ
    contenders["ours, lse at hand"] = lambda: attention_inflow(q, k, variant="paper", lse_BHN=lse)
    if q.device.type == "cuda":
        # Each shape compiled for itself: after a few, Dynamo would give up and run it uncompiled.
        torch._dynamo.reset()
        flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        contenders["FlexAttention, roles swapped"] = partial(
            attention_inflow_by_flex, q, k, flex=flex
        )
    yield Case(
        "attention_flow",
        shape.name,
        batch,
        "paper",
        _name(dtype),
        contenders,
        partial(_flow_in_double, eager.attention_inflow, q, k),
        "eager maps",
        num_bytes,
        2 * products,
    )
    yield Case(
        "attention_flow",
        shape.name,
        batch,
        "release",
        _name(dtype),
        {
            OURS: lambda: attention_inflow(q, k, variant="release"),
            "eager maps": lambda: eager.release_inflow(q, k),
        },
        partial(_flow_in_double, eager.release_inflow, q, k),
        "eager maps",
        num_bytes,
        2 * products,
    )


def similarity_cases(shape: Shape, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every token of an image's crops against the image's own: target matching."""
    num_tokens = shape.window.num_image_tokens
    crops = _unit(batch, CROPS * num_tokens, shape.channels, dtype, seed=0)
    image = _unit(batch, num_tokens, shape.channels, dtype, seed=1)
    yield Case(
        "similarity",
        shape.name,
        batch,
        "max and argmax",
        _name(dtype),
        {
            OURS: lambda: max_similarity(crops, image).values,
            "eager": lambda: eager.max_similarity(crops, image)[0],
        },
        lambda: eager.max_similarity(crops.double(), image.double())[0],
        "eager",
        (crops.numel() + image.numel()) * dtype.itemsize,
        2 * crops.numel() * num_tokens,
    )


def contrastive_cases(shape: Shape, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """A loss and its gradients: crops against a pool (refinement), image against registers."""
    num_tokens = shape.window.num_image_tokens
    num_registers = shape.window.num_tokens - shape.window.prefix - num_tokens
    for name, rows_of_image, num_columns, trains_columns in (
        ("refinement", CROPS * num_tokens, num_tokens, False),
        ("uniformity", num_tokens, num_registers, True),
    ):
        rows = _unit(batch, rows_of_image, shape.channels, dtype, seed=0).requires_grad_()
        columns = _unit(batch, num_columns, shape.channels, dtype, seed=1)
        columns.requires_grad_(trains_columns)
        contenders: dict[str, Contender] = {
            OURS: partial(_loss_gradient, _fused_loss, rows, columns),
            "eager": partial(_loss_gradient, _eager_loss, rows, columns),
        }
        wide_rows = rows.detach().double().requires_grad_()
        wide_columns = columns.detach().double()
        yield Case(
            "contrastive",
            shape.name,
            batch,
            name,
            _name(dtype),
            contenders,
            partial(_loss_gradient, _eager_loss, wide_rows, wide_columns),
            "eager",
            2 * (rows.numel() + columns.numel()) * dtype.itemsize,
            (6 if trains_columns else 4) * rows.numel() * num_columns,
        )


def _fused_loss(rows: Tensor, columns: Tensor) -> Tensor:
    return mean_logsumexp(
        rows, columns, temperature=TEMPERATURE, threshold=THRESHOLD, below="detach"
    )


def _eager_loss(rows: Tensor, columns: Tensor) -> Tensor:
    return eager.logsumexp_mean(rows, columns, temperature=TEMPERATURE, threshold=THRESHOLD)


def _loss_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor, columns: Tensor
) -> Tensor:
    """The rows' gradient; the columns' is computed too where they train."""
    leaves = [tensor for tensor in (rows, columns) if tensor.requires_grad]
    return torch.autograd.grad(loss(rows, columns), leaves)[0]


def attention_cases(shape: Shape, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    """A block of the served forward (all queries), and the last one (those of the image)."""
    q, k, v = _queries_and_keys(shape, batch, dtype)
    everything = TokenWindow((1, shape.window.num_tokens))
    for name, window in (("all queries", everything), ("last block", shape.window)):
        asked = None if window is everything else window
        contenders: dict[str, Contender] = {
            OURS: partial(attention, q, k, v, window=asked),
            "SDPA": partial(eager.attention, q, k, v, window),
            "SDPA, wanted queries": partial(eager.windowed_attention, q, k, v, window),
        }
        if q.device.type == "cuda":
            for backend_name, backend in eager.SDPA_BACKENDS.items():
                contenders[f"SDPA {backend_name}, wanted queries"] = partial(
                    eager.windowed_attention, q, k, v, window, backend
                )
        num_queries = window.prefix + window.num_image_tokens
        yield Case(
            "attention",
            shape.name,
            batch,
            name,
            _name(dtype),
            {key: run for key, run in contenders.items() if eager.supported(key, run)},
            partial(_attention_in_double, q, k, v, window),
            "SDPA",
            (2 * q.numel() + 2 * q.numel() * num_queries // window.num_tokens) * dtype.itemsize,
            4 * batch * num_queries * window.num_tokens * shape.channels,
        )


def _attention_in_double(q: Tensor, k: Tensor, v: Tensor, window: TokenWindow) -> Tensor:
    """Sample by sample: float64 has no fused attention, and holds all scores of what it does."""
    return torch.cat(
        [
            eager.attention(
                q[i : i + 1].double(), k[i : i + 1].double(), v[i : i + 1].double(), window
            )
            for i in range(len(q))
        ]
    )


def _flow_in_double(flow: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor) -> Tensor:
    return torch.cat([flow(q[i : i + 1].double(), k[i : i + 1].double()) for i in range(len(q))])


GENERATORS = {
    "roi_align": roi_align_cases,
    "attention_flow": attention_flow_cases,
    "similarity": similarity_cases,
    "contrastive": contrastive_cases,
    "attention": attention_cases,
}


def _queries_and_keys(shape: Shape, batch: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Views [B, H, T, D] of one packed projection, as a transformer's block has them."""
    size = (batch, shape.window.num_tokens, 3, shape.heads, shape.head_dim)
    packed = _normal(size, _generator(0), dtype)
    return packed.permute(2, 0, 3, 1, 4).unbind(0)


def _unit(batch: int, num_tokens: int, channels: int, dtype: torch.dtype, *, seed: int) -> Tensor:
    """Tokens with a common direction: cosines spread around 0.3, as a backbone's are."""
    common = torch.randn(channels, generator=_generator(99))
    own = torch.randn(batch, num_tokens, channels, generator=_generator(seed))
    return F.normalize(own + 0.65 * common, dim=-1).to(dtype)


def _normal(size: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(size, generator=generator).to(dtype)


def _generator(seed: int) -> torch.Generator:
    """Of the device that is measured: billions of numbers would take the CPU minutes."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
