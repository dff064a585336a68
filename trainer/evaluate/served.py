"""Backbones behind a feature service: so that what is served is what is measured.

The contract is the one of `docs/api.md`: pixels go as a safetensors file to `POST /features` in
the size that they are to be encoded at, and float32 tokens come back.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import random
import time
import weakref
from collections.abc import Callable, Mapping, Sequence

import httpx2 as httpx
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trainer.evaluate.errors import SubjectError

logger = logging.getLogger(__name__)

# A batch of large images on a busy CPU takes its time; the service has its own limit.
_TIMEOUT_SECONDS = 300.0
_MAX_RETRIES = 8
_FIRST_DELAY_SECONDS, _LONGEST_DELAY_SECONDS = 0.5, 8.0
# A service that asks for more is down rather than busy.
_LONGEST_RETRY_AFTER_SECONDS = 60.0
_RETRYABLE_STATUSES = frozenset({408, 429, 502, 503, 504})
_BODY_ROOM = 4096  # the header of a safetensors file, at most
_SHOWN_CHARACTERS = 300


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class ServedModel(_Document):
    """What `/info` says of a model, as far as it matters here."""

    name: str
    backbone: str
    digest: str
    is_refined: bool
    patch_size: int
    embed_dim: int
    native_size: tuple[int, int]
    register_width: int
    precision: str


class _Limits(_Document):
    max_body_bytes: int
    max_images: int
    max_feature_bytes: int
    max_response_bytes: int
    batch_tokens: int


class ServiceInfo(_Document):
    """What `/info` says."""

    models: tuple[ServedModel, ...]
    limits: _Limits
    versions: dict[str, str]
    version: str

    def find(self, name: str) -> ServedModel:
        """The model of that name.

        Raises:
            SubjectError: no model of that name is served.
        """
        for model in self.models:
            if model.name == name:
                return model
        served = ", ".join(
            f"{model.name} ({'refined' if model.is_refined else 'raw'})" for model in self.models
        )
        raise SubjectError(f"no model {name!r} is served; choose one of: {served}")


class ServiceConnection:
    """Asks one service, and asks again where that may help.

    Args:
        url: Of the service, as http://127.0.0.1:8000.
        api_key: Sent as bearer token.
        transport: Instead of the network.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise SubjectError(f"--url {url!r} is no URL; write it as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._has_key = bool(api_key)
        self._http = httpx.Client(headers=headers, timeout=_TIMEOUT_SECONDS, transport=transport)
        self._sleep = sleep
        # Subjects share it, and none of them knows which is the last.
        weakref.finalize(self, self._http.close)

    def info(self) -> ServiceInfo:
        """What is served and allowed.

        Raises:
            SubjectError: the service does not say.
        """
        response = self.ask("GET", "/info")
        try:
            return ServiceInfo.model_validate_json(response.content)
        except ValidationError as error:
            raise SubjectError(
                f"{self.url}/info does not answer as a feature service of vit-refinery does "
                f"({error.error_count()} fields missing or wrong); check --url"
            ) from error

    def ask(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> httpx.Response:
        """An answer with status 200.

        Raises:
            SubjectError: there is none, also after some tries where the reason may pass.
        """
        url = self.url + path
        for tried in range(_MAX_RETRIES + 1):
            asked = 0.0
            try:
                response = self._http.request(
                    method, url, params=params, headers=headers, content=content
                )
            except httpx.ConnectError as error:
                raise SubjectError(
                    f"{url} cannot be reached ({error}); start the service with "
                    "python -m service, or check --url"
                ) from error
            except httpx.TransportError as error:
                reason = f"{url} gave no answer: {type(error).__name__} {error}".rstrip()
            else:
                if response.status_code == httpx.codes.OK:
                    return response
                reason = self._reason(url, response)
                if response.status_code not in _RETRYABLE_STATUSES:
                    raise SubjectError(reason)
                asked = _retry_after(response.headers.get("retry-after"))
            if tried == _MAX_RETRIES or asked > _LONGEST_RETRY_AFTER_SECONDS:
                break
            backoff = min(_LONGEST_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2.0**tried)
            delay = asked + backoff * (0.5 + 0.5 * random.random())
            logger.info("%s; asking again in %.1f s", reason, delay)
            self._sleep(delay)
        raise SubjectError(
            f"{reason}; gave up after {tried + 1} tries: run again to go on from here"
        )

    def _reason(self, url: str, response: httpx.Response) -> str:
        if response.status_code == httpx.codes.UNAUTHORIZED:
            what = "the key was refused" if self._has_key else "it wants an API key"
            return f"{url}: {what} (401); give --api-key-file FILE with a key that it knows"
        try:
            detail = json.loads(response.content)["error"]
            return f"{url}: {detail['message']} ({response.status_code} {detail['code']})"
        except (ValueError, KeyError, TypeError):
            shown = response.text.strip()[:_SHOWN_CHARACTERS] or "no explanation"
            return f"{url} answered {response.status_code}: {shown}"


def _retry_after(value: str | None) -> float:
    """Seconds of a `Retry-After` header; the service sends them as a number."""
    return float(value) if value is not None and value.strip().isdecimal() else 0.0


class ServedSubject:
    """One model of a service.

    Args:
        connection: To the service.
        model: Its name there; None: the default one.
        register_width: Border in patches; default the model's rule.
        name: Before its row.
    """

    def __init__(
        self,
        connection: ServiceConnection,
        model: str | None = None,
        *,
        register_width: int | None = None,
        name: str = "served",
    ) -> None:
        info = connection.info()
        if not info.models:
            raise SubjectError(f"{connection.url} serves no model; load one first")
        self.model = info.models[0] if model is None else info.find(model)
        self.name = name
        self.spec = f"{connection.url} {self.model.name}"
        self.digest = self.model.digest
        self.patch_size = self.model.patch_size
        self.native_size = self.model.native_size
        self._limits = info.limits
        self._connection = connection
        self._options = {
            "model": self.model.name,
            "layers": "-1",
            "layout": "tokens",
            "dtype": "float32",
        }
        if register_width is not None:
            self._options["register_width"] = str(register_width)
        self.key = self._fingerprint(info)

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Tokens of uint8 images of whole patches: float32 `[B, N, C]`.

        Raises:
            SubjectError: the service refuses, or gives no answer.
        """
        step = self._batch_images(*images_B3HW.shape[-2:])
        starts = range(0, len(images_B3HW), step)
        return torch.cat([self._ask(images_B3HW[start : start + step]) for start in starts])

    def _batch_images(self, height: int, width: int) -> int:
        """Images in a request, so that no limit of the service is passed."""
        limits, patch_size = self._limits, self.patch_size
        num_patches = math.ceil(height / patch_size) * math.ceil(width / patch_size)
        values = num_patches * self.model.embed_dim
        return max(
            1,
            min(
                limits.max_images,
                (limits.max_body_bytes - _BODY_ROOM) // (height * width * 3),
                limits.max_feature_bytes // (4 * values),
                limits.max_response_bytes // (4 * values + _BODY_ROOM),
                # More would wait for the service's own batches, and be refused when it is busy.
                limits.batch_tokens // num_patches,
            ),
        )

    def _ask(self, images_B3HW: Tensor) -> Tensor:
        response = self._post(images_B3HW)
        digest = response.headers.get("x-model-digest")
        if digest != self.digest:
            raise SubjectError(
                f"{self.spec} has other weights than when this began ({str(digest)[:12]} instead "
                f"of {self.digest[:12]}): the model was replaced; run again"
            )
        try:
            tensors = load(response.content)
            return torch.stack([tensors[f"features.{i}"] for i in range(len(images_B3HW))])
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise SubjectError(
                f"{self.spec} answered with something else than the tokens of {len(images_B3HW)} "
                f"images ({error}); check that --url is a feature service of vit-refinery"
            ) from error

    def _post(self, images_B3HW: Tensor) -> httpx.Response:
        height, width = images_B3HW.shape[-2:]
        return self._connection.ask(
            "POST",
            "/features",
            params={**self._options, "size": f"{height},{width}"},
            headers={
                "content-type": "application/x-safetensors",
                "accept": "application/x-safetensors",
            },
            content=save({"images": images_B3HW.permute(0, 2, 3, 1).contiguous()}),
        )

    def _fingerprint(self, info: ServiceInfo) -> str:
        """What decides the features of given pixels, as far as the service tells it.

        `/info` does not say how the register border is filled. The name of an answer does hold
        that: of a fixed picture it is another one as soon as anything else decides the features.
        """
        side = self.patch_size
        answer = self._post(torch.zeros(1, 3, side, side, dtype=torch.uint8))
        parts = {
            "model": self.model.model_dump(),
            "options": self._options,
            "versions": info.versions,
            "version": info.version,
            "etag": answer.headers.get("etag"),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def served_baseline(models: Sequence[ServedModel], refined: ServedModel) -> str:
    """The name of the one raw model that may be what a served one was refined from.

    Raises:
        SubjectError: there is none, or there are several.
    """
    raw = [
        model.name
        for model in models
        if not model.is_refined
        and (model.backbone, model.patch_size) == (refined.backbone, refined.patch_size)
    ]
    if len(raw) == 1:
        return raw[0]
    found = (
        f"several raw models of {refined.backbone}: {', '.join(raw)}"
        if raw
        else (f"no raw model of {refined.backbone}")
    )
    raise SubjectError(
        f"the service has {found}; give --baseline NAME, or --baseline none to measure "
        f"{refined.name} alone"
    )
