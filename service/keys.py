"""API keys: a file of hashed keys, read again when it changes, and the command that makes them.

    python -m service.keys new alice --file keys.txt        # prints the key once
    python -m service.keys new operator --admin --file keys.txt
    python -m service.keys list --file keys.txt
    python -m service.keys revoke alice --file keys.txt
    python -m service.keys hash < key.txt                   # the hash of a key made elsewhere

One key a line, `NAME SHA256HEX [admin]`; empty lines and `# comments` are allowed, and a file
without keys admits nobody. Only hashes are kept, so who reads the file cannot ask for features with
it.
"""

import argparse
import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Container, Sequence
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers

from service.settings import SettingsError

logger = logging.getLogger(__name__)

_FILE_VARIABLE = "REFINERY_API_KEY_FILE"
_KEY_BYTES = 32
# A hash only protects what cannot be guessed; `new` makes keys of 43 characters.
_MIN_KEY_CHARACTERS = 16
_MAX_FILE_BYTES = 1024 * 1024
_CHECK_SECONDS = 1.0
# More would be guessing, and each is compared with every key there is.
_MAX_PRESENTED = 4
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class Identity(NamedTuple):
    """Whose key a request has."""

    name: str
    is_admin: bool


class KeyRing:
    """The keys of a file.

    Args:
        path: The file.

    Raises:
        SettingsError: it cannot be read, or a line of it is no key.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checked = time.monotonic()
        self._signature = _signature(path)
        self._keys = self._read()
        self._complaint = ""

    def __len__(self) -> int:
        return len(self._keys)

    def authenticate(self, headers: Headers, *, takes_basic: bool = True) -> Identity | None:
        """Whose key came as `Authorization: Bearer`, `x-api-key` or password of HTTP Basic.

        Takes microseconds, and the same time whichever key it is. A request that shows more than
        four is nobody's. A changed file counts after one second at most; while it is unreadable or
        wrong, the keys that it last had stay valid.
        """
        self._refresh()
        presented = presented_keys(headers, takes_basic=takes_basic)
        if len(presented) > _MAX_PRESENTED:
            return None
        found = None
        for key in presented:
            digest = hashlib.sha256(key).digest()
            for known, identity in self._keys:  # no early exit: time must not tell how close it was
                if hmac.compare_digest(known, digest):
                    found = found or identity
        return found

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < _CHECK_SECONDS:
            return
        self._checked = now
        try:
            signature = _signature(self._path)
            if signature == self._signature and not self._complaint:
                return
            # The signature first: what is written while we read is then read once more.
            self._signature, self._keys = signature, self._read()
        except SettingsError as error:
            if str(error) != self._complaint:
                logger.error("%s; the %d keys read before stay valid", error, len(self._keys))
            self._complaint = str(error)
            return
        self._complaint = ""
        logger.info("read %d API keys from %s", len(self._keys), self._path)

    def _read(self) -> list[tuple[bytes, Identity]]:
        keys = _read(self._path)
        if not keys:
            logger.warning(
                "API key file %s has no keys: nobody is admitted until one is added, which takes a "
                "second: python -m service.keys new NAME --file FILE",
                self._path,
            )
        return keys


def presented_keys(headers: Headers, *, takes_basic: bool = True) -> list[bytes]:
    """Every key that a request shows; none of them is checked yet."""
    keys = [value.encode("latin-1") for value in headers.getlist("x-api-key")]
    for value in headers.getlist("authorization"):
        scheme, _, credentials = value.partition(" ")
        if scheme.lower() == "bearer":
            keys.append(credentials.strip().encode("latin-1"))
        elif scheme.lower() == "basic" and takes_basic:
            try:
                decoded = base64.b64decode(credentials.strip(), validate=True)
            except (binascii.Error, ValueError):
                continue
            keys.append(decoded.partition(b":")[2])
    return [key for key in keys if key]


def _signature(path: Path) -> tuple[int, int, int]:
    """Changes with the file; also when a symbolic link on the way leads elsewhere."""
    try:
        status = path.stat()
    except OSError as error:
        raise SettingsError(f"API key file {path}: {error.strerror}") from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> list[tuple[bytes, Identity]]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"API key file {path}: {error.strerror}") from None
    if len(text) > _MAX_FILE_BYTES:
        raise SettingsError(f"API key file {path} has more than {_MAX_FILE_BYTES} bytes")
    keys: dict[bytes, Identity] = {}
    names: set[str] = set()
    for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        problem = _problem(words, keys, names)
        if problem:
            raise SettingsError(
                f"API key file {path}, line {number}: {problem}; a line is NAME SHA256HEX [admin], "
                "as python -m service.keys new prints it"
            )
        keys[bytes.fromhex(words[1])] = Identity(words[0], len(words) == 3)
        names.add(words[0])
    return list(keys.items())


def _problem(words: Sequence[str], keys: Container[bytes], names: Container[str]) -> str:
    """What is wrong with a line; it is not shown, for it may hold a key that is not hashed."""
    if not 2 <= len(words) <= 3:
        return f"{len(words)} words"
    if not _NAME.fullmatch(words[0]):
        return "the name is not made of 1 to 64 letters, digits and ._@-"
    if not _HASH.fullmatch(words[1]):
        return "the second word is no SHA-256 in hexadecimal"
    if len(words) == 3 and words[2] != "admin":
        return "the third word is not 'admin'"
    if words[0] in names:
        return f"the name {words[0]!r} is taken by an earlier line"
    if bytes.fromhex(words[1]) in keys:
        return "an earlier line has the same key"
    return ""


def key_line(name: str, key: str, *, is_admin: bool) -> str:
    """The line of a key file that admits `key`."""
    return f"{name} {hash_key(key)}{' admin' if is_admin else ''}"


def hash_key(key: str) -> str:
    """SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(key.encode("utf-8")).hexdigest()


