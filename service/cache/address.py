"""Where Redis is and how to get in, from the settings, refused clearly when it cannot be right."""

import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from service.settings import SettingsError

_DEFAULT_PORT = 6379
_FORM = "redis://[user@]host[:port][/db], or rediss:// for TLS"


@dataclass(frozen=True, slots=True)
class RedisAddress:
    """A Redis; neither `str` nor `repr` shows the password."""

    host: str
    port: int = _DEFAULT_PORT
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    is_tls: bool = False

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}/{self.db}"


def read_address(url: str, password_file: Path | None) -> RedisAddress:
    """The address that `url` names, with the password of the file.

    Raises:
        SettingsError: the URL or file cannot be used; the text never holds the password.
    """
    address = parse_url(url)
    if password_file is not None:
        if address.password is not None:
            raise SettingsError(
                "--cache has a password and --cache-password-file is given too: leave the one in "
                "the URL out, as any user of this machine can read it there"
            )
        address = replace(address, password=_read_password(password_file))
    if address.username is not None and address.password is None:
        raise SettingsError(
            f"--cache names the user {address.username!r} but no password: give "
            "--cache-password-file"
        )
    return address


def parse_url(url: str) -> RedisAddress:
    """The address that a URL names.

    Raises:
        SettingsError: it is no URL of a Redis.
    """
    try:
        parts = urlsplit(url)
        port = _DEFAULT_PORT if parts.port is None else parts.port
        database = int(parts.path.strip("/") or 0)
    except ValueError:
        # The cause would show the URL, which may hold a password.
        raise SettingsError(f"--cache has no valid port or database; write {_FORM}") from None
    if parts.scheme not in ("redis", "rediss") or not parts.hostname or port == 0 or database < 0:
        raise SettingsError(f"--cache names no Redis; write {_FORM}")
    if parts.query or parts.fragment:
        raise SettingsError(f"--cache has something after ? or #, which it does not take: {_FORM}")
    return RedisAddress(
        host=parts.hostname,
        port=port,
        db=database,
        username=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        is_tls=parts.scheme == "rediss",
    )


def read_tls(address: RedisAddress, ca_file: Path | None) -> ssl.SSLContext | None:
    """What is needed to speak TLS with that Redis; None where TLS is not asked for.

    Only authorities of `ca_file` are trusted; None: those that the system trusts. The certificate
    must name the host.

    Raises:
        SettingsError: TLS is off, or the file has no certificate that can be read.
    """
    if not address.is_tls:
        if ca_file is not None:
            raise SettingsError(
                "--cache-ca-file is for TLS and --cache does not use it: write rediss://"
            )
        return None
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise SettingsError(
            f"--cache-ca-file {ca_file} cannot be used ({error}): give a PEM file of certificates"
        ) from error


def _read_password(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        # The cause would show the password.
        raise SettingsError(f"--cache-password-file {path} is not UTF-8 text") from None
    except OSError as error:
        raise SettingsError(
            f"--cache-password-file {path} cannot be read: {error.strerror}"
        ) from error
    password = text.rstrip("\r\n")
    if not password or "\n" in password:
        raise SettingsError(
            f"--cache-password-file {path} has {len(text.splitlines())} lines; write the password "
            "in one"
        )
    return password
