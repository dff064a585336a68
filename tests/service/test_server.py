"""A real server process: start, hostile files, hang-ups, shutdown."""

import contextlib
import csv
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import httpx2 as httpx
import psutil
import pytest
from safetensors.numpy import load

from service.keys import key_line
from tests.service.small_service import RunningServer, read_all, running, small_app
from tests.support import data_folder, encoded, noise_image, tiny_artifact

PNG = {"content-type": "image/png"}
PHOTO = encoded(noise_image(64, 64))
MIB = 1024 * 1024


def post(server, data=PHOTO, headers=PNG, **options):
    return server.client.post("/features", content=data, headers=headers, **options)


def counter(server, name):
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"refinery_{name}"))


def wait_for(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def run_service(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "service", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.fixture(scope="module")
def server(server_process):
    return server_process("--precision", "fp32", "--decode-threads", "2")


def test_a_photograph_goes_in_and_features_come_out(server):
    response = post(server)

    assert load(response.content)["features.0"].shape == (4, 4, 32)
    assert "server" not in response.headers


def test_many_clients_at_once_all_get_what_they_get_alone(server):
    images = [encoded(noise_image(64, 64 + 16 * (seed % 3), seed)) for seed in range(24)]
    alone = [post(server, image, params={"size": "64"}).content for image in images]
    answers = [b""] * len(images)

    def ask(index):
        for _ in range(3):
            answers[index] = post(server, images[index], params={"size": "64"}).content

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(images))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for one, other in zip(alone, answers, strict=True):
        left, right = load(one)["features.0"], load(other)["features.0"]
        assert abs(left.astype("f4") - right.astype("f4")).max() < 1e-2


@pytest.mark.data
@pytest.mark.slow
def test_no_hostile_file_harms_the_service(server):
    folder = data_folder("bad_inputs")
    with (folder / "MANIFEST.tsv").open() as manifest:
        rows = list(csv.DictReader(manifest, delimiter="\t"))
    process = psutil.Process(server.process.pid)
    wrong = []

    def send_all():
        for row in rows:
            started = time.monotonic()
            response = post(server, (folder / row["file"]).read_bytes())
            seconds = time.monotonic() - started
            if response.status_code != 200:
                assert response.json()["error"]["code"], row["file"]
            expected = response.status_code == 200 or 400 <= response.status_code < 500
            served_junk = response.status_code == 200 and row["decodable"] == "no"
            if not expected or served_junk or seconds > 5:
                wrong.append((row["file"], response.status_code, round(seconds, 1)))

    send_all()  # what the allocator keeps once, it keeps
    send_all()
    memory_before = process.memory_info().rss
    for _ in range(2):
        send_all()

    assert wrong == []
    assert len(rows) > 200
    assert post(server).status_code == 200
    assert process.memory_info().rss - memory_before < 48 * MIB


def test_truncated_and_lying_requests_leave_the_service_alive(server):
    host, port = server.url.removeprefix("http://").split(":")
    for request in (
        b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\n"
        b"content-length: 1000\r\n\r\nshort",
        b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\n"
        b"transfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"\x00\x01\x02 nonsense\r\n\r\n",
    ):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request)

    assert post(server).status_code == 200
    wait_for(lambda: counter(server, "requests_in_flight") == 0)
    assert counter(server, 'requests_total{route="/features",status="499"}') == 2
    assert "Traceback" not in server.log.read_text()


def test_a_client_that_sends_before_it_listens_still_hears_why_it_was_refused(server):
    request = urllib.request.Request(server.url + "/features", bytes(40 * MIB), PNG)

    with pytest.raises(urllib.error.HTTPError) as caught, urllib.request.urlopen(request):
        pass

    with caught.value as answer:
        assert json.load(answer)["error"]["code"] == "body_too_large"


