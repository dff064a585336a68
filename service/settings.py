"""The service's settings: one frozen model, the only place where a setting is written down.

`service.command_line` makes a flag and a `REFINERY_*` variable of every field.
"""

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_MIB = 1024 * 1024
_MAX_CPU_ENGINES = 8
_BUCKET = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")
# No dot in front: clients take the path /admin/models/.. for another one.
_MODEL_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")

CommaSeparated = tuple[str, ...]


class SettingsError(Exception):
    """A flag or variable that does not exist or has an impossible value."""


class Settings(BaseModel):
    """Everything that an operator can choose."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: tuple[str, ...] = Field(
        min_length=1,
        description="artifact folder, name of the catalogue or of timm (hf-hub:... too), or "
        "local-dir:PATH; as NAME=PATH under a name; give it several times to serve several, the "
        "first by default",
    )
    weights: Path | None = Field(
        None,
        description="checkpoint for the model that --model names: a file, an index of shards, or a "
        "folder",
    )
    random_weights: bool = Field(
        False, description="serve untrained weights of a timm model name, for load tests"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?(,cuda:\d+)*)$",
        description="auto, cpu, cuda, or several as cuda:0,cuda:1; devices share one queue",
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto is bf16 where the hardware multiplies it natively"
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="serve /metrics on this port of the same host, without key, not on --port",
    )
    insecure: bool = Field(
        False, description="allow a non-loopback --host although requests need no key"
    )
    api_key_file: Path | None = Field(
        None,
        description="file of hashed API keys (python -m service.keys makes them); with it every "
        "route but the probes needs a key; read again when it changes",
    )
    cors_origins: CommaSeparated = Field(
        (), description="origins whose pages may call the service, as https://host, with commas"
    )
    allow_url_hosts: CommaSeparated = Field(
        (),
        description="hosts that images may be fetched from by URL, with commas, *.host for those "
        "below one; none: URLs are refused",
    )
    url_seconds: float = Field(5.0, gt=0, le=60, description="how long fetching a URL may take")
    max_url_redirects: int = Field(3, ge=0, le=10, description="most redirects of a URL")
    max_body_bytes: int = Field(
        32 * _MIB, ge=1, description="largest request body, and largest file behind a URL, bytes"
    )
    max_header_bytes: int = Field(
        32 * 1024, ge=1024, description="most bytes of a request's line and headers"
    )
    max_images: int = Field(32, ge=1, description="most images in a request")
    max_image_pixels: int = Field(
        40_000_000, ge=1, description="most pixels that an image's header may declare"
    )
    max_image_tokens: int = Field(
        8192,
        ge=1,
        description="most tokens, register border included, that one image may cost at the size "
        "asked for; memory and time of one forward grow with it",
    )
    max_size: int = Field(
        4096, ge=1, description="longest side in pixels that images may be asked to be encoded at"
    )
    max_layers: int = Field(8, ge=1, description="most layers in a request")
    max_image_boxes: int = Field(
        1000, ge=1, description="most boxes of one image, with the option boxes"
    )
    max_box_vectors: int = Field(
        65536,
        ge=1,
        description="most feature vectors that the boxes of a request may ask for (boxes x "
        "box_size^2 x layers), also those of a batch",
    )
    max_response_bytes: int = Field(
        1024 * _MIB,
        ge=1,
        description="most bytes of features in one answer; of frames, of one image",
    )
    max_held_body_bytes: int = Field(
        1024 * _MIB,
        ge=1,
        description="bytes of bodies that may be in memory, of all requests together, at least "
        "--max-body-bytes; beyond it requests get 429",
    )
    max_feature_bytes: int = Field(
        1024 * _MIB,
        ge=1,
        description="most bytes of features that a request may ask for, as the model computes "
        "them (images x layers x patches x channels): so much it holds in memory",
    )
    batch_tokens: int = Field(
        16384,
        ge=1,
        description="most tokens in a batch, at least --max-image-tokens; raise it until images "
        "per second stop growing",
    )
    batch_seconds: float = Field(
        0.1,
        gt=0,
        description="longest that a batch should take at the measured rate: who comes meanwhile "
        "waits that long; a single image may take longer",
    )
    buckets: CommaSeparated = Field(
        (),
        description="sizes that are made ready before requests are taken, as 448x448,448x672 "
        "(height x width, px) with commas; the model's native size always is",
    )
    only_buckets: bool = Field(
        False, description="refuse sizes that are no bucket, so that nothing is compiled late"
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        "auto",
        description="replay the forward of each bucket from CUDA graphs; auto: on CUDA, and "
        "without them when a capture fails, which is logged and counted",
    )
    jpeg_decoder: Literal["cpu", "nvjpeg"] = Field(
        "cpu",
        description="nvjpeg decodes JPEG on the CUDA device; pixels differ a little between them",
    )
    queue_seconds: float = Field(
        10.0,
        gt=0,
        description="work that may wait, in seconds of the measured rate; beyond it requests get "
        "429 with Retry-After",
    )
    max_queue_tokens: int = Field(
        0, ge=0, description="the same bound in tokens; 0: by --queue-seconds"
    )
    request_seconds: float = Field(
        60.0,
        gt=0,
        description="how long a request may take from its headers to its answer; x-deadline-ms "
        "can only shorten it",
    )
    body_seconds: float = Field(
        30.0, gt=0, description="how long a request body may take to arrive"
    )
    header_seconds: float = Field(
        10.0, gt=0, description="how long a request's line and headers may take to arrive"
    )
    decode_threads: int = Field(
        0, ge=0, le=256, description="threads that decode and resize images; 0: one per core"
    )
    torch_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="threads of all forwards on a CPU together; 0: one per core. A forward alone "
        "has them all, several at a time share them",
    )
    cpu_engines: int = Field(
        0,
        ge=0,
        le=64,
        description="forwards at a time on a CPU; 0: one per torch thread, at most 8",
    )
    cache: str = Field(
        "memory",
        repr=False,  # its URL may hold a password
        pattern=r"^(memory|off|rediss?://.+)$",
        description="memory: in this process; redis://[user@]host:port/db or rediss:// (TLS): "
        "shared by replicas, behind the one in memory; off",
    )
    cache_bytes: int = Field(
        512 * _MIB, ge=0, description="bytes of the cache in memory; 0: none in front of Redis"
    )
    cache_ttl_seconds: int = Field(
        86400, ge=1, description="how long Redis keeps a value that nobody asks for"
    )
    cache_max_value_bytes: int = Field(16 * _MIB, ge=1, description="larger values are not cached")
    cache_password_file: Path | None = Field(None, description="file with the password of Redis")
    cache_ca_file: Path | None = Field(
        None, description="PEM file of the authority that signed the certificate of Redis"
    )
    drain_seconds: float = Field(
        30.0, gt=0, description="how long SIGTERM waits for requests in flight"
    )
    stuck_seconds: float = Field(
        60.0,
        gt=0,
        description="an engine that works longer than this on one batch is taken for dead: /livez "
        "fails and the process exits with 1",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least severe log line that is written"
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="log lines for people, or one JSON object a line"
    )
    otlp_endpoint: str | None = Field(
        None,
        repr=False,
        pattern=r"^https?://.+",
        description="send traces by OpenTelemetry to this HTTP endpoint; needs the extra otel",
    )

    @field_validator("model", "cors_origins", "allow_url_hosts", "buckets", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @field_validator("buckets")
    @classmethod
    def _check_buckets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for bucket in value:
            if not _BUCKET.fullmatch(bucket):
                raise ValueError(f"{bucket!r} is no bucket; write height x width, as 448x672")
        return value

    @field_validator("model")
    @classmethod
    def _check_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [named_model(text)[0] for text in value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models are called {name!r}; name them: NAME=PATH")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_tokens < self.max_image_tokens:
            # A batch that cannot hold the largest image would leave it in the queue for ever.
            raise ValueError(
                f"batch_tokens {self.batch_tokens} is less than max_image_tokens "
                f"{self.max_image_tokens}: set --batch-tokens to {self.max_image_tokens} or more"
            )
        if self.max_held_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_body_bytes {self.max_held_body_bytes} is less than max_body_bytes "
                f"{self.max_body_bytes}: set it to {self.max_body_bytes} or more"
            )
        if 0 < self.max_queue_tokens < self.max_image_tokens:
            raise ValueError(
                f"max_queue_tokens {self.max_queue_tokens} is less than max_image_tokens "
                f"{self.max_image_tokens}: set it to {self.max_image_tokens} or more"
            )
        if len(self.model) > 1 and (self.weights or self.random_weights):
            raise ValueError("--weights and --random-weights go with one --model")
        if not self.insecure and self.api_key_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines and requests need no key: "
                "give --api-key-file, listen on 127.0.0.1, or add --insecure"
            )
        return self

    @property
    def models(self) -> dict[str, str]:
        """What is served at the start, by name; the first is the default."""
        return dict(named_model(text) for text in self.model)

    @property
    def bucket_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) in pixels of each declared bucket."""
        sizes = (bucket.split("x") for bucket in self.buckets)
        return tuple((int(height), int(width)) for height, width in sizes)

    def shown(self) -> str:
        """All settings as JSON, without the passwords that URLs may hold."""
        urls = {"cache": without_password(self.cache)}
        if self.otlp_endpoint is not None:
            urls["otlp_endpoint"] = without_password(self.otlp_endpoint)
        return self.model_copy(update=urls).model_dump_json(indent=2)

    @property
    def num_decode_threads(self) -> int:
        return self.decode_threads or available_cores()

    @property
    def num_torch_threads(self) -> int:
        return self.torch_threads or available_cores()

    @property
    def num_cpu_engines(self) -> int:
        return self.cpu_engines or min(self.num_torch_threads, _MAX_CPU_ENGINES)


def without_password(url: str) -> str:
    """A URL, or what was meant as one, as it may be shown."""
    start = url.find("://") + 3 if "://" in url else 0
    # The password may have a colon or an @ itself.
    user, colon, _ = url[start:].partition(":")
    _, at, host = url[start:].rpartition("@")
    has_password = colon and at and "@" not in user
    return f"{url[:start]}{user}:***@{host}" if has_password else url


def named_model(text: str) -> tuple[str, str]:
    """Name and place of a model: `NAME=PATH`, or a path or timm name that gives the name itself."""
    name, equals, spec = text.partition("=")
    if equals and _MODEL_NAME.fullmatch(name):
        return name, spec
    last = text.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._-]", "-", last)[-64:], text


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
