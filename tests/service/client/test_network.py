"""Both clients against a real HTTP server: connections, pieces, pauses, deadlines."""

import asyncio
import threading
import time

import pytest

from service.client import (
    AsyncFeatureClient,
    ConnectionFailedError,
    DeadlineError,
    FeatureClient,
    Features,
)
from tests.service.client.fake_service import (
    END,
    FRAMES,
    SAFETENSORS,
    Script,
    answer,
    error,
    frame,
    frames,
    make_client,
    mark,
    running,
    suited,
)

IMAGES = [bytes([number]) * 9 for number in range(1, 25)]


@pytest.fixture(params=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("service.client.retry.FIRST_DELAY_SECONDS", 0.002)


def test_requests_share_connections():
    with running(Script()) as server, FeatureClient(server.url, max_connections=2) as client:
        for _ in range(5):
            client.features(IMAGES, size=64)

        assert len(server.script.asked) == 15
        assert server.num_connections <= 2


def test_several_requests_are_in_flight_but_never_more_than_allowed(kind):
    def slow(asked):
        time.sleep(0.05)
        return suited(asked)

    with (
        running(Script(slow)) as server,
        make_client(kind, url=server.url, batch_images=2, max_connections=3) as client,
    ):
        found = dict(client.stream(IMAGES))

    assert server.most_running == 3
    assert all((found[i].features == mark(image)).all() for i, image in enumerate(IMAGES))


def test_calls_at_once_wait_for_a_connection_as_long_as_it_takes():
    def slow(asked):
        time.sleep(0.3)
        return suited(asked)

    async def ask(url):
        settings = {"max_connections": 2, "timeout_seconds": 0.9, "max_retries": 0}
        async with AsyncFeatureClient(url, **settings) as client:
            return await asyncio.gather(*(client.feature(image) for image in IMAGES[:10]))

    with running(Script(slow)) as server:
        found = asyncio.run(ask(server.url))

    assert server.most_running == 2
    assert [int(item.features[0, 0, 0]) for item in found] == [int(mark(i)) for i in IMAGES[:10]]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_frames_may_come_in_any_pieces(kind, size):
    def in_pieces(asked):
        data = frames(asked, order=[1, 0])
        return 200, FRAMES, [data[start : start + size] for start in range(0, len(data), size)]

    with running(Script(in_pieces)) as server, make_client(kind, url=server.url) as client:
        found = list(client.stream(IMAGES[:2]))

    assert [index for index, _ in found] == [1, 0]
    assert all((item.features == mark(IMAGES[index])).all() for index, item in found)


def test_a_slow_image_holds_nobody():
    is_first_taken = threading.Event()

    def second_first(asked):
        def pieces():
            yield frame(1, asked.images[1])
            assert is_first_taken.wait(10)
            yield frame(0, asked.images[0]) + END

        return 200, FRAMES, pieces()

    with running(Script(second_first)) as server, FeatureClient(server.url) as client:
        stream = client.stream(IMAGES[:2])
        index, _ = next(stream)
        is_first_taken.set()
        rest = list(stream)

    assert index == 1
    assert [index for index, _ in rest] == [0]


def test_retry_after_is_waited_for(kind):
    full = error(429, "overloaded", retryable=True, headers={"retry-after": "1"})

    with running(Script(full, suited)) as server, make_client(kind, url=server.url) as client:
        started = time.monotonic()
        client.feature(b"x")

    assert time.monotonic() - started >= 1


def test_an_answer_that_breaks_off_is_asked_for_again(kind):
    def break_off(asked):
        data = answer(asked)
        return 200, SAFETENSORS | {"content-length": str(len(data))}, data[:-10]

    with (
        running(Script(break_off, suited)) as server,
        make_client(kind, url=server.url) as client,
    ):
        found = client.feature(b"abc")

    assert (found.features == mark(b"abc")).all()
    assert len(server.script.asked) == 2


def test_a_service_that_is_not_there_is_said_to_be(kind):
    with running(Script()) as server:
        url = server.url

    with (
        make_client(kind, url=url, max_retries=1) as client,
        pytest.raises(ConnectionFailedError, match=url) as caught,
    ):
        client.feature(b"x")

    assert caught.value.code == "connection_failed"


def test_a_service_that_hangs_ends_with_the_timeout(kind):
    def hang(asked):
        time.sleep(1)
        return suited(asked)

    with (
        running(Script(hang)) as server,
        make_client(kind, url=server.url, timeout_seconds=0.1, max_retries=0) as client,
        pytest.raises(ConnectionFailedError) as caught,
    ):
        client.feature(b"x")

    assert caught.value.code == "timeout"


def drip(asked):
    """An answer that always makes progress and never ends."""

    def pieces():
        for byte in answer(asked):
            time.sleep(0.05)
            yield bytes([byte])

    return 200, SAFETENSORS, pieces()


def test_no_call_outlasts_its_deadline(kind):
    with running(Script(drip)) as server, make_client(kind, url=server.url) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineError) as caught:
            client.features(IMAGES[:3], deadline_seconds=0.3)
        seconds = time.monotonic() - started

    assert 0.25 < seconds < 5  # the whole answer takes 25 s
    assert caught.value.code == "client_deadline"


def test_a_piece_just_before_the_deadline_wins_no_time(kind):
    is_over = threading.Event()

    def hang(asked):
        def pieces():
            data = answer(asked)
            time.sleep(1.2)
            yield data[:9]
            is_over.wait(10)
            yield data[9:]

        return 200, SAFETENSORS, pieces()

    with running(Script(hang)) as server, make_client(kind, url=server.url) as client:
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            client.feature(b"x", deadline_seconds=1.5)
        seconds = time.monotonic() - started
        is_over.set()

    assert seconds < 2.5  # one more read with the time that there was at first would take 2.7


def test_past_the_deadline_partial_keeps_what_is_there(kind):
    def slow_for_the_second(asked):
        return drip(asked) if IMAGES[1] in asked.images else suited(asked)

    with (
        running(Script(slow_for_the_second)) as server,
        make_client(kind, url=server.url, batch_images=1) as client,
    ):
        found = client.features(IMAGES[:3], partial=True, deadline_seconds=0.4)

    assert [type(item) for item in found] == [Features, DeadlineError, Features]


def test_leaving_a_stream_early_stops_its_requests():
    with (
        running(Script()) as server,
        FeatureClient(server.url, batch_images=1, max_connections=2) as client,
    ):
        for _ in client.stream(IMAGES):
            break
        time.sleep(0.1)

    assert len(server.script.asked) <= 3
