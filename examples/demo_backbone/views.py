"""Pairs of random crops of photographs, and where their patches lie.

All photographs are decoded once and stay in memory. A batch is drawn first (which photographs,
which boxes, which flips) and rendered afterwards, so threads change the speed, never the pixels.
Dimension key: B = photographs, V = views (2B: first the B first views, then the B second ones),
N = patches of a view, S = side of a view in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5
AREA_RANGE = (0.15, 0.8)
ASPECT_RANGE = (0.75, 1.33)

# Luma weights (BT.601), and the chroma rotation of the YIQ colour space for hue shifts.
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_RGB_TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


class ViewPlan(NamedTuple):
    """What a batch of views will show, before any pixel is touched."""

    photo_V: list[int]
    box_V4: Tensor  # xyxy, pixels of the photograph
    is_flipped_V: Tensor
    side: int


class Views(NamedTuple):
    """Rendered views and their plan."""

    pixels_V3SS: Tensor  # uint8
    plan: ViewPlan


def load_photos(folder: Path, *, short_side: int, threads: int) -> list[Image.Image]:
    """Decode every photograph below `folder`, shrunk to a short side of at most `short_side`."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no photographs ({', '.join(sorted(IMAGE_SUFFIXES))}) in {folder}")

    def decode(path: Path) -> Image.Image:
        with Image.open(path) as opened:
            photo = opened.convert("RGB")
        scale = short_side / min(photo.size)
        if scale < 1.0:
            width, height = (max(1, round(side * scale)) for side in photo.size)
            photo = photo.resize((width, height), Image.Resampling.BICUBIC)
        return photo

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(decode, paths))


class ViewSampler:
    """Draws and renders batches of view pairs; every photograph once per epoch, in a new order."""

    def __init__(
        self, photos: list[Image.Image], generator: torch.Generator, *, threads: int
    ) -> None:
        self._photos = photos
        self._generator = generator
        self._pool = ThreadPoolExecutor(threads)
        self._order = self._epochs()

    def _epochs(self) -> Iterator[int]:
        while True:
            order: list[int] = torch.randperm(len(self._photos), generator=self._generator).tolist()
            yield from order

    def _uniform(self, count: int, low: float, high: float) -> Tensor:
        return torch.rand(count, generator=self._generator) * (high - low) + low

    def draw(self, num_photos: int, side: int) -> ViewPlan:
        """Choose photographs, boxes (log-uniform area and aspect) and flips for one batch."""
        photo_V = [next(self._order) for _ in range(num_photos)] * 2
        size_V2 = torch.tensor([self._photos[index].size for index in photo_V], dtype=torch.float32)
        count = len(photo_V)
        area_V = self._uniform(count, math.log(AREA_RANGE[0]), math.log(AREA_RANGE[1])).exp()
        aspect_V = self._uniform(count, math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])).exp()
        side_V = (area_V * size_V2.prod(dim=1)).sqrt()
        extent_V2 = torch.stack([side_V * aspect_V.sqrt(), side_V / aspect_V.sqrt()], dim=1)
        extent_V2 = extent_V2.minimum(size_V2)
        corner_V2 = torch.rand(count, 2, generator=self._generator) * (size_V2 - extent_V2)
        is_flipped_V = torch.rand(count, generator=self._generator) < 0.5
        return ViewPlan(
            photo_V, torch.cat([corner_V2, corner_V2 + extent_V2], dim=1), is_flipped_V, side
        )

    def render(self, plan: ViewPlan) -> Views:
        """Cut and resample the planned boxes."""
        pixels_VSS3 = np.empty((len(plan.photo_V), plan.side, plan.side, 3), dtype=np.uint8)
        boxes: list[list[float]] = plan.box_V4.tolist()
        flips: list[bool] = plan.is_flipped_V.tolist()
        for row, (photo, (left, top, right, bottom), is_flipped) in enumerate(
            zip(plan.photo_V, boxes, flips, strict=True)
        ):
            image = self._photos[photo]
            box = (left, top, min(right, image.width), min(bottom, image.height))
            view_SS3 = np.asarray(
                image.resize((plan.side, plan.side), Image.Resampling.BILINEAR, box=box)
            )
            pixels_VSS3[row] = view_SS3[:, ::-1] if is_flipped else view_SS3
        return Views(torch.from_numpy(pixels_VSS3).permute(0, 3, 1, 2), plan)

    def prefetch(self, num_photos: int, side: int) -> Future[Views]:
        """Draw now, render in a worker thread."""
        return self._pool.submit(self.render, self.draw(num_photos, side))


