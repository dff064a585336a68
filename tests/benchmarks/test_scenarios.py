"""How scenarios judge what they saw, and what is printed about it."""

import itertools
import json
import math
from types import SimpleNamespace

import pytest

from benchmarks.load import Job, Load, Sample
from benchmarks.report import plot, to_markdown
from benchmarks.serve import SCENARIOS, numbers, to_document
from benchmarks.serving.faults import odd_jobs
from benchmarks.serving.measure import queue_p99_ms, summary
from benchmarks.serving.outages import _is_settled
from benchmarks.serving.outcome import Outcome, livez_table, load_table, stage_table
from benchmarks.serving.paced import _recovery_seconds
from benchmarks.serving.targets import Criteria, criteria
from tests.benchmarks.test_images import photograph


def sample(sent, seconds, status=200, failure=""):
    return Sample("", sent, sent, sent + seconds, status, failure)


def steady(seconds, latency):
    return Load(0.0, seconds, [sample(at / 10, latency) for at in range(int(seconds * 10))])


def test_every_scenario_of_the_matrix_has_a_name():
    matrix = {"C1", "C2", "O1", "O2", *(f"X{number}" for number in range(1, 9))}

    assert set(SCENARIOS) >= matrix | {"rounds", "targets", "peers", "soak"}


def test_recovery_ends_with_the_first_second_that_is_as_fast_as_before():
    before = steady(10, 0.1)
    slow = [sample(at / 10, 2.0) for at in range(35)]
    fast = [sample(at / 10, 0.11) for at in range(35, 100)]

    assert _recovery_seconds(before, Load(0.0, 10.0, slow + fast)) == 4
    assert _recovery_seconds(before, steady(10, 0.11)) == 0


def test_a_service_that_never_recovers_is_never_back():
    after = steady(10, 2.0)

    assert _recovery_seconds(steady(10, 0.1), after) == math.inf


def test_an_ideal_queue_serves_in_order_and_one_at_a_time():
    # Due at 0 and at once, 0.1 and 0.1: each takes 0.1 s, so the fourth waits longest.
    assert queue_p99_ms([0.0, 0.0, 0.1, 0.1, 5.0], rate=10) == pytest.approx(300, rel=0.05)
    assert queue_p99_ms([0.0, 1.0, 2.0], rate=10) == pytest.approx(100)


@pytest.mark.parametrize(
    ("status", "failure", "seconds_before", "is_settled"),
    [
        (200, "", 1.0, True),
        (429, "", 1.0, True),
        (503, "", 1.0, False),  # admitted, and then refused
        (503, "", 0.05, True),  # the server may not have begun on it
        (0, "closed", 0.05, True),
        (0, "closed", 1.0, False),
        (0, "cut off", 0.05, False),
        (0, "timeout", 0.05, False),
        (500, "", 1.0, False),
    ],
)
def test_a_request_is_lost_when_it_was_admitted_and_not_answered(
    status, failure, seconds_before, is_settled
):
    assert _is_settled(sample(10 - seconds_before, 2.0, status, failure), 10.0) is is_settled


def test_odd_images_are_one_in_a_hundred_each_and_all_new():
    bench = SimpleNamespace(images=[photograph()], arguments=SimpleNamespace(seed=0))
    bodies = (f"{number}".encode() for number in itertools.count())
    bench.mixed_traffic = lambda: SimpleNamespace(fresh=lambda: Job(next(bodies)))

    jobs = [job for job, _ in zip(odd_jobs(bench), range(300), strict=False)]

    kinds = [job.kind for job in jobs]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "photograph": 282,
        "jpeg progressive": 3,
        "jpeg CMYK": 3,
        "jpeg EXIF-rotated": 3,
        "png 16 bit": 3,
        "corrupt": 3,
        "bomb": 3,
    }
    assert len({job.body for job in jobs}) == 300


@pytest.mark.parametrize(
    ("embed_dim", "size", "device", "expected"),
    [
        (192, (224, 224), "cpu", Criteria(0.88, 10)),
        (384, (512, 512), "cpu", Criteria(0.97, 100)),
        (384, (224, 224), "cpu", Criteria(0.88, 10)),
        (1152, (512, 512), "cuda:0", Criteria(0.95, 100)),
    ],
)
def test_the_promise_depends_on_the_model_and_the_device(embed_dim, size, device, expected):
    info = {"model": {"embed_dim": embed_dim, "devices": [device]}}

    assert criteria(SimpleNamespace(info=info, size=size)) == expected


def test_numbers_are_read_with_commas_between():
    assert numbers(int)("1,2,4") == (1, 2, 4)
    with pytest.raises(ValueError, match="invalid literal"):
        numbers(int)("1,two")


@pytest.fixture
def outcome():
    figures = summary(Load(0.0, 1.0, [sample(0.0, 0.1), sample(0.1, 0.2)]))
    found = Outcome("C1", "a closed loop")
    found.tables = [load_table("by concurrency", [("1", figures)]), stage_table("stages", [])]
    found.tables.append(
        livez_table(
            [("", {"probes": 1, "failed": 0, "latency_ms": {"p99": 3}, "prober_lateness_ms": {}})]
        )
    )
    found.figures = {
        "curve": [figures | {"concurrency": 1}],
        "knee": {"concurrency": 1, "rate": 2.0},
        "memory": {"rss_mib": [(0, 100.0), (1, 101.0)]},
    }
    found.check("it is fast", "2.0", True)
    found.check("it is small", "not measured", None)
    return found


RESULT = {
    "command": "python -m benchmarks.serve",
    "machine": {"cpu": "a CPU", "gpu": None, "cores": 2, "load_average_before": 0.1},
    "cores_taken_by_others": 0.05,
    "versions": {"torch": "2"},
    "model": {"backbone": "vit", "precision": "fp32", "register_width": 1},
    "size": (224, 224),
    "parity": [
        {"kind": "jpeg", "dtype": "int8", "relative_error": 0.01, "bound": 0.02, "min_cosine": 0.9}
    ],
}


def test_the_section_has_the_tables_and_a_verdict_for_each_criterion(outcome):
    text = to_markdown(RESULT, [outcome])

    assert "| 1 | 2.0 | 150 |" in text
    assert "| PASS | it is fast | 2.0 |" in text
    assert "| not tried | it is small | not measured |" in text
    assert "other programs took 0.05 cores" in text


def test_only_a_missed_criterion_is_a_failure(outcome):
    assert not outcome.failed

    outcome.check("it is right", "no", False)

    assert outcome.failed
    assert "| FAIL | it is right | no |" in to_markdown(RESULT, [outcome])


def test_an_outcome_goes_into_json(outcome):
    document = json.loads(json.dumps(to_document(outcome)))

    assert document["checks"][0] == {"criterion": "it is fast", "measured": "2.0", "passed": True}
    assert document["figures"]["curve"][0]["statuses"] == {"200": 2}


def test_curves_and_memory_are_drawn(outcome, tmp_path):
    assert plot([outcome], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert not plot([Outcome("X4", "no curve")], tmp_path / "none.png")
