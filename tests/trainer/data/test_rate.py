import pytest

from trainer.data import LoaderWatch


class Stream:
    """What the watch sees of `Batches`."""

    def __init__(self, loader_rate=100.0):
        self.wait_seconds = 3.0
        self.loader_rate = loader_rate


def watched(wait, *, steps=50):
    """The values of the last of some steps of a second, each with so much waiting."""
    stream = Stream()
    watch = LoaderWatch(stream, images_per_step=8)
    for _ in range(steps):
        stream.wait_seconds += wait
        values = watch.step(1.0)
    return values


def test_the_loader_is_compared_with_steps_that_never_wait():
    values = watched(0.2)

    assert values["data_wait_seconds"] == pytest.approx(0.2)
    assert values["loader_rate"] == 100
    assert values["loader_over_step"] == pytest.approx(100 / (8 / 0.8))


def test_a_starved_run_is_told_once_and_with_its_numbers(caplog):
    watched(0.2, steps=200)

    assert len(caplog.records) == 1
    assert "waited for images 20 % of their time: the loader gives 100 images/s" in caplog.text
    assert "a step could take 10;" in caplog.text


@pytest.mark.parametrize(("wait", "steps"), [(0.09, 200), (0.5, 49)])
def test_little_waiting_and_a_slow_start_are_no_starvation(caplog, wait, steps):
    watched(wait, steps=steps)

    assert not caplog.records
