"""What the pages ask of the service, answered without a model: fast, and the same every time."""

import io
import json

import numpy as np
from fastapi import FastAPI, Request, Response
from PIL import Image, UnidentifiedImageError
from safetensors.numpy import save

from backbone.preprocess import patch_affine, resolve_size
from service.errors import NotReadyError, ServiceError, UnsupportedImageError
from service.web.routes import router

PATCH_SIZE = 16
NATIVE_SIZE = (224, 224)


def model(name, *, is_refined, channels=24):
    return {
        "name": name,
        "is_refined": is_refined,
        "native_size": NATIVE_SIZE,
        "embed_dim": channels,
        "patch_size": PATCH_SIZE,
    }


REFINED = model("demo", is_refined=True)
RAW = model("folder/raw", is_refined=False)


def features_of(data, options, channels):
    """Random directions of the mean colours of the patches, and of their surroundings."""
    try:
        image = Image.open(io.BytesIO(data)).convert("RGB")
    except UnidentifiedImageError:
        raise UnsupportedImageError(
            f"image 0: {len(data)} bytes that no supported format recognises"
        ) from None
    original = (image.height, image.width)
    size = options.get("size")
    resized = resolve_size(*original, int(size), PATCH_SIZE) if size else NATIVE_SIZE
    h, w = (side // PATCH_SIZE for side in resized)
    near = np.asarray(image.resize((w, h)), dtype=np.float32) / 255
    far = np.asarray(image.resize((2, 2)).resize((w, h)), dtype=np.float32) / 255
    seed = 1 if options["model"] == REFINED["name"] else 2
    mixing = np.random.default_rng(seed).standard_normal((6, channels), dtype=np.float32)
    dtype = np.dtype(options.get("dtype", "float16"))
    tensors = {"features.0": (np.concatenate([near, far], -1) @ mixing).astype(dtype)}
    if options.get("include") == "spurious":
        brightness = near.mean(-1)
        z_score = (brightness - brightness.mean()) / brightness.std()
        tensors["spurious.0"] = np.stack([brightness, z_score], -1)
    image_metadata = {
        "index": 0,
        "grid": [h, w],
        "original_size": original,
        "resized_to": resized,
        "affine": patch_affine(original, resized, PATCH_SIZE),
    }
    return tensors, {"model": options["model"], "images": json.dumps([image_metadata])}


def fake_service(models=(RAW, REFINED), failures=()):
    """An application of the pages.

    Args:
        models: What `/info` says is served.
        failures: Errors that the first requests for `/info` are answered with.
    """
    app = FastAPI(title="fake", docs_url=None, redoc_url=None)
    app.include_router(router)
    app.state.failures = list(failures)
    by_name = {entry["name"]: entry for entry in models}

    @app.exception_handler(ServiceError)
    async def answer_error(_: Request, error: ServiceError) -> Response:
        body = error.body("request-1").model_dump_json(exclude_none=True)
        headers = error.headers | {"x-request-id": "request-1"}
        return Response(body, error.status, headers, "application/json")

    @app.get("/info")
    async def info() -> dict:
        """What is served."""
        if app.state.failures:
            raise app.state.failures.pop(0)
        return {"models": list(models), "model": models[0]}

    @app.post("/features")
    async def features(request: Request, size: int | None = None) -> Response:
        """Features of `one` image."""
        del size  # declared for the description; read with the others
        options = dict(request.query_params)
        channels = by_name[options["model"]]["embed_dim"]
        tensors, metadata = features_of(await request.body(), options, channels)
        return Response(save(tensors, metadata), media_type="application/x-safetensors")

    return app


def warming_up():
    return NotReadyError("the model is being warmed up; retry in a moment")
