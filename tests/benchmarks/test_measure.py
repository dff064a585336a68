"""Figures say what happened: percentiles, goodput, void runs, the knee, growing memory."""

import os
import time

import pytest

from benchmarks.load import Load, Sample
from benchmarks.serving.measure import (
    Knee,
    alternate,
    flatness,
    growth,
    knee_of,
    livez,
    median_ratio,
    metric,
    open_summary,
    summary,
)
from benchmarks.serving.watch import Memory, Probe, Watch, watching
from tests.benchmarks.fake_server import fake_server, good


def sample(due, seconds, status=200, *, lag=0.0, kind="", failure="", headers=None):
    return Sample(
        kind,
        due,
        sent=due + lag,
        ended=due + seconds,
        status=status,
        failure=failure,
        received_bytes=1000,
        headers=headers or {},
    )


def memory(*mib):
    return [Memory(float(at), value * 2**20, 0.0, 10, 20) for at, value in enumerate(mib)]


def test_latency_is_of_good_answers_alone():
    load = Load(0.0, 10.0, [sample(1, 0.1), sample(2, 0.3), sample(3, 9.0, 503)])

    figures = summary(load)

    assert figures["latency_ms"]["p50"] == pytest.approx(200)
    assert figures["latency_ms"]["max"] == pytest.approx(300)
    assert figures["rate"] == pytest.approx(0.2)
    assert figures["statuses"] == {"200": 2, "503": 1}


def test_answers_after_the_run_have_a_latency_but_no_part_in_the_rate():
    load = Load(0.0, 10.0, [sample(1, 1.0), sample(9, 5.0)])

    figures = summary(load)

    assert figures["rate"] == pytest.approx(0.1)
    assert figures["latency_ms"]["max"] == pytest.approx(5000)


def test_goodput_counts_good_answers_within_the_objective_of_all_that_were_offered():
    closed = sample(0, 0, 0, failure="closed")
    load = Load(0.0, 2.0, [sample(0, 0.1), sample(0, 0.3), sample(0, 0.1, 429), closed])

    figures = summary(load, slo_seconds=0.2)

    assert figures["goodput"] == pytest.approx(0.5)
    assert figures["goodput_share"] == pytest.approx(0.25)
    assert figures["statuses"] == {"200": 2, "429": 1, "closed": 1}


def test_stage_times_and_cache_hits_come_from_the_headers():
    headers = {b"server-timing": b"decode;dur=2.00, forward;dur=10.00", b"x-cache": b"hit"}
    other = {b"server-timing": b"forward;dur=20.00", b"x-cache": b"miss"}
    load = Load(0.0, 1.0, [sample(0, 0.1, headers=headers), sample(0, 0.1, headers=other)])

    figures = summary(load)

    assert figures["stage_ms"]["forward"]["mean"] == pytest.approx(15)
    assert figures["stage_ms"]["decode"]["mean"] == pytest.approx(2)
    assert figures["cache"] == {"hit": 1, "miss": 1}


def test_kinds_are_told_apart():
    load = Load(0.0, 1.0, [sample(0, 0.1, kind="a"), sample(0, 0.2, 422, kind="b")])

    kinds = summary(load)["by_kind"]

    assert kinds["a"]["statuses"] == {"200": 1}
    assert kinds["b"] == {"requests": 1, "statuses": {"422": 1}, "latency_ms": {}}


def test_a_run_whose_generator_was_late_is_void():
    offsets = [0.1 * number for number in range(1, 11)]
    late = Load(0.0, 1.0, [sample(offset, 0.2, lag=0.08) for offset in offsets])
    timely = Load(0.0, 1.0, [sample(offset, 0.2, lag=0.001) for offset in offsets])

    assert open_summary(late, offsets)["is_void"]
    assert not open_summary(timely, offsets)["is_void"]


def test_a_run_that_took_longer_than_scheduled_to_send_is_void():
    offsets = [0.1 * number for number in range(1, 11)]
    load = Load(0.0, 1.1, [sample(offset, 0.2) for offset in offsets])

    figures = open_summary(load, offsets)

    assert figures["is_void"]
    assert figures["achieved_share"] == pytest.approx(1 / 1.1)


def test_the_knee_is_the_first_concurrency_near_the_best_throughput():
    points = [
        {"concurrency": concurrency, "rate": rate}
        for concurrency, rate in ((1, 10.0), (2, 18.0), (4, 24.0), (8, 25.0), (16, 24.5))
    ]

    assert knee_of(points) == Knee(4, 24.0)


def test_contenders_take_turns_and_ratios_are_within_a_round():
    order = []

    def contender(name, rates):
        values = iter(rates)
        return lambda: (order.append(name), next(values))[1]

    rates = alternate({"a": contender("a", [10, 2, 9]), "b": contender("b", [5, 1, 9])}, 3)

    assert order == ["a", "b"] * 3
    assert median_ratio(rates, "a", "b") == 2


def test_flat_memory_passes_and_a_leak_does_not():
    flat = memory(*[100] * 10, *[150] * 40)  # it fills up first
    leak = memory(*range(100, 150))

    assert growth(flat) == pytest.approx(0)
    assert flatness(flat)[2] is True
    assert flatness(leak)[2] is False


def test_a_short_run_says_nothing_about_memory():
    assert growth(memory(100, 100, 100)) is None
    assert flatness(memory(100, 100, 100))[2] is None


def test_failed_probes_are_counted():
    watch = Watch([Probe(0.0, 0.002, 200, 0.0), Probe(0.05, 10.0, 0, 0.001)], [])

    figures = livez(watch)

    assert figures["failed"] == 1
    assert figures["latency_ms"]["max"] == pytest.approx(10_000)


def test_a_watch_sees_probes_and_memory_of_a_process():
    with fake_server(lambda _: (0.0, good())) as server:
        url = f"http://127.0.0.1:{server.port}"
        with watching(url, os.getpid()) as watch:
            time.sleep(1.6)

    assert {probe.status for probe in watch.probes} == {200}
    assert 10 < len(watch.probes) < 40
    assert watch.memory[0].rss_bytes > 2**20


def test_a_metric_is_summed_over_its_labels_and_a_missing_one_is_an_error():
    text = (
        "# HELP refinery_x_total text\n"
        'refinery_x_total{model="a"} 2.0\n'
        'refinery_x_total{model="b"} 3.0\n'
        "refinery_x_total_more 7.0\n"
    )

    with fake_server(lambda _: (0.0, good(text.encode()))) as server:
        url = f"http://127.0.0.1:{server.port}"
        assert metric(url, "refinery_x_total") == 5
        with pytest.raises(SystemExit, match="no refinery_y"):
            metric(url, "refinery_y")
