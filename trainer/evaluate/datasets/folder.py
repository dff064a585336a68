"""Data sets of one's own: a folder per part and kind, and a file that describes the targets.

DATA/classes.json                 {"0": "Sky", "1": "Building", ...}; "background" is a class apart
DATA/{train,val}/images/NAME.jpg  photographs
DATA/{train,val}/labels/NAME.png  one class number per pixel, 255 = ignore

DATA/depth.json                   optional: {"scale": 1000, "min": 0.001, "max": 10}
DATA/{train,val}/images/NAME.jpg  photographs
DATA/{train,val}/depth/NAME.png   16 bits, `scale` units per metre, 0 = no measurement; or
DATA/{train,val}/depth/NAME.npy   floating point, metres, 0 or NaN = no measurement
"""

import json
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from trainer.evaluate.datasets.layout import Layout
from trainer.evaluate.datasets.listing import find_images, pair
from trainer.evaluate.datasets.samples import IGNORE, DatasetError, Sample
from trainer.evaluate.datasets.types import DepthDataset, SegmentationDataset


def read_folder(folder: Path) -> SegmentationDataset:
    """List train|val/{images,labels} with the classes that classes.json numbers."""
    classes = _read_classes(folder / "classes.json")
    return SegmentationDataset(
        name=folder.resolve().name,
        layout="folder",
        classes=classes,
        train=_read_part(folder / "train", "labels", (".png",), "label"),
        val=_read_part(folder / "val", "labels", (".png",), "label"),
        background=classes.index("background") if "background" in classes else None,
    )


def read_depth_folder(folder: Path) -> DepthDataset:
    """List train|val/{images,depth}, scored as depth.json says."""
    description = _read_description(folder / "depth.json")
    return DepthDataset(
        name=folder.resolve().name,
        layout="folder",
        train=_read_part(folder / "train", "depth", (".png", ".npy"), "depth map"),
        val=_read_part(folder / "val", "depth", (".png", ".npy"), "depth map"),
        min_depth=description.min,
        max_depth=description.max,
        units_per_metre=description.scale,
    )


def _read_part(
    part: Path, targets: str, suffixes: tuple[str, ...], what: str
) -> tuple[Sample, ...]:
    images = part / "images"
    return pair(
        find_images(images),
        lambda image: [part / targets / f"{image.stem}{suffix}" for suffix in suffixes],
        folder=images,
        what=what,
    )


def _read_classes(path: Path) -> tuple[str, ...]:
    example = '{"0": "Sky", "1": "Building"}'
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; it names the classes, like {example}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from error
    if not isinstance(names, dict) or not names:
        raise DatasetError(f"{path} must number its classes from 0, like {example}")
    expected = [str(number) for number in range(len(names))]
    missing = [number for number in expected if number not in names]
    if missing:
        extra = next(number for number in names if number not in expected)
        raise DatasetError(
            f"{path} must number its classes from 0 without gaps; of {len(names)} classes one is "
            f"{extra!r} and none is {missing[0]!r}"
        )
    if len(names) > IGNORE:
        raise DatasetError(
            f"{path} names {len(names)} classes; label maps of 8 bits have room for {IGNORE}, "
            f"since {IGNORE} means ignore"
        )
    wrong = next((number for number in expected if not isinstance(names[number], str)), None)
    if wrong is not None:
        raise DatasetError(f"{path} gives class {wrong} the name {names[wrong]!r}; names are text")
    return tuple(names[number] for number in expected)


class _Description(BaseModel):
    """What depth.json may say.

    Attributes:
        scale: Units per metre of 16-bit PNG files.
        min: Nearest distance that is scored, in metres.
        max: Farthest distance that is scored, in metres.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    scale: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    min: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    max: float = Field(default=10.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min >= self.max:
            raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
        return self


def _read_description(path: Path) -> _Description:
    try:
        return _Description.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return _Description()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DatasetError(
            f"{path}: {f'{where}: ' if where else ''}{first['msg']}; it may set scale (units per "
            "metre), min and max (metres)"
        ) from error


FOLDER = Layout(
    about="train|val/{images,labels} with classes.json, 255 = ignore",
    marks=(("classes.json",), ("val/images", "val/labels")),
    read=read_folder,
)

DEPTH_FOLDER = Layout(
    about="train|val/{images,depth}, 16-bit PNG in mm or .npy in metres, 0 = no measurement; "
    "depth.json may set scale, min and max",
    marks=(("val/images", "val/depth"),),
    read=read_depth_folder,
)
