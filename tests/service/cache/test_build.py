"""The cache that the settings ask for, and the settings that are refused."""

import asyncio
import logging
import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry

from service.cache import build_cache
from service.cache.address import RedisAddress, parse_url
from service.settings import Settings, SettingsError
from tests.service.cache.helpers import (
    MIB,
    Counted,
    RedisServer,
    make_entry,
    values_of,
    wait_until,
)

OPENSSL = shutil.which("openssl")


def build(**changes):
    registry = CollectorRegistry()
    return Counted(build_cache(Settings(model=("demo",), **changes), registry), registry)


def get_many(opened, keys):
    return values_of(asyncio.run(opened.cache.get_many(keys)))


def works(opened):
    """Whether a value goes to Redis and comes back."""
    opened.cache.put("a", make_entry(1))
    return get_many(opened, ["a"]) == [1]


@pytest.fixture
def password_file(tmp_path):
    path = tmp_path / "password"
    path.write_text("s3same\n")
    return path


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """A folder with an authority (ca.pem), another (other.pem), and a server's certificate."""
    if OPENSSL is None:
        pytest.skip("no openssl is installed to make certificates with")
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run([OPENSSL, *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        openssl(
            *new_key, "-x509", "-days", "2", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.pem",
        )  # fmt: skip
    openssl(*new_key, "-subj", "/CN=redis", "-keyout", "redis.key", "-out", "redis.csr")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    openssl(
        "x509", "-req", "-days", "2", "-in", "redis.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
        "-CAcreateserial", "-extfile", "names", "-out", "redis.pem",
    )  # fmt: skip
    return folder


@pytest.fixture
def tls_server(tmp_path, certificates):
    server = RedisServer(
        tmp_path, "--tls-cert-file", str(certificates / "redis.pem"),
        "--tls-key-file", str(certificates / "redis.key"),
        "--tls-ca-cert-file", str(certificates / "ca.pem"), "--tls-auth-clients", "no",
        is_tls=True,
    )  # fmt: skip
    server.start()
    yield server
    server.kill()


def test_off_keeps_nothing():
    opened = build(cache="off")
    opened.cache.start()

    opened.cache.put("a", make_entry())

    assert not opened.cache.is_enabled
    assert get_many(opened, ["a", "a"]) == [None, None]
    asyncio.run(opened.cache.close(1.0))


def test_by_default_it_is_in_memory():
    opened = build()
    opened.cache.start()

    opened.cache.put("a", make_entry(1))

    assert opened.cache.is_enabled
    assert get_many(opened, ["a", "b"]) == [1, None]
    asyncio.run(opened.cache.close(1.0))


def test_memory_takes_the_bytes_and_the_largest_value_that_are_set():
    opened = build(cache_bytes=16 * MIB, cache_max_value_bytes=MIB)

    for index in range(40):
        opened.cache.put(str(index), make_entry(num_bytes=MIB // 2))
    opened.cache.put("large", make_entry(num_bytes=2 * MIB))

    assert 15 * MIB < opened.count("bytes") <= 16 * MIB
    assert opened.count("dropped_writes_total", reason="too_large") == 1


@pytest.mark.redis
def test_redis_is_behind_memory(server):
    opened = build(cache=f"redis://127.0.0.1:{server.port}/2", cache_ttl_seconds=77)
    opened.cache.start()

    opened.cache.put("a", make_entry(1))

    with server.admin(db=2) as admin:
        wait_until(lambda: admin.exists("refinery:a"))
        assert admin.ttl("refinery:a") <= 77
    assert get_many(opened, ["a"]) == [1]
    assert opened.lookups("hit", "memory") == 1
    asyncio.run(opened.cache.close(1.0))


@pytest.mark.redis
@pytest.mark.parametrize("user", ["", "default@"])
def test_the_password_comes_from_its_file(make_server, password_file, user):
    server = make_server("--requirepass", "s3same")
    opened = build(
        cache=f"redis://{user}127.0.0.1:{server.port}",
        cache_password_file=password_file,
        cache_bytes=0,
    )
    opened.cache.start()

    wait_until(lambda: works(opened))
    asyncio.run(opened.cache.close(1.0))


@pytest.mark.redis
def test_a_password_in_the_url_works_and_is_warned_of_but_not_shown(make_server, caplog):
    caplog.set_level(logging.DEBUG)
    server = make_server("--requirepass", "s3same/%")
    opened = build(cache=f"redis://:s3same%2F%25@127.0.0.1:{server.port}", cache_bytes=0)
    opened.cache.start()

    wait_until(lambda: works(opened))
    asyncio.run(opened.cache.close(1.0))

    assert "use --cache-password-file" in caplog.text
    assert "s3same" not in caplog.text


@pytest.mark.redis
def test_a_certificate_of_the_authority_given_is_trusted(tls_server, certificates):
    opened = build(
        cache=f"rediss://127.0.0.1:{tls_server.port}",
        cache_ca_file=certificates / "ca.pem",
        cache_bytes=0,
    )
    opened.cache.start()

    wait_until(lambda: works(opened))
    asyncio.run(opened.cache.close(1.0))


@pytest.mark.redis
def test_values_of_megabytes_go_through_tls(tls_server, certificates):
    opened = build(
        cache=f"rediss://127.0.0.1:{tls_server.port}",
        cache_ca_file=certificates / "ca.pem",
        cache_bytes=0,
    )
    opened.cache.start()
    for index in range(3):
        opened.cache.put(f"k{index}", make_entry(index, num_bytes=4 * MIB))
    wait_until(lambda: opened.count("written_bytes_total") > 12 * MIB)

    wait_until(lambda: get_many(opened, ["k2", "x", "k0", "k1"]) == [2, None, 0, 1])
    asyncio.run(opened.cache.close(1.0))


@pytest.mark.redis
@pytest.mark.parametrize("authority", ["other.pem", None])
def test_a_certificate_of_nobody_known_is_refused(tls_server, certificates, caplog, authority):
    opened = build(
        cache=f"rediss://127.0.0.1:{tls_server.port}",
        cache_ca_file=certificates / authority if authority else None,
        cache_bytes=0,
    )
    opened.cache.start()

    for _ in range(6):
        assert not works(opened)
    asyncio.run(opened.cache.close(1.0))

    assert opened.errors() >= 5
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text


@pytest.mark.redis
def test_a_certificate_for_another_host_is_refused(tls_server, certificates, caplog):
    opened = build(
        cache=f"rediss://localhost:{tls_server.port}",
        cache_ca_file=certificates / "ca.pem",
        cache_bytes=0,
    )
    opened.cache.start()

    for _ in range(6):
        assert not works(opened)
    asyncio.run(opened.cache.close(1.0))

    assert "Hostname mismatch" in caplog.text


@pytest.mark.redis
def test_a_server_without_tls_is_not_spoken_to_in_the_clear(server):
    opened = build(cache=f"rediss://127.0.0.1:{server.port}", cache_bytes=0)
    opened.cache.start()

    assert not works(opened)
    asyncio.run(opened.cache.close(1.0))

    assert opened.lookups("error") == 1


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://cache", RedisAddress("cache")),
        ("redis://cache/", RedisAddress("cache")),
        ("redis://cache:7000/3", RedisAddress("cache", 7000, 3)),
        ("rediss://cache", RedisAddress("cache", is_tls=True)),
        ("redis://[::1]:7000", RedisAddress("::1", 7000)),
        ("redis://me:p%40ss@cache", RedisAddress("cache", username="me", password="p@ss")),
        ("redis://:pass@cache", RedisAddress("cache", password="pass")),
    ],
)
def test_urls_name_addresses(url, address):
    assert parse_url(url) == address


def test_an_address_reads_as_host_port_and_database():
    assert str(RedisAddress("::1", 7000, 3)) == "[::1]:7000/3"


def test_an_address_does_not_show_its_password():
    address = parse_url("redis://me:s3same@cache")

    assert "s3same" not in f"{address!r} {address}"


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("redis://:s3same@cache:port", "no valid port"),
        ("redis://:s3same@cache:70000", "no valid port"),
        ("redis://:s3same@cache:0", "names no Redis"),
        ("redis://:s3same@cache/first", "no valid port or database"),
        ("redis://:s3same@cache/-1", "names no Redis"),
        ("redis://:s3same@cache/1/2", "no valid port or database"),
        ("redis://:s3same@", "names no Redis"),
        ("redis://:s3same@[cache", "no valid port"),
        ("redis://:s3same@cache?db=1", "something after"),
        ("redis://:s3same@cache#1", "something after"),
    ],
)
def test_urls_that_name_no_redis_are_refused_without_showing_the_password(url, text):
    with pytest.raises(SettingsError, match=text) as refusal:
        build(cache=url)

    assert "s3same" not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__ or refusal.value.__context__ is None