def test_a_client_that_hangs_up_costs_no_forward(server_process):
    # One image at a time, large enough that the queue is long when the clients leave.
    server = server_process(
        "--torch-threads", "1", "--batch-tokens", "1000", "--max-image-tokens", "1000"
    )
    leaving = [threading.Thread(target=ask_and_leave, args=(server, seed)) for seed in range(24)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()

    wait_for(lambda: counter(server, "requests_in_flight") == 0)
    assert post(server).status_code == 200
    assert counter(server, "abandoned_requests_total") > 0
    assert counter(server, "queue_images") == counter(server, "queue_tokens") == 0


def ask_and_leave(server, seed):
    image = encoded(noise_image(448, 448, seed))
    with contextlib.suppress(httpx.TimeoutException):
        server.client.post(
            "/features?size=448", content=image, headers=PNG, timeout=httpx.Timeout(10, read=0.01)
        )


def test_sigterm_finishes_what_was_admitted_and_exits_with_0(server_process):
    server = server_process("--torch-threads", "1")
    statuses = []

    def ask(seed):
        image = encoded(noise_image(512, 512, seed))
        statuses.append(post(server, image, params={"size": "512"}).status_code)

    asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in asking:
        thread.start()
    wait_for(lambda: counter(server, "requests_in_flight") == 12)
    server.process.terminate()
    for thread in asking:
        thread.join()

    assert statuses == [200] * 12
    assert server.process.wait(20) == 0
    assert "draining: " in server.log.read_text()


def test_a_drain_beyond_its_deadline_cuts_requests_off_and_says_so(server_process):
    server = server_process("--drain-seconds", "0.2")
    connection = slow_upload(server)
    wait_for(lambda: counter(server, "requests_in_flight") == 1)

    server.process.terminate()
    wait_for(lambda: server.readyz() == 503, 1)

    assert server.process.wait(20) == 1
    assert "cut off" in server.log.read_text()
    connection.close()


def slow_upload(server):
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-type: image/png\r\n"
        b"content-length: 1000\r\n\r\nnever the rest"
    )
    return connection


def test_sigterm_during_the_start_ends_it_cleanly(server_process, tmp_path):
    slow = tiny_artifact(tmp_path / "slow", native_size=(1408, 1408))
    server = server_process(
        "--max-image-tokens", "9999", "--torch-threads", "1", model=slow, wait=False
    )
    wait_for(lambda: server.readyz() == 503, 60)
    wait_for(lambda: "loaded" in server.log.read_text())

    server.process.terminate()

    assert server.process.wait(10) == 0
    assert "warmed up" not in server.log.read_text()


def test_a_model_too_large_for_the_limits_ends_the_start(artifact):
    result = run_service(
        "--model", str(artifact), "--port", "0", "--max-image-tokens", "9", "--batch-tokens", "9"
    )

    assert result.returncode == 2
    assert "costs 37 tokens and --max-image-tokens is 9" in result.stderr.splitlines()[-1]


def test_a_second_signal_stops_at_once(server_process):
    server = server_process("--drain-seconds", "60")
    connection = slow_upload(server)
    wait_for(lambda: counter(server, "requests_in_flight") == 1)

    server.process.terminate()
    time.sleep(0.3)
    server.process.terminate()

    assert server.process.wait(10) == 1
    connection.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--model", "m", "--host", "0.0.0.0"], "--insecure"),
        (["--model", "m", "--batch-tokens", "1"], "--batch-tokens"),
        (["--model", "m", "--api-key-file", "/no/such/file"], "/no/such/file"),
        (["--model", "m", "--cors-origins", "*"], "--cors-origins"),
        ([], "--model"),
    ],
)
def test_settings_that_cannot_work_end_with_one_line_and_status_2(arguments, message):
    result = run_service(*arguments, "--port", "0") if arguments else run_service()

    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_an_unknown_variable_ends_the_start(monkeypatch):
    monkeypatch.setenv("REFINERY_PROT", "1")

    result = run_service("--model", "m")

    assert result.returncode == 2
    assert "REFINERY_PORT" in result.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [("fast", "'fast'; use one of auto, triton, reference"), ("triton", "REFINERY_KERNELS=triton")],
)
def test_kernels_that_cannot_run_end_the_start(monkeypatch, artifact, value, message):
    # Without the interpreter, whatever this process runs under.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("REFINERY_KERNELS", value)

    result = run_service("--model", str(artifact), "--device", "cpu", "--port", "0")

    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_print_config_shows_flags_variables_and_defaults(monkeypatch):
    monkeypatch.setenv("REFINERY_PORT", "8100")

    config = json.loads(run_service("--model", "m", "--print-config").stdout)

    assert (config["model"], config["port"], config["max_images"]) == (["m"], 8100, 32)


def test_settings_that_cannot_work_are_json_where_the_log_is(tmp_path):
    (tmp_path / "keys").write_text("alice not-a-hash\n")

    result = run_service(
        "--model", "m", "--log-format", "json", "--api-key-file", str(tmp_path / "keys")
    )

    assert result.returncode == 2
    document = json.loads(result.stderr.splitlines()[-1])
    assert document["level"] == "critical"
    assert "line 1" in document["message"]


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_that_is_taken_ends_the_start(artifact, flag):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        result = run_service("--model", str(artifact), "--port", "0", flag, port)

    assert result.returncode == 2
    assert "address already in use" in result.stderr


