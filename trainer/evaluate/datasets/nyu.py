"""NYU-Depth v2 in the folders that people have, depth in millimetres as 16-bit PNG.

With lists: lines of image, depth map (and focal length), relative to the folders they are about.
    nyudepthv2_{train,test}_files_with_gt.txt, sync/SCENE/..., official_splits/test/SCENE/...
    nyu_{train,test}.txt, SCENE/...
With a folder per kind:
    images/{train,test}/NAME.jpg, annotations/{train,test}/NAME.png
The 1,449 labelled images, exported with their official split (or below official_splits):
    {train,test}/SCENE/rgb_NUMBER.jpg, {train,test}/SCENE/sync_depth_NUMBER.png
    {train,test}/images/NAME.jpg, {train,test}/depth/NAME.png
"""

from pathlib import Path

from trainer.evaluate.datasets.layout import Layout, has
from trainer.evaluate.datasets.listing import Existing, check_exist, find_images, pair, read_lines
from trainer.evaluate.datasets.samples import DatasetError, Sample
from trainer.evaluate.datasets.types import Crop, DepthDataset

# What Eigen et al. score, as BTS and later evaluations cut it; arXiv:1406.2283, arXiv:1907.10326.
EIGEN_CROP = Crop(height=480, width=640, rows=(45, 471), columns=(41, 601))

_LISTS = ("nyudepthv2_{part}_files_with_gt.txt", "nyu_{part}.txt")
_LIST_FOLDERS = (".", "train_test_inputs", "filenames")
# What paths in lists are relative to.
_LISTED_BELOW = (".", "sync", "official_splits/{part}", "{part}")


def read_nyu(root: Path) -> DepthDataset:
    """List NYU-Depth v2: scored on the 654 images of its official test part, Eigen's crop."""
    return DepthDataset(
        name="NYU-Depth v2",
        layout="nyu",
        train=_read_part(root, "train"),
        val=_read_part(root, "test"),
        min_depth=1e-3,
        max_depth=10.0,
        crop=EIGEN_CROP,
    )


def _read_part(root: Path, part: str) -> tuple[Sample, ...]:
    for folder in _LIST_FOLDERS:
        for name in _LISTS:
            path = root / folder / name.format(part=part)
            if path.is_file():
                return _read_listed(root, path, part)
    if (root / "annotations" / part).is_dir():
        images = root / "images" / part
        return _pair(images, root / "annotations" / part)
    for below in (root / "official_splits" / part, root / part):
        if (below / "depth").is_dir():
            return _pair(below / "images", below / "depth")
        if has(below, "*/rgb_*"):
            return _read_scenes(below)
    raise DatasetError(
        f"{root} has no {part} part of NYU-Depth v2; looked for {_LISTS[0].format(part=part)}, "
        f"{_LISTS[1].format(part=part)}, annotations/{part}, {part}/depth and {part}/SCENE/rgb_*, "
        "the last two also below official_splits"
    )


def _pair(images: Path, depths: Path) -> tuple[Sample, ...]:
    return pair(
        find_images(images),
        lambda image: [depths / f"{image.stem}.png"],
        folder=images,
        what="depth map",
    )


def _read_scenes(folder: Path) -> tuple[Sample, ...]:
    return pair(
        find_images(folder, "*/rgb_*"),
        lambda image: [image.with_name(f"sync_depth_{image.stem.removeprefix('rgb_')}.png")],
        folder=folder,
        what="depth map",
    )


def _read_listed(root: Path, path: Path, part: str) -> tuple[Sample, ...]:
    pairs: dict[Path, Path] = {}
    for line in read_lines(path):
        # Absolute in form only: lists begin their paths with a slash.
        fields = [field.lstrip("/") for field in line.split()]
        if len(fields) < 2:
            raise DatasetError(
                f"{path} has the line {line!r}; a line gives an image and its depth map"
            )
        pairs[Path(fields[0])] = Path(fields[1])
    first, exists = next(iter(pairs)), Existing()
    folders = [root / folder.format(part=part) for folder in _LISTED_BELOW]
    folder = next((folder for folder in folders if exists(folder / first)), None)
    if folder is None:
        raise DatasetError(
            f"{path} lists {first}, which is in none of {', '.join(map(str, folders))}; put the "
            "images into one of them"
        )
    images = [folder / image for image in sorted(pairs)]
    check_exist(images, path)
    return pair(
        images,
        lambda image: [folder / pairs[image.relative_to(folder)]],
        folder=folder,
        what="depth map",
    )


NYU = Layout(
    about="NYU-Depth v2: BTS's lists with sync and official_splits, nyu_{train,test}.txt, "
    "images|annotations/{train,test}, or the labelled images as {train,test}",
    marks=(
        *(
            ((Path(folder) / name.format(part="test")).as_posix(),)
            for folder in _LIST_FOLDERS
            for name in _LISTS
        ),
        ("images/test", "annotations/test"),
        ("official_splits/test",),
        ("test/images", "test/depth"),
        ("test/*/sync_depth_*",),
    ),
    read=read_nyu,
    roots=(".", "nyu_depth_v2", "nyu"),
)
