"""Tiny data sets in published layouts, for the tests of their readers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (4, 6)


def write_image(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], (10, 20, 30)).save(path)
    return path


def write_label(path: Path, values: int | Sequence[int] = 0, *, palette: bool = False) -> Path:
    """A label map of `SIZE` whose first pixels have the values and whose other ones the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [values] if isinstance(values, int) else values
    pixels = np.full(SIZE[0] * SIZE[1], values[-1], np.uint8)
    pixels[: len(values)] = values
    image = Image.fromarray(pixels.reshape(SIZE))
    if palette:
        image = image.convert("P")
        image.putdata(pixels.tolist())
        image.putpalette([255 - channel // 3 for channel in range(768)])
    image.save(path)
    return path


def write_depth(path: Path, millimetres: int | Sequence[int], size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [millimetres] if isinstance(millimetres, int) else millimetres
    pixels = np.full(size[0] * size[1], values[-1], np.uint16)
    pixels[: len(values)] = values
    Image.fromarray(pixels.reshape(size)).save(path)
    return path


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def segmentation_folder(
    root: Path, classes: Mapping[str, object] | None = None, *, labels: Sequence[int] = (0, 1, 255)
) -> Path:
    """The layout `folder`: three images to train on, two to score on."""
    for part, names in (("train", "abc"), ("val", "de")):
        for name in names:
            write_image(root / part / "images" / f"{name}.jpg")
            write_label(root / part / "labels" / f"{name}.png", labels)
    classes = {"0": "dark", "1": "bright"} if classes is None else classes
    (root / "classes.json").write_text(json.dumps(classes))
    return root


def depth_folder(root: Path) -> Path:
    """The layout `folder` of depth: two images to train on, one to score on."""
    for part, names in (("train", "ab"), ("val", "c")):
        for name in names:
            write_image(root / part / "images" / f"{name}.jpg")
            write_depth(root / part / "depth" / f"{name}.png", (0, 1500))
    return root


def ade20k(root: Path) -> Path:
    for part, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        write_image(root / "images" / part / f"{name}.jpg")
        write_label(root / "annotations" / part / f"{name}.png", (0, 1, 150))
    return root


def cityscapes(root: Path, labels: str = "labelIds", values: Sequence[int] = (0, 7, 33)) -> Path:
    for part, city in (("train", "aachen"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        write_image(root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
        write_label(root / "gtFine" / part / city / f"{stem}_gtFine_{labels}.png", values)
    return root


def camvid(root: Path) -> Path:
    for part in ("train", "val", "test"):
        write_image(root / part / f"0001TP_{part}.png")
        write_label(root / f"{part}annot" / f"0001TP_{part}.png", (0, 10, 11))
    return root


def voc(root: Path) -> Path:
    """A VOCdevkit with VOC2012; the year's folder is returned."""
    year = root / "VOC2012"
    for part, name in (("train", "2007_000032"), ("val", "2007_000033")):
        write_image(year / "JPEGImages" / f"{name}.jpg")
        write_label(year / "SegmentationClass" / f"{name}.png", (0, 1, 20, 255), palette=True)
        write_lines(year / "ImageSets" / "Segmentation" / f"{part}.txt", name)
    return year


def context(root: Path) -> Path:
    """A VOCdevkit with VOC2010; the year's folder is returned."""
    year = root / "VOC2010"
    for part, name in (("train", "2008_000002"), ("val", "2008_000003")):
        write_image(year / "JPEGImages" / f"{name}.jpg")
        write_label(year / "SegmentationClassContext" / f"{name}.png", (0, 1, 59))
        write_lines(year / "ImageSets" / "SegmentationContext" / f"{part}.txt", name)
    return year


def coco(root: Path, ending: str, values: Sequence[int], part: str = "val2017") -> Path:
    write_image(root / "images" / part / "000000000139.jpg")
    write_label(root / "annotations" / part / f"000000000139_{ending}.png", values)
    return root
