"""A stand-in for the service: says what was asked, answers what a test wants."""

import asyncio
import contextlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

import httpx2 as httpx
import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from service.client import AsyncFeatureClient, FeatureClient

URL = "http://service.test"
DIGEST = "d" * 64
SAFETENSORS = {"content-type": "application/x-safetensors", "x-request-id": "r-1"}
FRAMES = {"content-type": "application/x-refinery-frames", "x-request-id": "r-1"}
GRID, CHANNELS = (2, 3), 4


@dataclass
class Asked:
    """A request, taken apart."""

    path: str
    headers: dict
    body: bytes
    options: dict = field(default_factory=dict)
    images: list = field(default_factory=list)


def take_apart(method, url, headers, body):
    headers = {name.lower(): value for name, value in headers.items()}
    parts = urlsplit(url)
    asked = Asked(parts.path, headers, body, dict(parse_qsl(parts.query)))
    media = headers.get("content-type", "")
    if method == "POST" and media.startswith("multipart/form-data"):
        boundary = media.partition("boundary=")[2].encode()
        for part in body.split(b"--" + boundary)[1:-1]:
            head, _, data = part.removeprefix(b"\r\n").partition(b"\r\n\r\n")
            data = data.removesuffix(b"\r\n")
            if b'name="options"' in head:
                asked.options |= json.loads(data)
            else:
                asked.images.append(data)
    elif method == "POST" and media == "application/x-safetensors":
        asked.images += list(safetensors.numpy.load(body)["images"])
    elif method == "POST":
        asked.images.append(body)
    return asked


def mark(image):
    """A number that tells images apart: the features of the stand-in are that number."""
    data = image if isinstance(image, bytes) else image.tobytes()
    return float(sum(data[:512]) % 1000)


def entry(index, **changes):
    return {
        "index": index,
        "grid": GRID,
        "original_size": [32, 48],
        "resized_to": [32, 48],
        "bucket": "32x48",
        "affine": [[1 / 16, 0, 0], [0, 1 / 16, 0]],
        "cache": "miss",
        **changes,
    }


def metadata(entries, **changes):
    values = {
        "model": "fake",
        "model_digest": DIGEST,
        "patch_size": "16",
        "layers": "[11]",
        "dtype": "float16",
        "layout": "grid",
        "normalize": "false",
        "images": json.dumps(entries),
    }
    return values | changes


def features_of(image):
    return torch.full((*GRID, CHANNELS), mark(image), dtype=torch.float16)


def answer(asked, errors=None, **changes):
    """Safetensors of all images; `errors` are those of images, by position."""
    errors = errors or {}
    tensors = {
        f"features.{i}": features_of(image)
        for i, image in enumerate(asked.images)
        if i not in errors
    }
    entries = [
        {"index": i, "error": errors[i]} if i in errors else entry(i)
        for i in range(len(asked.images))
    ]
    return safetensors.torch.save(tensors, metadata(entries, **changes))


def frame(index, image=None, error=None):
    if error is not None:
        data = safetensors.torch.save({}, {"index": str(index), "error": json.dumps(error)})
    else:
        tensors = {f"features.{index}": features_of(image)}
        data = safetensors.torch.save(tensors, metadata([entry(index)], index=str(index)))
    return len(data).to_bytes(8, "little") + data


END = bytes(8)


def frames(asked, order=None, errors=None):
    """All frames in an order, and the end."""
    errors = errors or {}
    order = range(len(asked.images)) if order is None else order
    return b"".join(frame(i, asked.images[i], errors.get(i)) for i in order) + END


def suited(asked):
    """What the service would answer: frames or safetensors."""
    if asked.headers["accept"] == FRAMES["content-type"]:
        return 200, FRAMES, frames(asked)
    return 200, SAFETENSORS, answer(asked)


def error(status, code, *, retryable=False, headers=None, **detail):
    body = {"code": code, "message": f"{code} happened", "retryable": retryable}
    body |= {"request_id": "r-9"} | detail
    return (
        status,
        {"content-type": "application/json", **(headers or {})},
        json.dumps({"error": body}).encode(),
    )


class Script:
    """Answers in turn; the last one, or what suits, for ever. Notes what was asked."""

    def __init__(self, *answers):
        self.answers = list(answers) or [suited]
        self.asked = []
        self._lock = threading.Lock()

    def __call__(self, asked):
        with self._lock:
            self.asked.append(asked)
            turn = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return turn(asked) if callable(turn) else turn

    def mock(self, request):
        """As the handler of a `MockTransport`."""
        asked = take_apart(request.method, str(request.url), request.headers, request.content)
        result = self(asked)
        if isinstance(result, Exception):
            raise result
        status, headers, body = result
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))


class AsyncBlocking:
    """`AsyncFeatureClient` with the blocking methods of `FeatureClient`."""

    def __init__(self, url=URL, **settings):
        self._make = lambda: AsyncFeatureClient(url, **settings)

    def _call(self, name, *arguments, **options):
        async def call():
            async with self._make() as client:
                return await getattr(client, name)(*arguments, **options)

        return asyncio.run(call())

    def feature(self, *arguments, **options):
        return self._call("feature", *arguments, **options)

    def features(self, *arguments, **options):
        return self._call("features", *arguments, **options)

    def info(self):
        return self._call("info")

    def stream(self, *arguments, **options):
        async def call():
            async with self._make() as client:
                return [item async for item in client.stream(*arguments, **options)]

        return asyncio.run(call())


def make_client(kind, script=None, url=URL, **settings):
    """A client of either kind; with a script, without network."""
    if script is not None:
        settings["transport"] = httpx.MockTransport(script.mock)
    if kind == "async":
        return contextlib.nullcontext(AsyncBlocking(url, **settings))
    return FeatureClient(url, **settings)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.num_connections += 1

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        server = self.server
        with server.lock:
            server.num_running += 1
            server.most_running = max(server.most_running, server.num_running)
        asked = take_apart("POST", self.path, self.headers, body)
        try:
            status, headers, pieces = server.script(asked)
        finally:
            with server.lock:
                server.num_running -= 1
        pieces = [pieces] if isinstance(pieces, bytes) else pieces
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        is_chunked = "content-length" not in headers
        if is_chunked:
            self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
                self.wfile.flush()
            if is_chunked:
                self.wfile.write(b"0\r\n\r\n")
            else:
                self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def running(script):
    """A real HTTP server with a script on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.script, server.lock = script, threading.Lock()
    server.num_connections = server.num_running = server.most_running = 0
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def pixels(height=4, width=5, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
