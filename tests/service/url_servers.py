"""Local servers that a `UrlFetcher` is let at, and resolvers that say what a test wants."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from service.errors import UrlRefusedError
from service.urls import UrlFetcher

PUBLIC = "93.184.216.34"


def answer(body=b"pixels", status="200 OK", **headers):
    fields = {"content-length": str(len(body)), "connection": "close"} | headers
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


class Server:
    """Answers each path with bytes, or with what a function writes; keeps the requests' heads."""

    def __init__(self, answers):
        self.answers = answers
        self.heads = []
        self.num_connections = 0
        self.num_open = self.most_open = 0

    async def __call__(self, reader, writer):
        self.num_connections += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.heads.append(head)
            reply = self.answers[head.split()[1]]
            if callable(reply):
                await reply(writer)
            else:
                writer.write(reply)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.num_open -= 1
            writer.close()


@asynccontextmanager
async def serving(answers, context=None):
    handler = Server(answers)
    server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=context)
    async with server:
        handler.port = server.sockets[0].getsockname()[1]
        handler.url = f"{'https' if context else 'http'}://127.0.0.1:{handler.port}"
        yield handler


def fetcher(*hosts, **options):
    return UrlFetcher(hosts, **({"max_bytes": 1000, "seconds": 5.0} | options))


def resolving(*answers):
    """A resolver that gives one answer after the other, then the last again, and notes names."""
    asked = []

    async def resolve(host, _):
        asked.append(host)
        return answers[min(len(asked), len(answers)) - 1]

    resolve.asked = asked
    return resolve


def fetch_from(answers, path="/a", **options):
    """What a fetcher that may fetch from the local server alone gets from it."""

    async def run():
        async with serving(answers) as server:
            return await fetcher(server.url, **options).fetch(server.url + path)

    return asyncio.run(run())


def refused(url, *hosts, **options):
    with pytest.raises(UrlRefusedError) as caught:
        asyncio.run(fetcher(*hosts, **options).fetch(url))
    return caught.value.message
