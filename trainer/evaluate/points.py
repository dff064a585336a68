"""Dense features at labelled pixels: what linear probes are trained on.

A linear layer and bilinear upsampling commute, so the logits that a pixel gets are the linear layer
of the tokens interpolated there. A probe therefore needs no logit map to learn from: each image
gives a few thousand of its labelled pixels, drawn once, and each step takes some of them.

Dimension key: P = points, C = channels, h, w = token grid, H, W = pixels, T = tokens of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.errors import RefineryError

NormalizationKind = Literal["batch", "whitening"]

MAX_HELD_BYTES = 4 * 2**30
NEAR_ZERO = 1e-6  # share of the total variance
BATCH_NORM_EPSILON = 1e-5  # torch's; here a share of the mean variance


class ProbeError(RefineryError):
    """Features and labels that no probe can be trained on or scored by."""


def check_part(grids: Sequence[Tensor], targets: Sequence[Tensor], part: str) -> int:
    """The number of channels of a part's grids.

    Raises:
        ProbeError: A grid is not `[h, w, C]` and finite, or channels or counts differ.
    """
    if not len(grids):
        raise ProbeError(f"the {part} part has no images")
    if len(grids) != len(targets):
        raise ProbeError(
            f"the {part} part has {len(grids)} feature grids but {len(targets)} labels"
        )
    num_channels = grids[0].shape[-1]
    for index, grid in enumerate(grids):
        if grid.ndim != 3 or not grid.numel() or grid.shape[-1] != num_channels:
            raise ProbeError(
                f"feature grid {index} of the {part} part is {list(grid.shape)}; every grid must "
                f"be [h, w, C] with one C, here {num_channels}"
            )
        if not torch.isfinite(grid).all():
            raise ProbeError(
                f"feature grid {index} of the {part} part is not finite (NaN or infinite); encode "
                "with --precision fp32, or look at the weights"
            )
    return num_channels


def check_parts(
    train_grids: Sequence[Tensor],
    train_targets: Sequence[Tensor],
    val_grids: Sequence[Tensor],
    val_targets: Sequence[Tensor],
) -> None:
    """
    Raises:
        ProbeError: See `check_part`; or the parts have other channels.
    """
    train_channels = check_part(train_grids, train_targets, "train")
    val_channels = check_part(val_grids, val_targets, "val")
    if train_channels != val_channels:
        raise ProbeError(
            f"train features have {train_channels} channels, val features {val_channels}"
        )


def held(tensors: Sequence[Tensor], device: torch.device | str) -> Sequence[Tensor]:
    """The tensors in memory, if they fit: what is read from disk is read in every step else."""
    if len(tensors) and tensors[0].nbytes * len(tensors) > MAX_HELD_BYTES:
        return tensors
    return [tensor.to(device) for tensor in tensors]


@dataclass(frozen=True)
class Normalization:
    """An affine map of features, the same for every image: `(x - mean) * scale`.

    Batch normalisation in training has the statistics of each batch, and keeps running averages of
    them for scoring. Features are frozen here, so what these averages tend to is known beforehand:
    the statistics of the whole training part, and they serve in training too. There is no learned
    scale and shift: the linear layer that follows can express both.
    """

    mean_C: Tensor
    # Per channel, or a matrix that mixes channels.
    scale: Tensor

    @classmethod
    def fit(cls, grids: Sequence[Tensor], kind: NormalizationKind) -> Normalization:
        """Statistics of all tokens of all grids.

        `batch` gives every channel mean 0 and variance 1. `whitening` makes channels uncorrelated
        too: a linear layer can express the same by both, but where channels are correlated it gets
        there in fewer steps. A ViT-Ti/16 on CamVid had 38.4, 41.8, 43.0, 43.9 and 43.6 % mIoU after
        300, 1,000, 3,000, 5,000 and 10,000 steps by `batch`, and 42.7 and 43.5 % after 1,000 and
        3,000 by `whitening`.
        """
        # Sums of squares of what is far from zero lose the variance in float32.
        shift_C = grids[0].float().flatten(0, 1).mean(dim=0)
        num_channels = len(shift_C)
        shape = (num_channels, num_channels) if kind == "whitening" else (num_channels,)
        total_C = torch.zeros(num_channels, dtype=torch.float64)
        second = torch.zeros(shape, dtype=torch.float64)
        count = 0
        for grid in grids:
            flat_NC = grid.float().flatten(0, 1) - shift_C.to(grid.device)
            total_C += flat_NC.sum(dim=0).cpu()
            squares = flat_NC.T @ flat_NC if kind == "whitening" else flat_NC.square().sum(dim=0)
            second += squares.cpu()
            count += len(flat_NC)
        mean_C = total_C / count
        mean_of_all_C = (mean_C + shift_C.cpu().double()).float()
        if kind == "batch":
            variance_C = (second / count - mean_C.square()).clamp(min=0)
            # Not torch's own 1e-5: the scale of features must not change the score.
            floor = BATCH_NORM_EPSILON * variance_C.mean() + NEAR_ZERO**2
            return cls(mean_of_all_C, (variance_C + floor).rsqrt().float())
        eigen = torch.linalg.eigh(second / count - mean_C.outer(mean_C))
        # Directions without variance, as of a constant channel, must not become noise.
        floor = NEAR_ZERO * eigen.eigenvalues.sum() + NEAR_ZERO**2
        matrix_CC = eigen.eigenvectors / (eigen.eigenvalues.clamp(min=0) + floor).sqrt()
        return cls(mean_of_all_C, matrix_CC.float())

    def to(self, device: torch.device | str) -> Normalization:
        return Normalization(self.mean_C.to(device), self.scale.to(device))

    def __call__(self, features_XC: Tensor) -> Tensor:
        centred_XC = features_XC.float() - self.mean_C
        return centred_XC @ self.scale if self.scale.ndim == 2 else centred_XC * self.scale


class Points(NamedTuple):
    """Labelled pixels of one image.

    Attributes:
        position_P: `row * W + column`, int32.
        target_P: What the label holds there, in its own dtype.
        size: (H, W) of the label.
        share: 0 to 1: how many of a step's points per image this image gives.
    """

    position_P: Tensor
    target_P: Tensor
    size: tuple[int, int]
    share: float


def draw_points(
    target_HW: Tensor,
    is_known_HW: Tensor,
    generator: torch.Generator,
    *,
    most: int,
    weigh: bool = False,
) -> Points:
    """Known pixels of a label, drawn at random.

    Args:
        target_HW: Label map.
        is_known_HW: Which pixels may be drawn, bool.
        generator: Of the draw.
        most: Points, if every pixel is known.
        weigh: Draw in proportion to the share of pixels that are known, so that a batch weighs
            pixels as the mean over all of them would. Else sparse labels weigh as dense ones.
    """
    known_X = is_known_HW.flatten().nonzero()[:, 0]
    share = len(known_X) / target_HW.numel() if weigh else 1.0
    wanted = math.ceil(share * most)
    if len(known_X) > wanted:
        # With replacement among many is nearly without, and needs no permutation of them all.
        known_X = known_X[torch.randint(len(known_X), (wanted,), generator=generator)]
    height, width = target_HW.shape
    return Points(known_X.int(), target_HW.flatten()[known_X], (height, width), share)


def corners(
    position_P: Tensor, size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The four tokens that bilinear upsampling reads at each pixel, and their weights.

    As `F.interpolate(mode="bilinear", align_corners=False)` from `grid` to `size`.

    Returns:
        Token numbers in raster order, int64 `[P, 4]`, and weights, float32 `[P, 4]`.
    """
    position_P = position_P.long()
    low, high, weight = zip(
        *(
            _along(coordinate_P, pixels, tokens)
            for coordinate_P, pixels, tokens in (
                (position_P // size[1], size[0], grid[0]),
                (position_P % size[1], size[1], grid[1]),
            )
        ),
        strict=True,
    )
    rows, columns = (low[0], high[0]), (low[1], high[1])
    index_P4 = torch.stack([row * grid[1] + column for row in rows for column in columns], dim=1)
    shares = ((1 - weight[0], weight[0]), (1 - weight[1], weight[1]))
    weight_P4 = torch.stack([y * x for y in shares[0] for x in shares[1]], dim=1)
    return index_P4, weight_P4


def _along(coordinate_P: Tensor, pixels: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    source_P = ((coordinate_P + 0.5) * (tokens / pixels) - 0.5).clamp(min=0)
    low_P = source_P.long().clamp(max=tokens - 1)
    return low_P, (low_P + 1).clamp(max=tokens - 1), (source_P - low_P).clamp(max=1)


def features_at(grids: Sequence[Tensor], points: Sequence[Points], device: torch.device) -> Tensor:
    """Features interpolated at the points of each image, in order; float32 `[P, C]`."""
    index, weight, start = [], [], 0
    for grid_hwC, of_image in zip(grids, points, strict=True):
        index_P4, weight_P4 = corners(
            of_image.position_P, of_image.size, (grid_hwC.shape[0], grid_hwC.shape[1])
        )
        index.append(index_P4 + start)
        weight.append(weight_P4)
        start += grid_hwC.shape[0] * grid_hwC.shape[1]
    table_TC = torch.cat([grid_hwC.flatten(0, 1) for grid_hwC in grids]).to(device).float()
    return F.embedding_bag(
        torch.cat(index).to(device),
        table_TC,
        per_sample_weights=torch.cat(weight).to(device),
        mode="sum",
    )


class PointBatches:
    """Random points of random images, step after step; no image twice in a round of all.

    Args:
        grids: Features `[h, w, C]` of each image.
        points: Of each image; images without any are left out.
        batch_size: Images per step.
        points_per_image: At most, of an image whose points are all there.
        generator: Of the order of images and of points; on the CPU.
        device: Where features are given.
    """

    def __init__(
        self,
        grids: Sequence[Tensor],
        points: Sequence[Points],
        *,
        batch_size: int,
        points_per_image: int,
        generator: torch.Generator,
        device: torch.device,
    ) -> None:
        self._grids, self._points = grids, points
        self._used = [index for index, some in enumerate(points) if len(some.position_P)]
        self._batch_size = min(batch_size, len(self._used))
        self._points_per_image = points_per_image
        self._generator, self._device = generator, device
        self._order: list[int] = []

    def draw(self) -> tuple[Tensor, Tensor]:
        """Features `[P, C]`, float32, and targets `[P]` of the next step."""
        if len(self._order) < self._batch_size:
            order = torch.randperm(len(self._used), generator=self._generator).tolist()
            self._order = [self._used[position] for position in order]
        batch, self._order = self._order[: self._batch_size], self._order[self._batch_size :]
        chosen = [self._some(self._points[index]) for index in batch]
        features_PC = features_at([self._grids[index] for index in batch], chosen, self._device)
        return features_PC, torch.cat([some.target_P for some in chosen]).to(self._device)

    def _some(self, points: Points) -> Points:
        count = max(1, round(points.share * self._points_per_image))
        picked = torch.randint(len(points.position_P), (count,), generator=self._generator)
        return points._replace(
            position_P=points.position_P[picked], target_P=points.target_P[picked]
        )
