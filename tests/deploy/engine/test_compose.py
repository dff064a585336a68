"""compose.yaml from `up` to `down`, with the same commands as docs/deploy.md shows."""

import json
import urllib.parse
from collections.abc import Iterator

import pytest

from tests.deploy.engine.containers import (
    PHOTOGRAPH,
    Project,
    ask,
    docker,
    free_port,
    inspect,
    wait_for,
)


@pytest.fixture(scope="module")
def project(service_image, trainer_image, tmp_path_factory) -> Iterator[Project]:
    project = Project(
        tmp_path_factory.mktemp("refinery"),
        VIT_REFINERY_SERVICE_IMAGE=service_image,
        VIT_REFINERY_TRAINER_IMAGE=trainer_image,
        VIT_REFINERY_RUN="one",
    )
    try:
        project("up", "--detach")
        wait_for(
            lambda: ask(project.url + "/readyz").status == 200, "ready\n" + project("logs"), 120
        )
        yield project
    finally:
        project("--profile", "obs", "--profile", "train", "down", "--volumes", "--timeout", "60")


@pytest.fixture(scope="module")
def key(project) -> str:
    key = project("run", "--rm", "keys", "new", "test").splitlines()[-1]
    wait_for(lambda: ask(project.url + "/info", x_api_key=key).status == 200, "the key works", 5)
    return key


def features(project: Project, key: str, query: str = "") -> tuple[int, str]:
    """Status and x-cache of a photograph's features."""
    answer = ask(f"{project.url}/features?{query}", PHOTOGRAPH, Authorization=f"Bearer {key}")
    return answer.status, answer.headers.get("x-cache", "")


def metric(project: Project, name: str) -> float:
    """A metric of the service, read where Prometheus reads it."""
    code = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9090/metrics').read().decode())"
    text = project("exec", "-T", "service", "python", "-c", code)
    values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith(name)]
    assert values, f"no metric {name}"
    return sum(map(float, values))


def test_nobody_is_served_before_a_key_is_made_and_its_owner_is_within_a_second(project, key):
    assert ask(project.url + "/features", PHOTOGRAPH).status == 401
    assert features(project, key)[0] == 200


def test_a_key_is_taken_away_without_a_restart(project):
    other = project("run", "--rm", "keys", "new", "other").splitlines()[-1]
    wait_for(lambda: ask(project.url + "/info", x_api_key=other).status == 200, "it works", 5)

    project("run", "--rm", "keys", "revoke", "other")

    wait_for(lambda: ask(project.url + "/info", x_api_key=other).status == 401, "it does not", 5)


def test_the_service_waits_for_a_healthy_redis_and_becomes_healthy(project):
    for service in ("redis", "service"):
        name = project.container(service)
        wait_for(
            lambda name=name: inspect(name)["State"]["Health"]["Status"] == "healthy", service, 30
        )


def test_an_image_is_a_miss_once_and_a_hit_from_redis_after_a_restart(project, key):
    assert features(project, key, "size=240") == (200, "miss")
    assert features(project, key, "size=240") == (200, "hit")
    wait_for(lambda: metric(project, "refinery_cache_written_bytes_total") > 0, "written to Redis")

    project("restart", "--timeout", "60", "service")
    wait_for(lambda: ask(project.url + "/readyz").status == 200, "ready again")

    # The memory of the old process is gone, so that this one is from Redis.
    assert features(project, key, "size=240") == (200, "hit")
    assert metric(project, 'refinery_cache_lookups_total{result="hit",tier="redis"}') == 1


def test_without_redis_it_computes_and_with_redis_it_remembers_again(project, key):
    project("stop", "redis")
    assert features(project, key, "size=256") == (200, "miss")
    assert ask(project.url + "/readyz").status == 200

    project("start", "redis")

    def remembers() -> bool:
        before = metric(project, "refinery_cache_written_bytes_total")
        features(project, key, "size=272&cache=refresh")
        return metric(project, "refinery_cache_written_bytes_total") > before

    wait_for(remembers, "Redis is used again", 60)


def test_limits_and_rights_are_those_that_the_file_asks_for(project):
    for service, memory in (("service", 4 << 30), ("redis", 3 << 29)):
        host = inspect(project.container(service))["HostConfig"]
        assert host["ReadonlyRootfs"], service
        assert host["CapDrop"] == ["ALL"], service
        assert any("no-new-privileges" in option for option in host["SecurityOpt"]), service
        assert host["Memory"] == memory, service
        assert host["PidsLimit"] > 0, service


