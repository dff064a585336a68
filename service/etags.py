"""Names of answers, so that a client that has one need not fetch it again.

They follow from the request alone, because features follow from the image's bytes, the model and
the options. They are weak in HTTP's sense: the same answer may differ in its last bits when the
image was encoded in other company.
"""

import hashlib
from collections.abc import Sequence

import orjson

from service.negotiation import MediaType
from service.options import FeatureOptions
from service.work import Item


def etag_of(media: MediaType, items: Sequence[Item], options: FeatureOptions) -> str:
    """The answer's name: two requests share it exactly when their answers are equal."""
    found = hashlib.sha256(media.encode())
    for item in items:
        found.update(f"\n{item.key} {item.original}".encode())
    found.update(orjson.dumps(options.shaping(), option=orjson.OPT_SORT_KEYS))
    if items:
        found.update(items[0].plan.model.name.encode())
    return f'W/"{found.hexdigest()[:32]}"'


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether the header `If-None-Match` names the answer, by weak comparison.

    `*` names none: a client that has no answer would get none.
    """
    if if_none_match is None:
        return False
    tags = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag.removeprefix("W/") in tags
