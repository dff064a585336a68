import itertools
import logging
import time

import pytest
import torch

from tests.support import encoded, noise_image
from tests.trainer.refining import image_folder, write_shard
from trainer.config import DataSection
from trainer.data import BadImages, Batches, ImageFolder, TarShards, source_image, square_image
from trainer.errors import DataError

SECTION = DataSection(batch_size=2, workers=2)


def scan(folder, **changes):
    return ImageFolder.scan(folder, **({"seed": 0, "max_images": None} | changes))


def take(source, count, section=SECTION, **changes):
    arguments = {"size": 32, "seed": 0, "bad": BadImages(skip=False)} | changes
    stream = Batches(source, section, **arguments)
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


def test_an_epoch_of_batches_shows_every_image_once(tmp_path):
    folder = scan(image_folder(tmp_path, count=6, side=40))

    epoch = torch.cat([batch.images for batch in take(folder, 3)])

    expected = [square_image(path, size=32, section=SECTION) for path in folder.files]
    order = folder.order(0, seed=0)
    torch.testing.assert_close(epoch, torch.stack([expected[index] for index in order]))


@pytest.mark.parametrize("start", [1, 3, 4])
def test_batches_continue_from_any_position(tmp_path, start):
    folder = scan(image_folder(tmp_path, count=5, side=20))
    whole = take(folder, 7)

    rest = take(folder, 7 - start, position=whole[start - 1].position)

    for ours, theirs in zip(rest, whole[start:], strict=True):
        assert ours.position == theirs.position
        assert torch.equal(ours.images, theirs.images)


def test_shards_give_the_batches_of_their_files(tmp_path):
    images = {f"{n:03}.png": encoded(noise_image(40, 30, seed=n)) for n in range(5)}
    for name, data in images.items():
        (tmp_path / name).write_bytes(data)
    shard = write_shard(tmp_path / "a.tar", images)

    from_shards = take(TarShards.index([shard], seed=0, max_images=None), 4)

    for ours, theirs in zip(from_shards, take(scan(tmp_path), 4), strict=True):
        assert ours.position == theirs.position
        assert torch.equal(ours.images, theirs.images)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_out_the_images_of_one(tmp_path, world_size):
    # 7 images: batches of all processes run over the ends of epochs.
    folder = scan(image_folder(tmp_path, count=7, side=20))
    alone = take(folder, 4 * world_size)

    ranks = [take(folder, 4, rank=rank, world_size=world_size) for rank in range(world_size)]

    together = [batch.images for step in zip(*ranks, strict=True) for batch in step]
    assert torch.equal(torch.cat(together), torch.cat([batch.images for batch in alone]))
    positions = [batch.position for batch in alone[world_size - 1 :: world_size]]
    for rank in ranks:
        assert [batch.position for batch in rank] == positions


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    folder = scan(image_folder(tmp_path, count=7, side=20))
    alone = torch.cat([batch.images for batch in take(folder, 8)])

    before = [take(folder, 2, rank=rank, world_size=2) for rank in range(2)]
    position = before[0][-1].position
    after = [take(folder, 1, rank=rank, world_size=4, position=position) for rank in range(4)]

    assert position == 8
    torch.testing.assert_close(torch.cat([taken[0].images for taken in after]), alone[8:])


def test_an_unreadable_image_shifts_nothing_for_other_processes(tmp_path):
    image_folder(tmp_path, count=6, side=20)
    (tmp_path / "003.png").write_bytes(b"no image at all")
    folder = scan(tmp_path)
    skip = {"bad": BadImages(skip=True)}
    alone = take(folder, 6, **skip)

    ranks = [take(folder, 3, rank=rank, world_size=2, **skip) for rank in range(2)]

    together = [batch.images for step in zip(*ranks, strict=True) for batch in step]
    assert torch.equal(torch.cat(together), torch.cat([batch.images for batch in alone]))
    assert alone[-1].position == 12


def test_another_image_takes_the_place_of_an_unreadable_one(tmp_path):
    image_folder(tmp_path, count=6, side=20)
    whole = torch.cat([batch.images for batch in take(scan(tmp_path), 3)])
    order = scan(tmp_path).order(0, seed=0)
    scan(tmp_path).path(order[1]).write_bytes(b"no image at all")

    taken = torch.cat([batch.images for batch in take(scan(tmp_path), 3, bad=BadImages(skip=True))])

    assert torch.equal(taken[1], whole[4])
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(taken[kept], whole[kept])