def test_only_the_service_is_published_and_only_to_this_machine(project):
    assert inspect(project.container("redis"))["HostConfig"]["PortBindings"] in (None, {})
    bindings = inspect(project.container("service"))["HostConfig"]["PortBindings"]

    assert set(bindings) == {"8000/tcp"}
    assert {binding["HostIp"] for binding in bindings["8000/tcp"]} == {"127.0.0.1"}
    assert ask(project.url + "/metrics").status == 401


def test_redis_cannot_reach_the_outside(project):
    networks = inspect(project.container("redis"))["NetworkSettings"]["Networks"]

    assert len(networks) == 1
    assert inspect(next(iter(networks)))["Internal"] is True


def test_redis_keeps_nothing_on_disk_and_evicts_what_is_asked_for_least(project):
    def configured(name: str) -> str:
        return project("exec", "-T", "redis", "redis-cli", "config", "get", name).split()[-1]

    assert configured("maxmemory-policy") == "allkeys-lfu"
    assert configured("maxmemory") == str(1 << 30)
    assert configured("appendonly") == "no"
    assert project("exec", "-T", "redis", "redis-cli", "config", "get", "save").split() == ["save"]


def test_keys_lie_in_a_file_that_only_the_service_reads(project):
    listing = project("exec", "-T", "service", "ls", "-ln", "/run/secrets/refinery/api_keys")

    assert listing.split()[0] == "-rw-------"
    assert listing.split()[2] == "10001"
    environment = inspect(project.container("service"))["Config"]["Env"]
    assert not [line for line in environment if "PASSWORD" in line or "SECRET" in line]


def test_a_run_of_the_train_profile_lands_where_the_service_serves_it(project, key):
    text = project("--profile", "train", "run", "--rm", "trainer")
    served = project("exec", "-T", "service", "ls", "/models/runs/one/refined")

    assert {"model.safetensors", "refinery.json"} <= set(served.split()), text
    project.variables["VIT_REFINERY_MODEL"] = "first=/models/runs/one/refined"
    project("up", "--detach", "service")
    wait_for(lambda: ask(project.url + "/readyz").status == 200, "ready with the new model")
    info = json.loads(ask(project.url + "/info", x_api_key=key).body)

    assert [model["name"] for model in info["models"]] == ["first"]
    assert features(project, key)[0] == 200


def test_prometheus_of_the_obs_profile_scrapes_the_service_and_loads_the_rules(project):
    # Grafana has no stand-in where no registry can be reached: tests/deploy/test_dashboards.py.
    project("--profile", "obs", "up", "--detach", "prometheus")
    name = project.container("prometheus")
    address = docker("port", name, "9090").splitlines()[0]

    def query(expression: str) -> list[dict[str, object]]:
        path = "/api/v1/query?query=" + urllib.parse.quote(expression)
        answer = ask(f"http://{address}{path}")
        return json.loads(answer.body)["data"]["result"] if answer.status == 200 else []

    wait_for(
        lambda: query('up{job="vit-refinery"} == 1') and query("refinery_ready == 1"),
        "scraped: " + docker("logs", name),
        60,
    )
    rules = json.loads(ask(f"http://{address}/api/v1/rules").body)["data"]["groups"]
    assert sum(len(group["rules"]) for group in rules) > 10
    assert not [rule for group in rules for rule in group["rules"] if rule["health"] == "err"]


@pytest.mark.parametrize("files", [[], ["--file", "compose.gpu.yaml"]], ids=["alone", "overridden"])
def test_the_files_are_valid_with_every_profile(project, files):
    rendered = project(*files, "--profile", "obs", "--profile", "train", "config")

    for service in ("service", "redis", "trainer", "prometheus", "grafana"):
        assert f"  {service}:" in rendered
    assert ("capabilities" in rendered) == bool(files)


def test_a_gpu_that_is_not_there_is_an_error_of_the_engine_and_no_slow_service(project, tmp_path):
    if "nvidia" in docker("info", "--format", "{{json .Runtimes}}"):
        pytest.skip("this host has NVIDIA's runtime")
    gpu = ("--file", "compose.gpu.yaml")
    other = Project(tmp_path, **project.variables)
    other.variables["VIT_REFINERY_PORT"] = str(free_port())
    try:
        text = other(*gpu, "up", "--detach", "service", fails=True)

        assert "could not select device driver" in text
        assert not inspect(other.container("service"))["State"]["Running"]
    finally:
        other(*gpu, "down", "--volumes")
