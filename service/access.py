"""Who may ask for what, decided from a request's path and headers alone.

With keys every path needs one, those that do not exist too, but for the probes: a route that is
added later is closed until somebody opens it here.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from service.errors import ForbiddenError, UnauthorizedError
from service.keys import Identity, KeyRing, presented_keys

PROBES = frozenset({"/livez", "/readyz", "/startupz", "/healthz"})
_ADMIN = "/admin"
_HARMLESS_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_admin_path(path: str) -> bool:
    """Whether `path` needs a key with the admin right."""
    return path == _ADMIN or path.startswith(_ADMIN + "/")


def check_access(scope: Scope, keys: KeyRing | None) -> Identity | None:
    """Whose request it is; None where no key is needed.

    Args:
        scope: Of an HTTP request.
        keys: The keys that are admitted; None lets everybody in, but not to /admin.

    Raises:
        UnauthorizedError: no valid key.
        ForbiddenError: the key has not the right, or no key could have it.
    """
    path = scope["path"]
    if path in PROBES:
        return None
    if keys is None:
        if is_admin_path(path):
            raise ForbiddenError(
                f"{_ADMIN} needs a key with the admin right and the service has no keys; start it "
                "with --api-key-file"
            )
        return None
    headers = Headers(scope=scope)
    is_foreign = _comes_from_another_site(scope["method"], headers)
    identity = keys.authenticate(headers, takes_basic=not is_foreign)
    if identity is None:
        if is_foreign and keys.authenticate(headers) is not None:
            raise ForbiddenError(
                "a page of another site sent this, with a key that the browser added by itself; "
                "send the key as Authorization: Bearer"
            )
        what = "the API key is not valid" if presented_keys(headers) else "no API key came"
        raise UnauthorizedError(
            f"{what}; send one as Authorization: Bearer KEY, as x-api-key: KEY, or as the password "
            "of HTTP Basic"
        )
    if is_admin_path(path) and not identity.is_admin:
        raise ForbiddenError(
            f"the key {identity.name!r} has not the admin right, which {_ADMIN} needs; "
            "python -m service.keys new NAME --admin makes one that has"
        )
    return identity


def _comes_from_another_site(method: str, headers: Headers) -> bool:
    """Browsers add HTTP Basic to requests of any page, once it was given for this service."""
    if method in _HARMLESS_METHODS:
        return False
    fetch_site = headers.get("sec-fetch-site")
    if fetch_site is not None:
        return fetch_site not in ("same-origin", "none")
    origin = headers.get("origin")
    if origin is None:
        return False
    try:
        return urlsplit(origin).netloc != headers.get("host")
    except ValueError:  # no origin of this site, whatever it is
        return True
