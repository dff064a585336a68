"""Which response format a request gets, from its header `Accept`."""

from typing import Literal

from service.errors import NotAcceptableError

MediaType = Literal[
    "application/x-safetensors",
    "application/x-npy",
    "application/json",
    "application/octet-stream",
    "application/x-refinery-frames",
    "image/png",
]
MEDIA_TYPES: tuple[MediaType, ...] = (
    "application/x-safetensors",
    "application/x-npy",
    "application/json",
    "application/octet-stream",
    "application/x-refinery-frames",
    "image/png",
)


def negotiate(accept: str | None) -> MediaType:
    """The offered format that `Accept` likes best; safetensors when it does not mind.

    Raises:
        NotAcceptableError: it names no format that is offered.
    """
    if not accept:
        return MEDIA_TYPES[0]
    ranges = [_media_range(text) for text in accept.split(",")]
    best: MediaType | None = None
    best_quality = 0.0
    for media in MEDIA_TYPES:
        matching = [item for item in ranges if _covers(item[0], media)]
        # The most specific range decides: `*/*;q=0.1` does not weaken `application/json`.
        quality = max(matching, key=lambda item: -item[0].count("*"))[1] if matching else 0.0
        if quality > best_quality:
            best, best_quality = media, quality
    if best is None:
        raise NotAcceptableError(
            f"Accept is {accept[:80]!r}; this service offers {', '.join(MEDIA_TYPES)}"
        )
    return best


def _media_range(text: str) -> tuple[str, float]:
    media, *parameters = (part.strip() for part in text.split(";"))
    quality = 1.0
    for parameter in parameters:
        if parameter.lower().startswith("q="):
            try:
                quality = float(parameter[2:])
            except ValueError:
                quality = 0.0
    return media.lower(), quality


def _covers(media_range: str, media: MediaType) -> bool:
    if media_range == media:
        return True
    kind, _, subtype = media_range.partition("/")
    return subtype == "*" and kind in ("*", media.split("/")[0])
