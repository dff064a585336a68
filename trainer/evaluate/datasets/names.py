"""Class names of published data sets, in the order of their class numbers.

ade20k       150 of the scene parsing benchmark
camvid        11, as the SegNet tutorial numbers them
cityscapes    19 classes that are scored
coco_object   background and the 80 things of COCO
coco_stuff   171: 80 things, 91 kinds of stuff, without the 11 numbers that no image has
context60    background and the 59 classes of Pascal Context that are scored
voc21        background and the 20 classes of Pascal VOC

Source: mmsegmentation 1.2.2 (`METAINFO` of its data sets), except camvid (SegNet-Tutorial,
Scripts/test_segmentation_camvid.py) and coco_object (background before the things of coco_stuff).
"""

from pathlib import Path

_FOLDER = Path(__file__).parent / "classes"


def class_names(data_set: str) -> tuple[str, ...]:
    """Names by class number, from the text file of that name."""
    return tuple((_FOLDER / f"{data_set}.txt").read_text(encoding="utf-8").splitlines())
