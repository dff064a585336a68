"""The images under test, built once."""

from collections.abc import Iterator

import pytest

from tests.deploy.engine.containers import (
    HARDENED,
    build,
    container,
    docker,
    inspect,
    wait_for,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/deploy/engine" in item.path.as_posix():
            item.add_marker(pytest.mark.engine)


@pytest.fixture(scope="session")
def service_image() -> str:
    build("service", "vit-refinery-test/service")
    return "vit-refinery-test/service"


@pytest.fixture(scope="session")
def trainer_image() -> str:
    build("trainer", "vit-refinery-test/trainer")
    return "vit-refinery-test/trainer"


@pytest.fixture(scope="session")
def served(service_image: str) -> Iterator[tuple[str, str]]:
    """A healthy container as it is run in production, and its address."""
    with container(
        service_image, *HARDENED, "--publish", "127.0.0.1::8000", "--env", "REFINERY_INSECURE=true"
    ) as name:
        wait_for(
            lambda: inspect(name)["State"].get("Health", {}).get("Status") == "healthy",
            f"healthy\n{docker('logs', name)}",
        )
        yield name, f"http://{docker('port', name, '8000').splitlines()[0]}"
