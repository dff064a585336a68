"""The query by which KEDA scales is one number: how many replicas the work needs."""

import subprocess

import pytest
import yaml

from tests.deploy.manifests import SITE, documents, find
from tests.deploy.tools import program

RATE = "refinery_tokens_per_second"
ADMITTED = "refinery_admitted_tokens"
ENCODED = "refinery_batch_tokens_sum"


def query(overlay="h100"):
    (trigger,) = find(documents(overlay), "ScaledObject/service")["spec"]["triggers"]
    assert trigger["metadata"]["threshold"] == "1"
    # Rounded, since promtool compares to the last bit.
    return f"round({trigger['metadata']['query']}, 0.001)"


def series(metric, pod, values, namespace="vit-refinery"):
    name = f'{metric}{{namespace="{namespace}", job="vit-refinery", pod="{pod}"}}'
    return {"series": name, "values": values}


def evaluated(folder, input_series, expression, expected):
    """Whether promtool finds the samples [(labels, value)] after an hour."""
    test = {
        "rule_files": [],
        "tests": [
            {
                "interval": "15s",
                "input_series": input_series,
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": "1h",
                        "exp_samples": [{"labels": "{}", "value": value} for value in expected],
                    }
                ],
            }
        ],
    }
    file = folder / "test.yaml"
    file.write_text(yaml.safe_dump(test))
    command = [program("promtool"), "test", "rules", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode == 0, run.stdout + run.stderr


# What two or three replicas show, whose rate is 1000 tokens/s each unless another is given.
CASES = {
    "idle": (["0x240", "0x240"], ["0x240", "0x240"], "1000x240", 0.0),
    # 5 s of work wait on one and 1 s on the other: work for six replicas.
    "waiting": (["5000x240", "1000x240"], ["0x240", "0x240"], "1000x240", 6.0),
    # 750 and 300 tokens/s are encoded: 1.05 replicas' best, at 70 % of it 1.5.
    "throughput": (["100x240", "100x240"], ["0+11250x240", "0+4500x240"], "1000x240", 1.5),
    # A replica that gets single images is slow now; what it could do is what it did at its best.
    "small batches": (["0x240", "0x240"], ["0+5250x240", "0+5250x240"], "1000x10 100x230", 1.0),
    # The one that just started has no rate yet, and does not count for one that is infinitely slow.
    "starting": (["3000x240", "0x240"], ["0x240", "0x240"], None, 3.0),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_work_says_how_many_replicas_it_needs(tmp_path, case):
    admitted, encoded, rate, replicas = CASES[case]
    input_series = [series(ADMITTED, pod, values) for pod, values in enumerate(admitted)]
    input_series += [series(ENCODED, pod, values) for pod, values in enumerate(encoded)]
    rates = ["1000x240", "0x240"] if rate is None else [rate, rate]
    input_series += [series(RATE, pod, values) for pod, values in enumerate(rates)]

    is_right, said = evaluated(tmp_path, input_series, query(), [replicas])

    assert is_right, said


def test_without_metrics_there_is_no_number_which_is_no_zero(tmp_path):
    others = [series(ADMITTED, 0, "5000x240", "elsewhere"), series(RATE, 0, "9x240", "elsewhere")]

    is_right, said = evaluated(tmp_path, others, query(), [])

    assert is_right, said


@pytest.mark.parametrize(
    ("overlay", "replicas"), [("h100", 5.0), (SITE[0], 3.0)], ids=["as committed", "renamed"]
)
def test_an_installation_counts_its_own_work_alone(tmp_path, overlay, replicas):
    input_series = []
    for namespace, admitted, rate in (
        ("vit-refinery", 5000, 1000),
        ("vit-refinery-site", 300, 100),
    ):
        input_series += [
            series(ADMITTED, 0, f"{admitted}x240", namespace),
            series(RATE, 0, f"{rate}x240", namespace),
            series(ENCODED, 0, "0x240", namespace),
        ]

    is_right, said = evaluated(tmp_path, input_series, query(overlay), [replicas])

    assert is_right, said


def test_promtool_tells_a_wrong_number(tmp_path):
    input_series = [series(ADMITTED, 0, "5000x240"), series(RATE, 0, "1000x240")]

    is_right, said = evaluated(tmp_path, input_series, query(), [4.0])

    assert not is_right
    assert "5E+00" in said
