"""What other servers got wrong, one test each.

Those about keys, probes behind keys, Redis timeouts and the cost of a cache that never hits are
with the modules that they are about.
"""

import asyncio
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from safetensors.numpy import load

from backbone import preprocess
from service import composing, decoding, wire
from service.features import FEATURE_ERRORS
from tests.service.conftest import REPOSITORY
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(80, 112))
OTHER = encoded(noise_image(80, 112, seed=1))


def post(client, data=PHOTO, headers=PNG, **query):
    return client.post("/features", content=data, headers=headers, params=query)


def value(client, series):
    text = client.get("/metrics").text
    found = [line for line in text.splitlines() if line.startswith(f"{series} ")]
    return float(found[0].split()[1]) if found else 0.0


def test_tensors_are_not_compressed_on_the_way(client):
    response = post(client, headers=PNG | {"accept-encoding": "gzip, br, zstd"})

    assert "content-encoding" not in response.headers
    assert int(response.headers["content-length"]) == len(response.content)


def test_two_images_of_one_size_are_two_images(client):
    first, second = (load(post(client, image).content)["features.0"] for image in (PHOTO, OTHER))

    assert np.abs(first - second).max() > 0.1


def test_no_name_that_a_client_gives_can_stand_for_an_image(client):
    headers = PNG | {"x-request-id": "same", "idempotency-key": "same"}

    first, second = (
        load(post(client, image, headers).content)["features.0"] for image in (PHOTO, OTHER)
    )

    assert np.abs(first - second).max() > 0.1


@pytest.mark.parametrize("count", [1, 3])
def test_a_request_is_counted_once_whatever_it_holds(serve, count):
    with serve() as client:
        ok = 'refinery_requests_total{route="/features",status="200"}'
        failed = 'refinery_requests_total{route="/features",status="415"}'

        client.post("/features", files=[("images", PHOTO)] * count)
        client.post("/features", files=[("images", b"junk")] * count)

        assert (value(client, ok), value(client, failed)) == (1.0, 1.0)
        assert value(client, "refinery_requests_in_flight") == 0.0


@pytest.mark.parametrize("route", ["/livez", "/readyz", "/healthz", "/startupz"])
def test_probes_answer_503_and_never_another_error(serve, route):
    with serve() as client:
        client.app.state.service.failure = RuntimeError("planted")

        assert client.get(route).status_code == 503
        client.app.state.service.failure = None


def test_health_knows_of_an_engine_that_is_stuck(serve, watched_encoder):
    with serve(lambda *_: watched_encoder, stuck_seconds=0.1) as client:
        service = client.app.state.service
        watched_encoder.hold()
        answers = []
        asking = threading.Thread(target=lambda: answers.append(post(client)))
        asking.start()
        watched_encoder.wait_until_held()
        service.check_health()
        assert client.get("/livez").status_code == 200  # busy is not dead

        time.sleep(0.15)
        service.check_health()

        assert client.get("/livez").status_code == 503
        asking.join(10)
        watched_encoder.gate.set()
    assert answers[0].status_code == 503
    assert answers[0].json()["error"]["code"] == "not_ready"


def test_every_documented_status_belongs_to_an_error_that_is_sent_with_it(client):
    documented = client.get("/openapi.json").json()["paths"]["/features"]["post"]["responses"]

    for error in FEATURE_ERRORS:
        assert f"`{error.code}`" in documented[str(error.status)]["description"]
    too_many = client.post("/features", files=[("images", PHOTO)] * 33)
    assert too_many.status_code == 413  # documented, and sent


def test_images_are_decoded_away_from_the_event_loop(serve, monkeypatch):
    threads = []
    decode = preprocess.decode_image

    def watched(*arguments, **options):
        threads.append(threading.current_thread())
        return decode(*arguments, **options)

    monkeypatch.setattr(decoding.preprocess, "decode_image", watched)
    with serve() as client:
        loops = []
        client.portal.call(lambda: loops.append(threading.current_thread()))
        post(client)

    assert threads
    assert loops[0] not in threads


def test_fetching_urls_changes_nothing_for_the_rest_of_the_process():
    code = (
        "import asyncio, socket\n"
        "names = [(socket, 'getaddrinfo'), (socket.socket, 'connect'),\n"
        "         (asyncio.BaseEventLoop, 'create_connection')]\n"
        "before = [getattr(*name) for name in names]\n"
        "import service.urls\n"
        "service.urls.UrlFetcher(['a.example'], max_bytes=1, seconds=1, max_redirects=1)\n"
        "assert before == [getattr(*name) for name in names]\n"
    )

    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_nothing_is_told_to_anybody_outside(serve, monkeypatch):
    connect = socket.socket.connect
    called = []

    def watched(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "127.0.0.1",
            "::1",
        ):
            called.append(address)
            raise OSError("no network in this test")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    with serve() as client:
        assert post(client).status_code == 200

    assert called == []


