"""What the served features are held against: the same model in a loop, in this process.

`bare` decodes, resizes and encodes, batch after batch, in one thread: the ceiling line.
`pipelined` decodes the next batches in threads meanwhile: what the machine could do without HTTP.
`check_parity` comes before any timing: figures of a server that answers something else are worth
nothing.

Dimension key: B = images, N = patch tokens, C = channels.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor

from backbone import Backbone, DenseEncoder, RegisterBorder, save_artifact
from backbone.preprocess import decode_image, resize_image
from benchmarks.serving.images import kinds_of
from benchmarks.serving.processes import post

# Largest relative error that rounding to the wire's dtype can add to a vector.
_ROUNDING = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}


class Difference(NamedTuple):
    """How far served vectors are from the bare model's, at worst."""

    kind: str
    dtype: str
    relative_error: float  # distance of two vectors over the length of the bare one
    min_cosine: float
    bound: float  # on the relative error


def bare(encoder: DenseEncoder, bodies: Sequence[bytes], size: tuple[int, int], batch: int) -> None:
    """Decode, resize and encode, batch after batch, in this thread."""
    for chunk in _chunks(bodies, batch):
        encode(encoder, [decode(body, size) for body in chunk])


def pipelined(
    encoder: DenseEncoder, bodies: Sequence[bytes], size: tuple[int, int], batch: int
) -> None:
    """The same with the images of the next batches decoded in threads meanwhile."""
    with ThreadPoolExecutor(initializer=lambda: torch.set_num_threads(1)) as threads:
        waiting: list[list[Future[Tensor]]] = []
        for chunk in _chunks(bodies, batch):
            waiting.append([threads.submit(decode, body, size) for body in chunk])
            if len(waiting) > 2:
                encode(encoder, [future.result() for future in waiting.pop(0)])
        for futures in waiting:
            encode(encoder, [future.result() for future in futures])


def decode(body: bytes, size: tuple[int, int]) -> Tensor:
    """uint8 [3, h, w]"""
    return resize_image(decode_image(body), size)


def encode(encoder: DenseEncoder, images: Sequence[Tensor]) -> Tensor:
    """[B, N, C] on the CPU, in the encoder's precision."""
    return encoder.encode(torch.stack(list(images)))[0].tokens.cpu()


def check_parity(
    url: str,
    encoder: DenseEncoder,
    images: Sequence[bytes],
    size: tuple[int, int],
    *,
    dtypes: Sequence[str],
    tolerance: float,
) -> list[Difference]:
    """Compare served features of several kinds of images, in each dtype, with the bare model's.

    Args:
        url: Of the server; `/features` is added.
        tolerance: Relative error that the service declares for float32.

    Raises:
        SystemExit: they differ by more than the dtype explains.
    """
    kinds = kinds_of(images[0]) | {f"jpeg {n}": image for n, image in enumerate(images[1:4], 1)}
    differences = []
    for kind, body in kinds.items():
        bare_NC = encode(encoder, [decode(body, size)])[0].float()
        for dtype in dtypes:
            query = f"?size={size[0]},{size[1]}&dtype={dtype}&layout=tokens"
            answer = post(f"{url}/features{query}", body, _media_type(kind))
            served_NC, rounding = _read(load(answer), dtype, bare_NC)
            differences.append(_difference(kind, dtype, served_NC, bare_NC, tolerance + rounding))
    for found in differences:
        if not found.relative_error <= found.bound:
            raise SystemExit(
                f"served and bare features of a {found.kind} image in {found.dtype} differ by "
                f"{found.relative_error:.2g}, {found.bound:.2g} is allowed: nothing is timed"
            )
    return differences


def check_peer(
    url: str,
    encoder: DenseEncoder,
    images: Sequence[bytes],
    size: tuple[int, int],
    *,
    tolerance: float,
) -> float:
    """Largest relative error of a peer's float16 answers.

    Raises:
        SystemExit: it does not do the same work.
    """
    worst = 0.0
    for body in images[:4]:
        bare_NC = encode(encoder, [decode(body, size)])[0].float()
        content = post(f"{url}/features", body)
        served_NC = torch.frombuffer(bytearray(content), dtype=torch.float16).float()
        if served_NC.numel() != bare_NC.numel():
            raise SystemExit(f"{url} answers {served_NC.numel()} values, not {bare_NC.numel()}")
        difference = _difference("jpeg", "float16", served_NC.view_as(bare_NC), bare_NC, 0.0)
        worst = max(worst, difference.relative_error)
    if worst > tolerance + _ROUNDING["float16"]:
        raise SystemExit(f"{url} differs from the bare model by {worst:.2g}: nothing is timed")
    return worst


@contextmanager
def artifact(model: str, *, random_weights: bool) -> Iterator[str]:
    """What all sides open; random weights are drawn once and written down for all."""
    if not random_weights:
        yield model
        return
    with tempfile.TemporaryDirectory() as folder:
        backbone = Backbone.load(model, random_weights=True)
        path = Path(folder) / "random"
        save_artifact(path, backbone, border=RegisterBorder(), model_card="random weights\n")
        yield str(path)


def _read(tensors: Mapping[str, Tensor], dtype: str, bare_NC: Tensor) -> tuple[Tensor, float]:
    """The served vectors in float32, and the relative error that their dtype explains."""
    served_NC = tensors["features.0"].float()
    if dtype != "int8":
        return served_NC, _ROUNDING[dtype]
    scale_N1 = tensors["features.0.scale"].float().reshape(-1, 1)
    # Half a step in each channel, at most.
    steps_N1 = scale_N1 / 2 * math.sqrt(bare_NC.shape[-1]) / bare_NC.norm(dim=-1, keepdim=True)
    return served_NC * scale_N1, float(steps_N1.max())


def _difference(
    kind: str, dtype: str, served_NC: Tensor, bare_NC: Tensor, bound: float
) -> Difference:
    error_N = (served_NC - bare_NC).norm(dim=-1) / bare_NC.norm(dim=-1)
    cosine_N = torch.nn.functional.cosine_similarity(served_NC, bare_NC, dim=-1)
    return Difference(kind, dtype, float(error_N.max()), float(cosine_N.min()), bound)


def _media_type(kind: str) -> str:
    return f"image/{kind.split()[0]}"


def _chunks(bodies: Sequence[bytes], batch: int) -> Iterator[Sequence[bytes]]:
    for start in range(0, len(bodies), batch):
        yield bodies[start : start + batch]
