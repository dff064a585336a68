"""What the edge does to every request, around routes that have no model behind them."""

import base64
import json
import logging
import threading
import time

import pytest
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from service import keys
from service.app import create_app
from service.keys import key_line
from service.settings import SettingsError
from tests.service.small_service import read_all, running, small_app, wait_for

PROBES = ("/livez", "/readyz", "/startupz", "/healthz")
ALICE, ROOT = "alice-0123456789abcdef", "root-0123456789abcdef"
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    lines = (key_line("alice", ALICE, is_admin=False), key_line("root", ROOT, is_admin=True))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def open_client():
    with TestClient(small_app()) as client:
        yield client


@pytest.fixture(scope="module")
def guarded(key_file):
    with TestClient(small_app(api_key_file=key_file)) as client:
        yield client


def error_of(response):
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["request_id"] == response.headers["x-request-id"]
    return error


def access_lines(caplog):
    return [record for record in caplog.records if " trace=" in record.getMessage()]


# Every answer.


def test_a_request_keeps_its_id_and_every_answer_says_that_types_are_not_guessed(open_client):
    response = open_client.get("/livez", headers={"x-request-id": "from-a-proxy:1"})

    assert response.headers["x-request-id"] == "from-a-proxy:1"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["x-model-digest"] == "sha256:0123"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\tb"])
def test_an_id_that_is_unfit_for_a_log_is_replaced(open_client, given):
    response = open_client.get("/nowhere", headers={"x-request-id": given})

    assert error_of(response)["request_id"] not in ("", given)


def test_a_trace_goes_on_in_the_answer(open_client):
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-01"}

    version, trace, span, flags = (
        open_client.get("/livez", headers=headers).headers["traceparent"].split("-")
    )

    assert (version, trace, flags) == ("00", TRACE, "01")
    assert span != SPAN


def test_a_trace_that_makes_no_sense_is_replaced(open_client):
    response = open_client.get("/livez", headers={"traceparent": "00-short-01"})

    assert len(response.headers["traceparent"].split("-")[1]) == 32


def test_a_fault_is_answered_with_its_request_id_and_logged_under_it(open_client, caplog):
    response = open_client.post("/features?fails=true", content=b"x")

    error = error_of(response)
    assert (response.status_code, error["code"]) == (500, "internal")
    assert any(
        error["request_id"] in record.getMessage() and record.exc_info for record in caplog.records
    )


def test_a_web_socket_is_refused(open_client, guarded):
    for client in (open_client, guarded):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/features"):
            pass


# Log lines.


def test_a_feature_request_gets_one_line_that_tells_all_about_it(guarded, caplog):
    caplog.set_level(logging.DEBUG, "service")
    headers = {"x-api-key": ALICE, "x-request-id": "r1", "traceparent": f"00-{TRACE}-{SPAN}-01"}

    guarded.post("/features?size=448", content=b"12345", headers=headers)

    (record,) = access_lines(caplog)
    assert record.levelno == logging.INFO
    message = record.getMessage()
    assert message.startswith("POST /features 200 ")
    for part in ("r1", f"trace={TRACE}", "key=alice", "5 bytes"):
        assert part in message
    fields = record.fields
    assert (fields["method"], fields["path"], fields["status"]) == ("POST", "/features", 200)
    assert (fields["received_bytes"], fields["bytes"]) == (5, 5)
    assert 0 < fields["seconds"] < 5


@pytest.mark.parametrize(
    ("path", "level"),
    [("/livez", logging.DEBUG), ("/info", logging.DEBUG), ("/nowhere", logging.INFO)],
)
def test_other_requests_get_a_line_too_and_errors_a_louder_one(open_client, caplog, path, level):
    caplog.set_level(logging.DEBUG, "service")

    open_client.get(path)

    assert [record.levelno for record in access_lines(caplog)] == [level]


def test_no_path_forges_a_log_line(open_client, caplog):
    caplog.set_level(logging.DEBUG, "service")

    open_client.get("/a%0aINFO%20forged%1b[31m" + "x" * 500)

    (record,) = access_lines(caplog)
    assert record.getMessage().isprintable()
    assert len(record.getMessage()) < 500