def test_an_idle_service_sleeps(server_process):
    server = server_process()
    process = psutil.Process(server.process.pid)
    used = sum(process.cpu_times()[:2])

    time.sleep(1.0)

    assert sum(process.cpu_times()[:2]) - used < 0.1


def test_the_queue_is_bounded_by_time_and_not_by_a_number_out_of_the_air(serve):
    with serve(queue_seconds=3.0) as client:
        admission = client.app.state.service.admission
        admission.observe(2_000_000, 1.0)
        admission.observe(2_000_000, 1.0)
        rate = admission.tokens_per_second

        limit = client.get("/info").json()["limits"]["max_queue_tokens"]

    assert limit == int(3.0 * rate)


def test_one_process_counts_the_requests_of_all_connections(server_process):
    server = server_process()

    async def ask():
        for _ in range(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.client.base_url.port)
            writer.write(b"GET /info HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            await reader.read()
            writer.close()

    before = value(server.client, 'refinery_requests_total{route="/info",status="200"}')
    asyncio.run(ask())

    after = value(server.client, 'refinery_requests_total{route="/info",status="200"}')
    assert after - before == 5


@pytest.mark.parametrize(
    "options", [{"pool": "mean"}, {"pool": "2"}, {"project": "2"}, {"boxes": "0,0,112,80"}]
)
def test_what_reads_whole_maps_is_done_away_from_the_event_loop(serve, monkeypatch, options):
    threads = []
    finish = composing.finish

    def watched(*arguments, **names):
        threads.append(threading.current_thread())
        return finish(*arguments, **names)

    monkeypatch.setattr(composing, "finish", watched)
    with serve() as client:
        loops = []
        client.portal.call(lambda: loops.append(threading.current_thread()))
        for _ in range(2):  # a miss and a hit
            assert post(client, **options).status_code == 200

    assert len(threads) == 2
    assert loops[0] not in threads


def test_slow_answers_do_not_keep_short_work_waiting(serve, monkeypatch):
    started, may_end = threading.Semaphore(0), threading.Event()
    finish = composing.finish

    def slow(features, regions, options, **names):
        if options.project is not None:
            started.release()
            assert may_end.wait(10)
        return finish(features, regions, options, **names)

    monkeypatch.setattr(composing, "finish", slow)
    with serve() as client, ThreadPoolExecutor(2) as threads:
        post(client)
        slow_ones = [threads.submit(post, client, project=2) for _ in range(2)]
        assert all(started.acquire(timeout=10) for _ in slow_ones)

        hit = post(client)

        assert hit.headers["x-cache"] == "hit"
        assert not any(future.done() for future in slow_ones)
        may_end.set()
        assert all(future.result().status_code == 200 for future in slow_ones)


def test_json_is_refused_for_all_its_values_and_not_for_features_alone(client, monkeypatch):
    monkeypatch.setattr(wire, "MAX_JSON_VALUES", 1000)
    accept = PNG | {"accept": "application/json"}
    mean = {"pool": "mean", "register_width": 2}

    small = post(client, headers=accept, **mean)
    large = post(client, headers=accept, include="registers", **mean)

    assert small.status_code == 200
    assert large.status_code == 422
    assert large.json()["error"]["code"] == "response_too_large"


def test_the_garbage_collector_leaves_what_the_libraries_made_alone(artifact):
    script = (
        "import gc, sys, service.server, service.__main__ as program\n"
        "server = service.server.DrainingServer\n"
        "server.run = lambda _: print(gc.get_freeze_count(), flush=True)\n"
        "program.main(sys.argv[1:])"
    )

    ended = subprocess.run(
        [sys.executable, "-c", script, "--model", str(artifact)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert int(ended.stdout) > 100_000


def test_bodies_that_are_compressed_as_a_whole_are_refused_and_not_misread(client):
    response = post(client, headers=PNG | {"content-encoding": "gzip"})

    assert response.status_code == 415
    assert "Content-Encoding is 'gzip'" in response.json()["error"]["message"]


@pytest.mark.parametrize("route", ["/livez", "/readyz", "/healthz"])
def test_probes_may_be_asked_with_head(client, route):
    assert client.head(route).status_code == 200
