"""Images behind URLs: fetched from listed hosts, over connections to addresses that were checked.

    fetcher = UrlFetcher(["images.example", "*.cdn.example"], max_bytes=2**25, seconds=5.0)
    data = await fetcher.fetch("https://images.example/cat.jpg")

A server that fetches what it is told can be sent to its own network. So a host has to be listed,
its name is resolved once, every address that it has must be a public one, and the connection goes
to such an address, not to the name: what the name resolves to a moment later changes nothing. A
redirect is a new URL, checked in the same way.
"""

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import httpx2 as httpx

from service.errors import BodyTooLargeError, UrlFetchError, UrlRefusedError

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_PORTS = {"http": 80, "https": 443}
_MAX_URL_LENGTH = 4096
_MAX_ADDRESSES = 4  # of one name that are tried, one after the other
# No user name, since `https://listed.example@other.example` deceives; no backslash, which some
# parsers take for a slash.
_URL = re.compile(r"https?://[^\s/?#@\\]+([/?#][^\s\\]*)?", re.IGNORECASE)
_ENTRY = re.compile(r"(?:(https?)://)?(\*\.)?([^\s/?#@\\*]+)", re.IGNORECASE)
# A last label that is a number, of any notation, makes an address in disguise.
_NAME = re.compile(r"(?:[a-z0-9_-]{1,63}\.)*(?!0x[0-9a-f]*$|[0-9]*$)[a-z0-9-]{1,63}")

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# They look public and are not: 6to4 and Teredo wrap any IPv4 address, and two clouds answer their
# virtual machines at the last two.
_REFUSED = tuple(
    ipaddress.ip_network(text)
    for text in ("2002::/16", "2001::/32", "192.88.99.0/24", "192.0.0.0/24", "168.63.129.16/32")
)


class AllowedHost(NamedTuple):
    """One entry of the allow-list; write it with `parse_allowed_host`."""

    scheme: str
    host: str  # a name in ASCII, lower case, or an address in its canonical form
    port: int
    is_wildcard: bool  # names below `host`, not `host` itself

    def matches(self, scheme: str, host: str, port: int) -> bool:
        if (scheme, port) != (self.scheme, self.port):
            return False
        return host.endswith(f".{self.host}") if self.is_wildcard else host == self.host


def parse_allowed_host(text: str) -> AllowedHost:
    """Read `[http://|https://]HOST[:PORT]`, where HOST is a name, `*.name`, or an address.

    Without a scheme it is https, without a port that of the scheme; IPv6 goes in brackets.

    Raises:
        ValueError: the text is nothing of the kind, or the star stands for everything.
    """
    wanted = "write a host as images.example, *.images.example, http://host:8080 or [2001:db8::1]"
    found = _ENTRY.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no host to fetch from; {wanted}")
    scheme = (found[1] or "https").lower()
    try:
        host, port = _host_and_port(httpx.URL(f"{scheme}://{found[3]}"))
    except (httpx.InvalidURL, ValueError):
        raise ValueError(f"{text!r} is no host to fetch from; {wanted}") from None
    if found[2] and _as_address(host) is not None:
        raise ValueError(f"{text!r}: the star stands for names below a name; {wanted}")
    return AllowedHost(scheme, host, port, is_wildcard=bool(found[2]))


