"""Pascal VOC 2012 and Pascal Context, as a VOCdevkit has them.

VOC2012/JPEGImages/NAME.jpg
VOC2012/ImageSets/Segmentation/{train,val}.txt         and trainaug.txt or aug.txt
VOC2012/SegmentationClass/NAME.png                     0 = background, 255 = ignore
VOC2012/SegmentationClassAug/NAME.png                  labels of SBD for more training images

VOC2010/JPEGImages/NAME.jpg
VOC2010/ImageSets/SegmentationContext/{train,val}.txt
VOC2010/SegmentationClassContext/NAME.png              0 = none of the 59 classes
"""

from pathlib import Path

from trainer.evaluate.datasets.layout import Layout
from trainer.evaluate.datasets.listing import check_exist, pair, read_lines
from trainer.evaluate.datasets.names import class_names
from trainer.evaluate.datasets.samples import DatasetError, Sample
from trainer.evaluate.datasets.scenes import shifted
from trainer.evaluate.datasets.types import SegmentationDataset

_AUGMENTED = "SegmentationClassAug"


def read_voc(root: Path) -> SegmentationDataset:
    """List VOC 2012 with 21 classes; trained on `trainaug` where its labels are there."""
    return _read(root, "voc", "Segmentation", has_background=True, needs_train=True)


def read_voc21(root: Path) -> SegmentationDataset:
    """List VOC 2012 for open vocabulary: 20 classes and background."""
    return _read(root, "voc21", "Segmentation", has_background=True)


def read_voc20(root: Path) -> SegmentationDataset:
    """List VOC 2012 for open vocabulary: 20 classes, pixels of the background are ignored."""
    return _read(root, "voc20", "Segmentation", has_background=False)


def read_context60(root: Path) -> SegmentationDataset:
    """List Pascal Context: 59 classes and background."""
    return _read(root, "context60", "SegmentationContext", has_background=True)


def read_context59(root: Path) -> SegmentationDataset:
    """List Pascal Context: 59 classes, pixels of the background are ignored."""
    return _read(root, "context59", "SegmentationContext", has_background=False)


def _read(
    root: Path, layout: str, image_set: str, *, has_background: bool, needs_train: bool = False
) -> SegmentationDataset:
    is_context = image_set == "SegmentationContext"
    classes = class_names("context60" if is_context else "voc21")
    lists = root / "ImageSets" / image_set
    if is_context:
        labels: tuple[str, ...] = ("SegmentationClassContext",)
        train_lists = [lists / "train.txt"]
        name = "Pascal Context"
    else:
        # The labels that VOC itself published come first: those of SBD have no borders.
        labels = ("SegmentationClass", _AUGMENTED)
        train_lists = _train_lists(root, lists)
        name = "Pascal VOC 2012"
    if not needs_train and not train_lists[0].is_file():
        train_lists = []
    train = [sample for path in train_lists for sample in _read_listed(root, path, labels)]
    return SegmentationDataset(
        name=name,
        layout=layout,
        classes=classes if has_background else classes[1:],
        train=tuple(sorted(train, key=lambda sample: sample.name)),
        val=_read_listed(root, lists / "val.txt", labels),
        class_of=None if has_background else shifted(len(classes) - 1),
        background=0 if has_background else None,
    )


def _train_lists(root: Path, lists: Path) -> list[Path]:
    if not (root / _AUGMENTED).is_dir():
        return [lists / "train.txt"]
    if (lists / "trainaug.txt").is_file():
        return [lists / "trainaug.txt"]
    if (lists / "aug.txt").is_file():
        return [lists / "train.txt", lists / "aug.txt"]
    raise DatasetError(
        f"{root / _AUGMENTED} is there, but neither {lists / 'trainaug.txt'} nor aug.txt beside "
        "it, which list what to train on; add one of them, or move the folder away to train on "
        "train.txt"
    )


def _read_listed(root: Path, path: Path, labels: tuple[str, ...]) -> tuple[Sample, ...]:
    # Some copies of trainaug.txt give the paths of the image and of the label.
    names = [Path(line.split()[0]).stem for line in read_lines(path)]
    images = [root / "JPEGImages" / f"{name}.jpg" for name in sorted(names)]
    check_exist(images, path)
    return pair(
        images,
        lambda image: [root / folder / f"{image.stem}.png" for folder in labels],
        folder=root / "JPEGImages",
    )


_VOC_MARKS = (("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),)
_VOC_ROOTS = (".", "VOC2012", "VOCdevkit/VOC2012")
_CONTEXT_MARKS = (("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"),)
_CONTEXT_ROOTS = (".", "VOC2010", "VOCdevkit/VOC2010")

VOC = Layout(
    about="VOCdevkit/VOC2012, 21 classes; trains on trainaug where SegmentationClassAug is",
    marks=_VOC_MARKS,
    read=read_voc,
    roots=_VOC_ROOTS,
)

VOC20 = Layout(
    about="the same for open vocabulary, 20 classes, background is ignored",
    marks=_VOC_MARKS,
    read=read_voc20,
    roots=_VOC_ROOTS,
    is_recognised=False,
)

VOC21 = Layout(
    about="the same for open vocabulary, 20 classes and background",
    marks=_VOC_MARKS,
    read=read_voc21,
    roots=_VOC_ROOTS,
    is_recognised=False,
)

CONTEXT59 = Layout(
    about="VOCdevkit/VOC2010 with SegmentationClassContext, 59 classes, background is ignored",
    marks=_CONTEXT_MARKS,
    read=read_context59,
    roots=_CONTEXT_ROOTS,
)

CONTEXT60 = Layout(
    about="the same, 59 classes and background",
    marks=_CONTEXT_MARKS,
    read=read_context60,
    roots=_CONTEXT_ROOTS,
)
