"""TLS of fetched URLs: a connection to an address, a certificate of a name."""

import asyncio
import shutil
import ssl
import subprocess

import pytest

from service.errors import UrlFetchError
from tests.service.url_servers import answer, fetcher, resolving, serving


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """An authority, and what it signed for images.example and for 127.0.0.1."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl: it makes the certificates of the TLS tests")
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *key, "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem")
    for name, kind in (("images.example", "DNS"), ("127.0.0.1", "IP")):
        files = (
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-keyout",
            f"{name}.key",
            "-out",
            f"{name}.pem",
        )
        names = ("-subj", "/CN=x", "-addext", f"subjectAltName={kind}:{name}")
        openssl("req", "-x509", *key, *files, *names)
    return folder


def fetch_by_tls(certificates, certificate, host, *, is_trusted=True):
    """What a fetcher gets from a local server of `certificate`, and the names it was told."""
    told = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(
        certificates / f"{certificate}.pem", certificates / f"{certificate}.key"
    )
    context.sni_callback = lambda _, name, __: told.append(name)
    trusted = ssl.create_default_context(cafile=certificates / "ca.pem" if is_trusted else None)

    async def run():
        async with serving({"/a": answer(b"cat")}, context) as server:
            ours = fetcher(
                f"{host}:{server.port}",
                f"127.0.0.1:{server.port}",
                resolve=resolving(["127.0.0.1"]),
                ssl_context=trusted,
            )
            return await ours.fetch(f"https://{host}:{server.port}/a")

    return asyncio.run(run()), told


def test_a_certificate_is_checked_against_the_name_and_not_the_address(certificates):
    body, told = fetch_by_tls(certificates, "images.example", "images.example")

    assert body == b"cat"
    assert told == ["images.example"]


def test_a_certificate_of_an_address_serves_a_url_of_that_address(certificates):
    body, _ = fetch_by_tls(certificates, "127.0.0.1", "127.0.0.1")

    assert body == b"cat"


def test_a_certificate_of_another_name_is_refused(certificates):
    with pytest.raises(UrlFetchError, match="no valid certificate"):
        fetch_by_tls(certificates, "127.0.0.1", "images.example")


def test_a_certificate_of_an_unknown_authority_is_refused(certificates):
    with pytest.raises(UrlFetchError, match="no valid certificate"):
        fetch_by_tls(certificates, "images.example", "images.example", is_trusted=False)
