import shutil
import subprocess

import pytest

from service.cache import build_cache
from service.metrics import STAGES, Metrics
from service.settings import Settings


def test_every_metric_has_the_prefix_and_no_twin():
    metrics = Metrics()
    metrics.requests.labels("/features", "200").inc()

    text = metrics.exposition().decode()

    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line[0] != "#"}
    assert all(name.startswith("refinery_") for name in names)
    assert not any(name.endswith("_created") for name in names)
    assert 'refinery_requests_total{route="/features",status="200"} 1.0' in text


def test_every_stage_has_its_histogram_from_the_start():
    text = Metrics().exposition().decode()

    for stage in STAGES:
        assert f'refinery_stage_seconds_count{{stage="{stage}"}} 0.0' in text


def test_services_in_one_process_count_apart():
    first, second = Metrics(), Metrics()

    first.images.inc()

    assert "refinery_images_total 0.0" in second.exposition().decode()


def test_the_model_is_shown_by_its_digest():
    metrics = Metrics()

    metrics.show_models([("a", "123", "vit", "fp32")])
    metrics.show_models([("b", "abc", "vit", "bf16")])

    text = metrics.exposition().decode()
    assert 'refinery_model_info{backbone="vit",digest="abc",model="b",precision="bf16"} 1.0' in text
    assert 'model="a"' not in text


def test_prometheus_finds_nothing_to_object_to():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    metrics = Metrics()
    build_cache(Settings(model=("m",)), metrics.registry)
    metrics.requests.labels("/features", "200").inc()
    metrics.errors.labels("overloaded").inc()
    metrics.show_models([("a", "abc", "vit", "bf16")])
    metrics.show_device_memory("cuda:0", free_bytes=1, total_bytes=2)

    found = subprocess.run(
        [promtool, "check", "metrics"], input=metrics.exposition(), capture_output=True
    )

    assert (found.returncode, found.stdout + found.stderr) == (0, b"")
