"""compose.yaml and its companions, without an engine."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.command_line import load_settings
from service.settings import Settings
from tests.deploy.tools import program
from tests.support import ROOT
from trainer.__main__ import _parser as trainer_parser

# What Compose v2 knows and docker-compose 1.29 refuses (run with it: tests/deploy/engine).
ONLY_NEW_KEYS = {"name", "include", "develop", "gpus", "env_file", "configs", "models", "provider"}


def substituted(text: str, **variables: str) -> str:
    """`${NAME:-default}` as Compose replaces it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: variables.get(found[1]) or found[2], text)


def compose(name: str = "compose.yaml", **variables: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(substituted((ROOT / name).read_text(), **variables))
    return loaded


def settings_of(service: dict[str, Any]) -> Settings:
    """What `python -m service` makes of the environment of a service."""
    names = {name: value for name, value in service["environment"].items() if "REFINERY" in name}
    return load_settings({}, names)


def num_bytes(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(m|mb|g|gb)", text.lower()).groups()  # type: ignore[union-attr]
    return int(number) << {"m": 20, "g": 30}[unit[0]]


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


SERVICES = compose()["services"]


def test_the_service_takes_its_settings():
    settings = settings_of(SERVICES["service"])

    assert settings.models == {"demo": "models/demo", "raw": "models/demo-pretrained"}
    assert settings.device == "cpu"
    assert settings.cache == "redis://redis:6379/0"


def test_a_setting_that_the_service_does_not_know_would_be_seen():
    with pytest.raises(Exception, match="REFINERY_BATCH_TOKEN"):
        settings_of({"environment": {"REFINERY_MODEL": "m", "REFINERY_BATCH_TOKEN": "1"}})


def test_every_request_needs_a_key_and_none_comes_with_the_repository():
    assert settings_of(SERVICES["service"]).api_key_file is not None
    assert not settings_of(SERVICES["service"]).insecure
    text = (ROOT / "compose.yaml").read_text()
    assert not re.search(r"(?<!@sha256:)\b[0-9a-f]{64}\b", text), "a hashed key?"


def test_the_service_is_given_longer_to_drain_than_it_takes():
    service = SERVICES["service"]

    assert seconds(service["stop_grace_period"]) >= settings_of(service).drain_seconds + 15


@pytest.mark.parametrize("files", [["compose.yaml"], ["compose.yaml", "compose.gpu.yaml"]])
def test_what_the_service_may_hold_fits_its_memory(files):
    services = [compose(name)["services"]["service"] for name in files]
    environment = {k: v for service in services for k, v in service["environment"].items()}
    settings = settings_of({"environment": environment})
    memory = num_bytes(services[-1]["deploy"]["resources"]["limits"]["memory"])

    held = settings.cache_bytes + settings.max_held_body_bytes + settings.max_feature_bytes
    assert held <= memory / 2  # as tests/deploy/workloads.py asks of Kubernetes


def test_redis_has_half_more_memory_than_it_fills():
    redis = SERVICES["redis"]
    command = redis["command"]
    maxmemory = num_bytes(command[command.index("--maxmemory") + 1])

    assert num_bytes(redis["deploy"]["resources"]["limits"]["memory"]) >= 1.5 * maxmemory


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_hardened_and_bounded(name):
    service = SERVICES[name]

    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"]["max-size"]
    assert service["deploy"]["resources"]["limits"]["memory"]
    assert service["pids_limit"]


@pytest.mark.parametrize("name", SERVICES)
def test_ports_are_published_to_this_machine_alone_unless_asked(name):
    for port in SERVICES[name].get("ports", []):
        assert port.startswith("127.0.0.1:"), port


def test_redis_is_with_the_service_alone_on_a_network_that_leads_nowhere():
    assert SERVICES["redis"]["networks"] == ["back"]
    assert "ports" not in SERVICES["redis"]
    assert compose()["networks"]["back"] == {"internal": True}
    assert {name for name in SERVICES if "back" in SERVICES[name].get("networks", [])} == {
        "service",
        "redis",
    }


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_the_trainer_s_command_is_one_that_the_trainer_takes(file):
    command = compose(file)["services"]["trainer"]["command"]
    options = trainer_parser().parse_args(command[3:])

    assert command[:3] == ["python", "-m", "trainer"]
    assert (options.images, options.output.parts[:2]) == (Path("/images"), ("/", "models"))
    assert options.resume


def test_on_a_gpu_the_trainer_downloads_nothing():
    command = compose("compose.gpu.yaml")["services"]["trainer"]["command"]

    assert trainer_parser().parse_args(command[3:]).backbone.startswith("/models/")


def test_on_a_gpu_one_device_is_reserved_and_required():
    gpu = compose("compose.gpu.yaml")["services"]

    for name in ("service", "trainer"):
        (device,) = gpu[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert gpu["service"]["environment"]["REFINERY_DEVICE"] == "cuda"


@pytest.mark.parametrize("file", ["compose.yaml", "compose.gpu.yaml"])
def test_nothing_is_used_that_only_newer_composes_know(file):
    document = compose(file)

    assert not document.keys() & ONLY_NEW_KEYS
    for service in document["services"].values():
        assert not service.keys() & ONLY_NEW_KEYS
        assert "pids" not in service.get("deploy", {}).get("resources", {}).get("limits", {})


def test_every_file_that_is_mounted_is_there():
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).exists(), source
            else:
                assert source in compose()["volumes"], source


def test_all_variables_have_the_project_s_prefix_and_are_documented():
    text = (ROOT / "compose.yaml").read_text() + (ROOT / "compose.gpu.yaml").read_text()
    names = set(re.findall(r"\$\{(\w+)", text))
    documented = (ROOT / "docs" / "deploy.md").read_text()

    assert names
    for name in names:
        assert name.startswith("VIT_REFINERY_"), name
        assert f"`{name}`" in documented, name


def test_variables_are_replaced_as_compose_does():
    assert substituted("a: ${X:-1}-${Y:-2}", X="3") == "a: 3-2"


def test_prometheus_takes_its_configuration(tmp_path):
    text = (ROOT / "docker" / "prometheus.yaml").read_text()
    (tmp_path / "prometheus.yaml").write_text(text)
    checked = subprocess.run(
        [program("promtool"), "check", "config", tmp_path / "prometheus.yaml"],
        capture_output=True,
        text=True,
    )

    assert checked.returncode == 0, checked.stderr
    (job,) = yaml.safe_load(text)["scrape_configs"]
    assert job["job_name"] == "vit-refinery"  # what the rules select
    port = settings_of(SERVICES["service"]).metrics_port
    assert job["static_configs"][0]["targets"] == [f"service:{port}"]


def test_grafana_finds_its_source_and_its_dashboards():
    folder = ROOT / "docker" / "grafana"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yaml").read_text())[
        "datasources"
    ]
    (provider,) = yaml.safe_load((folder / "dashboards" / "vit-refinery.yaml").read_text())[
        "providers"
    ]
    mounts = dict(volume.split(":")[:2] for volume in SERVICES["grafana"]["volumes"])
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    dashboards = ROOT / next(a for a, b in mounts.items() if b == provider["options"]["path"])

    assert source["url"] == "http://prometheus:9090"
    assert home.parent == Path(provider["options"]["path"])
    assert (dashboards / home.name).is_file()
