"""Connections of clients that are slow, hostile, or mistaken."""

import contextlib
import json
import socket
import time

import pytest

from service import protocol
from tests.service.small_service import read_all, running, small_app, wait_for

GET = b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n"
GET_AND_CLOSE = b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server():
    app = small_app(max_header_bytes=4096, header_seconds=0.5, body_seconds=0.7, cache="off")
    with running(app) as server:
        yield server


@pytest.fixture(autouse=True)
def short_linger(monkeypatch):
    monkeypatch.setattr(protocol, "_LINGER_SECONDS", 0.2)


def error_of(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head
    assert b"x-content-type-options: nosniff" in head
    return int(head.split()[1]), json.loads(body)["error"]


def read_answer(connection):
    """One whole answer, the connection still open."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(4096)
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    while len(body) < length:
        body += connection.recv(4096)
    return head + b"\r\n\r\n" + body


def seconds_until_closed(connection):
    started = time.monotonic()
    read_all(connection)
    return time.monotonic() - started


def seconds_of_trickling(connection, data):
    """How long the other side lets us send a little now and then."""
    started = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - started < 5:
            connection.sendall(data)
            time.sleep(0.05)
    return time.monotonic() - started


def test_a_request_is_answered(server):
    answer = server.ask(GET_AND_CLOSE)

    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b'{"status":"ok"}')


def test_a_connection_that_sends_nothing_is_closed_in_time(server):
    with server.connect() as connection:
        assert 0.3 < seconds_until_closed(connection) < 2


def test_headers_that_trickle_are_cut_off_in_time(server):
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\n")

        assert 0.3 < seconds_of_trickling(connection, b"a: b\r\n") < 2


def test_headers_that_trickle_on_a_kept_connection_are_cut_off_too(server):
    with server.connect() as connection:
        connection.sendall(GET)
        assert b"200 OK" in read_answer(connection)
        time.sleep(0.8)  # idle for longer than headers may take
        connection.sendall(b"GET /livez HT")

        assert 0.3 < seconds_until_closed(connection) < 2


def test_idle_connections_are_kept(server):
    connections = [server.connect() for _ in range(200)]
    for connection in connections:
        connection.sendall(GET)
        assert b"200 OK" in read_answer(connection)

    time.sleep(0.8)
    for connection in connections:
        connection.sendall(GET)
        assert b"200 OK" in read_answer(connection)
        connection.close()


@pytest.mark.parametrize(
    "headers",
    [
        b"x: " + b"a" * 5000 + b"\r\n",
        b"".join(b"x-%d: a\r\n" % index for index in range(1000)),
        b"a" * 5000 + b": b\r\n",
    ],
    ids=["one long", "a thousand", "a long name"],
)
@pytest.mark.parametrize("is_complete", [True, False])
def test_headers_beyond_the_limit_get_a_typed_431(server, headers, is_complete):
    request = b"GET /livez HTTP/1.1\r\nhost: a\r\n" + headers + b"\r\n" * is_complete

    status, error = error_of(server.ask(request))

    assert (status, error["code"]) == (431, "headers_too_large")
    assert "4096 bytes" in error["message"]


def test_a_request_line_beyond_the_limit_gets_a_typed_431(server):
    status, error = error_of(server.ask(b"GET /livez?" + b"a" * 5000))

    assert (status, error["code"]) == (431, "headers_too_large")


def test_headers_that_arrive_in_pieces_are_counted_together(server):
    with server.connect() as connection:
        connection.sendall(b"GET /livez HTTP/1.1\r\nx: ")
        for _ in range(50):
            connection.sendall(b"a" * 100)
            time.sleep(0.001)

        assert error_of(read_all(connection))[0] == 431


def test_headers_within_the_limit_are_taken(server):
    answer = server.ask(GET_AND_CLOSE[:-2] + b"x: " + b"a" * 3900 + b"\r\n\r\n")

    assert b"200 OK" in answer


def test_empty_lines_without_end_are_refused(server):
    assert error_of(server.ask(b"\r\n" * 5000))[0] == 431


CHUNKED = (
    b"POST /features HTTP/1.1\r\nhost: a\r\nconnection: close\r\n"
    b"transfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
)


def test_trailers_do_not_pass_for_headers(server):
    answer = server.ask(CHUNKED + b"x-deadline-ms: none\r\nconnection: upgrade\r\n\r\n")

    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"\r\n\r\nx")
    assert (b"connection", b"upgrade") not in server.service.seen_headers[-1]


def test_trailers_have_a_limit_too(server):
    with server.connect() as connection:
        connection.sendall(CHUNKED)
        for _ in range(50):
            connection.sendall(b"a: " + b"b" * 95 + b"\r\n")
            time.sleep(0.001)

        assert error_of(read_all(connection))[0] == 431


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\x01\x02 nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS on a plain port
        b"GET\r\n\r\n",
        b"GET /livez HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.org:443 HTTP/1.1\r\nhost: a\r\n\r\n",
        "GET /é HTTP/1.1\r\nhost: a\r\n\r\n".encode(),
        b"GET /livez HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\na: b\x00c\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nhost: a\r\nx: a\r\n folded\r\n\r\n",
        b"POST /features HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /features HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"POST /features HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST /features HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\na",
        b"POST /features HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /features HTTP/1.1\r\nupgrade: h2c\r\nconnection: upgrade\r\ncontent-length: 3\r\n"
        b"\r\nabc",
    ],
)
def test_what_is_not_http_gets_a_typed_400_and_is_closed(server, request_bytes):
    status, error = error_of(server.ask(request_bytes))

    assert (status, error["code"], error["retryable"]) == (400, "malformed_request", False)
    assert error["request_id"]
    assert "None" not in error["message"]


def test_refusals_are_counted(server):
    def count():
        text = server.service.metrics.exposition().decode()
        line = 'refinery_requests_total{route="other",status="400"} '
        return sum(float(row.split()[-1]) for row in text.splitlines() if row.startswith(line))

    before = count()

    server.ask(b"GET\r\n\r\n")

    assert count() == before + 1


def test_pipelined_requests_are_answered_in_order(server):
    request = b"POST /features HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n%d"

    answer = server.ask(b"".join(request % index for index in range(5)) + GET_AND_CLOSE)

    bodies = [part.split(b"HTTP/1.1")[0] for part in answer.split(b"\r\n\r\n")[1:]]
    assert bodies == [b"0", b"1", b"2", b"3", b"4", b'{"status":"ok"}']


def test_garbage_after_a_request_leaves_its_answer_whole(server):
    answer = server.ask(
        b"POST /features?wait=0.2 HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx\x00garbage"
    )

    first, second = answer.split(b"HTTP/1.1 400")
    assert first.startswith(b"HTTP/1.1 200 OK")
    assert first.endswith(b"\r\n\r\nx")
    assert error_of(b"HTTP/1.1 400" + second)[1]["code"] == "malformed_request"


def test_more_requests_than_may_wait_on_a_connection_are_refused(server):
    slow = b"POST /features?wait=0.2 HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx"

    answer = server.ask(slow + GET * 1000)

    assert answer.count(b"HTTP/1.1 200") == 9
    assert answer.count(b"HTTP/1.1 400") == 1
    assert answer.endswith(b"}}")


def test_the_first_of_a_pipeline_hears_that_its_client_left(server):
    server.service.seen.clear()
    with server.connect() as connection:
        connection.sendall(
            b"POST /features?wait=0.3 HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx" + GET
        )
        wait_for(lambda: server.service.seen)

    wait_for(lambda: server.service.in_flight == 0)
    wait_for(lambda: server.connections() == 0)
    assert b"200 OK" in server.ask(GET_AND_CLOSE)


def test_an_upgrade_without_body_is_answered_as_a_plain_request(server):
    answer = server.ask(
        b"GET /livez HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n"
        + GET_AND_CLOSE
    )

    assert answer.count(b"HTTP/1.1 200 OK") == 2


def test_the_rest_of_a_body_that_was_refused_is_taken_and_the_connection_goes_on(server):
    with server.connect() as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        assert b" 404 " in read_answer(connection)
        connection.sendall(bytes(200000))
        time.sleep(0.8)
        connection.sendall(GET)

        assert b"200 OK" in read_answer(connection)


def test_the_rest_of_a_body_that_was_refused_has_a_limit_in_time(server):
    with server.connect() as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 200000\r\n\r\n")
        assert b" 404 " in read_answer(connection)

        assert 0.3 < seconds_of_trickling(connection, b"x") < 2


def test_a_refusal_instead_of_a_go_ahead_ends_the_connection(server):
    answer = server.ask(
        b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\nexpect: 100-continue\r\n\r\n"
    )

    assert b" 404 " in answer
    assert b"100 Continue" not in answer


def test_a_client_that_reads_nothing_is_let_go(server, monkeypatch):
    monkeypatch.setattr(protocol, "_STALL_SECONDS", 0.3)
    with server.connect() as connection:
        connection.sendall(b"GET /large?mib=64 HTTP/1.1\r\nhost: a\r\n\r\n")
        wait_for(lambda: server.connections() == 1)

        wait_for(lambda: server.connections() == 0, 5)


@pytest.mark.parametrize("header", [b"", b"connection: close\r\n"])
def test_a_client_that_reads_slowly_gets_everything(server, monkeypatch, header):
    monkeypatch.setattr(protocol, "_STALL_SECONDS", 0.2)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /large?mib=8 HTTP/1.1\r\nhost: a\r\n" + header + b"\r\n")
        received, size = 0, 8 * 1024 * 1024
        while received < size:
            data = connection.recv(256 * 1024)
            assert data, f"closed after {received} bytes"
            received += len(data)
            time.sleep(0.01)

    assert received >= size


def test_no_connection_is_left_behind(server):
    wait_for(lambda: server.connections() == 0)