def jitter_and_normalise(pixels_V3SS: Tensor, generator: torch.Generator) -> Tensor:
    """Random colour change per view, and normalisation, as one affine map of RGB each.

    Colour is a strong cue for small models, so the change is mild: brightness and contrast within
    30 %, saturation within 40 %, hue within 18 degrees, one view in ten grey.
    """
    count = pixels_V3SS.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    brightness_V, contrast_V = uniform(0.7, 1.3), uniform(0.7, 1.3)
    saturation_V = torch.where(uniform(0, 1) < 0.1, torch.zeros(count), uniform(0.6, 1.4))
    hue_V = uniform(-math.pi / 10, math.pi / 10)

    chroma_V33 = torch.zeros(count, 3, 3)
    chroma_V33[:, 0, 0] = 1.0
    chroma_V33[:, 1, 1] = chroma_V33[:, 2, 2] = saturation_V * hue_V.cos()
    chroma_V33[:, 2, 1] = saturation_V * hue_V.sin()
    chroma_V33[:, 1, 2] = -chroma_V33[:, 2, 1]
    colour_V33 = _YIQ_TO_RGB @ chroma_V33 @ _RGB_TO_YIQ * (brightness_V * contrast_V)[:, None, None]

    flat_V3P = pixels_V3SS.reshape(count, 3, -1).float().div_(255.0)
    grey_V = (flat_V3P.mean(dim=2) @ _LUMA) * brightness_V
    offset_V31 = (grey_V * (1.0 - contrast_V))[:, None, None]
    changed_V3P = torch.baddbmm(offset_V31, colour_V33, flat_V3P).clamp_(0.0, 1.0)
    return changed_V3P.sub_(PIXEL_MEAN).div_(PIXEL_STD).view(pixels_V3SS.shape)


NOWHERE = 1e9  # pixels; no place of the other view is near


def border_some(
    pixels_V3SS: Tensor,
    centre_VN2: Tensor,
    *,
    share: float,
    patch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Noise instead of the outermost patches of a share of views, as in a register border.

    A backbone that never saw noise around an image is disturbed by it, whatever the adapter learns.

    Args:
        pixels_V3SS: Normalised.
        centre_VN2: See `patch_centres`.
        share: Of views, 0 to 1.

    Returns:
        What the encoder sees, and the centres: a patch of noise is nowhere.
    """
    if share == 0:
        return pixels_V3SS, centre_VN2
    count, _, side, _ = pixels_V3SS.shape
    is_inner_SS = torch.zeros(side, side, dtype=torch.bool)
    is_inner_SS[patch_size:-patch_size, patch_size:-patch_size] = True
    is_bordered_V = torch.rand(count, generator=generator) < share
    noise_V3SS = torch.randn(pixels_V3SS.shape, generator=generator)
    is_noise_V1SS = is_bordered_V[:, None, None, None] & ~is_inner_SS
    is_noise_VN1 = is_noise_V1SS[:, :, ::patch_size, ::patch_size].flatten(2).transpose(1, 2)
    sign_V11 = torch.ones(count, 1, 1)
    sign_V11[count // 2 :] = -1  # the two views of a photograph: on opposite sides of it
    return (
        torch.where(is_noise_V1SS, noise_V3SS, pixels_V3SS),
        torch.where(is_noise_VN1, sign_V11 * NOWHERE, centre_VN2),
    )


def patch_centres(plan: ViewPlan, patch_size: int) -> tuple[Tensor, Tensor]:
    """Where each patch of each view lies in its photograph.

    Returns:
        `centre_VN2` (x, y) and `patch_side_V` (geometric mean of width and height), in pixels of
        the photograph.
    """
    grid = plan.side // patch_size
    step_G = (torch.arange(grid) + 0.5) / grid
    x_VG = torch.where(plan.is_flipped_V[:, None], 1.0 - step_G, step_G)
    y_VG = step_G.expand_as(x_VG)
    unit_VN2 = torch.stack(
        [x_VG[:, None, :].expand(-1, grid, -1), y_VG[:, :, None].expand(-1, -1, grid)], dim=-1
    ).flatten(1, 2)
    extent_V2 = plan.box_V4[:, 2:] - plan.box_V4[:, :2]
    centre_VN2 = plan.box_V4[:, None, :2] + unit_VN2 * extent_V2[:, None, :]
    return centre_VN2, extent_V2.prod(dim=1).sqrt() / grid
