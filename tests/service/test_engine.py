import logging
import threading

import pytest
import torch

from service.batcher import Batcher, QueuedImage
from service.engine import Engine
from service.errors import EncodingFailedError
from service.metrics import Metrics


class Fixture:
    def __init__(self, open_encoder):
        self.metrics = Metrics()
        self.batcher = Batcher(self.metrics, batch_tokens=1000, batch_box_vectors=1000)
        self.ready = threading.Event()
        self.failure = None
        self.failed = threading.Event()
        self.engine = Engine(
            "test",
            open_encoder,
            self.batcher,
            self.metrics,
            num_threads=1,
            on_ready=self.ready.set,
            on_failure=self._fail,
        )
        self.engine.start()

    def _fail(self, error):
        self.failure = error
        self.failed.set()

    def submit(self, seed, layers=(1,)):
        return self.batcher.submit(QueuedImage(pixels(seed), layers, 10))


def pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture
def engine(watched_encoder):
    fixture = Fixture(lambda: watched_encoder)
    assert fixture.ready.wait(30)
    yield fixture
    watched_encoder.gate.set()
    fixture.batcher.close()
    fixture.engine.join(10)


def test_ready_means_that_a_forward_has_run(engine, watched_encoder):
    assert engine.engine.is_ready
    assert watched_encoder.batches


def test_images_that_come_during_a_batch_share_the_next_one(engine, watched_encoder):
    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()

    rest = [engine.submit(seed) for seed in (1, 2, 3)]
    watched_encoder.gate.set()

    assert [future.result(10).batch_images for future in [first, *rest]] == [1, 3, 3, 3]
    assert watched_encoder.batches == [(1, 3, 64, 64), (3, 3, 64, 64)]


def test_every_image_of_a_batch_gets_its_own_features(engine, watched_encoder):
    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()
    rest = [engine.submit(seed, layers=(0, 1)) for seed in (1, 2)]
    watched_encoder.gate.set()

    for seed, future in enumerate([first, *rest]):
        layers = (1,) if seed == 0 else (0, 1)
        alone = watched_encoder.encode(pixels(seed)[None], layers=layers)
        for vectors, features in zip(future.result(10).vectors_VC, alone, strict=True):
            torch.testing.assert_close(vectors, features.tokens[0])


def test_a_poisoned_image_fails_alone(engine, watched_encoder, caplog):
    watched_encoder.hold()
    watched_encoder.fails = lambda images: bool((images == pixels(2)).all(-1).all(-1).all(-1).any())
    first = engine.submit(0)
    watched_encoder.wait_until_held()

    with caplog.at_level(logging.CRITICAL):
        good, bad = engine.submit(1), engine.submit(2)
        watched_encoder.gate.set()
        assert good.result(10).batch_images == 1
        assert isinstance(bad.exception(10), EncodingFailedError)

    assert first.result(10)
    assert engine.metrics.batch_retries._value.get() == 1
    assert watched_encoder.batches[1:] == [(2, 3, 64, 64), (1, 3, 64, 64), (1, 3, 64, 64)]


def test_every_waiter_hears_a_failed_forward_and_the_next_batch_runs(
    engine, watched_encoder, caplog
):
    watched_encoder.hold()
    watched_encoder.fails = lambda _: True
    waiting = [engine.submit(seed) for seed in range(3)]

    with caplog.at_level(logging.CRITICAL):
        watched_encoder.gate.set()
        assert all(isinstance(future.exception(10), EncodingFailedError) for future in waiting)

    watched_encoder.fails = lambda _: False
    assert engine.submit(0).result(10)


def test_a_model_that_cannot_be_loaded_is_reported(caplog):
    def open_encoder():
        raise ValueError("no such model")

    with caplog.at_level(logging.CRITICAL):
        fixture = Fixture(open_encoder)
        assert fixture.failed.wait(10)

    assert str(fixture.failure) == "no such model"
    assert not fixture.engine.is_ready


def test_a_model_with_values_that_are_not_finite_does_not_get_ready(watched_encoder, caplog):
    with torch.no_grad():
        watched_encoder.backbone.vit.norm.weight.fill_(float("nan"))

    with caplog.at_level(logging.CRITICAL):
        fixture = Fixture(lambda: watched_encoder)
        assert fixture.failed.wait(10)

    assert "not finite" in str(fixture.failure)
