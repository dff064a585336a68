"""What both clients are made of but for the transport."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import httpx2 as httpx

from service.client.errors import FeatureError, InputError
from service.client.exchange import Exchange, Mode, Source
from service.client.features import Features
from service.client.requests import Box
from service.client.retry import Deadline

if TYPE_CHECKING:
    from service.client.images import ImageInput

# Servers commonly close what was idle for 5 s: leave before they do.
_KEEPALIVE_SECONDS = 4.0
_END = object()


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a client asks; see `FeatureClient`."""

    url: str
    api_key: str | None = field(repr=False)
    model: str | None
    timeout_seconds: float
    deadline_seconds: float | None
    max_retries: int
    max_connections: int
    batch_images: int

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url is {self.url!r}; give one like http://127.0.0.1:8000")
        if self.max_connections < 1 or self.batch_images < 1 or self.max_retries < 0:
            raise ValueError(
                f"max_connections is {self.max_connections}, batch_images {self.batch_images}, "
                f"max_retries {self.max_retries}; give at least 1, 1 and 0"
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"timeout_seconds is {self.timeout_seconds}; give more than 0")
        Deadline(self.deadline_seconds)

    @property
    def endpoint(self) -> str:
        """Where requests for features go."""
        return f"{self.url.rstrip('/')}/features"

    def http_arguments(self) -> dict[str, Any]:
        """Arguments of the HTTP client."""
        # Tensors do not compress; a proxy that tries costs more time than it saves.
        headers = {"accept-encoding": "identity", "user-agent": "vit-refinery"}
        if self.api_key is not None:
            headers["authorization"] = f"Bearer {self.api_key}"
        return {
            "headers": headers,
            "timeout": self.timeout_seconds,
            "limits": httpx.Limits(
                max_connections=self.max_connections,
                max_keepalive_connections=self.max_connections,
                keepalive_expiry=_KEEPALIVE_SECONDS,
            ),
        }

    def deadline(self, seconds: float | None) -> Deadline:
        """A call's deadline: its own, or the client's."""
        return Deadline(self.deadline_seconds if seconds is None else seconds)

    def exchange(
        self,
        sources: Sequence[Source],
        options: Mapping[str, object],
        *,
        mode: Mode,
        deadline: Deadline,
    ) -> Exchange:
        """The work for a few images."""
        if self.model is not None:
            options = {"model": self.model, **options}
        return Exchange(
            sources, options, mode=mode, deadline=deadline, max_retries=self.max_retries
        )


class SourceCounter:
    """Gives images their numbers and boxes, one after the other.

    Attributes:
        num_sources: How many there were.
    """

    def __init__(self, boxes: Iterable[Sequence[Box]] | None) -> None:
        self.num_sources = 0
        self._boxes = None if boxes is None else iter(boxes)

    def number(self, image: "ImageInput") -> Source:
        """The next source.

        Raises:
            InputError: there are no boxes left.
        """
        boxes = None
        if self._boxes is not None:
            found = next(self._boxes, _END)
            if found is _END:
                raise self._wrong("fewer")
            boxes = found
        self.num_sources += 1
        return Source(self.num_sources - 1, image, boxes)  # type: ignore[arg-type]

    def end(self) -> None:
        """All images are taken.

        Raises:
            InputError: there are boxes left.
        """
        if self._boxes is not None and next(self._boxes, _END) is not _END:
            raise self._wrong("more")

    def _wrong(self, compared: str) -> InputError:
        return InputError(
            f"boxes has {compared} entries than there are images; give a list of boxes for each "
            "image, [] for none",
            code="invalid_input",
        )


def take_batches(
    images: Iterable["ImageInput"], counter: SourceCounter, batch_images: int
) -> Iterator[list[Source]]:
    """Numbered images in batches, taken only when a batch is asked for.

    Raises:
        InputError: there are not as many boxes as images.
    """
    remaining = iter(images)
    while batch := [counter.number(image) for image in islice(remaining, batch_images)]:
        yield batch
    counter.end()


def in_order(
    outcomes: Mapping[int, Features | FeatureError], num_sources: int
) -> list[Features | FeatureError]:
    """Outcomes in the order of their images."""
    return [outcomes[index] for index in range(num_sources)]
