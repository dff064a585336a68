"""CUDA graphs: the forward of each bucket, recorded once and replayed without Python.

Recorded for batches of 1, 2, 4, ... images; a batch in between is filled up with whatever was
there before, and those rows are thrown away. Only the last layer at the model's own border width
is recorded; other requests run as they are.

Dimension key: B = images, h, w = image in pixels.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from backbone import DenseEncoder, DenseFeatures

logger = logging.getLogger(__name__)

_WARM_RUNS = 2


class GraphError(RuntimeError):
    """A recorded forward cannot be had, or does not give what the forward gives."""


class _Recorded(NamedTuple):
    graph: torch.cuda.CUDAGraph
    canvas_B3HW: Tensor  # where the graph reads
    features: DenseFeatures  # where it writes


class GraphPool:
    """The recorded forwards of one model on one device."""

    def __init__(self, encoder: DenseEncoder) -> None:
        self._encoder = encoder
        self._recorded: dict[tuple[int, int], dict[int, _Recorded]] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def record(self, size: tuple[int, int], *, max_batch: int, tolerance: float) -> None:
        """Record the forward of images of `size` for batches up to `max_batch`.

        Raises:
            GraphError: a replay differs from the forward by more than `tolerance`.
            RuntimeError: what CUDA says when it cannot record.
        """
        batches = [2**power for power in range(max_batch.bit_length())]
        # The largest first: the others then live in the memory that it took.
        self._recorded[size] = {
            batch: self._record_one(size, batch, tolerance) for batch in reversed(batches)
        }

    def run(self, images_B3hw: Tensor) -> tuple[DenseFeatures, int] | None:
        """The last layer's features, and how many images were computed in vain; None if the size
        or so large a batch is not recorded."""
        by_batch = self._recorded.get((images_B3hw.shape[-2], images_B3hw.shape[-1]), {})
        num_images = len(images_B3hw)
        fitting = [batch for batch in by_batch if batch >= num_images]
        if not fitting:
            return None
        batch = min(fitting)
        recorded = by_batch[batch]
        width = self._encoder.register_width(*images_B3hw.shape[-2:])
        recorded.canvas_B3HW[:num_images].copy_(self._encoder.canvas(images_B3hw, width))
        recorded.graph.replay()
        features = replace(
            recorded.features,
            # Copies: the next replay writes to the same place.
            tokens=recorded.features.tokens[:num_images].clone(),
            prefix=recorded.features.prefix[:num_images].clone(),
        )
        return features, batch - num_images

    @torch.inference_mode()
    def _record_one(self, size: tuple[int, int], batch: int, tolerance: float) -> _Recorded:
        device = self._encoder.device
        width = self._encoder.register_width(*size)
        images_B3hw = torch.randint(0, 256, (batch, 3, *size), dtype=torch.uint8, device=device)
        canvas_B3HW = self._encoder.canvas(images_B3hw, width).clone()
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_RUNS):
                (expected,) = self._encoder.encode_canvas(canvas_B3HW, width)
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may serve meanwhile: only this one must keep to what can be recorded.
        with torch.cuda.graph(
            graph, pool=self._memory, stream=side, capture_error_mode="thread_local"
        ):
            (features,) = self._encoder.encode_canvas(canvas_B3HW, width)
        graph.replay()
        error_BN = (features.tokens - expected.tokens).float().norm(dim=-1)
        relative = float((error_BN / expected.tokens.float().norm(dim=-1)).max())
        if not relative <= tolerance:
            raise GraphError(
                f"the recorded forward of {batch} images of {size[0]}x{size[1]} px differs by "
                f"{relative:.2g}"
            )
        return _Recorded(graph, canvas_B3HW, features)


def capture_buckets(
    encoder: DenseEncoder,
    buckets: Sequence[tuple[int, int]],
    *,
    max_tokens: int,
    mode: Literal["auto", "on", "off"],
    tolerance: float,
) -> GraphPool | None:
    """Record the forward of each bucket; None where there are no graphs.

    Raises:
        GraphError: `mode` is `on` and they cannot be had.
    """
    if mode == "off":
        return None
    if encoder.device.type != "cuda":
        if mode == "on":
            raise GraphError(f"CUDA graphs need a CUDA device, and this is {encoder.device}")
        return None
    pool = GraphPool(encoder)
    try:
        for size in buckets:
            max_batch = max(1, max_tokens // encoder.num_tokens(*size))
            pool.record(size, max_batch=max_batch, tolerance=tolerance)
    except RuntimeError as error:
        if mode == "on":
            raise GraphError(f"CUDA graphs cannot be recorded: {error}") from error
        torch.cuda.synchronize(encoder.device)
        logger.warning("no CUDA graphs, the forward runs as it is: %s", error)
        return None
    logger.info("recorded CUDA graphs of %d buckets on %s", len(buckets), encoder.device)
    return pool
