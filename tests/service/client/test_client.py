"""Both clients on a scripted transport: order, batches, errors, retries, deadlines."""

import subprocess
import sys
import threading
import time

import httpx2 as httpx
import pytest

from service.client import (
    AnswerError,
    AuthenticationError,
    ConnectionFailedError,
    DeadlineError,
    FeatureClient,
    FeatureError,
    Features,
    InputError,
    OverloadedError,
    RefusedError,
    ServerError,
    UnavailableError,
)
from tests.service.client.fake_service import (
    DIGEST,
    FRAMES,
    SAFETENSORS,
    Script,
    answer,
    error,
    frame,
    frames,
    make_client,
    mark,
    suited,
)
from tests.support import ROOT

IMAGES = [bytes([number]) * 7 for number in range(1, 12)]
BUSY = error(429, "overloaded", retryable=True)


@pytest.fixture(params=["sync", "async"])
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr("service.client.retry.FIRST_DELAY_SECONDS", 0.002)


def test_importing_the_client_does_not_import_torch():
    code = "import sys, service.client; print('torch' in sys.modules, 'PIL' in sys.modules)"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )

    assert done.stdout.split() == ["False", "False"]


def test_one_image_gives_its_features(kind):
    script = Script()

    with make_client(kind, script, api_key="k", model="m") as client:
        found = client.feature(b"abc", size=(448, 672), layers=[-1], normalize=True)

    assert (found.features == mark(b"abc")).all()
    assert (found.model_digest, found.request_id, found.cache) == (DIGEST, "r-1", "miss")
    (asked,) = script.asked
    assert asked.path == "/features"
    assert asked.headers["authorization"] == "Bearer k"
    assert asked.headers["accept-encoding"] == "identity"
    assert "x-deadline-ms" not in asked.headers
    assert asked.options == {"model": "m", "size": "448,672", "layers": "-1", "normalize": "true"}


def test_many_images_come_in_order_from_requests_of_a_batch(kind):
    script = Script()

    with make_client(kind, script, batch_images=4) as client:
        found = client.features(IMAGES, dtype="float32")

    assert [int(item.features[0, 0, 0]) for item in found] == [int(mark(i)) for i in IMAGES]
    assert [item.index for item in found] == list(range(11))
    assert sorted(len(asked.images) for asked in script.asked) == [3, 4, 4]
    assert all(asked.options == {"dtype": "float32"} for asked in script.asked)


def test_images_too_large_for_one_request_go_in_several(kind, monkeypatch):
    monkeypatch.setattr("service.client.exchange._MAX_BODY_BYTES", 20)
    script = Script()

    with make_client(kind, script) as client:
        found = client.features([*IMAGES[:4], b"long" * 9])

    assert [len(asked.images) for asked in script.asked] == [2, 2, 1]
    assert [item.index for item in found] == [0, 1, 2, 3, 4]


def test_no_images_are_no_request(kind):
    script = Script()

    with make_client(kind, script) as client:
        assert client.features([]) == []
        assert list(client.stream(iter([]))) == []

    assert script.asked == []


def test_boxes_go_with_their_images(kind):
    script = Script()
    boxes = [[[0, 0, number, 1]] for number in range(3)]

    with make_client(kind, script, batch_images=2, max_connections=1) as client:
        client.features(IMAGES[:3], boxes=boxes, box_size=2)
        client.feature(IMAGES[0], boxes=[])

    assert [asked.options["boxes"] for asked in script.asked] == [boxes[:2], boxes[2:], [[]]]
    assert script.asked[0].options["box_size"] == 2


