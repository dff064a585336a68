import asyncio
import os
import sys
import threading

import pytest
import torch

from backbone.errors import ImageTooLargeError
from backbone.preprocess import decode_image
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


def test_resizing_can_be_left_to_the_device():
    data = encoded(noise_image(40, 70))

    image = decode_resized(data, lambda *_: (32, 48), 10_000, resize_on_device=True)

    assert (image.original, image.resized) == ((40, 70), (32, 48))
    assert torch.equal(image.pixels_3hw, decode_image(data))


def test_what_the_device_cannot_reduce_is_resized_all_the_same():
    data = encoded(noise_image(20, 300))

    image = decode_resized(data, lambda *_: (16, 32), 10_000, resize_on_device=True)

    assert (image.original, image.resized) == ((20, 300), (16, 32))
    assert torch.equal(
        image.pixels_3hw, decode_resized(data, lambda *_: (16, 32), 10_000).pixels_3hw
    )


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


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_workers_stand_behind_the_event_loop(pool):
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    ours, theirs = niceness(), asyncio.run(pool.run(niceness))

    assert theirs == min(ours + 5, 19)


def test_a_system_that_forbids_priorities_is_no_error(monkeypatch):
    def forbid(*_):
        raise PermissionError("not here")

    monkeypatch.setattr(os, "setpriority", forbid)
    pool = WorkerPool(1)

    assert asyncio.run(pool.run(lambda: 7)) == 7
    pool.close()


def test_depth_counts_what_waits_and_what_runs(pool):
    proceed = threading.Event()

    async def run():
        assert pool.depth == 0
        tasks = [asyncio.create_task(pool.run(proceed.wait, 5)) for _ in range(5)]
        await asyncio.sleep(0)
        full = pool.depth
        proceed.set()
        await asyncio.gather(*tasks)
        return full

    assert asyncio.run(run()) == 5
    assert pool.depth == 0


def test_depth_falls_when_work_fails_and_the_error_arrives(pool):
    def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(pool.run(fail))
    assert pool.depth == 0


def test_work_that_waits_is_dropped_when_its_caller_leaves(pool):
    proceed, done = threading.Event(), []

    def work(number):
        proceed.wait(5)
        done.append(number)

    async def run():
        tasks = [asyncio.create_task(pool.run(work, number)) for number in range(4)]
        while pool.depth < 4:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)  # until both threads have begun
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        depth = pool.depth
        proceed.set()
        while pool.depth:
            await asyncio.sleep(0.01)
        return depth

    depth = asyncio.run(run())

    assert depth == 2  # those that had begun still hold a thread each
    assert sorted(done) == [0, 1]


def test_a_closed_pool_takes_nothing():
    pool = WorkerPool(1)
    pool.close()

    with pytest.raises(RuntimeError, match="shutdown"):
        asyncio.run(pool.run(print))
    assert pool.depth == 0
