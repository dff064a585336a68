import logging
import multiprocessing
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from tests.support import noise_image
from trainer.evaluate.errors import EvaluationError, StoreError
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.images import ShortSide
from trainer.evaluate.windows import Windows

SIZE = (16, 24)


@dataclass
class Colours:
    """A subject whose tokens are the mean colours of patches; notes the shapes of its batches."""

    key: str = "c" * 64
    patch_size: int = 4
    scale: float = 1.0
    name: str = "raw"
    spec: str = "colours"
    digest: str = "d" * 64
    native_size: tuple[int, int] = SIZE
    batches: list = field(default_factory=list)
    fails_after: int | None = None

    def encode(self, images):
        if self.fails_after is not None and len(self.batches) >= self.fails_after:
            raise KeyboardInterrupt
        self.batches.append(tuple(images.shape))
        pooled = torch.nn.functional.avg_pool2d(images.float(), self.patch_size)
        return self.scale * pooled.flatten(2).transpose(1, 2)


@dataclass(frozen=True)
class Picture:
    image: Path


def pictures(folder, sizes=((20, 30),) * 5):
    folder.mkdir(exist_ok=True)
    samples = [Picture(folder / f"{index}.png") for index in range(len(sizes))]
    for seed, (sample, (height, width)) in enumerate(zip(samples, sizes, strict=True)):
        noise_image(height, width, seed).save(sample.image)
    return samples


@pytest.fixture
def samples(tmp_path):
    return pictures(tmp_path / "images")


@pytest.fixture(params=["disk", "memory"])
def store(request, tmp_path):
    return FeatureStore(tmp_path / "features" if request.param == "disk" else None)


def test_grids_are_what_the_subject_gives_in_the_order_of_the_samples(store, samples):
    subject = Colours()

    grids = store.features(subject, samples, size=SIZE, batch_size=2)

    assert len(grids) == 5
    assert subject.batches == [(2, 3, *SIZE), (2, 3, *SIZE), (1, 3, *SIZE)]
    assert grids[0].dtype == torch.float16
    assert grids[0].shape == (4, 6, 3)
    for index, sample in enumerate(samples):
        (alone,) = FeatureStore(None).features(Colours(), [sample], size=SIZE)
        assert torch.equal(grids[index], alone)
    assert torch.equal(grids[-1], grids[4])
    assert len(grids[1:3]) == 2
    with pytest.raises(IndexError):
        grids[5]


def test_what_was_computed_is_found_again(store, samples):
    first = store.features(Colours(), samples, size=SIZE)
    subject = Colours()

    again = store.features(subject, samples, size=SIZE)

    assert subject.batches == []
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))


def test_nothing_else_is_ever_returned(store, samples, tmp_path):
    def computed(subject=None, of=samples, **changes):
        subject = subject or Colours()
        store.features(subject, of, **({"size": SIZE} | changes))
        return sum(batch[0] for batch in subject.batches)

    assert computed() == 5
    assert computed(Colours(key="e" * 64)) == 5
    assert computed(size=(16, 20)) == 5
    assert computed(windows=Windows(8, 8)) > 5
    assert computed(size=ShortSide(16)) == 0  # which is 16x24 for these
    # The same path with another picture, and the same picture at another path.
    noise_image(20, 30, 99).save(samples[0].image)
    assert computed() == 1
    moved = tmp_path / "moved.png"
    moved.write_bytes(samples[1].image.read_bytes())
    assert computed(of=[Picture(moved)]) == 0


def test_a_run_that_was_killed_goes_on_with_what_is_missing(tmp_path, samples):
    store = FeatureStore(tmp_path / "features")
    with pytest.raises(KeyboardInterrupt):
        store.features(Colours(fails_after=1), samples, size=SIZE, batch_size=2)
    subject = Colours()

    grids = FeatureStore(tmp_path / "features").features(subject, samples, size=SIZE, batch_size=2)

    assert subject.batches == [(2, 3, *SIZE), (1, 3, *SIZE)]
    assert len(list(grids)) == 5


