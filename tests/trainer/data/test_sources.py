import os

import pytest

from tests.support import encoded, noise_image
from tests.trainer.refining import image_folder, write_shard
from trainer.data import ImageFolder, TarShards, find_images
from trainer.errors import DataError


def scan(folder, **changes):
    return ImageFolder.scan(folder, **({"seed": 0, "max_images": None} | changes))


def find(images, **changes):
    return find_images(images, **({"seed": 0, "max_images": None} | changes))


def names(source):
    return [source.path(index).name for index in range(len(source))]


def test_images_are_found_recursively_by_their_suffix(tmp_path):
    for name in ("a.jpg", "b/c.PNG", "b/d/e.webp", "f.bmp", "g.tiff", "h.tif", "i.jpeg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(8, 8).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")

    folder = scan(tmp_path)

    found = [path.relative_to(tmp_path).as_posix() for path in folder.files]
    assert found == ["a.jpg", "b/c.PNG", "b/d/e.webp", "f.bmp", "g.tiff", "h.tif", "i.jpeg"]


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


def test_a_list_names_its_images_from_where_it_lies(tmp_path):
    image_folder(tmp_path / "photos", count=3, side=8)
    listing = tmp_path / "lists" / "some.txt"
    listing.parent.mkdir()
    listing.write_text(
        f"# two of three\n../photos/002.png\r\n\n  {tmp_path / 'photos' / '000.png'}\n"
    )

    source = find(listing)

    assert names(source) == ["002.png", "000.png"]
    assert source.read(1) == (tmp_path / "photos" / "000.png").read_bytes()


def test_the_fingerprint_of_a_list_moves_with_it(tmp_path):
    for folder in ("a", "b"):
        image_folder(tmp_path / folder / "photos", count=2, side=8)
        (tmp_path / folder / "list.txt").write_text("photos/000.png\nphotos/001.png\n")
    before = find(tmp_path / "a" / "list.txt").fingerprint()

    assert find(tmp_path / "b" / "list.txt").fingerprint() == before

    (tmp_path / "b" / "list.txt").write_text("photos/000.png\n")
    assert find(tmp_path / "b" / "list.txt").fingerprint() != before


@pytest.mark.parametrize(
    ("text", "message"),
    [("# nothing\n\n", "lists no files"), ("gone.jpg\nalso.jpg\n", "not one of the 2 files")],
)
def test_a_list_without_images_is_an_error(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)

    with pytest.raises(DataError, match=message):
        find(tmp_path / "list.txt")


def test_every_kind_of_images_is_told_by_its_name(tmp_path):
    image_folder(tmp_path / "photos", count=1, side=8)
    image = encoded(noise_image(8, 8))
    for name in ("a-00.tar", "a-01.tar"):
        write_shard(tmp_path / "shards" / name, {f"{name[:4]}.png": image})
    (tmp_path / "list.txt").write_text("photos/000.png\n")

    kinds = {
        "photos": (ImageFolder, 1),
        "list.txt": (ImageFolder, 1),
        "shards": (TarShards, 2),
        "shards/a-00.tar": (TarShards, 1),
        "shards/a-{00..01}.tar": (TarShards, 2),
    }
    for name, (kind, count) in kinds.items():
        source = find(tmp_path / name)
        assert isinstance(source, kind), name
        assert len(source) == source.num_found == count, name


def test_shards_beside_images_are_left_alone_and_named(tmp_path, caplog):
    image_folder(tmp_path, count=2, side=8)
    write_shard(tmp_path / "old.tar", {"a.png": encoded(noise_image(8, 8))})

    source = find(tmp_path)

    assert names(source) == ["000.png", "001.png"]
    assert "its 1 .tar files are not read" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone", "not a folder"),
        ("shards.tar.gz", "compressed"),
        ("one.jpg", "is one image"),
        ("s3://bucket/a.tar", "not a local path"),
    ],
)
def test_what_is_no_source_says_what_would_be(name, message):
    with pytest.raises(DataError, match=message):
        find(name)
