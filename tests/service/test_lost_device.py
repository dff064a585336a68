"""A device that is lost while requests are in flight, in a process of its own."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx

from tests.service.cache.helpers import free_port
from tests.service.conftest import REPOSITORY, wait_until_ready
from tests.support import encoded, noise_image

PNG = {"content-type": "image/png"}
LAUNCHER = """
import sys, time, torch
from service import models

load = models.load_encoder

class Failing:
    def __init__(self, encoder):
        self._encoder = encoder
    def __getattr__(self, name):
        return getattr(self._encoder, name)
    def encode(self, images, **options):
        if tuple(images.shape[-2:]) == (96, 96):
            time.sleep(1.0)
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return self._encoder.encode(images, **options)

models.load_encoder = lambda *arguments: Failing(load(*arguments))

from service.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_everybody_in_flight_hears_of_a_lost_device_and_the_process_ends(artifact, tmp_path):
    port = free_port()
    log = (tmp_path / "log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, "--model", str(artifact), "--port", str(port)],
        cwd=REPOSITORY,
        stderr=log,
    )

    def readyz():
        try:
            return client.get("/readyz").status_code
        except httpx.TransportError:
            return 0

    def post(seed, size):
        return client.post(
            f"/features?size={size}", content=encoded(noise_image(64, 64, seed)), headers=PNG
        )

    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        wait_until_ready(readyz)
        assert post(0, 64).status_code == 200

        started = time.monotonic()
        doomed = [threads.submit(post, seed, "96,96") for seed in range(3)]
        waiting = [threads.submit(post, seed, "64,64") for seed in range(3, 6)]
        answers = [future.result() for future in [*doomed, *waiting]]
        status = process.wait(10)

    assert status == 1
    assert time.monotonic() - started < 10
    codes = [answer.json()["error"]["code"] for answer in answers if answer.status_code != 200]
    assert [answer.status_code for answer in answers[:3]] == [503] * 3
    assert set(codes) == {"not_ready"}
    log.close()
    assert "is lost" in (tmp_path / "log").read_text()