def is_public(address: Address) -> bool:
    """Whether `address` belongs to the internet, and to no machine or network of our own."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address not in _GLOBAL_UNICAST:
            return False
    if any(address.version == network.version and address in network for network in _REFUSED):
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class _Target(NamedTuple):
    """A URL whose host is listed."""

    url: httpx.URL
    scheme: str
    host: str
    port: int


class UrlFetcher:
    """Fetches files from listed hosts; one for the whole service, of one event loop.

    Args:
        allowed_hosts: What `parse_allowed_host` reads. An address permits exactly this address,
            public or not, by itself and as what a listed name leads to.
        max_bytes: Largest file.
        seconds: How long one fetch may take, redirects and the wait for a slot included.
        max_redirects: Most redirects of one fetch.
        max_concurrent: Most fetches at a time; others wait.
        ssl_context: What certificates are checked with; the system's authorities when None.
        resolve: From a name and a port to all of its addresses.

    Raises:
        ValueError: an entry of `allowed_hosts` cannot be read.
    """

    def __init__(
        self,
        allowed_hosts: Sequence[str],
        *,
        max_bytes: int,
        seconds: float,
        max_redirects: int = 3,
        max_concurrent: int = 16,
        ssl_context: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
    ) -> None:
        self._allowed = tuple(parse_allowed_host(text) for text in allowed_hosts)
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._max_redirects = max_redirects
        self._ssl_context = ssl_context or ssl.create_default_context()
        self._slots = asyncio.Semaphore(max_concurrent)
        # A name server that does not answer holds a thread for long: not one of the loop's own.
        self._resolvers = ThreadPoolExecutor(max_concurrent, "resolver")
        self._resolve = resolve or self._ask_system

    def close(self) -> None:
        self._resolvers.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str) -> bytes:
        """The file behind `url`.

        Raises:
            UrlRefusedError: it, or where it redirects to, is not allowed; nothing was sent there.
            BodyTooLargeError: the file has more than `max_bytes`.
            UrlFetchError: the host does not answer, not in time, or not with a file.
        """
        try:
            async with asyncio.timeout(self._seconds), self._slots:
                return await self._follow(url)
        except TimeoutError:
            raise UrlFetchError(
                f"fetching the URL took longer than the {self._seconds:g} s allowed; "
                "send the image itself"
            ) from None

    async def _follow(self, text: str) -> bytes:
        target = self._check(text)
        for _ in range(self._max_redirects + 1):
            addresses = await self._checked_addresses(target)
            answer = await self._get(target, addresses)
            if isinstance(answer, bytes):
                return answer
            try:
                target = self._check(str(answer))
            except UrlRefusedError:
                # Where to is for the operator of that host to know, not for our client.
                raise UrlRefusedError(
                    "the URL redirects to one that is not allowed; give the final URL, "
                    "of a host that is listed in /info"
                ) from None
        raise UrlFetchError(f"the URL redirects more than {self._max_redirects} times")

    def _check(self, text: str) -> _Target:
        if len(text) > _MAX_URL_LENGTH or not text.isprintable() or not _URL.fullmatch(text):
            raise UrlRefusedError(
                f"not a URL that is fetched: give https://host/path without user name, "
                f"at most {_MAX_URL_LENGTH} characters"
            )
        try:
            url = httpx.URL(text)
            host, port = _host_and_port(url)
        except (httpx.InvalidURL, ValueError):
            raise UrlRefusedError("the URL's host is no valid name, address or port") from None
        if not self._is_listed(url.scheme, host, port):
            raise UrlRefusedError(
                f"URLs of {url.scheme}://{host}:{port} are not allowed; "
                "send the image itself, or use a host that is listed in /info"
            )
        return _Target(url, url.scheme, host, port)

    def _is_listed(self, scheme: str, host: str, port: int) -> bool:
        return any(entry.matches(scheme, host, port) for entry in self._allowed)

    async def _checked_addresses(self, target: _Target) -> list[str]:
        if _as_address(target.host) is not None:
            return [target.host]
        try:
            found = await self._resolve(target.host, target.port)
        except (OSError, UnicodeError):
            found = []
        if not found:
            raise UrlFetchError(f"the name {target.host} does not resolve")
        # One private address among public ones is enough: a client may not choose between them.
        for text in found:
            address = ipaddress.ip_address(text)
            if not is_public(address) and not self._is_listed(
                target.scheme, str(address), target.port
            ):
                raise UrlRefusedError(
                    f"the name {target.host} leads to an address of no public host"
                )
        return list(dict.fromkeys(found))[:_MAX_ADDRESSES]

    async def _ask_system(self, host: str, port: int) -> list[str]:
        loop = asyncio.get_running_loop()
        found = await loop.run_in_executor(
            self._resolvers, lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        )
        return [str(address[0]) for *_, address in found]

    async def _get(self, target: _Target, addresses: Sequence[str]) -> bytes | httpx.URL:
        """The file, or where it is said to be."""
        failure: httpx.HTTPError | None = None
        for address in addresses:
            try:
                return await self._get_from(target, address)
            except httpx.HTTPError as error:
                failure = error
                if not isinstance(error, httpx.ConnectError):
                    break
        what = "has no valid certificate" if _is_about_certificate(failure) else "does not answer"
        raise UrlFetchError(f"the host {target.host} {what} as a web server should") from failure

    async def _get_from(self, target: _Target, address: str) -> bytes | httpx.URL:
        default = target.port == _PORTS[target.scheme]
        name = f"[{target.host}]" if ":" in target.host else target.host
        request = httpx.Request(
            "GET",
            target.url.copy_with(host=address, fragment=None),
            headers={
                "host": name if default else f"{name}:{target.port}",
                "accept": "image/*",
                # Bytes are counted as they come; packed ones could be a bomb.
                "accept-encoding": "identity",
                "user-agent": "vit-refinery",
            },
            extensions={"sni_hostname": target.host},
        )
        # A transport for each request: another name at this address needs its own handshake. And
        # no client around it, which would know cookies, proxies, passwords and redirects.
        async with httpx.AsyncHTTPTransport(verify=self._ssl_context, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
            try:
                return await self._read(target, response)
            finally:
                await response.aclose()

    async def _read(self, target: _Target, response: httpx.Response) -> bytes | httpx.URL:
        headers = response.headers
        if response.status_code in (301, 302, 303, 307, 308) and "location" in headers:
            try:
                return target.url.join(headers["location"])
            except httpx.InvalidURL:
                raise UrlFetchError(f"the host {target.host} redirects to no valid URL") from None
        if response.status_code != 200:
            raise UrlFetchError(f"the host {target.host} answers {response.status_code}, not 200")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise UrlFetchError(f"the host {target.host} compresses the file, which was not asked")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self._max_bytes:
                raise self._too_large()
        return bytes(data)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(
            f"the file behind the URL has more than the {self._max_bytes} bytes allowed; "
            "use a smaller one"
        )


def _host_and_port(url: httpx.URL) -> tuple[str, int]:
    host = url.raw_host.decode("ascii").lower().removesuffix(".")
    address = _as_address(host)
    if address is None and (not _NAME.fullmatch(host) or len(host) > 253):
        raise ValueError(f"{host!r} is neither a name nor an address")
    port = _PORTS[url.scheme] if url.port is None else url.port
    if not 0 < port < 65536:
        raise ValueError(f"{port} is no port")
    return str(address or host), port


def _as_address(host: str) -> Address | None:
    if "%" in host:  # names an interface of this machine
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _is_about_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
