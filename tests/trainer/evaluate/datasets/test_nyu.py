import pytest

from tests.trainer.evaluate.datasets.trees import write_depth, write_image, write_lines
from trainer.evaluate.datasets import DatasetError, open_depth


def write_scene(folder, scene="kitchen_0001", number="00045"):
    write_image(folder / scene / f"rgb_{number}.jpg")
    write_depth(folder / scene / f"sync_depth_{number}.png", (0, 2000))


def bts(root):
    """The folders and lists of BTS."""
    write_scene(root / "sync", "basement_0001a")
    write_scene(root / "official_splits" / "test", "bathroom")
    write_lines(
        root / "nyudepthv2_train_files_with_gt.txt",
        "/basement_0001a/rgb_00045.jpg /basement_0001a/sync_depth_00045.png 518.8579",
    )
    write_lines(
        root / "nyudepthv2_test_files_with_gt.txt",
        "bathroom/rgb_00045.jpg bathroom/sync_depth_00045.png 518.8579",
    )
    return root


def lists_beside_scenes(root):
    for part in ("train", "test"):
        write_scene(root, f"{part}_0001")
        line = f"/{part}_0001/rgb_00045.jpg /{part}_0001/sync_depth_00045.png 518.8579"
        write_lines(root / f"nyu_{part}.txt", line)
    return root


def folder_per_kind(root):
    for part in ("train", "test"):
        write_image(root / "images" / part / "kitchen_0001_00045.jpg")
        write_depth(root / "annotations" / part / "kitchen_0001_00045.png", (0, 2000))
    return root


def labelled_scenes(root):
    for part in ("train", "test"):
        write_scene(root / part)
    return root


def labelled_folders(root):
    for part in ("train", "test"):
        write_image(root / part / "images" / "0001.png")
        write_depth(root / part / "depth" / "0001.png", (0, 2000))
    return root


def labelled_below_official_splits(root):
    labelled_scenes(root / "official_splits")
    return root


LAYOUTS = [
    bts,
    lists_beside_scenes,
    folder_per_kind,
    labelled_scenes,
    labelled_folders,
    labelled_below_official_splits,
]


@pytest.mark.parametrize("write", LAYOUTS)
def test_every_layout_is_read_and_scored_the_same(tmp_path, write):
    dataset = open_depth(write(tmp_path))

    assert (dataset.name, dataset.layout) == ("NYU-Depth v2", "nyu")
    assert len(dataset.train) == len(dataset.val) == 1
    assert dataset.train[0].image != dataset.val[0].image
    assert (dataset.min_depth, dataset.max_depth) == (1e-3, 10)
    assert dataset.eval_mask(480, 640).sum() == 426 * 560
    assert dataset.read_depth(dataset.val[0]).flatten()[:2].tolist() == [0, 2]


def test_it_is_found_one_folder_below(tmp_path):
    bts(tmp_path / "nyu_depth_v2")

    assert open_depth(tmp_path).val[0].name == "bathroom/rgb_00045"


def test_a_list_whose_images_lie_nowhere_says_where_it_looked(tmp_path):
    bts(tmp_path)
    (tmp_path / "sync").rename(tmp_path / "elsewhere")

    with pytest.raises(DatasetError, match=r"lists basement_0001a/rgb_00045\.jpg, .*/sync"):
        open_depth(tmp_path)


def test_a_listed_image_that_does_not_exist_is_named(tmp_path):
    path = bts(tmp_path) / "nyudepthv2_train_files_with_gt.txt"
    path.write_text(path.read_text() + "/z/rgb_1.jpg /z/sync_depth_1.png 518.8579\n")

    with pytest.raises(DatasetError, match=r"1 of 2 images that .*txt lists .*sync/z/rgb_1\.jpg"):
        open_depth(tmp_path)


def test_a_listed_depth_map_that_does_not_exist_is_named(tmp_path):
    bts(tmp_path)
    (tmp_path / "sync" / "basement_0001a" / "sync_depth_00045.png").unlink()

    with pytest.raises(DatasetError, match=r"1 of 1 images .* no depth map; .*sync_depth_00045"):
        open_depth(tmp_path)


def test_a_line_without_a_depth_map_is_refused(tmp_path):
    write_lines(bts(tmp_path) / "nyudepthv2_test_files_with_gt.txt", "bathroom/rgb_00045.jpg")

    with pytest.raises(DatasetError, match=r"has the line 'bathroom/rgb_00045\.jpg'; a line gives"):
        open_depth(tmp_path)


def test_a_missing_part_is_named(tmp_path):
    labelled_scenes(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")

    with pytest.raises(
        DatasetError, match="has no train part of NYU-Depth v2; looked for nyudepth"
    ):
        open_depth(tmp_path)
