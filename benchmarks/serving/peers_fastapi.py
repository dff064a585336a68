"""The server that one would write in an afternoon: FastAPI, a thread per request, no batching.

    python -m benchmarks.serving.peers_fastapi --model models/demo --port 8001 --size 224 224

The same model with the same register border and the same preprocessing as the service, and the
same float16 values in the answer, as raw bytes.
"""

import argparse

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool

from backbone import DenseEncoder, open_model
from backbone.preprocess import decode_image, resize_image


def create_app(encoder: DenseEncoder, size: tuple[int, int]) -> FastAPI:
    """The application around `encoder`."""
    app = FastAPI()

    def encode(body: bytes) -> bytes:
        pixels_3hw = resize_image(decode_image(body), size)
        (features,) = encoder.encode(pixels_3hw[None])
        values: bytes = features.tokens[0].to("cpu", torch.float16).numpy().tobytes()
        return values

    @app.post("/features")
    async def features(request: Request) -> Response:
        values = await run_in_threadpool(encode, await request.body())
        return Response(values, media_type="application/octet-stream")

    @app.get("/health")
    async def health() -> str:
        return "ok"

    return app


def main() -> None:
    arguments = parse_arguments()
    encoder = open_model(arguments.model, precision=arguments.precision)
    app = create_app(encoder, tuple(arguments.size))
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="error", access_log=False)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--size", type=int, nargs=2, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
