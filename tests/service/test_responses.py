import asyncio

import pytest
from starlette.requests import ClientDisconnect

from service.responses import FramesResponse, PartsResponse

PARTS = [[b"length", memoryview(b"tensors")], [b"second"]]
END = bytes(8)


class Connection:
    """A client that reads until it leaves, or until `limit` messages have come."""

    def __init__(self, *, limit=None, leaves=False):
        self.sent = []
        self.gone = asyncio.Event()
        self._limit = limit
        if leaves:
            self.gone.set()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if self._limit is not None and len(self.sent) >= self._limit:
            raise OSError("planted failure of the connection")
        self.sent.append(message)
        await asyncio.sleep(0)

    @property
    def bodies(self):
        return [message["body"] for message in self.sent[1:]]


class Frames:
    """A stream of frames that counts how it ended."""

    def __init__(self, frames=PARTS, *, error=None, waits=False):
        self.num_ends = 0
        self.was_cancelled = False
        self._frames, self._error, self._waits = frames, error, waits

    async def _iterate(self):
        for frame in self._frames:
            yield frame
        if self._error:
            raise self._error
        if self._waits:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise

    def end(self):
        self.num_ends += 1

    async def respond(self, connection, headers=None):
        response = FramesResponse(self._iterate(), headers or {}, on_end=self.end)
        await response({}, connection.receive, connection.send)


def test_parts_are_sent_as_they_are():
    sent = []

    async def send(message):
        sent.append(message)

    parts = [b"head", memoryview(b"tensor")]
    asyncio.run(PartsResponse(parts, "application/x-npy", {"a": "b"})({}, None, send))

    headers = dict(sent[0]["headers"])
    assert sent[0]["status"] == 200
    assert headers[b"content-length"] == b"10"
    assert (headers[b"content-type"], headers[b"a"]) == (b"application/x-npy", b"b")
    assert [message["body"] for message in sent[1:]] == parts
    assert sent[2]["body"] is parts[1]
    assert [message["more_body"] for message in sent[1:]] == [True, False]


def test_frames_are_sent_as_they_are_and_end_with_an_empty_one():
    async def run():
        connection, frames = Connection(), Frames()
        await frames.respond(connection, {"x-cache": "miss"})
        return connection, frames

    connection, frames = asyncio.run(run())

    headers = dict(connection.sent[0]["headers"])
    assert headers[b"content-type"] == b"application/x-refinery-frames"
    assert headers[b"x-cache"] == b"miss"
    assert b"content-length" not in headers
    assert connection.bodies == [b"length", b"tensors", b"second", END]
    assert connection.bodies[1] is PARTS[0][1], "it is sent without a copy"
    assert [message["more_body"] for message in connection.sent[1:]] == [True, True, True, False]
    assert frames.num_ends == 1


def test_a_stream_without_frames_is_ended_all_the_same():
    async def run():
        connection, frames = Connection(), Frames([])
        await frames.respond(connection)
        return connection, frames

    connection, frames = asyncio.run(run())

    assert (connection.bodies, frames.num_ends) == ([END], 1)


def test_a_frame_is_sent_before_the_next_one_is_there():
    async def run():
        connection, frames = Connection(), Frames(waits=True)
        responding = asyncio.ensure_future(frames.respond(connection))
        while len(connection.sent) < 4:
            await asyncio.sleep(0)
        assert frames.num_ends == 0
        connection.gone.set()
        with pytest.raises(ClientDisconnect):
            await responding
        return connection, frames

    connection, frames = asyncio.run(run())

    assert connection.bodies == [b"length", b"tensors", b"second"]
    assert frames.num_ends == 1


def test_when_the_client_leaves_the_frames_are_given_up():
    async def run():
        connection, frames = Connection(), Frames(waits=True)
        responding = asyncio.ensure_future(frames.respond(connection))
        while len(connection.sent) < 4:
            await asyncio.sleep(0)
        connection.gone.set()
        with pytest.raises(ClientDisconnect):
            await responding
        for _ in range(5):
            await asyncio.sleep(0)
        return frames.was_cancelled, frames.num_ends  # now: the loop cancels what is left

    assert asyncio.run(run()) == (True, 1)


def test_a_client_that_left_before_the_first_frame_ends_it_too():
    async def run():
        frames = Frames(waits=True)
        with pytest.raises(ClientDisconnect):
            await frames.respond(Connection(leaves=True))
        return frames

    assert asyncio.run(run()).num_ends == 1


@pytest.mark.parametrize("limit", [0, 1, 2, 4])
def test_a_connection_that_breaks_ends_it_with_the_error(limit):
    async def run():
        frames = Frames()
        with pytest.raises(OSError, match="planted failure"):
            await frames.respond(Connection(limit=limit))
        return frames

    assert asyncio.run(run()).num_ends == 1


def test_frames_that_fail_break_off_without_the_mark_of_the_end():
    async def run():
        connection, frames = Connection(), Frames(error=ValueError("planted failure"))
        with pytest.raises(ValueError, match="planted failure"):
            await frames.respond(connection)
        return connection, frames

    connection, frames = asyncio.run(run())

    assert connection.bodies == [b"length", b"tensors", b"second"]
    assert frames.num_ends == 1


def test_a_request_that_is_cancelled_ends_it_once():
    async def run():
        connection, frames = Connection(), Frames(waits=True)
        responding = asyncio.ensure_future(frames.respond(connection))
        while len(connection.sent) < 4:
            await asyncio.sleep(0)
        responding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await responding
        for _ in range(5):
            await asyncio.sleep(0)
        return frames.was_cancelled, frames.num_ends  # now: the loop cancels what is left

    assert asyncio.run(run()) == (True, 1)


def test_nothing_is_left_running_when_a_response_is_over():
    async def run():
        await Frames().respond(Connection())
        for _ in range(5):
            await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(run()) == set()
