"""The load client counts what a server does, and cannot be fooled about latency."""

import itertools

import numpy as np
import pytest

from benchmarks.load import Job, Target, arrivals, closed_loop, open_loop
from benchmarks.serving.processes import free_port
from tests.benchmarks.fake_server import fake_server, good

JOB = Job(b"image", "?size=224", "a kind")


def test_a_closed_loop_sends_every_job_once_over_as_many_connections_as_clients():
    jobs = [Job(bytes([number])) for number in range(12)]

    with fake_server(lambda _: (0.0, good())) as server:
        load = closed_loop(server.target, jobs, clients=3)

    assert sorted(request.body for request in server.requests) == [job.body for job in jobs]
    assert server.num_connections == 3
    assert [sample.status for sample in load.samples] == [200] * 12
    assert load.rate == pytest.approx(12 / load.seconds)


def test_a_closed_loop_keeps_no_more_requests_open_than_it_has_clients():
    with fake_server(lambda _: (0.05, good())) as server:
        load = closed_loop(server.target, [JOB] * 8, clients=2)

    assert load.seconds >= 4 * 0.05


def test_a_closed_loop_ends_after_its_time_and_waits_for_what_is_in_flight():
    with fake_server(lambda _: (0.08, good())) as server:
        load = closed_loop(server.target, itertools.repeat(JOB), clients=1, seconds=0.2)

    assert len(load.samples) == 3
    assert load.seconds == pytest.approx(0.2, abs=0.01)
    assert load.rate == pytest.approx(2 / 0.2, rel=0.1)  # the third came after the time


def test_a_request_has_its_query_type_and_headers():
    job = Job(b"x", "?size=64", content_type="image/png", headers="x-deadline-ms: 9\r\n")

    with fake_server(lambda _: (0.0, good())) as server:
        closed_loop(server.target, [job], clients=1)

    (request,) = server.requests
    assert request.head.startswith("POST /features?size=64 HTTP/1.1\r\n")
    assert "content-type: image/png\r\nx-deadline-ms: 9\r\n" in request.head


def test_an_answer_is_told_by_status_size_and_headers():
    headers = "Server-Timing: forward;dur=5.5\r\nX-Cache: hit\r\nServer: fake\r\n"

    with fake_server(lambda _: (0.0, good(b"12345", headers=headers))) as server:
        (sample,) = closed_loop(server.target, [JOB], clients=1).samples

    assert (sample.status, sample.received_bytes, sample.kind) == (200, 5, "a kind")
    assert sample.headers == {
        b"server-timing": b"forward;dur=5.5",
        b"x-cache": b"hit",
        b"content-length": b"5",
    }


def test_an_answer_larger_than_the_buffer_is_read_to_its_end():
    body = bytes(3 * 2**20)

    with fake_server(lambda _: (0.0, good(body))) as server:
        first, second = closed_loop(server.target, [JOB, JOB], clients=1).samples

    assert first.received_bytes == second.received_bytes == len(body)
    assert server.num_connections == 1


def test_latency_of_an_open_loop_counts_from_the_scheduled_time():
    """A server that stalls once must show in every request that was due meanwhile."""
    waits = iter([0.3, *[0.0] * 9])
    offsets = [number * 0.02 for number in range(10)]

    with fake_server(lambda _: (next(waits), good())) as server:
        load = open_loop(server.target, [JOB] * 10, offsets)

    due = [sample.due - load.started for sample in load.samples]
    assert np.allclose(due, offsets)
    assert max(sample.latency for sample in load.samples) >= 0.3
    assert sum(sample.latency < 0.15 for sample in load.samples) >= 8  # others do not wait for it


def test_a_late_generator_makes_latency_longer_not_shorter():
    with fake_server(lambda _: (0.0, good())) as server:
        # Both are due at once: the second is sent later, and counts from when it was due.
        load = open_loop(server.target, [JOB, JOB], [0.0, 0.0])

    for sample in load.samples:
        assert sample.latency >= sample.ended - sample.sent


def test_a_closed_connection_is_a_failure_without_status():
    with fake_server(lambda _: (0.0, None)) as server:
        (sample,) = closed_loop(server.target, [JOB], clients=1).samples

    assert (sample.status, sample.failure) == (0, "closed")


def test_half_an_answer_is_told_from_none():
    half = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf"

    with fake_server(lambda _: (0.0, half)) as server:
        server.cuts_off = True
        (sample,) = closed_loop(server.target, [JOB], clients=1).samples

    assert (sample.status, sample.failure) == (0, "cut off")


def test_a_server_that_is_gone_refuses():
    target = Target("127.0.0.1", free_port(), "/features")

    (sample,) = open_loop(target, [JOB], [0.0]).samples

    assert (sample.status, sample.failure) == (0, "refused")


def test_a_client_that_leaves_hangs_up_and_its_connection_is_not_used_again():
    jobs = [JOB._replace(leaves_after=0.05), JOB]

    with fake_server(lambda _: (0.15, good())) as server:
        left, stayed = closed_loop(server.target, jobs, clients=1).samples

    assert left.failure == "left"
    assert stayed.status == 200
    assert server.num_connections == 2


def test_arrivals_have_the_rate_that_was_asked_for():
    offsets = arrivals(rate=200, seconds=50, seed=1)

    assert len(offsets) == pytest.approx(200 * 50, rel=0.03)
    assert offsets[0] > 0
    assert offsets[-1] < 50


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_vary_as_the_gamma_distribution_has_it(burstiness):
    offsets = arrivals(rate=100, seconds=200, burstiness=burstiness, seed=2)

    gaps = np.diff(offsets)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_of_a_later_phase_lie_in_it():
    offsets = arrivals(rate=50, seconds=2, start=10)

    assert min(offsets) > 10
    assert max(offsets) < 12
