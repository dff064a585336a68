"""Answers of `POST /features`, taken in whatever pieces they come."""

from collections.abc import Iterator, Mapping
from typing import Any

import httpx2 as httpx
import orjson

from service.client.errors import (
    AnswerError,
    ConnectionFailedError,
    FeatureError,
    from_answer,
    from_detail,
)
from service.client.exchange import FRAMES, SAFETENSORS, Exchange, Outcome
from service.client.features import Features, describe_answer, describe_image, tensors_by_image
from service.client.tensors import FrameReader, parse_safetensors

_MAX_ERROR_BYTES = 1 << 20


class Receiver:
    """Takes the answer to one try.

    Raises:
        AnswerError: it is in no format that was asked for.
    """

    def __init__(self, exchange: Exchange, status: int, headers: httpx.Headers) -> None:
        self._exchange = exchange
        self._status = status
        self._headers = headers
        self._body = bytearray()
        self._frames = FrameReader()
        self._answered: set[int] = set()
        self._media = headers.get("content-type", "").partition(";")[0].strip().lower()
        if status == httpx.codes.OK and self._media not in (SAFETENSORS, FRAMES):
            raise AnswerError(
                f"the answer is {self._media or 'of no content type'}, wanted {SAFETENSORS}; is "
                "this the address of the feature service?",
                code="unexpected_answer",
                status=status,
            )

    def feed(self, piece: bytes) -> Iterator[Outcome]:
        """The outcomes that this piece of the answer completes.

        Raises:
            DeadlineError: there is no time for more.
            AnswerError, FeatureError: see `Exchange.settle`.
        """
        self._exchange.check_deadline()
        if self._status == httpx.codes.OK and self._media == FRAMES:
            for frame in self._frames.feed(piece):
                yield from self._frame(frame)
        elif self._status == httpx.codes.OK or len(self._body) < _MAX_ERROR_BYTES:
            self._body += piece

    def end(self) -> Iterator[Outcome]:
        """The outcomes of the whole answer.

        Raises:
            FeatureError: the answer is an error, broken, or leaves an image out.
        """
        if self._status != httpx.codes.OK:
            error = from_answer(self._status, self._headers, self._body)
            raise error.about(self._exchange.index_of(error.index))
        if self._media == SAFETENSORS:
            yield from self._whole()
        elif not self._frames.is_complete:
            raise ConnectionFailedError(
                "the answer ends before its last frame", code="connection_failed", retryable=True
            )
        missing = next((p for p in range(self._exchange.num_sent) if p not in self._answered), None)
        if missing is not None:
            raise AnswerError(f"the answer leaves image {missing} out", code="malformed_answer")

    def _whole(self) -> Iterator[Outcome]:
        tensors, metadata = parse_safetensors(self._body)
        common = self._common(metadata)
        by_image = tensors_by_image(tensors, common["layer_numbers"])
        for place, entry in enumerate(_entries(metadata)):
            position = entry.get("index", place)
            if "error" in entry:
                yield from self._settle(position, self._error(entry["error"]))
            else:
                yield from self._settle(
                    position, self._features(position, common, entry, by_image.get(position))
                )

    def _frame(self, frame: bytearray) -> Iterator[Outcome]:
        tensors, metadata = parse_safetensors(frame)
        try:
            position = int(metadata["index"])
            detail = orjson.loads(metadata["error"]) if "error" in metadata else None
        except (KeyError, ValueError) as error:
            raise AnswerError(
                f"a frame without a readable index: {error}", code="malformed_answer"
            ) from error
        if detail is not None:
            yield from self._settle(position, self._error(detail))
            return
        common = self._common(metadata)
        by_image = tensors_by_image(tensors, common["layer_numbers"])
        entry = next(iter(_entries(metadata)), {})
        yield from self._settle(
            position, self._features(position, common, entry, by_image.get(position))
        )

    def _settle(self, position: int, result: Features | FeatureError) -> list[Outcome]:
        outcomes = self._exchange.settle(position, result)
        self._answered.add(position)
        return outcomes

    def _error(self, detail: Mapping[str, Any]) -> FeatureError:
        return from_detail(detail, request_id=self._headers.get("x-request-id"))

    def _common(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        return describe_answer(metadata) | {"request_id": self._headers.get("x-request-id")}

    def _features(
        self,
        position: int,
        common: Mapping[str, Any],
        entry: Mapping[str, Any],
        tensors: Mapping[Any, Any] | None,
    ) -> Features:
        own = describe_image(entry)
        asked = [(layer, "features") for layer in common["layer_numbers"]]
        if tensors is None or any(key not in tensors for key in asked):
            raise AnswerError(
                f"the answer has no features of image {position}", code="malformed_answer"
            )
        if own["cache"] is None and self._headers.get("x-cache") in ("hit", "miss"):
            own["cache"] = self._headers["x-cache"]
        index = self._exchange.index_of(position)
        return Features(index=-1 if index is None else index, tensors=tensors, **common, **own)


def _entries(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    try:
        entries = orjson.loads(metadata["images"])
    except (KeyError, ValueError) as error:
        raise AnswerError(
            f"the answer's list of images cannot be read: {error}", code="malformed_answer"
        ) from error
    if not (isinstance(entries, list) and all(map(_is_entry, entries))):
        raise AnswerError("the answer's list of images is none", code="malformed_answer")
    return entries


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("index", 0), int)
        and isinstance(entry.get("error", {}), dict)
    )
