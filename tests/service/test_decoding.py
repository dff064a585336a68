import asyncio
import threading

import pytest
import torch

from backbone.errors import ImageTooLargeError
from service.decoding import WorkerPool, decode_resized
from tests.support import encoded, noise_image


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


def test_an_image_comes_back_with_both_its_sizes():
    asked = []

    def choose_size(height, width):
        asked.append((height, width))
        return 32, 48

    image = decode_resized(encoded(noise_image(40, 70)), choose_size, 10_000)

    assert asked == [(40, 70)]
    assert (image.original, image.resized) == ((40, 70), (32, 48))
    assert image.pixels_3hw.shape == (3, 32, 48)
    assert image.pixels_3hw.dtype == torch.uint8


def test_too_many_pixels_are_refused_before_the_size_is_chosen():
    with pytest.raises(ImageTooLargeError):
        decode_resized(encoded(noise_image(40, 70)), pytest.fail, 2799)


def test_work_runs_in_worker_threads_of_one_core(pool):
    def work(number):
        return number, threading.current_thread().name, torch.get_num_threads()

    number, name, cores = asyncio.run(pool.run(work, 7))

    assert (number, cores) == (7, 1)
    assert name.startswith("worker")


def test_workers_do_not_take_cores_from_other_threads(pool):
    del pool
    before = torch.get_num_threads()

    WorkerPool(2).close()

    assert torch.get_num_threads() == before


def test_no_more_work_runs_at_once_than_there_are_threads(pool):
    running, most = 0, 0
    lock = threading.Lock()
    proceed = threading.Event()

    def work():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        proceed.wait(0.05)
        with lock:
            running -= 1

    async def all_at_once():
        await asyncio.gather(*(pool.run(work) for _ in range(6)))

    asyncio.run(all_at_once())

    assert most == 2
