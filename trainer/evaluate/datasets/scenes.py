"""Whole scenes, labelled throughout: ADE20K, Cityscapes and CamVid.

ADEChallengeData2016/images/{training,validation}/NAME.jpg
ADEChallengeData2016/annotations/{training,validation}/NAME.png    0 = none of the 150 classes

leftImg8bit/{train,val}/CITY/NAME_leftImg8bit.png
gtFine/{train,val}/CITY/NAME_gtFine_labelIds.png (or _labelTrainIds.png)

CamVid/{train,val,test}/NAME.png                                   as the SegNet tutorial has it
CamVid/{train,val,test}annot/NAME.png                              11 = void
"""

from pathlib import Path

from trainer.evaluate.datasets.folder import read_folder
from trainer.evaluate.datasets.layout import Layout, has
from trainer.evaluate.datasets.listing import find_images, pair
from trainer.evaluate.datasets.names import class_names
from trainer.evaluate.datasets.samples import IGNORE, Sample
from trainer.evaluate.datasets.types import SegmentationDataset

# Ids of all Cityscapes labels by the class that is scored; the other ids up to 33 are void.
# Source: cityscapesScripts 2.3.0, helpers/labels.py (`id` and `trainId`).
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
CITYSCAPES_CLASS_OF = dict.fromkeys(range(34), IGNORE) | {
    number: class_number for class_number, number in enumerate(_CITYSCAPES_IDS)
}
_CAMVID_VOID = 11


def shifted(num_classes: int) -> dict[int, int]:
    """Values 1 to `num_classes` are the classes; 0, like 255, is not scored."""
    return {0: IGNORE, IGNORE: IGNORE} | {number + 1: number for number in range(num_classes)}


def read_ade20k(root: Path) -> SegmentationDataset:
    """List the scene parsing benchmark; the training part may be left out."""

    def part(name: str) -> tuple[Sample, ...]:
        labels = root / "annotations" / name
        images = root / "images" / name
        return pair(
            find_images(images), lambda image: [labels / f"{image.stem}.png"], folder=images
        )

    classes = class_names("ade20k")
    return SegmentationDataset(
        name="ADE20K",
        layout="ade20k",
        classes=classes,
        train=part("training") if (root / "images" / "training").is_dir() else (),
        val=part("validation"),
        class_of=shifted(len(classes)),
    )


def read_cityscapes(root: Path) -> SegmentationDataset:
    """List the finely labelled images; the training part may be left out."""
    has_ids = has(root, "gtFine/val/*/*_gtFine_labelIds.png")
    ending = "_gtFine_labelIds.png" if has_ids else "_gtFine_labelTrainIds.png"

    def part(name: str) -> tuple[Sample, ...]:
        def labels_of(image: Path) -> list[Path]:
            stem = image.stem.removesuffix("_leftImg8bit")
            return [root / "gtFine" / name / image.parent.name / f"{stem}{ending}"]

        images = root / "leftImg8bit" / name
        return pair(find_images(images, "*/*_leftImg8bit.*"), labels_of, folder=images)

    return SegmentationDataset(
        name="Cityscapes",
        layout="cityscapes",
        classes=class_names("cityscapes"),
        train=part("train") if (root / "leftImg8bit" / "train").is_dir() else (),
        val=part("val"),
        class_of=CITYSCAPES_CLASS_OF if has_ids else None,
    )


def read_camvid(root: Path) -> SegmentationDataset:
    """List CamVid, scored on `val`."""
    return _read_camvid(root, "camvid", "val")


def read_camvid_test(root: Path) -> SegmentationDataset:
    """List CamVid, scored on `test`, as the SegNet tutorial does."""
    return _read_camvid(root, "camvid-test", "test")


def _read_camvid(root: Path, layout: str, scored: str) -> SegmentationDataset:
    if (root / "classes.json").is_file():
        return read_folder(root)

    def part(name: str) -> tuple[Sample, ...]:
        labels = root / f"{name}annot"
        return pair(
            find_images(root / name),
            lambda image: [labels / f"{image.stem}.png"],
            folder=root / name,
        )

    classes = class_names("camvid")
    class_of = {number: number for number in range(len(classes))}
    return SegmentationDataset(
        name="CamVid" if scored == "val" else f"CamVid ({scored})",
        layout=layout,
        classes=classes,
        train=part("train"),
        val=part(scored),
        class_of=class_of | {_CAMVID_VOID: IGNORE},
    )


ADE20K = Layout(
    about="ADEChallengeData2016: images|annotations/{training,validation}, 150 classes, "
    "0 is ignored",
    marks=(("images/validation", "annotations/validation"),),
    read=read_ade20k,
    roots=(".", "ADEChallengeData2016"),
)

CITYSCAPES = Layout(
    about="leftImg8bit|gtFine/{train,val}/CITY with labelIds or labelTrainIds, 19 classes",
    marks=(("leftImg8bit/val", "gtFine/val"),),
    read=read_cityscapes,
)

CAMVID = Layout(
    about="CamVid as the SegNet tutorial has it (train, trainannot, val, valannot), 11 classes; "
    "or with classes.json as in `folder`",
    marks=(("train", "trainannot", "val", "valannot"), ("classes.json",)),
    read=read_camvid,
    roots=(".", "CamVid"),
)

CAMVID_TEST = Layout(
    about="the same, scored on test and testannot",
    marks=(("train", "trainannot", "test", "testannot"),),
    read=read_camvid_test,
    roots=(".", "CamVid"),
    is_recognised=False,
)