def test_a_link_to_nowhere_is_an_unreadable_image(tmp_path):
    image_folder(tmp_path, count=2, side=8)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    folder = scan(tmp_path)

    assert len(folder.fingerprint()) == 64
    with pytest.raises(DataError, match=r"gone\.png"):
        take(folder, 2)


@pytest.mark.parametrize("content", [b"no image at all", b""])
def test_an_unreadable_image_stops_with_its_path(tmp_path, content):
    image_folder(tmp_path, count=3, side=20)
    (tmp_path / "bad.jpg").write_bytes(content)

    with pytest.raises(DataError, match=r"bad\.jpg.*--skip-bad-images"):
        take(scan(tmp_path), 3)


def test_an_unreadable_member_stops_with_its_shard(tmp_path):
    shard = write_shard(tmp_path / "x-7.tar", {"a.jpg": b"no image at all"})

    with pytest.raises(DataError, match=r"x-7\.tar/a\.jpg.*--skip-bad-images"):
        take(TarShards.index([shard], seed=0, max_images=None), 1)


def test_a_truncated_image_stops_with_its_path(tmp_path):
    image_folder(tmp_path, count=3, side=60)
    whole = (tmp_path / "001.png").read_bytes()
    (tmp_path / "001.png").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(DataError, match=r"001\.png.*damaged"):
        take(scan(tmp_path), 3)


def test_unreadable_images_are_skipped_and_counted_when_asked(tmp_path, caplog):
    image_folder(tmp_path, count=3, side=20)
    (tmp_path / "bad.jpg").write_bytes(b"no image at all")
    bad = BadImages(skip=True)

    with caplog.at_level(logging.WARNING):
        taken = take(scan(tmp_path), 4, bad=bad)

    assert {path.name for path in bad.paths} == {"bad.jpg"}
    assert caplog.text.count("skipped unreadable image") == 1
    assert all(len(batch.images) == 2 for batch in taken)


def test_a_folder_of_unreadable_images_ends_in_an_error(tmp_path):
    for name in ("a.jpg", "b.png"):
        (tmp_path / name).write_bytes(b"no image at all")

    with pytest.raises(DataError, match="not one of 2 images could be read"):
        take(scan(tmp_path), 1, bad=BadImages(skip=True))


def test_more_unreadable_images_than_allowed_end_in_an_error_that_names_some(tmp_path):
    image_folder(tmp_path, count=16, side=20)
    for number in range(4):
        (tmp_path / f"bad{number}.jpg").write_bytes(b"no image at all")

    assert take(scan(tmp_path), 10, bad=BadImages(skip=True, max_share=0.2))
    with pytest.raises(DataError, match=r"of 20 images are unreadable.*bad\d\.jpg, .*bad\d\.jpg"):
        take(scan(tmp_path), 10, bad=BadImages(skip=True, max_share=0.15))


def test_a_single_unreadable_image_is_never_too_many(tmp_path):
    image_folder(tmp_path, count=3, side=20)
    (tmp_path / "bad.jpg").write_bytes(b"no image at all")

    taken = take(scan(tmp_path), 4, bad=BadImages(skip=True, max_share=0))

    assert len(taken) == 4


def test_fit_decides_whether_an_image_is_cut_or_stretched(tmp_path):
    picture = noise_image(20, 60)
    picture.paste((255, 0, 0), (0, 0, 20, 20))
    picture.save(tmp_path / "wide.png")

    cut = square_image(tmp_path / "wide.png", size=32, section=DataSection(fit="crop"))
    stretched = square_image(tmp_path / "wide.png", size=32, section=DataSection(fit="stretch"))

    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    assert cut.shape == stretched.shape == (3, 32, 32)
    assert torch.equal(stretched[:, 16, 2], red)
    assert not torch.equal(cut[:, 16, 2], red)


# Smaller than the training size, as large, a little larger, more than twice as large.
SIDES = {"small": (20, 27), "equal": (32, 32), "large": (50, 41), "huge": (200, 90)}


