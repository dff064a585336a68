"""The images, built and run as production runs them."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load

from tests.deploy.engine.containers import (
    HARDENED,
    PHOTOGRAPH,
    ask,
    build,
    container,
    docker,
    inspect,
    wait_for,
)
from tests.support import ROOT, running_server

MAX_BYTES = 6_000_000_000


def run(image: str, *command: str, options: tuple[str, ...] = HARDENED) -> str:
    """Output of a command in a new container."""
    return docker("run", "--rm", *options, image, *command)


def test_features_equal_those_outside_of_the_container(served, tmp_path):
    query = "/features?size=448&dtype=float32&cache=bypass"

    inside = ask(served[1] + query, PHOTOGRAPH)
    with running_server(tmp_path / "log", "--model", str(ROOT / "models" / "demo")) as url:
        outside = ask(url + query, PHOTOGRAPH)

    assert inside.status == outside.status == 200
    assert inside.headers["x-model-digest"] == outside.headers["x-model-digest"]
    a, b = load(inside.body)["features.0"], load(outside.body)["features.0"]
    assert a.shape == b.shape == (19, 28, 192)
    assert (a - b).norm() / b.norm() < 1e-3
    assert a.std() > 0.1


def test_both_models_that_ship_are_served(served):
    info = json.loads(ask(served[1] + "/info").body)

    assert [model["name"] for model in info["models"]] == ["demo", "raw"]
    assert info["version"] == "0.1.0"


def test_the_process_has_no_rights_beyond_a_user_s(served):
    name, _ = served
    status = docker("exec", name, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)

    assert fields["Uid"].split() == ["10001"] * 4
    assert fields["Gid"].split() == ["10001"] * 4
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    assert fields["Name"] == "tini"


def test_nothing_can_be_written_but_what_is_mounted(served):
    name, _ = served
    script = "import sys; open(sys.argv[1], 'w')"

    for path in ("/opt/refinery/x", "/opt/venv/x", "/usr/local/bin/ready", "/etc/x", "/models/x"):
        refused = docker("exec", name, "python", "-c", script, path, check=False)
        assert "Read-only file system" in refused, path
    for path in ("/tmp/x", "/cache/x"):
        docker("exec", name, "python", "-c", script, path)


def test_a_user_id_that_is_not_known_in_the_image_runs_too(service_image):
    # OpenShift takes one of its own, and group 0.
    options = ("--read-only", "--cap-drop", "ALL", "--user", "123456:0", "--tmpfs", "/tmp",
               "--volume", "/cache", "--env", "REFINERY_INSECURE=true")  # fmt: skip

    with container(service_image, *options) as name:
        wait_for(
            lambda: inspect(name)["State"]["Health"]["Status"] == "healthy",
            "healthy with another user id",
        )


def test_sigterm_drains(service_image):
    options = (*HARDENED, "--publish", "127.0.0.1::8000", "--env", "REFINERY_INSECURE=true")
    with container(service_image, *options) as name, ThreadPoolExecutor() as pool:
        url = f"http://{docker('port', name, '8000').splitlines()[0]}"
        wait_for(lambda: ask(url + "/readyz").status == 200, "ready")
        # Large enough to be under way for a moment.
        slow = [
            pool.submit(ask, f"{url}/features?size=1120&cache=bypass", PHOTOGRAPH) for _ in range(4)
        ]
        time.sleep(0.5)
        assert not all(answer.done() for answer in slow), "nothing was in flight"

        docker("stop", "--time", "45", name)

        assert [answer.result().status for answer in slow] == [200] * 4
        assert inspect(name)["State"]["ExitCode"] == 0
    assert ask(url + "/readyz").status == 0


def test_without_keys_it_refuses_to_listen_to_all(service_image):
    output = docker("run", "--rm", *HARDENED, service_image, check=False)

    assert "--api-key-file" in output
    assert "--insecure" in output


def test_a_device_that_is_not_there_stops_it_and_says_what_to_do(service_image):
    options = (*HARDENED, "--env", "REFINERY_DEVICE=cuda", "--env", "REFINERY_INSECURE=true")
    output = docker("run", "--rm", *options, service_image, check=False)

    assert "0 CUDA devices are visible" in output
    assert "--gpus" in output


def test_the_health_check_fails_while_nobody_listens_and_while_requests_are_refused(service_image):
    code = (
        "import http.server as h\n"
        "class Draining(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_error(503 if self.path == '/readyz' else 200)\n"
        "h.HTTPServer(('127.0.0.1', 8000), Draining).serve_forever()"
    )
    script = f'ready || echo status $?; python -c "{code}" & sleep 2; ready || echo status $?'

    lines = run(service_image, "bash", "-c", script)

    assert "does not answer" in lines
    assert "/readyz says 503" in lines
    assert lines.count("status 1") == 2
    assert inspect(service_image)["Config"]["Healthcheck"]["Test"] == ["CMD", "ready"]


def test_triton_finds_compiler_and_headers_and_may_load_what_it_made(service_image):
    code = (
        "from triton.runtime.build import compile_module_from_src as make\n"
        "source = '#include <Python.h>\\n"
        'static struct PyModuleDef m = {PyModuleDef_HEAD_INIT, "probe", 0, -1, 0};\\n'
        "PyMODINIT_FUNC PyInit_probe(void) {return PyModule_Create(&m);}'\n"
        "print(make(source, 'probe').__name__)"
    )

    assert run(service_image, "python", "-c", code).splitlines()[-1].endswith("probe")
    # Docker's own tmpfs may not execute: the reason why /cache is a volume.
    forbidden = ("--read-only", "--tmpfs", "/tmp", "--tmpfs", "/cache:uid=10001")
    with pytest.raises(AssertionError, match="failed to map segment"):
        run(service_image, "python", "-c", code, options=forbidden)


def test_the_image_s_triton_compiles_kernels_for_an_h100(service_image):
    # The harness of tests/kernels, on the code and the Triton of the image.
    options = (*HARDENED, "--volume", f"{ROOT / 'tests'}:/checks/tests:ro", "--workdir", "/checks")

    table = run(
        service_image, "python", "-m", "tests.kernels.aot.harness", "roi_align", options=options
    )

    assert "registers=" in table
    assert "local_bytes=0" in table


def test_no_image_is_larger_than_its_budget(service_image, trainer_image):
    for image in (service_image, trainer_image):
        assert inspect(image)["Size"] < MAX_BYTES, image


def test_both_images_share_all_but_their_code(service_image, trainer_image):
    service, trainer = (
        inspect(image)["RootFS"]["Layers"] for image in (service_image, trainer_image)
    )

    assert service[:-1] == trainer[:-1]
    assert service[-1] != trainer[-1]
    assert "No module named 'trainer'" in docker(
        "run", "--rm", service_image, "python", "-c", "import trainer", check=False
    )
    assert "No module named 'service'" in docker(
        "run", "--rm", trainer_image, "python", "-c", "import service", check=False
    )


def test_a_change_of_the_code_rebuilds_the_last_layer_alone(service_image, tmp_path):
    before = inspect(service_image)["RootFS"]["Layers"]
    changed = ROOT / "service" / "hints.py"
    text = changed.read_text()
    context = tmp_path / "context"
    shutil.copytree(
        ROOT, context, ignore=shutil.ignore_patterns(".venv", ".git", "build", "runs", "results")
    )
    (context / "service" / changed.name).write_text(text + "# changed\n")

    build("service", "vit-refinery-test/changed", folder=context)
    after = inspect("vit-refinery-test/changed")["RootFS"]["Layers"]
    docker("image", "rm", "vit-refinery-test/changed")

    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_the_image_says_what_it_is(service_image, trainer_image):
    for image in (service_image, trainer_image):
        labels = inspect(image)["Config"]["Labels"]
        prefix = "org.opencontainers.image."
        assert labels[prefix + "version"] == "0.1.0"
        assert labels[prefix + "licenses"] == "Apache-2.0"
        assert len(labels[prefix + "revision"]) == 40
        assert labels[prefix + "base.name"]


def test_the_trainer_refines_on_a_read_only_root_without_a_network(trainer_image, tmp_path):
    output = tmp_path / "models"
    output.mkdir(mode=0o777)
    output.chmod(0o777)
    options = (
        *HARDENED, "--network", "none", "--shm-size", "1g",
        "--volume", f"{ROOT / 'examples' / 'photographs'}:/images:ro",
        "--volume", f"{output}:/models",
    )  # fmt: skip
    command = ("python", "-m", "trainer", "--recipe", "demo", "--images", "/images", "--output",
               "/models/run", "--set", "run.max_steps=1", "--resume")  # fmt: skip

    text = run(trainer_image, *command, options=options)

    refined = output / "run" / "refined"
    assert json.loads((refined / "refinery.json").read_text()), text
    assert (refined / "model.safetensors").stat().st_uid == 10001


def test_the_trainer_keeps_its_exit_status(trainer_image):
    with container(
        trainer_image, *HARDENED, command=("python", "-m", "trainer", "--recipe", "none")
    ) as name:
        assert docker("wait", name) == "2"
        assert "none" in docker("logs", name)


def test_an_artifact_becomes_an_image_that_holds_it_and_nothing_else(tmp_path):
    artifact = ROOT / "models" / "demo"
    docker("build", "--quiet", "--file", "docker/model.Dockerfile", "--tag",
           "vit-refinery-test/model", str(artifact))  # fmt: skip
    name = docker("create", "vit-refinery-test/model", "nothing")
    docker("cp", f"{name}:/", str(tmp_path / "copy"))
    docker("rm", name)

    def files(folder: Path) -> dict[str, bytes]:
        return {
            str(path.relative_to(folder)): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.parts[len(folder.parts)] not in ("dev", "etc", "proc", "sys")
        }

    assert {k: v for k, v in files(tmp_path / "copy").items() if k != ".dockerenv"} == files(
        artifact
    )