@pytest.mark.parametrize("boxes", [[[]], [[], [], []]])
def test_boxes_must_be_as_many_as_images(kind, boxes):
    with make_client(kind, Script()) as client, pytest.raises(InputError, match="boxes has"):
        client.features(IMAGES[:2], boxes=boxes)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "malformed_body", RefusedError),
        (401, "unauthorized", AuthenticationError),
        (403, "forbidden", AuthenticationError),
        (404, "unknown_model", RefusedError),
        (413, "too_many_images", RefusedError),
        (422, "unknown_option", RefusedError),
        (500, "internal", ServerError),
    ],
)
def test_errors_have_types_and_are_not_retried(kind, status, code, expected):
    script = Script(error(status, code))

    with make_client(kind, script) as client, pytest.raises(expected) as caught:
        client.feature(b"x")

    assert len(script.asked) == 1
    assert (caught.value.code, caught.value.status) == (code, status)
    assert (caught.value.message, caught.value.request_id) == (f"{code} happened", "r-9")
    assert str(caught.value) == f"{code} happened [{code}] (request r-9)"


@pytest.mark.parametrize(
    "failure",
    [
        BUSY,
        error(503, "draining", retryable=True),
        error(504, "deadline_exceeded", retryable=True),
        (502, {"content-type": "text/html"}, b"<html>bad gateway</html>"),
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("closed"),
    ],
)
def test_what_may_pass_is_tried_again(kind, failure):
    script = Script(failure, failure, suited)

    with make_client(kind, script) as client:
        found = client.feature(b"abc")

    assert len(script.asked) == 3
    assert (found.features == mark(b"abc")).all()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (BUSY, OverloadedError),
        (error(503, "not_ready", retryable=True), UnavailableError),
        (error(504, "deadline_exceeded", retryable=True), DeadlineError),
        (httpx.ConnectError("refused"), ConnectionFailedError),
    ],
)
def test_the_last_failure_is_raised_after_the_last_try(kind, failure, expected):
    script = Script(failure)

    with make_client(kind, script, max_retries=2) as client, pytest.raises(expected) as caught:
        client.feature(b"x")

    assert len(script.asked) == 3
    assert caught.value.retryable


def test_a_deadline_is_told_to_the_service_and_shrinks_with_each_try(kind):
    script = Script(BUSY, BUSY, suited)

    with make_client(kind, script, deadline_seconds=30) as client:
        client.feature(b"x", deadline_seconds=20)

    told = [int(asked.headers["x-deadline-ms"]) for asked in script.asked]
    assert 20_000 >= told[0] > told[1] > told[2] > 15_000


def test_no_try_begins_when_its_pause_would_pass_the_deadline(kind):
    script = Script(error(429, "overloaded", retryable=True, headers={"retry-after": "5"}))

    started = time.monotonic()
    with make_client(kind, script) as client, pytest.raises(OverloadedError) as caught:
        client.feature(b"x", deadline_seconds=2)

    assert time.monotonic() - started < 2
    assert caught.value.retry_after_seconds == 5
    assert len(script.asked) == 1


def test_the_index_is_that_of_the_call(kind):
    def refuse_the_tenth(asked):
        if IMAGES[9] in asked.images:
            index = asked.images.index(IMAGES[9])
            return error(422, "undecodable_image", index=index, message=f"image {index}: broken")
        return suited(asked)

    with (
        make_client(kind, Script(refuse_the_tenth), batch_images=4) as client,
        pytest.raises(RefusedError) as caught,
    ):
        client.features(IMAGES)

    assert caught.value.index == 9
    assert str(caught.value) == "image 9: broken [undecodable_image] (request r-9)"


def test_partial_puts_errors_in_their_places(kind, tmp_path):
    bad = {"code": "undecodable_image", "message": "image 1: broken", "retryable": False}
    script = Script(lambda asked: (200, SAFETENSORS, answer(asked, {1: bad})))

    with make_client(kind, script) as client:
        found = client.features([IMAGES[0], IMAGES[1], tmp_path / "none"], partial=True)

    assert isinstance(found[0], Features)
    assert isinstance(found[1], RefusedError)
    assert (found[1].index, found[1].message) == (1, "broken")
    assert isinstance(found[2], InputError)
    assert found[2].index == 2
    assert script.asked[0].options == {"partial": True}


