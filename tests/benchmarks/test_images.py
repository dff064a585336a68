"""Every request has bytes of its own, and the picture in them stays the same."""

import collections
import hashlib
import io
from itertools import islice

import pytest
import torch
from PIL import Image

from backbone.errors import ImageTooLargeError, UndecodableImageError
from backbone.preprocess import decode_image
from benchmarks.serving.images import (
    ASPECTS,
    Traffic,
    bomb,
    corrupt,
    in_aspects,
    kinds_of,
    read_images,
    with_comment,
)


def photograph(size=(64, 48), form="JPEG", seed=0):
    noise = torch.randint(0, 256, (6, 8, 3), generator=torch.Generator().manual_seed(seed))
    image = Image.fromarray(noise.to(torch.uint8).numpy()).resize(size)
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_comment_changes_the_bytes_and_not_the_picture(form):
    data = photograph(form=form)

    commented = with_comment(data, b"request 7")

    assert commented != data
    assert b"request 7" in commented
    assert torch.equal(decode_image(commented), decode_image(data))


def test_a_comment_leaves_the_jfif_segment_first():
    commented = with_comment(photograph(), b"x")

    assert commented[2:4] == b"\xff\xe0"
    assert commented[6:10] == b"JFIF"


@pytest.mark.parametrize("kind", ["jpeg CMYK", "jpeg EXIF-rotated", "jpeg progressive"])
def test_odd_jpeg_files_take_a_comment_too(kind):
    data = kinds_of(photograph())[kind]

    assert torch.equal(decode_image(with_comment(data, b"x")), decode_image(data))


def test_every_kind_can_be_decoded_and_is_what_it_says():
    kinds = kinds_of(photograph())

    opened = {kind: Image.open(io.BytesIO(data)) for kind, data in kinds.items()}
    assert {kind: image.mode for kind, image in opened.items()} == {
        "jpeg": "RGB",
        "jpeg progressive": "RGB",
        "jpeg grey": "L",
        "jpeg CMYK": "CMYK",
        "jpeg EXIF-rotated": "RGB",
        "png 16 bit": "I;16",
        "png RGBA": "RGBA",
        "webp": "RGB",
    }
    assert opened["jpeg progressive"].info["progressive"]
    assert decode_image(kinds["jpeg EXIF-rotated"]).shape == (3, 64, 48)
    for data in kinds.values():
        assert decode_image(data).float().std() > 5


def test_a_corrupt_file_and_a_bomb_are_refused():
    with pytest.raises(UndecodableImageError):
        decode_image(corrupt(photograph((256, 256))))
    with pytest.raises(ImageTooLargeError):
        decode_image(bomb())


def test_images_of_all_aspects_are_cut_without_stretching():
    images = in_aspects([photograph((300, 200))] * 5)

    sizes = [Image.open(io.BytesIO(image)).size for image in images]
    assert [width / height for width, height in sizes] == pytest.approx(ASPECTS, rel=0.01)


def test_without_hits_no_two_requests_have_the_same_bytes():
    traffic = Traffic([photograph()], sides=[32])

    bodies = [job.body for job in islice(traffic, 200)]

    assert len({hashlib.sha256(body).digest() for body in bodies}) == 200
    assert not traffic.warm_up


def test_two_runs_share_no_bytes():
    first, second = (Traffic([photograph()], seed=0) for _ in range(2))

    assert first.draw().body != second.draw().body


@pytest.mark.parametrize("hit_rate", [0.5, 0.95])
def test_the_hit_rate_is_the_share_of_requests_from_the_warmed_up_set(hit_rate):
    traffic = Traffic([photograph()], hit_rate=hit_rate, hot=8)
    warm = set(traffic.warm_up)

    jobs = list(islice(traffic, 2000))

    assert sum(job in warm for job in jobs) / 2000 == pytest.approx(hit_rate, abs=0.04)


def test_sizes_are_drawn_evenly_and_name_the_kind():
    traffic = Traffic([photograph()], sides=[224, (64, 96)], query="&dtype=float32")

    jobs = list(islice(traffic, 400))

    kinds = collections.Counter((job.kind, job.query) for job in jobs)
    assert set(kinds) == {
        ("224 px", "?size=224&dtype=float32"),
        ("64x96 px", "?size=64,96&dtype=float32"),
    }
    assert min(kinds.values()) > 150


def test_images_are_taken_from_the_whole_folder(tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.jpg").write_bytes(photograph(seed=number))

    images = read_images(tmp_path, 2)

    assert images == [photograph(seed=0), photograph(seed=5)]
    with pytest.raises(SystemExit, match="10 JPEG files"):
        read_images(tmp_path, 11)