def test_every_line_of_a_json_log_is_an_object_and_a_request_has_its_own(server_process):
    server = server_process("--log-format", "json", "--log-level", "debug")
    headers = {**PNG, "x-request-id": "find-me"}

    post(server, headers=headers)
    post(server, b"no image", headers=headers)
    server.process.terminate()
    assert server.process.wait(20) == 0

    documents = [json.loads(line) for line in server.log.read_text().splitlines()]
    answers = [
        (document["path"], document["status"])
        for document in documents
        if document.get("request_id") == "find-me" and "status" in document
    ]
    assert [path for path, _ in answers] == ["/features"] * 2
    assert answers[0][1] == 200
    assert 400 <= answers[1][1] < 500
    assert {"timestamp", "level", "logger", "message"} <= documents[0].keys()


def test_keys_guard_a_served_model_and_change_without_a_restart(server_process, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(key_line("alice", "alice-0123456789abcdef", is_admin=False))
    server = server_process("--api-key-file", str(keys))
    alice = {**PNG, "authorization": "Bearer alice-0123456789abcdef"}
    bob = {**PNG, "x-api-key": "bob-0123456789abcdef"}

    assert post(server).status_code == 401
    assert post(server, headers=alice).status_code == 200
    assert post(server, headers=bob).status_code == 401
    keys.write_text(key_line("bob", "bob-0123456789abcdef", is_admin=False))
    wait_for(lambda: post(server, headers=bob).status_code == 200, 5)
    assert post(server, headers=alice).status_code == 401

    server.process.terminate()
    assert server.process.wait(20) == 0
    assert "key=alice" in server.log.read_text()
    assert "0123456789abcdef" not in server.log.read_text()


def test_a_request_that_cannot_be_answered_in_time_gets_a_504(server):
    response = post(server, headers={**PNG, "x-deadline-ms": "1"})

    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"


# Below, the edge around routes without a model.


def metrics_url(caplog):
    found = []

    def look():
        lines = [record.getMessage() for record in caplog.records]
        found.extend(match[1] for line in lines if (match := re.match(r"metrics on (.+)", line)))
        return found

    wait_for(look)
    return found[0]


def test_metrics_have_a_port_of_their_own_that_needs_no_key(tmp_path, caplog):
    caplog.set_level("INFO")
    keys = tmp_path / "keys"
    keys.write_text(key_line("alice", "alice-0123456789abcdef", is_admin=False))

    with running(small_app(metrics_port=0, api_key_file=keys)) as server:
        url = metrics_url(caplog)
        httpx.get(server.url + "/info")
        # A request is counted when its answer is out.
        line = 'refinery_requests_total{route="other",status="401"} 1.0'
        wait_for(lambda: line in httpx.get(url).text)
        answer = httpx.get(url)
        elsewhere = httpx.get(url.replace("/metrics", "/features"))
        posted = httpx.post(url)

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert (elsewhere.status_code, elsewhere.json()["error"]["code"]) == (404, "not_found")
    assert (posted.status_code, posted.json()["error"]["code"]) == (405, "method_not_allowed")


def ask_in_thread(server, path):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(httpx.post(server.url + path)))
    thread.start()
    wait_for(lambda: server.service.in_flight > 0)
    return thread, answers


def test_requests_in_flight_hear_of_a_stuck_engine_before_the_process_ends():
    server = RunningServer(small_app())
    thread, answers = ask_in_thread(server, "/features?wait=60")

    server.service.is_stuck = True
    thread.join(10)
    server.thread.join(10)

    assert not server.thread.is_alive()
    assert server.server.exit_status == 1
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "not_ready")


def test_a_request_that_outlasts_the_drain_gets_a_503():
    server = RunningServer(small_app(drain_seconds=0.2))
    thread, answers = ask_in_thread(server, "/features?wait=60")

    server.server.handle_exit(15, None)
    thread.join(10)
    server.thread.join(10)

    assert not server.thread.is_alive()
    assert server.server.exit_status == 1
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "draining")


def test_a_request_that_ends_within_the_drain_is_answered():
    server = RunningServer(small_app(drain_seconds=10))
    thread, answers = ask_in_thread(server, "/features?wait=0.5")

    server.server.handle_exit(15, None)
    while_draining = httpx.get(server.url + "/livez").status_code
    thread.join(10)
    server.thread.join(10)

    assert not server.thread.is_alive()
    assert (while_draining, answers[0].status_code) == (200, 200)
    assert server.server.exit_status == 0


def test_a_second_signal_does_not_wait_for_clients_that_do_not_read():
    server = RunningServer(small_app(drain_seconds=60))
    with server.connect() as connection:
        connection.sendall(b"GET /large?mib=64 HTTP/1.1\r\nhost: a\r\n\r\n")
        wait_for(lambda: server.connections() == 1)

        server.server.handle_exit(15, None)
        server.server.handle_exit(15, None)
        server.thread.join(5)

        assert not server.thread.is_alive()
        assert len(read_all(connection)) < 64 * MIB