def test_partial_tries_again_only_the_images_that_may_pass(kind):
    late = {"code": "deadline_exceeded", "message": "image 2: late", "retryable": True}
    script = Script(lambda asked: (200, SAFETENSORS, answer(asked, {2: late})), suited)

    with make_client(kind, script) as client:
        found = client.features(IMAGES[:4], partial=True)

    assert all(isinstance(item, Features) for item in found)
    assert [asked.images for asked in script.asked] == [IMAGES[:4], [IMAGES[2]]]
    assert found[2].index == 2


def test_partial_gives_up_on_images_one_by_one(kind):
    late = {"code": "overloaded", "message": "later", "retryable": True}
    script = Script(lambda asked: (200, SAFETENSORS, answer(asked, {0: late})))

    with make_client(kind, script, max_retries=1) as client:
        found = client.features(IMAGES[:2], partial=True)

    assert isinstance(found[0], OverloadedError)
    assert isinstance(found[1], Features)


def test_partial_sends_the_others_again_where_one_failed_them_all(kind):
    script = Script(error(422, "undecodable_image", index=1), suited)

    with make_client(kind, script) as client:
        found = client.features(IMAGES[:3], partial=True)

    assert [type(item) for item in found] == [Features, RefusedError, Features]
    assert script.asked[1].images == [IMAGES[0], IMAGES[2]]


def test_partial_raises_what_every_image_would_meet(kind):
    with (
        make_client(kind, Script(error(401, "unauthorized"))) as client,
        pytest.raises(AuthenticationError),
    ):
        client.features(IMAGES, partial=True)


def test_the_stream_yields_in_the_order_of_completion(kind):
    script = Script(lambda asked: (200, FRAMES, frames(asked, order=[2, 0, 1])))

    with make_client(kind, script) as client:
        found = list(client.stream(IMAGES[:3]))

    assert [index for index, _ in found] == [2, 0, 1]
    assert all((item.features == mark(IMAGES[index])).all() for index, item in found)
    assert script.asked[0].headers["accept"] == FRAMES["content-type"]


def test_the_stream_yields_errors_and_goes_on(kind, tmp_path):
    bad = {"code": "unsupported_image", "message": "image 0: no image", "retryable": False}
    script = Script(lambda asked: (200, FRAMES, frames(asked, errors={0: bad})))
    images = [IMAGES[0], tmp_path / "none", IMAGES[2]]

    with make_client(kind, script) as client:
        found = dict(client.stream(images))

    assert (found[0].code, found[0].index) == ("unsupported_image", 0)
    assert (found[1].code, found[1].index) == ("unreadable_file", 1)
    assert (found[2].features == mark(IMAGES[2])).all()


def test_a_stream_that_breaks_goes_on_with_the_images_it_still_owes(kind):
    def break_off(asked):
        return 200, FRAMES, frame(1, asked.images[1]) + frame(2, asked.images[2])[:50]

    script = Script(break_off, suited)

    with make_client(kind, script) as client:
        found = list(client.stream(IMAGES[:3]))

    assert [index for index, _ in found] == [1, 0, 2]
    assert script.asked[1].images == [IMAGES[0], IMAGES[2]]


def test_the_stream_ends_with_an_error_that_every_image_would_meet(kind):
    with (
        make_client(kind, Script(error(422, "unknown_option"))) as client,
        pytest.raises(RefusedError, match="unknown_option"),
    ):
        list(client.stream(IMAGES))


def test_the_stream_goes_on_when_the_service_fails(kind):
    script = Script(error(500, "internal"), suited)

    with make_client(kind, script, batch_images=2, max_connections=1) as client:
        found = dict(client.stream(IMAGES[:4]))

    assert [type(found[index]) for index in range(4)] == [ServerError] * 2 + [Features] * 2


