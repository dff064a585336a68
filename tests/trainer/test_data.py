import itertools
import logging
import os

import pytest
import torch

from tests.support import noise_image
from tests.trainer.refining import image_folder
from trainer.config import DataSection
from trainer.data import BadImages, ImageFolder, batches, square_image
from trainer.errors import DataError

SECTION = DataSection(batch_size=2, workers=2)


def scan(folder, **changes):
    return ImageFolder.scan(folder, **({"seed": 0, "max_images": None} | changes))


def take(folder, count, section=SECTION, **changes):
    arguments = {"size": 32, "seed": 0, "bad": BadImages(skip=False)} | changes
    stream = batches(folder, section, **arguments)
    taken = list(itertools.islice(stream, count))
    stream.close()
    return taken


def test_images_are_found_recursively_by_their_suffix(tmp_path):
    for name in ("a.jpg", "b/c.PNG", "b/d/e.webp", "f.bmp", "g.tiff", "h.tif", "i.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")

    folder = scan(tmp_path)

    names = [path.relative_to(tmp_path).as_posix() for path in folder.files]
    assert names == ["a.jpg", "b/c.PNG", "b/d/e.webp", "f.bmp", "g.tiff", "h.tif", "i.jpeg"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.touch(), None])
def test_a_folder_without_images_is_an_error(tmp_path, make):
    folder = tmp_path / "images"
    if make:
        make(folder)

    with pytest.raises(DataError, match="no images under|not a folder"):
        scan(folder)


def test_more_images_than_asked_for_are_chosen_by_the_seed(tmp_path):
    image_folder(tmp_path, count=8, side=8)

    chosen = [scan(tmp_path, max_images=3, seed=seed) for seed in (0, 0, 1)]

    assert [len(folder) for folder in chosen] == [3, 3, 3]
    assert chosen[0].files == chosen[1].files != chosen[2].files
    assert chosen[0].num_found == 8


def test_the_fingerprint_follows_names_and_sizes(tmp_path):
    image_folder(tmp_path / "a", count=2, side=8)
    image_folder(tmp_path / "b", count=2, side=8)
    before = scan(tmp_path / "a").fingerprint()

    assert scan(tmp_path / "b").fingerprint() == before

    (tmp_path / "a" / "000.png").write_bytes(b"other")
    assert scan(tmp_path / "a").fingerprint() != before


def test_every_epoch_has_all_images_in_an_order_of_its_own(tmp_path):
    folder = scan(image_folder(tmp_path, count=8, side=8))

    orders = [folder.order(epoch, seed=0) for epoch in range(3)]

    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    assert folder.order(0, seed=0) == orders[0] != folder.order(0, seed=1)


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


def test_a_link_to_nowhere_is_an_unreadable_image(tmp_path):
    image_folder(tmp_path, count=2, side=8)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    folder = scan(tmp_path)

    assert len(folder.fingerprint()) == 64
    with pytest.raises(DataError, match=r"gone\.png"):
        take(folder, 2)


def test_file_names_need_not_be_unicode(tmp_path):
    image_folder(tmp_path, count=1, side=8)
    os.rename(tmp_path / "000.png", os.fsencode(tmp_path) + b"/caf\xe9.png")

    assert len(scan(tmp_path).fingerprint()) == 64


def test_a_folder_that_cannot_be_listed_is_not_passed_over(tmp_path, monkeypatch):
    image_folder(tmp_path / "images", count=1, side=8)
    (tmp_path / "images" / "locked").mkdir()
    listed = os.scandir

    def refuse(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", refuse)

    with pytest.raises(DataError, match="locked cannot be listed"):
        scan(tmp_path / "images")


@pytest.mark.parametrize("content", [b"no image at all", b""])
def test_an_unreadable_image_stops_with_its_path(tmp_path, content):
    image_folder(tmp_path, count=3, side=20)
    (tmp_path / "bad.jpg").write_bytes(content)

    with pytest.raises(DataError, match=r"bad\.jpg.*--skip-bad-images"):
        take(scan(tmp_path), 3)


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
