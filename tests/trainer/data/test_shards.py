import os
import tarfile

import pytest

from tests.support import encoded, noise_image
from tests.trainer.refining import write_shard
from trainer.data.shards import TarShards, expand
from trainer.errors import DataError

IMAGES = {f"{number:03}.png": encoded(noise_image(8, 8, seed=number)) for number in range(6)}


def index(*shards, **changes):
    return TarShards.index(shards, **({"seed": 0, "max_images": None} | changes))


def test_members_are_read_as_they_were_written(tmp_path):
    first = write_shard(tmp_path / "a.tar", dict(list(IMAGES.items())[:4]))
    second = write_shard(tmp_path / "b.tar", dict(list(IMAGES.items())[4:]))

    shards = index(first, second)

    assert [shards.read(number) for number in range(6)] == list(IMAGES.values())
    assert shards.path(5) == second / "005.png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_headers_is_read(tmp_path, format):
    name = f"{'deep/' * 14}caf\u00e9{'x' * (130 if format != tarfile.USTAR_FORMAT else 10)}.png"
    shard = write_shard(tmp_path / "a.tar", {name: IMAGES["000.png"]}, format=format)

    shards = index(shard)

    assert shards.read(0) == IMAGES["000.png"]
    assert str(shards.path(0)).endswith(name)


def test_a_sample_gives_the_first_member_that_is_its_image(tmp_path):
    image = IMAGES["000.png"]
    content = {
        "a/1.json": b"{}",
        "a/1.JPG": image,
        "a/1.png": image,
        "a/1.seg.png": image,
        "b/1.png": image,
        "a/2.cls": b"7",
        "a/3.seg.png": image,
        "a/.hidden.png": image,
        "a/plain": image,
    }

    shards = index(write_shard(tmp_path / "a.tar", content))

    assert [member.name for member in shards.members] == ["a/1.JPG", "b/1.png"]


def test_more_images_than_asked_for_are_chosen_by_the_seed(tmp_path):
    shard = write_shard(tmp_path / "a.tar", IMAGES)

    chosen = [index(shard, max_images=3, seed=seed) for seed in (0, 0, 1)]

    assert chosen[0].members == chosen[1].members != chosen[2].members
    assert [(len(shards), shards.num_found) for shards in chosen] == 3 * [(3, 6)]


def test_the_fingerprint_follows_names_and_sizes_of_members(tmp_path):
    for folder in ("a", "b"):
        write_shard(tmp_path / folder / "x.tar", IMAGES)
    before = index(tmp_path / "a" / "x.tar").fingerprint()

    assert index(tmp_path / "b" / "x.tar").fingerprint() == before

    write_shard(tmp_path / "b" / "x.tar", IMAGES | {"000.png": b"other"})
    assert index(tmp_path / "b" / "x.tar").fingerprint() != before


@pytest.mark.parametrize("cut", [300, 512, 700, 1500, -1024, -10240])
def test_a_shard_that_was_cut_off_is_named(tmp_path, cut):
    whole = write_shard(tmp_path / "whole.tar", IMAGES)
    content = whole.read_bytes().rstrip(b"\0")
    end = -(-len(content) // 512) * 512  # behind the last member, without the end mark
    cuts = {-1024: end, -10240: end - 100}
    (tmp_path / "train-0007.tar").write_bytes(content.ljust(end, b"\0")[: cuts.get(cut, cut)])

    with pytest.raises(DataError, match=r"train-0007\.tar is damaged or incomplete"):
        index(whole, tmp_path / "train-0007.tar")


def test_a_damaged_header_does_not_pass_for_the_end(tmp_path):
    shard = write_shard(tmp_path / "a.tar", IMAGES)
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[3].offset
    content = bytearray(shard.read_bytes())
    content[offset + 10] ^= 0xFF
    shard.write_bytes(content)

    with pytest.raises(DataError, match=r"a\.tar is damaged or incomplete"):
        index(shard)


@pytest.mark.parametrize("content", [b"", b"no tar file at all" * 100])
def test_a_file_that_is_no_shard_is_named(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)

    with pytest.raises(DataError, match=r"a\.tar is damaged or incomplete"):
        index(tmp_path / "a.tar")


def test_shards_without_images_are_an_error(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {"a.json": b"{}"})

    with pytest.raises(DataError, match="no images in 1 shards"):
        index(shard)


def test_links_in_a_shard_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)

    with pytest.raises(DataError, match=r"a\.png in the shard .*a\.tar is a link"):
        index(tmp_path / "a.tar")


def test_missing_shards_are_counted_and_named(tmp_path):
    write_shard(tmp_path / "a-1.tar", IMAGES)

    with pytest.raises(DataError, match=r"2 of 3 shards do not exist: .*a-0\.tar, .*a-2\.tar"):
        index(*expand(str(tmp_path / "a-{0..2}.tar")))


def test_a_shard_that_shrinks_during_a_run_is_named(tmp_path):
    shard = write_shard(tmp_path / "a.tar", IMAGES)
    shards = index(shard)
    os.truncate(shard, 600)

    with pytest.raises(DataError, match=r"a\.tar has become shorter"):
        shards.read(5)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{x,y}/{0..1}.tar", ["x/0.tar", "x/1.tar", "y/0.tar", "y/1.tar"]),
    ],
)
def test_braces_count_and_list(pattern, expected):
    assert [path.as_posix() for path in expand(pattern)] == expected


@pytest.mark.parametrize("inside", ["", "5..3", "a..b", "7"])
def test_braces_that_say_nothing_are_refused(inside):
    with pytest.raises(DataError, match="is no range of shards"):
        expand(f"a-{{{inside}}}.tar")


def test_a_shard_whose_headers_lead_back_is_refused(tmp_path):
    size = b"19 size=-000001536\n"  # the next header is at byte 0 again, by it
    content = {"a.txt": b"", "pax": size, "1.png": b""}
    shard = write_shard(tmp_path / "a.tar", content, format=tarfile.USTAR_FORMAT)
    data = bytearray(shard.read_bytes())
    data[512 + 156 : 512 + 157] = tarfile.XHDTYPE
    data[512 + 148 : 512 + 156] = b" " * 8
    data[512 + 148 : 512 + 156] = b"%06o\0 " % sum(data[512:1024])
    shard.write_bytes(data)

    with pytest.raises(DataError, match=r"a\.tar is damaged: 1\.png has -1536 bytes"):
        index(shard)


def test_a_member_is_called_by_its_shard_whatever_its_name(tmp_path):
    shard = write_shard(tmp_path / "a.tar", {"/data/1.png": IMAGES["000.png"]})

    path = index(shard).path(0)

    assert path == shard / "data" / "1.png"