def _append(path: Path, line: str) -> None:
    """
    Raises:
        SettingsError: the file has a line like it, is wrong as it is, or cannot be written.
    """
    if path.exists() and path.stat().st_size:
        keys = dict(_read(path))
        names = {identity.name for identity in keys.values()}
        problem = _problem(line.split(), keys, names)
        if problem:
            raise SettingsError(f"API key file {path}: {problem}")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingsError(f"API key file {path}: {error.strerror}") from None
    with os.fdopen(descriptor, "rb+") as file:
        length = file.seek(0, os.SEEK_END)
        ends_open = length > 0 and os.pread(file.fileno(), 1, length - 1) != b"\n"
        file.write(b"\n" * ends_open + line.encode() + b"\n")


def _remove(path: Path, name: str) -> None:
    """
    Raises:
        SettingsError: the file has no such key, is wrong as it is, or cannot be written.
    """
    if name not in {identity.name for _, identity in _read(path)}:
        raise SettingsError(
            f"API key file {path} has no key called {name!r}; python -m service.keys list"
        )
    kept = [
        line
        for line in path.read_text("utf-8", "replace").splitlines(keepends=True)
        if line.partition("#")[0].split()[:1] != [name]
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Renamed, so that a service never reads half of it.
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(kept)
        temporary.chmod(path.stat().st_mode & 0o777)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SettingsError(f"API key file {path}: {error.strerror}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, revoke, list or hash keys; the exit status is 2 where that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m service.keys", description="Make and revoke API keys of --api-key-file."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a key and print it once")
    new.add_argument("name", help="whose key it is; log lines carry it")
    new.add_argument("--admin", action="store_true", help="allow /admin too")
    revoke = commands.add_parser("revoke", help="take a key away; a running service follows")
    revoke.add_argument("name", help="whose key it is")
    listing = commands.add_parser("list", help="print whose keys there are")
    for command, what in ((new, "append the line to"), (revoke, "change"), (listing, "read")):
        command.add_argument(
            "--file",
            type=Path,
            default=os.environ.get(_FILE_VARIABLE) or None,
            required=command is not new and not os.environ.get(_FILE_VARIABLE),
            help=f"{what} this file (default: {_FILE_VARIABLE} of the environment"
            + ("; without either the line is printed)" if command is new else ")"),
        )
    commands.add_parser("hash", help="read a key from standard input and print its hash")
    options = parser.parse_args(arguments)
    try:
        if options.command == "hash":
            return _print_hash(sys.stdin.readline().strip())
        if options.command == "new":
            return _print_new(options.name, options.file, is_admin=options.admin)
        if options.command == "revoke":
            _remove(options.file, options.name)
            sys.stderr.write(f"took {options.name} out of {options.file}\n")
        else:
            for _, identity in _read(options.file):
                sys.stdout.write(identity.name + " admin" * identity.is_admin + "\n")
    except SettingsError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _print_hash(key: str) -> int:
    if len(key) < _MIN_KEY_CHARACTERS or not key.isascii() or " " in key:
        raise SettingsError(
            f"the key has {len(key)} characters; a key is {_MIN_KEY_CHARACTERS} or more ASCII "
            "characters without spaces, and must be random: python -m service.keys new makes one"
        )
    sys.stdout.write(hash_key(key) + "\n")
    return 0


def _print_new(name: str, file: Path | None, *, is_admin: bool) -> int:
    if not _NAME.fullmatch(name):
        raise SettingsError(f"the name {name!r} is not made of 1 to 64 letters, digits and ._@-")
    key = secrets.token_urlsafe(_KEY_BYTES)
    line = key_line(name, key, is_admin=is_admin)
    if file is None:
        sys.stderr.write("the key, which is shown only now, and its line for --api-key-file:\n")
        sys.stdout.write(f"{key}\n{line}\n")
    else:
        _append(file, line)
        sys.stderr.write(f"appended {name} to {file}; the key is shown only now:\n")
        sys.stdout.write(key + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
