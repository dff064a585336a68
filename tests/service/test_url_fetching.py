"""What happens on the wire: pinned connections, redirects, limits of bytes and time."""

import asyncio

import pytest

from service.errors import BodyTooLargeError, UrlFetchError, UrlRefusedError
from tests.service.url_servers import PUBLIC, answer, fetch_from, fetcher, resolving, serving


def test_a_file_is_fetched_from_a_listed_address():
    assert fetch_from({"/a?x=1": answer(b"cat")}, "/a?x=1") == b"cat"


def test_a_file_of_unknown_length_is_fetched():
    chunked = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\ncat\r\n2\r\ns!\r\n0\r\n\r\n"
    )

    assert fetch_from({"/a": chunked}) == b"cats!"


def test_the_request_asks_for_a_plain_image_and_tells_nothing():
    async def run():
        async with serving({"/a": answer(set_cookie="k=v"), "/b": answer()}) as server:
            ours = fetcher(server.url)
            await ours.fetch(server.url + "/a")
            await ours.fetch(server.url + "/b#part")
            return server

    server = asyncio.run(run())

    for head in server.heads:
        fields = dict(line.split(": ") for line in head.lower().strip().split("\r\n")[1:])
        assert fields.keys() == {"host", "accept", "accept-encoding", "user-agent"}
        assert fields["host"] == f"127.0.0.1:{server.port}"
        assert fields["accept-encoding"] == "identity"
    assert server.heads[1].startswith("GET /b HTTP/1.1")


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")

    assert fetch_from({"/a": answer()}) == b"pixels"


def test_the_connection_goes_to_the_address_that_was_checked():
    async def run():
        async with serving({"/a": answer()}) as server:
            # A name server that changes its mind: public when asked first, private from then on.
            resolve = resolving(["127.0.0.1"], [PUBLIC])
            entry = f"http://images.example:{server.port}"
            ours = fetcher(entry, server.url, resolve=resolve)
            return await ours.fetch(f"{entry}/a"), resolve.asked, server

    body, asked, server = asyncio.run(run())

    assert body == b"pixels"
    assert asked == ["images.example"]
    assert f"host: images.example:{server.port}" in server.heads[0].lower()


def test_a_name_that_turns_private_is_refused_the_next_time():
    async def run():
        async with serving({"/a": answer()}) as server:
            name = f"http://images.example:{server.port}"
            ours = fetcher(name, server.url, resolve=resolving(["127.0.0.1"], ["127.0.0.2"]))
            await ours.fetch(f"{name}/a")
            with pytest.raises(UrlRefusedError):
                await ours.fetch(f"{name}/a")
            return server.num_connections

    assert asyncio.run(run()) == 1


def test_a_listed_address_is_no_leave_for_another_port_of_it():
    async def run():
        async with serving({"/a": answer()}) as server:
            ours = fetcher(
                f"http://images.example:{server.port}",
                "http://127.0.0.1:1",
                resolve=resolving(["127.0.0.1"]),
            )
            with pytest.raises(UrlRefusedError, match="no public host"):
                await ours.fetch(f"http://images.example:{server.port}/a")
            return server.num_connections

    assert asyncio.run(run()) == 0


def test_an_address_that_does_not_answer_is_followed_by_the_next():
    async def run():
        async with serving({"/a": answer()}) as server:
            name = f"http://images.example:{server.port}"
            resolve = resolving(["127.0.0.9", "127.0.0.1"])
            ours = fetcher(name, server.url, f"http://127.0.0.9:{server.port}", resolve=resolve)
            return await ours.fetch(f"{name}/a")

    assert asyncio.run(run()) == b"pixels"


@pytest.mark.parametrize("location", ["/b", "b", "{url}/b", "//127.0.0.1:{port}/b"])
@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 Other", "307 T", "308 P"])
def test_redirects_within_listed_hosts_are_followed(status, location):
    async def run():
        async with serving({"/b": answer(b"cat")}) as server:
            target = location.format(url=server.url, port=server.port)
            server.answers["/a"] = answer(b"", status, location=target)
            return await fetcher(server.url).fetch(f"{server.url}/a")

    assert asyncio.run(run()) == b"cat"


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1:1/secret",
        "http://localhost/secret",
        "http://169.254.169.254/latest/meta-data",
        "http://user@127.0.0.1:{port}/b",
        "https://127.0.0.1:{port}/b",
        "file:///etc/passwd",
        "//other.internal/secret",
    ],
)
def test_a_redirect_to_what_is_not_listed_is_refused_without_naming_it(location):
    async def run():
        async with serving({"/b": answer()}) as server:
            target = location.format(port=server.port)
            server.answers["/a"] = answer(b"", "302 Found", location=target)
            with pytest.raises(UrlRefusedError, match="redirects to one that is not") as caught:
                await fetcher(server.url).fetch(f"{server.url}/a")
            return caught.value.message, server.num_connections

    message, num_connections = asyncio.run(run())

    assert "secret" not in message
    assert "internal" not in message
    assert num_connections == 1


