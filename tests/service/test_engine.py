import logging
import threading
import time

import pytest
import torch

from backbone import DenseFeatures
from service.batcher import Batcher, QueuedImage
from service.boxes import Regions
from service.cores import Cores
from service.encoding import spurious_scores
from service.engine import Engine
from service.errors import EncodingFailedError, NotReadyError
from service.metrics import Metrics
from tests.service.plans import plan, served_model


class Fixture:
    def __init__(self, encoder):
        self.metrics = Metrics()
        self.batcher = Batcher(self.metrics, batch_tokens=1000, batch_box_vectors=1000)
        self.model = served_model(encoder)
        self.failure = None
        self.failed = threading.Event()
        self.rates = []
        self.engine = Engine(
            0,
            "cpu",
            self.batcher,
            self.metrics,
            cores=Cores(1),
            models=list,
            on_batch=lambda tokens, seconds: self.rates.append((tokens, seconds)),
            on_failure=self._fail,
        )
        self.engine.start()

    def _fail(self, error):
        self.failure = error
        self.failed.set()

    def submit(self, seed, layers=(1,)):
        wanted = plan((64, 64), layers, self.model)
        return self.batcher.submit(QueuedImage(pixels(seed), wanted, 10))


def pixels(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)


@pytest.fixture
def engine(watched_encoder):
    fixture = Fixture(watched_encoder)
    yield fixture
    watched_encoder.gate.set()
    fixture.batcher.close()
    fixture.engine.join(10)


def test_images_that_come_during_a_batch_share_the_next_one(engine, watched_encoder):
    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()

    rest = [engine.submit(seed) for seed in (1, 2, 3)]
    watched_encoder.gate.set()

    assert all(future.result(10) for future in [first, *rest])
    assert watched_encoder.batches == [(1, 3, 64, 64), (3, 3, 64, 64)]


def test_every_image_of_a_batch_gets_its_own_features(engine, watched_encoder):
    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()
    rest = [engine.submit(seed, layers=(0, 1)) for seed in (1, 2)]
    watched_encoder.gate.set()

    for seed, future in enumerate([first, *rest]):
        layers = (1,) if seed == 0 else (0, 1)
        alone = watched_encoder.encode(pixels(seed)[None], layers=layers, register_width=1)
        for layer, features in zip(future.result(10).layers, alone, strict=True):
            torch.testing.assert_close(layer.tokens_NC, features.tokens[0])


def test_a_poisoned_image_fails_alone(engine, watched_encoder, caplog):
    watched_encoder.hold()
    watched_encoder.fails = lambda images: bool((images == pixels(2)).all(-1).all(-1).all(-1).any())
    first = engine.submit(0)
    watched_encoder.wait_until_held()

    with caplog.at_level(logging.CRITICAL):
        good, bad = engine.submit(1), engine.submit(2)
        watched_encoder.gate.set()
        assert good.result(10)
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


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_a_lost_device_ends_the_engine_and_everybody_hears_it(engine, watched_encoder, error):
    watched_encoder.hold()
    watched_encoder.error = error
    watched_encoder.fails = lambda _: True
    first = engine.submit(0)
    watched_encoder.wait_until_held()
    watched_encoder.gate.set()

    assert isinstance(first.exception(10), NotReadyError)
    assert engine.failed.wait(10)
    assert "is lost" in str(engine.failure)
    engine.engine.join(10)
    assert not engine.engine.is_alive


def test_memory_that_does_not_suffice_is_no_lost_device(engine, watched_encoder):
    watched_encoder.hold()
    watched_encoder.error = torch.OutOfMemoryError("CUDA out of memory")
    watched_encoder.fails = lambda images: len(images) > 1
    first = engine.submit(0)
    watched_encoder.wait_until_held()
    rest = [engine.submit(seed) for seed in (1, 2)]
    watched_encoder.gate.set()

    assert all(future.result(10) for future in [first, *rest])
    assert engine.metrics.out_of_memory._value.get() == 1
    assert engine.engine.is_alive


def test_a_busy_engine_tells_for_how_long_and_a_waiting_one_does_not(engine, watched_encoder):
    assert engine.engine.busy_seconds == 0.0

    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()
    time.sleep(0.02)
    busy_seconds = engine.engine.busy_seconds
    watched_encoder.gate.set()
    first.result(10)
    engine.submit(1).result(10)

    assert busy_seconds >= 0.02
    assert [tokens for tokens, _ in engine.rates][0] == 10