def test_a_key_is_never_logged(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    basic = base64.b64encode(f"a:{ALICE}".encode()).decode()

    guarded.get("/info", headers={"x-api-key": ALICE})
    guarded.get("/info", headers={"authorization": f"Basic {basic}"})
    guarded.get("/info", headers={"x-api-key": "wrong-" + ALICE})

    assert ALICE not in caplog.text
    assert basic not in caplog.text


# Keys.


def paths_of(routes):
    """Every path, those of included routers and those that are not in the schema too."""
    for route in routes:
        if hasattr(route, "path"):
            yield route.path
        else:
            yield from paths_of(route.original_router.routes)


def test_every_route_of_the_service_but_the_probes_needs_a_key(settings, key_file):
    app = create_app(settings(api_key_file=key_file))
    known = {*paths_of(app.routes), *app.openapi()["paths"]}
    assert {"/", "/features", "/info", "/docs", "/openapi.json", "/metrics", *PROBES} <= known
    assert {"/admin/models", "/admin/models/{name}", "/static/{name}"} <= known
    paths = known - set(PROBES) | {"/static/app.js", "/docs/x", "/redoc", "/admin", "/nowhere"}
    guarded = TestClient(app)  # not started: nothing behind the edge is asked for anything

    for path in paths:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
            response = guarded.request(method, path)
            assert response.status_code == 401, (method, path)
    for path in PROBES:
        assert guarded.get(path).status_code != 401, path


@pytest.mark.parametrize(
    "path", ["//livez", "/livez/", "/livez/../info", "/LIVEZ", "/livez%00", "/livez;/info"]
)
def test_what_resembles_a_probe_needs_a_key(guarded, path):
    assert guarded.get(path, follow_redirects=False).status_code == 401


def test_a_missing_key_and_a_wrong_one_are_told_apart_and_both_asked_for(guarded):
    missing = guarded.get("/info")
    wrong = guarded.get("/info", headers={"x-api-key": "nobody's"})

    assert "no API key came" in error_of(missing)["message"]
    assert "not valid" in error_of(wrong)["message"]
    for response in (missing, wrong):
        assert "Bearer" in response.headers["www-authenticate"]
        assert "Basic" in response.headers["www-authenticate"]


def test_a_key_opens_what_is_not_the_administrators(guarded):
    headers = {"authorization": f"Bearer {ALICE}"}

    assert guarded.get("/info", headers=headers).status_code == 200
    assert guarded.get("/nowhere", headers=headers).status_code == 404
    for path in ("/admin", "/admin/models", "/admin/nothing", "/admin%2Fmodels"):
        response = guarded.get(path, headers=headers)
        assert response.status_code == 403, path
        assert "admin right" in error_of(response)["message"]


def test_an_admin_key_opens_everything(guarded):
    headers = {"authorization": f"Bearer {ROOT}"}

    assert guarded.get("/info", headers=headers).status_code == 200
    assert guarded.get("/admin/models", headers=headers).status_code == 200


def test_without_a_key_file_everything_is_open_but_admin(open_client):
    refused = open_client.get("/admin/models")

    assert open_client.get("/info").status_code == 200
    assert refused.status_code == 403
    assert "--api-key-file" in error_of(refused)["message"]


def test_a_request_without_key_is_refused_before_its_body_is_read(key_file):
    with running(small_app(api_key_file=key_file)) as server, server.connect() as connection:
        connection.sendall(b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n")

        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
        assert server.service.seen == []


def test_keys_that_change_count_without_a_restart(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "_CHECK_SECONDS", 0.0)
    path = tmp_path / "keys"
    path.write_text(key_line("alice", ALICE, is_admin=False))
    with TestClient(small_app(api_key_file=path)) as client:
        before = client.get("/info", headers={"x-api-key": ROOT}).status_code
        path.write_text(key_line("root", ROOT, is_admin=True))
        after = client.get("/info", headers={"x-api-key": ROOT}).status_code
        revoked = client.get("/info", headers={"x-api-key": ALICE}).status_code

    assert (before, after, revoked) == (401, 200, 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"sec-fetch-site": "same-origin", "origin": "http://testserver"}, 200),
        ({"origin": "http://testserver"}, 200),
        ({"sec-fetch-site": "cross-site", "origin": ORIGIN}, 403),
        ({"sec-fetch-site": "same-site", "origin": ORIGIN}, 403),
        ({"origin": ORIGIN}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[evil"}, 403),
    ],
)
def test_a_page_of_another_site_cannot_use_the_key_that_a_browser_remembers(
    guarded, headers, status
):
    basic = base64.b64encode(f":{ALICE}".encode()).decode()

    post = guarded.post("/features", headers={"authorization": f"Basic {basic}", **headers})
    bearer = guarded.post("/features", headers={"authorization": f"Bearer {ALICE}", **headers})

    assert (post.status_code, bearer.status_code) == (status, 200)


def test_metrics_have_no_names_of_keys(guarded):
    guarded.post("/features", headers={"x-api-key": ALICE})

    assert "alice" not in guarded.app.state.service.metrics.exposition().decode()


# Deadlines.


@pytest.mark.parametrize("given", ["0", "-5", "1.5", "abc", "", "1e3", "+5", " ", "9" * 30])
def test_a_deadline_that_is_no_positive_whole_number_is_refused(open_client, given):
    response = open_client.post("/features", headers={"x-deadline-ms": given})

    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_deadline")


def test_what_is_not_answered_by_its_deadline_is_cancelled_and_gets_a_504(open_client):
    service = open_client.app.state.service
    service.ended.clear()

    started = time.monotonic()
    response = open_client.post("/features?wait=5", headers={"x-deadline-ms": "200"})

    error = error_of(response)
    assert (response.status_code, error["code"]) == (504, "deadline_exceeded")
    assert error["retryable"]
    assert "within 2" in error["message"]
    assert 0.15 < time.monotonic() - started < 2
    assert service.ended == ["cancelled"]
    assert service.in_flight == 0


def test_routes_know_the_deadline(open_client):
    service = open_client.app.state.service

    open_client.post("/features", headers={"x-deadline-ms": "5000"})
    asked = service.seen[-1]["deadline"]
    open_client.post("/features", headers={"x-deadline-ms": "900000000"})
    shortened = service.seen[-1]["deadline"]

    assert 54 < shortened - asked < 56  # request_seconds is 60


def test_a_header_only_shortens_what_the_operator_allows():
    with TestClient(small_app(request_seconds=0.2)) as client:
        response = client.post("/features?wait=5", headers={"x-deadline-ms": "60000"})

    assert response.status_code == 504


def test_an_answer_that_has_begun_is_not_cut_by_its_deadline(open_client):
    response = open_client.get("/slowly", headers={"x-deadline-ms": "150"})

    assert (response.status_code, response.content) == (200, b"part" * 4)


# Bodies.


def trickle(connection, seconds=5.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            connection.sendall(b"1")
        except OSError:
            return
        time.sleep(0.05)


@pytest.mark.parametrize("path", [b"/features", b"/json"])
def test_a_body_that_trickles_gets_a_408_and_the_connection_is_closed(path):
    with running(small_app(body_seconds=0.4)) as server, server.connect() as connection:
        connection.sendall(
            b"POST " + path + b" HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n"
        )
        sending = threading.Thread(target=trickle, args=(connection,))
        sending.start()

        started = time.monotonic()
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        seconds = time.monotonic() - started
        sending.join()
        wait_for(lambda: server.service.in_flight == 0)

    assert head.startswith(b"HTTP/1.1 408 ")
    assert b"connection: close" in head
    assert json.loads(body)["error"]["code"] == "body_too_slow"
    assert 0.3 < seconds < 2


def test_a_body_in_time_may_take_long_to_answer():
    with TestClient(small_app(body_seconds=0.2)) as client:
        assert client.post("/features?wait=0.5", content=b"x").content == b"x"


def test_a_client_that_hangs_up_is_counted_and_not_answered():
    with running(small_app()) as server:
        with server.connect() as connection:
            connection.sendall(
                b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\nabc"
            )
            wait_for(lambda: server.service.in_flight == 1)
        wait_for(lambda: server.service.in_flight == 0)

        line = 'refinery_requests_total{route="/features",status="499"} 1.0'
        wait_for(lambda: line in server.service.metrics.exposition().decode())
        text = server.service.metrics.exposition().decode()

    assert "refinery_abandoned_requests_total 1.0" in text


# Other origins.


def preflight(client, origin=ORIGIN, method="POST", headers="authorization, x-deadline-ms"):
    return client.options(
        "/features",
        headers={
            "origin": origin,
            "access-control-request-method": method,
            "access-control-request-headers": headers,
        },
    )


def test_without_origins_no_page_elsewhere_is_let_in(open_client):
    for response in (preflight(open_client), open_client.get("/info", headers={"origin": ORIGIN})):
        assert not any(name.startswith("access-control") for name in response.headers)


def test_a_page_of_a_named_origin_asks_for_permission_without_a_key(key_file):
    app = small_app(api_key_file=key_file, cors_origins=(ORIGIN,))
    with TestClient(app) as client:
        allowed = preflight(client)
        refused = preflight(client, origin="https://evil.example")
        response = client.get("/info", headers={"origin": ORIGIN, "x-api-key": ALICE})
        error = client.get("/info", headers={"origin": ORIGIN})

    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert allowed.headers["x-content-type-options"] == "nosniff"
    for method in ("GET", "POST", "DELETE"):
        assert method in allowed.headers["access-control-allow-methods"]
    for name in ("authorization", "x-api-key", "content-type", "if-none-match", "traceparent"):
        assert name in allowed.headers["access-control-allow-headers"].lower()
    assert "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-credentials" not in allowed.headers
    assert response.status_code == 200
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "x-model-digest", "etag", "retry-after", "x-shape"} <= set(exposed)
    assert (error.status_code, error.headers["access-control-allow-origin"]) == (401, ORIGIN)


@pytest.mark.parametrize("origin", ["*", "https://*.example", "app.example", "https://a/b"])
def test_an_origin_that_is_none_is_refused_at_the_start(origin):
    with pytest.raises(SettingsError, match="--cors-origins"):
        small_app(cors_origins=(origin,))


def test_a_key_file_that_cannot_be_used_is_refused_at_the_start(tmp_path):
    (tmp_path / "keys").write_text("alice not-a-hash\n")

    with pytest.raises(SettingsError, match="line 1"):
        small_app(api_key_file=tmp_path / "keys")


# Traces.


class Recorder:
    """A tracer that keeps what it is given."""

    def __init__(self):
        self.spans = []

    def record(self, context, name, **facts):
        self.spans.append((context, name, facts))

    def close(self):
        pass


def test_a_feature_request_is_traced_with_what_was_found_out_about_it(key_file, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr("service.middleware.open_tracer", lambda *_: recorder)
    with TestClient(small_app(api_key_file=key_file)) as client:
        headers = {"traceparent": f"00-{TRACE}-{SPAN}-01", "x-api-key": ALICE}
        answered = client.post("/features", headers=headers)
        failed = client.post("/features?fails=true", headers={"x-api-key": ALICE})
        client.get("/info", headers=headers)

    (context, name, facts), (_, _, failure) = recorder.spans
    assert name == "POST /features"
    assert context.header == answered.headers["traceparent"]
    assert context.parent_id == SPAN
    assert facts["attributes"] == {
        "http.request.method": "POST",
        "http.route": "/features",
        "http.response.status_code": 200,
        "refinery.key": "alice",
    }
    assert (facts["failed"], failure["failed"]) == (False, True)
    assert failure["attributes"]["refinery.error"] == "internal"
    assert failed.headers["traceparent"].endswith("-01")