def test_images_of_several_shapes_are_encoded_in_batches_of_one(store, tmp_path):
    samples = pictures(tmp_path / "mixed", [(20, 30), (30, 20), (40, 60), (16, 16)])
    subject = Colours()

    grids = store.features(subject, samples, size=ShortSide(16), batch_size=4)

    assert [tuple(grid.shape[:2]) for grid in grids] == [(4, 6), (6, 4), (4, 6), (4, 4)]
    assert sorted(subject.batches) == [(1, 3, 16, 16), (1, 3, 24, 16), (2, 3, 16, 24)]


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone"])
def test_a_damaged_file_is_computed_again_with_a_warning(tmp_path, samples, damage, caplog):
    store = FeatureStore(tmp_path / "features")
    expected = store.features(Colours(), samples[:1], size=SIZE)[0]
    (path,) = (tmp_path / "features").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    grids = store.features(Colours(), samples[:1], size=SIZE)
    if damage == "gone":
        path.unlink()
    else:
        data[-3] ^= 16
        path.write_bytes({"cut": data[:-9], "empty": b"", "flipped": data}[damage])

    with caplog.at_level(logging.WARNING):
        found = grids[0]

    assert torch.equal(found, expected)
    assert "it is computed again" in caplog.text
    assert torch.equal(
        FeatureStore(tmp_path / "features").features(
            Colours(fails_after=0), samples[:1], size=SIZE
        )[0],
        expected,
    )


def _write(folder, image, barrier, failures):
    try:
        for turn in range(20):
            barrier.wait(30)  # both find nothing, and write the same
            subject = Colours(key=f"{turn:064x}")
            (grid,) = FeatureStore(folder).features(subject, [Picture(image)], size=SIZE)
            assert grid.shape == (4, 6, 3)
    except BaseException as error:
        failures.put(repr(error))
        raise


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_that_write_at_once_never_see_half_a_file(tmp_path, samples):
    context = multiprocessing.get_context("fork")
    failures = context.Queue()
    arguments = (tmp_path / "features", samples[0].image, context.Barrier(2), failures)
    processes = [context.Process(target=_write, args=arguments) for _ in range(2)]

    for process in processes:
        process.start()
    for process in processes:
        process.join(60)

    assert [process.exitcode for process in processes] == [0, 0], failures.get(timeout=1)
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 20
    assert not list((tmp_path / "features").rglob(".part-*"))


def test_what_killed_runs_left_is_cleared_away_once_it_is_old(tmp_path):
    folder = tmp_path / "features" / "abc"
    folder.mkdir(parents=True)
    old, new = folder / ".part-old", folder / ".part-new"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)

    FeatureStore(tmp_path / "features")

    assert not old.exists()
    assert new.exists()


def test_values_that_float16_cannot_hold_are_kept_in_float32(store, samples):
    (grid,) = store.features(Colours(scale=1e4), samples[:1], size=SIZE)

    assert grid.dtype == torch.float32
    assert grid.max() > 65504


def test_values_that_are_not_finite_are_refused(store, samples):
    with pytest.raises(StoreError, match=r"raw gives values for .*png that are not finite"):
        store.features(Colours(scale=float("inf")), samples, size=SIZE)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 26), r"16x26 px is not a whole number of raw's 4 px patches; ask for 16x24"),
        ((0, 4), "not a whole number"),
        (ShortSide(3), "short side 3 px is less than a patch of raw, 4 px"),
    ],
)
def test_a_size_that_a_backbone_cannot_have_is_refused(store, samples, size, message):
    with pytest.raises(EvaluationError, match=message):
        store.features(Colours(), samples, size=size)


@pytest.mark.parametrize("content", [None, b"no image", b""])
def test_an_image_that_cannot_be_read_is_named(store, samples, content):
    samples[3].image.unlink()
    if content is not None:
        samples[3].image.write_bytes(content)

    with pytest.raises(EvaluationError, match=r"the image .*3\.png cannot be read"):
        store.features(Colours(), samples, size=SIZE)


def test_a_cut_off_image_is_named(store, samples):
    samples[2].image.write_bytes(samples[2].image.read_bytes()[:-200])

    with pytest.raises(EvaluationError, match=r"the image .*2\.png cannot be read"):
        store.features(Colours(), samples, size=SIZE)


def test_too_many_images_at_once_for_the_device_say_what_to_give(store, samples):
    class Small(Colours):
        def encode(self, images):
            raise torch.OutOfMemoryError(f"no room for {len(images)}")

    with pytest.raises(EvaluationError, match="raw has no room .* 5 images .* --batch-size"):
        store.features(Small(), samples, size=SIZE)


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path, samples):
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="another folder by --features DIR, or --features none"):
        FeatureStore(tmp_path / "file" / "features").features(Colours(), samples, size=SIZE)


def test_too_little_room_is_said_before_it_is_used_up(tmp_path, samples, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)

    with pytest.raises(StoreError, match="0 MiB left; make room"):
        FeatureStore(tmp_path / "features").features(Colours(), samples, size=SIZE)


def test_the_log_says_how_large_it_gets(tmp_path, samples, caplog):
    with caplog.at_level(logging.INFO):
        FeatureStore(tmp_path / "features").features(Colours(), samples, size=SIZE)

    assert "4x6x3 as float16 are 0.00 MiB an image" in caplog.text
    assert "5 images, 5 computed" in caplog.text