def test_a_redirect_to_a_listed_name_with_a_private_address_is_refused():
    async def run():
        redirect = answer(b"", "302 Found", location="https://images.example/b")
        async with serving({"/a": redirect}) as server:
            ours = fetcher(server.url, "images.example", resolve=resolving(["10.0.0.1"]))
            with pytest.raises(UrlRefusedError, match="no public host"):
                await ours.fetch(f"{server.url}/a")

    asyncio.run(run())


def test_redirects_are_counted():
    answers = {f"/{n}": answer(b"", "302 Found", location=f"/{n + 1}") for n in range(3)}
    answers["/3"] = answer(b"cat")

    assert fetch_from(answers, "/0", max_redirects=3) == b"cat"
    with pytest.raises(UrlFetchError, match="more than 2 times"):
        fetch_from(answers, "/0", max_redirects=2)


def test_a_declared_length_above_the_limit_is_refused_unread():
    async def stall(writer):
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1001\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(3)

    with pytest.raises(BodyTooLargeError, match="more than the 1000 bytes"):
        fetch_from({"/a": stall}, seconds=2.0)


def test_bytes_are_counted_as_they_come():
    sent = 0

    async def flood(writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while sent < 200_000_000:
            writer.write(bytes(100_000))
            await writer.drain()
            sent += 100_000

    with pytest.raises(BodyTooLargeError, match="more than the 1000 bytes"):
        fetch_from({"/a": flood})
    assert sent < 50_000_000


def test_a_file_of_exactly_the_limit_is_taken():
    assert len(fetch_from({"/a": answer(bytes(1000))})) == 1000


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nx: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_trickle_ends_at_the_time_limit(start):
    async def trickle(writer):
        writer.write(start)
        while not writer.is_closing():
            writer.write(b"a")
            await writer.drain()
            await asyncio.sleep(0.02)

    with pytest.raises(UrlFetchError, match=r"longer than the 0\.3 s"):
        fetch_from({"/a": trickle}, seconds=0.3)


def test_a_name_server_that_does_not_answer_costs_the_time_limit():
    async def resolve(*_):
        await asyncio.sleep(60)

    with pytest.raises(UrlFetchError, match=r"longer than the 0\.1 s"):
        asyncio.run(
            fetcher("images.example", seconds=0.1, resolve=resolve).fetch("https://images.example")
        )


@pytest.mark.parametrize(
    "status", ["204 No Content", "206 Partial", "304 Same", "404 No", "500 Oh"]
)
def test_only_200_is_an_image(status):
    with pytest.raises(UrlFetchError, match=f"answers {status[:3]}, not 200") as caught:
        fetch_from({"/a": answer(b"", status)})

    assert caught.value.status == 502


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "identity, gzip"])
def test_compressed_answers_are_refused(encoding):
    with pytest.raises(UrlFetchError, match="compresses the file"):
        fetch_from({"/a": answer(content_encoding=encoding)})


@pytest.mark.parametrize(
    "reply", [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut"]
)
def test_an_answer_that_is_no_http_is_an_error_without_its_bytes(reply):
    with pytest.raises(UrlFetchError, match="does not answer as a web server") as caught:
        fetch_from({"/a": reply})

    assert "SSH" not in caught.value.message


def test_nobody_listening_is_an_error():
    with pytest.raises(UrlFetchError, match="does not answer"):
        asyncio.run(fetcher("http://127.0.0.1:1").fetch("http://127.0.0.1:1/a"))


def test_no_more_fetches_run_at_once_than_allowed():
    async def slow(writer):
        await asyncio.sleep(0.05)
        writer.write(answer())

    async def run():
        async with serving({"/a": slow}) as server:
            ours = fetcher(server.url, max_concurrent=2)
            bodies = await asyncio.gather(*(ours.fetch(f"{server.url}/a") for _ in range(6)))
            return bodies, server.most_open

    bodies, most_open = asyncio.run(run())

    assert bodies == [b"pixels"] * 6
    assert most_open == 2


def test_a_cancelled_fetch_frees_its_slot_and_its_connection():
    async def run():
        async def hang(writer):
            entered.set()
            await writer.drain()
            while not writer.is_closing():
                writer.write(b"a")
                await writer.drain()
                await asyncio.sleep(0.01)

        entered = asyncio.Event()
        async with serving({"/a": hang, "/b": answer()}) as server:
            ours = fetcher(server.url, max_concurrent=1)
            task = asyncio.create_task(ours.fetch(f"{server.url}/a"))
            await entered.wait()
            task.cancel()
            assert await ours.fetch(f"{server.url}/b") == b"pixels"
            while server.num_open:
                await asyncio.sleep(0.01)
            return task.cancelled()

    assert asyncio.run(asyncio.wait_for(run(), 5))
