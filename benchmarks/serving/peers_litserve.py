"""LitServe with the batching that its documentation describes.

    python -m benchmarks.serving.peers_litserve --model models/demo --port 8002 --size 224 224

`max_batch_size` and `batch_timeout` of `LitAPI`; images are decoded in `decode_request`, stacked
by the default `batch`, taken apart by the default `unbatch`. Bodies come in raw, which is cheaper
than its usual JSON, and the answer is a `Response` with the same float16 bytes as the service's.
`workers_per_device` is the number of cores, as documented for CPUs, and the threads of a forward
share the cores. All else is left at its default, gzip too: that costs nothing here, because the
load client does not ask for compressed answers.
"""

import argparse
import os
from collections.abc import Sequence
from typing import Annotated

import litserve  # type: ignore[import-untyped]
import torch
from fastapi import Body, Response
from torch import Tensor

from backbone import open_model
from backbone.preprocess import decode_image, resize_image

RawBody = Annotated[bytes, Body(media_type="application/octet-stream")]


class FeatureAPI(litserve.LitAPI):  # type: ignore[misc]
    """Features of one image a request."""

    def __init__(
        self,
        model: str,
        *,
        precision: str,
        size: tuple[int, int],
        num_threads: int,
        max_batch_size: int,
        batch_timeout: float,
    ) -> None:
        super().__init__(
            max_batch_size=max_batch_size, batch_timeout=batch_timeout, api_path="/features"
        )
        self._model = model
        self._precision = precision
        self._size = size
        self._num_threads = num_threads

    def setup(self, device: str) -> None:
        torch.set_num_threads(self._num_threads)
        self._encoder = open_model(self._model, device=device, precision=self._precision)  # type: ignore[arg-type]

    def decode_request(self, request: RawBody) -> Tensor:
        return resize_image(decode_image(request), self._size)

    def predict(self, x: Tensor) -> Sequence[Tensor]:
        return list(self._encoder.encode(x)[0].tokens.to("cpu", torch.float16))

    def encode_response(self, output: Tensor) -> Response:
        return Response(output.numpy().tobytes(), media_type="application/octet-stream")


def main() -> None:
    arguments = parse_arguments()
    api = FeatureAPI(
        arguments.model,
        precision=arguments.precision,
        size=tuple(arguments.size),
        num_threads=max(1, _num_cores() // arguments.workers),
        max_batch_size=arguments.max_batch_size,
        batch_timeout=arguments.batch_timeout,
    )
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    server = litserve.LitServer(
        api, accelerator=accelerator, workers_per_device=arguments.workers, timeout=120
    )
    server.run(host="127.0.0.1", port=arguments.port, log_level="error", generate_client_file=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--size", type=int, nargs=2, required=True)
    parser.add_argument("--workers", type=int, default=_default_workers())
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--batch-timeout", type=float, default=0.01, help="seconds")
    return parser.parse_args()


def _default_workers() -> int:
    return 1 if torch.cuda.is_available() else _num_cores()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
