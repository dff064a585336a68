import threading
import time

import pytest
import torch

from service.batcher import Batcher, BatcherClosedError, QueuedImage
from service.boxes import Regions
from service.metrics import Metrics
from tests.service.plans import plan

SMALL, LARGE = (32, 32), (32, 48)


def make_batcher(metrics=None, batch_tokens=10, batch_box_vectors=1000):
    return Batcher(
        metrics or Metrics(), batch_tokens=batch_tokens, batch_box_vectors=batch_box_vectors
    )


@pytest.fixture
def batcher():
    return make_batcher()


def image(size=SMALL, tokens=4, layers=(11,), regions=None):
    pixels_3hw = torch.zeros(3, *size, dtype=torch.uint8)
    return QueuedImage(pixels_3hw, plan(size, layers), tokens, regions)


def regions(num_boxes, box_size=1, normalize=False):
    return Regions(torch.zeros(num_boxes, 4), box_size, normalize)


def submit(batcher, *images):
    for item in images:
        batcher.submit(item)
    return list(images)


def test_a_batch_takes_what_has_gathered_in_order(batcher):
    first, second = submit(batcher, image(), image())

    assert batcher.next_batch() == [first, second]


def test_a_batch_stays_within_its_budget(batcher):
    first, second, third = submit(batcher, image(), image(), image())

    assert batcher.next_batch() == [first, second]
    assert batcher.next_batch() == [third]


def test_an_image_that_fills_the_budget_goes_alone(batcher):
    first, second = submit(batcher, image(tokens=10), image(tokens=1))

    assert batcher.next_batch() == [first]
    assert batcher.next_batch() == [second]


def test_a_batch_holds_one_size_and_one_choice_of_layers(batcher):
    a, b, c, d = submit(batcher, image(), image(LARGE), image(layers=(5,)), image())

    assert [batcher.next_batch() for _ in range(3)] == [[a, d], [b], [c]]


def test_a_batch_holds_boxes_of_one_kind_however_many(batcher):
    kinds = [regions(3), None, regions(1, 7), regions(1, 1, True), regions(5)]
    a, b, c, d, e = submit(batcher, *(image(tokens=1, regions=kind) for kind in kinds))

    assert [batcher.next_batch() for _ in range(4)] == [[a, e], [b], [c], [d]]


def test_a_batch_stays_within_its_budget_of_box_vectors():
    batcher = make_batcher(batch_box_vectors=100)
    kinds = [regions(1, 7), regions(1, 7), regions(1, 7), regions(2, 7)]
    a, b, c, d = submit(batcher, *(image(tokens=1, regions=kind) for kind in kinds))

    assert [batcher.next_batch() for _ in range(3)] == [[a, b], [c], [d]]


def test_box_vectors_are_counted_in_every_layer():
    batcher = make_batcher(batch_box_vectors=100)
    a, b = submit(
        batcher, *[image(tokens=1, layers=(5, 11), regions=regions(1, 7)) for _ in range(2)]
    )

    assert [batcher.next_batch() for _ in range(2)] == [[a], [b]]


def test_the_oldest_image_goes_first_whatever_comes_after_it(batcher):
    submit(batcher, image())
    (rare,) = submit(batcher, image(LARGE))
    submit(batcher, *(image() for _ in range(6)))

    batcher.next_batch()

    assert batcher.next_batch() == [rare]


def test_a_cancelled_image_leaves_before_it_costs_anything(batcher):
    metrics = Metrics()
    batcher = make_batcher(metrics, batch_tokens=8)
    first, second, third = submit(batcher, image(), image(), image())

    first.future.cancel()

    assert batcher.next_batch() == [second, third]
    assert metrics.cancelled_images._value.get() == 1


def test_an_image_in_a_batch_cannot_be_cancelled_any_more(batcher):
    (first,) = submit(batcher, image())
    batcher.next_batch()

    assert not first.future.cancel()


def test_without_waiting_an_empty_queue_gives_nothing(batcher):
    assert batcher.next_batch(wait=False) is None


def test_a_batch_of_cancelled_images_alone_is_no_batch(batcher):
    first, other = submit(batcher, image(), image(LARGE))
    first.future.cancel()

    assert batcher.next_batch() == [other]


def test_an_idle_engine_sleeps_until_an_image_comes(batcher):
    taken = []
    engine = threading.Thread(target=lambda: taken.append(batcher.next_batch()))
    engine.start()
    time.sleep(0.05)
    cpu_before = time.process_time()
    time.sleep(0.05)

    (first,) = submit(batcher, image())
    engine.join(5)

    assert taken == [[first]]
    assert time.process_time() - cpu_before < 0.04


def test_a_closed_batcher_hands_out_what_it_has_and_takes_no_more(batcher):
    (first,) = submit(batcher, image())

    batcher.close()

    assert batcher.next_batch() == [first]
    assert batcher.next_batch() is None
    with pytest.raises(BatcherClosedError):
        batcher.submit(image())


def test_whoever_waits_can_be_failed_at_once(batcher):
    first, gone = submit(batcher, image(), image())
    gone.future.cancel()

    batcher.fail_waiting(ValueError("the engine is gone"))

    assert isinstance(first.future.exception(1), ValueError)
    batcher.close()
    assert batcher.next_batch() is None


def test_the_gauges_follow_the_queue(batcher):
    metrics = Metrics()
    batcher = make_batcher(metrics, batch_tokens=8)

    submit(batcher, image(), image(), image(LARGE))
    assert (metrics.queue_images._value.get(), metrics.queue_tokens._value.get()) == (3, 12)

    batcher.next_batch()
    assert (metrics.queue_images._value.get(), metrics.queue_tokens._value.get()) == (1, 4)

    batcher.next_batch()
    assert (metrics.queue_images._value.get(), metrics.queue_tokens._value.get()) == (0, 0)


def test_a_batch_is_no_longer_than_those_who_come_should_wait():
    rate = [0.0]
    batcher = Batcher(
        Metrics(),
        batch_tokens=100,
        batch_box_vectors=1000,
        batch_seconds=0.5,
        tokens_per_second=lambda: rate[0],
    )
    images = submit(batcher, *(image() for _ in range(30)))

    sizes = []
    for rate[0] in (0.0, 16.0, 1.0, 1000.0):
        sizes.append(len(batcher.next_batch()))

    # Unknown: 100 tokens; half a second of 16/s; less than one image; more than the budget.
    assert sizes == [25, 2, 1, 2]
    assert sum(sizes) == len(images)
