"""`GET /`, `GET /docs` and `GET /static/...`: files of this package, read once at the start.

Nothing comes from elsewhere: the pages work offline, and their Content-Security-Policy has the
browser refuse whatever is not from this service.
"""

import hashlib
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from service import errors
from service.hints import nearest

_MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_SECURITY_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
}


class WebFile(NamedTuple):
    """A file as it is sent."""

    content: bytes
    media_type: str
    etag: str


def _read_files(folder: str) -> dict[str, WebFile]:
    files = {}
    for entry in resources.files("service.web").joinpath(folder).iterdir():
        suffix = entry.name[entry.name.rfind(".") :]
        content = entry.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        files[entry.name] = WebFile(content, _MEDIA_TYPES[suffix], etag)
    return files


_PAGES = _read_files("pages")
_STATIC = _read_files("static")

router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def playground(request: Request) -> Response:
    """The playground: a photograph and what the models make of it."""
    return _answer(_PAGES["index.html"], request)


@router.api_route("/docs", methods=["GET", "HEAD"])
async def docs(request: Request) -> Response:
    """The API for people, made in the browser from `/openapi.json`."""
    return _answer(_PAGES["docs.html"], request)


@router.api_route("/static/{name}", methods=["GET", "HEAD"])
async def static(name: str, request: Request) -> Response:
    """A script, style sheet or icon of the pages.

    Raises:
        NotFoundError: there is no such file.
    """
    if name not in _STATIC:
        raise errors.NotFoundError(f"no file {name[:80]!r} in /static; {nearest(name, _STATIC)}")
    return _answer(_STATIC[name], request)


def _answer(file: WebFile, request: Request) -> Response:
    # File names stay the same from version to version, so browsers are to ask each time; the
    # answer is mostly 304.
    headers = {**_SECURITY_HEADERS, "cache-control": "no-cache", "etag": file.etag}
    if _has_current(request.headers.get("if-none-match", ""), file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


def _has_current(if_none_match: str, etag: str) -> bool:
    known = {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
    return etag in known or "*" in known