def mixed_folder(folder):
    for name, (height, width) in SIDES.items():
        noise_image(height, width).save(folder / f"{name}.png")
        noise_image(height, width).save(folder / f"{name}.jpg", quality=90)
    return scan(folder)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_the_device_gives_images_the_pixels_of_the_host(tmp_path, fit):
    folder = mixed_folder(tmp_path)
    host = DataSection(batch_size=3, workers=2, fit=fit)

    device = take(folder, 4, host.model_copy(update={"resize": "device"}))

    for ours, theirs in zip(device, take(folder, 4, host), strict=True):
        assert torch.equal(ours.images, theirs.images)


def test_what_goes_to_the_device_is_bounded(tmp_path):
    folder = mixed_folder(tmp_path)
    section = DataSection(fit="stretch", resize="device")
    stream = Batches(folder, section, size=32, seed=0, bad=BadImages(skip=False))

    shapes = {path.name: stream._decode(i, 32).shape[1:] for i, path in enumerate(folder.files)}
    stream.close()

    assert shapes["large.jpg"] == (50, 41)
    assert shapes["huge.jpg"] == (32, 32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: not run")
@pytest.mark.parametrize("resize", ["host", "device"])
def test_a_gpu_gives_images_within_one_level_of_the_host(tmp_path, resize):
    folder = mixed_folder(tmp_path)
    section = DataSection(batch_size=8, workers=2, resize=resize)

    (batch,) = take(folder, 1, section, device=torch.device("cuda"))

    (expected,) = take(folder, 1, section.model_copy(update={"resize": "host"}))
    assert batch.images.is_cuda
    difference = batch.images.cpu().int() - expected.images.int()
    assert difference.abs().max() <= (1 if resize == "device" else 0)


class SlowFolder(ImageFolder):
    def read(self, index):
        time.sleep(0.05)
        return super().read(index)


def test_the_loader_says_how_long_it_kept_the_caller_waiting(tmp_path):
    folder = SlowFolder.scan(image_folder(tmp_path, count=4, side=20), seed=0, max_images=None)
    stream = Batches(folder, SECTION, size=32, seed=0, bad=BadImages(skip=False))

    assert (stream.wait_seconds, stream.loader_rate) == (0, float("inf"))
    next(stream)
    stream.close()

    assert stream.wait_seconds >= 0.05
    assert stream.loader_rate <= 2 / 0.05


@pytest.mark.parametrize(("cpu_share", "expected"), [(0.0, 8.0), (1.0, 2.0)])
def test_the_loader_is_as_fast_as_its_threads_and_its_cores(
    tmp_path, monkeypatch, cpu_share, expected
):
    # Four threads, one core, an image in half a second: of waiting, or of the core's time.
    folder = scan(image_folder(tmp_path, count=4, side=20))
    monkeypatch.setattr("trainer.data.loader._cores", lambda: 1.0)
    section = DataSection(batch_size=2, workers=4)
    stream = Batches(folder, section, size=32, seed=0, bad=BadImages(skip=False))

    stream._timed.append((0.5, 0.5 * cpu_share))
    stream.close()

    assert stream.loader_rate == expected


def test_an_image_of_a_source_is_that_of_its_file(tmp_path):
    folder = scan(image_folder(tmp_path, count=2, side=40))

    image = source_image(folder, 1, size=32, section=SECTION)

    assert torch.equal(image, square_image(folder.files[1], size=32, section=SECTION))


def test_every_optimiser_step_has_one_of_the_sizes(tmp_path):
    folder = scan(image_folder(tmp_path, count=4, side=40))
    section = SECTION.model_copy(update={"other_sizes": (16, 48), "accumulate": 2})

    sides = [batch.images.shape[-1] for batch in take(folder, 40, section)]

    assert sides[::2] == sides[1::2]
    assert {sides.count(side) >= 6 for side in (16, 32, 48)} == {True}
    assert sides != [batch.images.shape[-1] for batch in take(folder, 40, section, seed=1)]


def test_processes_and_resumed_runs_agree_on_the_sizes(tmp_path):
    folder = scan(image_folder(tmp_path, count=4, side=40))
    section = SECTION.model_copy(update={"other_sizes": (48,), "accumulate": 2})
    alone = [batch.images for batch in take(folder, 24, section)]

    wide = section.model_copy(update={"accumulate": 1})
    ranks = [take(folder, 6, wide, rank=rank, world_size=2, position=24) for rank in range(2)]

    together = [batch.images for step in zip(*ranks, strict=True) for batch in step]
    for ours, theirs in zip(together, alone[12:], strict=True):
        assert torch.equal(ours, theirs)
