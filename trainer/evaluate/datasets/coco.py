"""COCO 2017 with labels of things and stuff, converted to class numbers.

images/{train2017,val2017}/NAME.jpg
annotations/{train2017,val2017}/NAME_labelTrainIds.png     COCO-Stuff, 171 classes
annotations/{train2017,val2017}/NAME_instanceTrainIds.png  COCO-Object, 0 = background, 80 things
"""

from pathlib import Path

from trainer.evaluate.datasets.layout import Layout, has
from trainer.evaluate.datasets.listing import find_images, pair
from trainer.evaluate.datasets.names import class_names
from trainer.evaluate.datasets.samples import Sample
from trainer.evaluate.datasets.types import SegmentationDataset

_STUFF_ENDING = "_labelTrainIds.png"
_OBJECT_ENDING = "_instanceTrainIds.png"


def read_coco_stuff(root: Path) -> SegmentationDataset:
    """List COCO-Stuff; the training part may be left out."""
    return SegmentationDataset(
        name="COCO-Stuff",
        layout="coco-stuff",
        classes=class_names("coco_stuff"),
        train=_read_part(root, "train2017", _STUFF_ENDING, is_needed=False),
        val=_read_part(root, "val2017", _STUFF_ENDING),
    )


def read_coco_object(root: Path) -> SegmentationDataset:
    """List COCO-Object; the training part may be left out."""
    return SegmentationDataset(
        name="COCO-Object",
        layout="coco-object",
        classes=class_names("coco_object"),
        train=_read_part(root, "train2017", _OBJECT_ENDING, is_needed=False),
        val=_read_part(root, "val2017", _OBJECT_ENDING),
        background=0,
    )


def _read_part(root: Path, name: str, ending: str, *, is_needed: bool = True) -> tuple[Sample, ...]:
    images, labels = root / "images" / name, root / "annotations" / name
    if not is_needed and not (images.is_dir() and has(labels, f"*{ending}")):
        return ()
    return pair(
        find_images(images), lambda image: [labels / f"{image.stem}{ending}"], folder=images
    )


COCO_STUFF = Layout(
    about="coco_stuff164k: images|annotations/val2017 with *_labelTrainIds.png, 171 classes",
    marks=(("images/val2017", f"annotations/val2017/*{_STUFF_ENDING}"),),
    read=read_coco_stuff,
    roots=(".", "coco_stuff164k"),
)

COCO_OBJECT = Layout(
    about="images|annotations/val2017 with *_instanceTrainIds.png, 80 classes and background",
    marks=(("images/val2017", f"annotations/val2017/*{_OBJECT_ENDING}"),),
    read=read_coco_object,
    roots=(".", "coco_object", "coco_stuff164k"),
)