def test_a_password_in_two_places_is_refused(password_file):
    with pytest.raises(SettingsError, match="leave the one in the URL out"):
        build(cache="redis://:other@cache", cache_password_file=password_file)


def test_a_user_without_password_is_refused():
    with pytest.raises(SettingsError, match="user 'me' but no password"):
        build(cache="redis://me@cache")


def test_a_password_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read: No such file"):
        build(cache="redis://cache", cache_password_file=tmp_path / "absent")


@pytest.mark.parametrize("text", [b"", b"\n", b"s3same\nsecond\n"])
def test_a_password_file_of_another_form_is_refused(password_file, text):
    password_file.write_bytes(text)

    with pytest.raises(SettingsError, match="write the password in one") as refusal:
        build(cache="redis://cache", cache_password_file=password_file)
    assert "s3same" not in str(refusal.value)


def test_a_password_file_that_is_no_text_is_refused(password_file):
    password_file.write_bytes(b"s3same\xff")

    with pytest.raises(SettingsError, match="not UTF-8") as refusal:
        build(cache="redis://cache", cache_password_file=password_file)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize("cache", ["memory", "off"])
def test_files_for_redis_are_refused_without_redis(password_file, cache):
    with pytest.raises(SettingsError, match="are for Redis"):
        build(cache=cache, cache_password_file=password_file)


def test_memory_without_bytes_is_refused():
    with pytest.raises(SettingsError, match="give --cache off"):
        build(cache="memory", cache_bytes=0)


def test_an_authority_without_tls_is_refused(password_file):
    with pytest.raises(SettingsError, match="write rediss://"):
        build(cache="redis://cache", cache_ca_file=password_file)


def test_an_authority_that_is_no_certificate_is_refused(password_file, tmp_path):
    for path in (password_file, tmp_path / "absent"):
        with pytest.raises(SettingsError, match="cannot be used"):
            build(cache="rediss://cache", cache_ca_file=path)