def test_what_a_stuck_engine_works_on_can_be_answered_for_it(engine, watched_encoder):
    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()

    engine.engine.abandon(NotReadyError("stuck"))

    assert isinstance(first.exception(1), NotReadyError)
    watched_encoder.gate.set()
    assert engine.submit(1).result(10)


def test_features_do_not_hold_on_to_those_of_their_batch(engine, watched_encoder):
    watched_encoder.hold()
    engine.submit(0)
    watched_encoder.wait_until_held()
    rest = [engine.submit(seed) for seed in (1, 2, 3)]
    watched_encoder.gate.set()

    tokens_NC = rest[0].result(10).layers[0].tokens_NC

    assert tokens_NC.untyped_storage().nbytes() == tokens_NC.nbytes


def test_spurious_scores_are_the_cosine_to_the_nearest_register_and_the_length():
    generator = torch.Generator().manual_seed(0)
    tokens_1NC = torch.randn(1, 6, 8, generator=generator)
    tokens_1NC[0, 2] *= 10
    registers_1RC = torch.randn(1, 3, 8, generator=generator)
    registers_1RC[0, 1] = 2 * tokens_1NC[0, 4]
    features = DenseFeatures(tokens_1NC, (2, 3), 16, tokens_1NC[:, :0], registers_1RC)

    scores_N2 = spurious_scores(features)[0]

    cosines_NR = torch.nn.functional.cosine_similarity(
        tokens_1NC[0][:, None], registers_1RC[0][None], dim=-1
    )
    torch.testing.assert_close(scores_N2[:, 0], cosines_NR.amax(dim=1))
    assert scores_N2[4, 0] == pytest.approx(1.0)
    norms_N = tokens_1NC[0].norm(dim=-1)
    expected_N = (norms_N - norms_N.mean()) / norms_N.std(correction=0)
    torch.testing.assert_close(scores_N2[:, 1], expected_N)
    assert scores_N2[:, 1].argmax() == 2


def test_engines_share_the_queue(watched_encoder):
    first = Fixture(watched_encoder)
    second = Engine(
        0,
        "cpu",
        first.batcher,
        first.metrics,
        cores=Cores(1),
        models=list,
        on_batch=lambda *_: None,
        on_failure=first._fail,
    )
    second.start()
    watched_encoder.hold()

    waiting = [first.submit(seed, layers=(seed,)) for seed in (0, 1)]
    watched_encoder.wait_until_held()
    watched_encoder.wait_until_held()  # both at a time: groups that cannot share a batch
    watched_encoder.gate.set()

    assert all(future.result(10) for future in waiting)
    first.batcher.close()
    first.engine.join(10)
    second.join(10)


def test_images_tried_one_by_one_are_batches_of_their_own(engine, watched_encoder, caplog):
    watched_encoder.hold()
    first = engine.submit(0)
    watched_encoder.wait_until_held()
    waiting = [engine.submit(seed) for seed in (1, 2, 3)]
    busy_seconds = []

    def fails(images):
        busy_seconds.append(engine.engine.busy_seconds)
        time.sleep(0.05)
        return len(images) > 1

    watched_encoder.fails = fails
    with caplog.at_level(logging.CRITICAL):
        watched_encoder.gate.set()
        assert first.result(10)
        assert all(future.result(10) for future in waiting)

    assert len(busy_seconds) == 5
    assert max(busy_seconds) < 0.1


def test_boxes_of_images_tried_one_by_one_are_counted(engine, watched_encoder, caplog):
    watched_encoder.hold()
    engine.submit(0)
    watched_encoder.wait_until_held()
    regions = Regions(torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 3), 1, normalize=False)
    wanted = plan((64, 64), (1,), engine.model)
    waiting = [
        engine.batcher.submit(QueuedImage(pixels(seed), wanted, 10, regions)) for seed in (1, 2)
    ]
    watched_encoder.fails = lambda images: len(images) > 1

    with caplog.at_level(logging.CRITICAL):
        watched_encoder.gate.set()
        assert all(future.result(10) for future in waiting)
        engine.batcher.close()
        engine.engine.join(10)

    assert engine.metrics.boxes._value.get() == 6
