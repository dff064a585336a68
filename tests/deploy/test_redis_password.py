"""The component `redis-password`: Redis asks for it, and its probe and the service know it."""

import re
import socket
import subprocess
import time
from pathlib import Path

import pytest

from service.cache.address import read_address
from tests.deploy.manifests import K8S, REDIS_PASSWORD, documents, find, pods
from tests.deploy.tools import program

PLACE = "/run/secrets/redis"


@pytest.fixture
def secret(tmp_path):
    """The files of the Secret, made by the lines that the component gives."""
    text = (K8S / "components" / "redis-password" / "kustomization.yaml").read_text()
    lines = re.findall(r"(?m)^#     ((?:openssl|echo) .+)$", text)
    assert len(lines) == 2
    program("openssl")
    subprocess.run(["bash", "-ec", "\n".join(lines)], cwd=tmp_path, check=True)
    return tmp_path


def containers():
    return {pod.name: pod.containers[0] for pod in pods(documents(REDIS_PASSWORD))}


def is_ready(secret: Path, port: int) -> bool:
    command = containers()["Deployment/redis"]["readinessProbe"]["exec"]["command"]
    words = [
        word.replace(PLACE, str(secret)).replace("redis-cli", f"redis-cli -p {port}")
        for word in command
    ]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


@pytest.fixture
def redis(secret):
    """The command of the manifest, running; its port and its command line."""
    program("redis-cli")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    container = containers()["Deployment/redis"]
    command = [program("redis-server"), container["command"][1].replace(PLACE, str(secret))]
    command += [*container["args"], "--port", str(port), "--bind", "127.0.0.1"]
    with subprocess.Popen(command, cwd=secret, stdout=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 20
            while not is_ready(secret, port):
                assert process.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
            yield port, Path(f"/proc/{process.pid}/cmdline").read_text()
        finally:
            process.terminate()


def test_redis_is_ready_for_who_has_the_password_alone(redis, secret):
    port, command_line = redis
    password = (secret / "password").read_text().strip()

    assert is_ready(secret, port)
    assert len(password) >= 32
    assert password not in command_line
    (secret / "password").write_text("another")
    assert not is_ready(secret, port)


def test_the_service_reads_the_password_that_redis_asks_for(secret):
    items = documents(REDIS_PASSWORD)
    settings = find(items, "ConfigMap/service-settings")["data"]
    file = settings["REFINERY_CACHE_PASSWORD_FILE"].replace(PLACE, str(secret))

    address = read_address(settings["REFINERY_CACHE"], Path(file))

    assert f"requirepass {address.password}\n" == (secret / "redis.conf").read_text()


def test_the_service_does_not_see_what_redis_alone_needs():
    (volume,) = (
        volume
        for pod in pods(documents(REDIS_PASSWORD))
        if pod.name == "Deployment/service"
        for volume in pod.spec["volumes"]
        if volume["name"] == "redis-password"
    )

    assert [item["key"] for item in volume["secret"]["items"]] == ["password"]