def test_the_stream_takes_images_only_as_far_ahead_as_it_may():
    taken = []
    images = (taken.append(image) or image for image in IMAGES)

    with make_client("sync", Script(), batch_images=2, max_connections=2) as client:
        stream = client.stream(images)
        assert taken == []
        next(stream)
        time.sleep(0.05)

    assert len(taken) == 4


def test_a_generator_that_fails_fails_the_call(kind):
    def images():
        yield IMAGES[0]
        raise OSError("the camera is gone")

    with make_client(kind, Script()) as client, pytest.raises(OSError, match="camera"):
        client.features(images())


@pytest.mark.parametrize(
    "reply",
    [
        (200, {"content-type": "text/html"}, b"<html>"),
        (200, SAFETENSORS, b"\x10\0\0\0\0\0\0\0short"),
        (200, SAFETENSORS, b""),
        (302, {"location": "http://elsewhere"}, b""),
        lambda asked: (200, SAFETENSORS, answer(asked, layers="eleven")),
        lambda asked: (200, SAFETENSORS, answer(asked, layers="[1, 2]")),
        lambda asked: (200, SAFETENSORS, answer(asked, images="[]")),
        lambda asked: (200, SAFETENSORS, answer(asked, images='[{"index": 7}]')),
        lambda asked: (200, SAFETENSORS, answer(asked, images='[{"index": null}]')),
        lambda asked: (200, SAFETENSORS, answer(asked, images='[{"error": "bad"}]')),
        (200, FRAMES, frame(0, b"x") + frame(0, b"x") + bytes(8)),
        (200, FRAMES, bytes(8)),
        (200, FRAMES, b"\xff" * 8),
        (200, FRAMES, bytes(9)),
    ],
)
def test_an_answer_that_makes_no_sense_is_said_to(kind, reply):
    script = Script(reply)

    with make_client(kind, script) as client, pytest.raises(AnswerError):
        client.feature(b"x")

    assert len(script.asked) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "127.0.0.1:8000"},
        {"max_connections": 0},
        {"batch_images": 0},
        {"max_retries": -1},
        {"timeout_seconds": 0},
        {"deadline_seconds": 0},
    ],
)
def test_settings_that_are_not_possible_are_refused(settings):
    with pytest.raises(ValueError, match=r"give|is"):
        FeatureClient(**({"url": "http://x"} | settings))


def test_many_threads_share_a_client():
    script = Script()
    found = {}

    with make_client("sync", script, max_connections=3) as client:

        def ask(number):
            found[number] = client.features([IMAGES[number]] * 3, size=64)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    for number, items in found.items():
        assert all((item.features == mark(IMAGES[number])).all() for item in items)
    assert len(found) == 8


def test_closing_ends_a_call_that_waits():
    script = Script(error(503, "draining", retryable=True, headers={"retry-after": "50"}))
    client = make_client("sync", script)
    failed = []

    def ask():
        try:
            client.feature(b"x")
        except FeatureError as reason:
            failed.append(reason)

    thread = threading.Thread(target=ask)
    thread.start()
    while not script.asked:
        time.sleep(0.005)
    client.close()
    thread.join(5)

    assert not thread.is_alive()
    assert failed[0].code == "client_closed"
    with pytest.raises(FeatureError, match="closed"):
        client.feature(b"x")


def test_info_is_what_the_service_says(kind):
    script = Script((200, {"content-type": "application/json"}, b'{"version": "1"}'))

    with make_client(kind, script) as client:
        assert client.info() == {"version": "1"}

    assert script.asked[0].path == "/info"
    with (
        make_client(kind, Script(httpx.ConnectError("x"))) as client,
        pytest.raises(ConnectionFailedError),
    ):
        client.info()


def test_the_key_is_not_in_what_a_traceback_would_show():
    with FeatureClient("http://127.0.0.1:1", api_key="secret") as client:
        assert "secret" not in repr(client._settings)
