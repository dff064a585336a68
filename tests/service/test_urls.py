"""Which URLs are fetched at all: allow-list, notations, addresses."""

import asyncio
import ipaddress

import pytest

from service.errors import UrlFetchError, UrlRefusedError
from service.urls import is_public, parse_allowed_host
from tests.service.url_servers import PUBLIC, fetcher, refused, resolving


@pytest.mark.parametrize(
    "url",
    [
        "https://other.example/a",
        "https://images.example.evil.example/a",
        "https://notimages.example/a",
        "https://sub.images.example/a",
        "https://cdn.example/a",
        "https://notcdn.example/a",
        "http://images.example/a",
        "https://images.example:8443/a",
        "https://127.0.0.1/a",
        "https://[::1]/a",
    ],
)
def test_what_is_not_listed_is_refused(url):
    resolve = resolving([PUBLIC])

    message = refused(url, "images.example", "*.cdn.example", resolve=resolve)

    assert "not allowed" in message
    assert not resolve.asked


@pytest.mark.parametrize(
    "url",
    [
        "https://images.example@other.example/a",
        "https://user:password@images.example/a",
        "https://@images.example/a",
        "https://other.example\\@images.example/a",
        "https://images.example\\.other.example/a",
        "https://images.example /a",
        "https://images.example/a\r\nx-injected: 1",
        "https://images.example/a\x00",
        "ftp://images.example/a",
        "file:///etc/passwd",
        "//images.example/a",
        "data:image/png;base64,AAAA",
        "https:///a",
        "",
        "https://images.example/" + "a" * 5000,
    ],
)
def test_what_is_no_plain_url_is_refused(url):
    assert "not a URL that is fetched" in refused(
        url, "images.example", resolve=resolving([PUBLIC])
    )


@pytest.mark.parametrize(
    "host",
    [
        "2130706433",
        "0177.0.0.1",
        "0x7f.0.0.1",
        "0x7f000001",
        "127.0.0.0x1",
        "127.1",
        "%31%32%37.0.0.1",
        "a..images.example",
        "[fe80::1%25eth0]",
        "images.example:0",
        "images.example:99999",
        "xn--\u2488.example",
    ],
)
def test_addresses_in_disguise_are_no_hosts(host):
    assert "no valid name, address or port" in refused(
        f"https://{host}/a", "*.example", "127.0.0.1"
    )


@pytest.mark.parametrize("host", ["[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]"])
def test_a_listed_address_permits_no_other_notation_of_it(host):
    assert "not allowed" in refused(f"https://{host}/a", "127.0.0.1")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "168.63.129.16",
        "::",
        "::1",
        "::127.0.0.1",
        "fe80::1",
        "fe80::1%1",
        "fc00::1",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:53aa:64c::1",
    ],
)
def test_a_listed_name_that_leads_to_an_address_of_no_public_host_is_refused(address):
    resolve = resolving([PUBLIC, address])

    message = refused("https://images.example/a", "images.example", resolve=resolve)

    assert "no public host" in message
    assert address not in message


@pytest.mark.parametrize(
    "address", [PUBLIC, "2606:4700::1111", f"::ffff:{PUBLIC}", f"64:ff9b::{PUBLIC}"]
)
def test_addresses_of_the_internet_are_public(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url", ["https://images.example/a", "https://IMAGES.Example./a", "https://images.example:443/a"]
)
def test_names_are_compared_in_one_notation(url):
    resolve = resolving(["127.0.0.1"])

    message = refused(url, "Images.example", resolve=resolve)

    assert "no public host" in message  # listed, then resolved
    assert resolve.asked == ["images.example"]


def test_a_name_in_any_script_is_compared_in_ascii():
    resolve = resolving(["127.0.0.1"])

    refused("https://b\u00fccher.example/a", "b\u00fccher.example", resolve=resolve)

    assert resolve.asked == ["xn--bcher-kva.example"]


def test_a_star_stands_for_names_at_any_depth():
    resolve = resolving(["127.0.0.1"])

    refused("https://a.b.cdn.example/a", "*.cdn.example", resolve=resolve)

    assert resolve.asked == ["a.b.cdn.example"]


@pytest.mark.parametrize(
    "entry",
    [
        "",
        "*",
        "*.*",
        "*.",
        "a*.example",
        "https://",
        "h/path",
        "u@h",
        "::1",
        "h:x",
        "h:0",
        "*.1.2.3.4",
    ],
)
def test_entries_that_mean_nothing_are_refused_at_the_start(entry):
    with pytest.raises(ValueError, match="write a host as images.example"):
        parse_allowed_host(entry)


def test_entries_say_scheme_host_and_port():
    assert parse_allowed_host("images.example") == ("https", "images.example", 443, False)
    assert parse_allowed_host("http://*.Example:81") == ("http", "example", 81, True)
    assert parse_allowed_host("[2001:DB8:0::1]") == ("https", "2001:db8::1", 443, False)


@pytest.mark.parametrize("error", [OSError("no such name"), UnicodeError("label too long")])
def test_a_name_that_does_not_resolve_is_an_error(error):
    async def resolve(*_):
        raise error

    with pytest.raises(UrlFetchError, match="images.example does not resolve"):
        asyncio.run(fetcher("images.example", resolve=resolve).fetch("https://images.example"))


def test_names_are_resolved_by_the_system():
    ours = fetcher("http://localhost")

    with pytest.raises(UrlRefusedError, match="no public host"):
        asyncio.run(ours.fetch("http://localhost/a"))
    ours.close()
