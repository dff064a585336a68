"""View consistency: whether a token says what is at its place, wherever the place is in a crop.

Two overlapping crops of one image show some places both. A token that describes its place is the
same in both views and unlike the tokens of other places, so it is found again; one that holds a
fixed pattern, the scene, or its position in the crop is not. Two measures, higher is better:

* margin: mean cosine of tokens that show the same place, minus the mean cosine of all other pairs
  of these tokens; 0 where a place makes no difference, 1 at most where other pairs have cosine 0;
* retrieval: the share of tokens whose best match among all tokens of the other view is at their
  own place, within one patch; chance is about 9 / N.

Crops are of two kinds. `shift`: both are windows of the size that the backbone is measured at, a
quarter of it apart, in whole patches, so that patches of the same place have the same pixels.
`zoom`: the middle of a window, three quarters as wide, enlarged to the window's size.

Dimension key: B = images, N = tokens of a view, M = matched tokens, C = channels, S = side of a
view and L of the picture it is cut from, in pixels.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from backbone.preprocess import resize_image

Kind = Literal["shift", "zoom"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_SHIFT = 4  # windows lie a quarter of their side apart
_ZOOM = 4  # an eighth on each side is cut off


class View(NamedTuple):
    """A square window of a picture, in its pixels."""

    top: float
    left: float
    side: float


class Agreement(NamedTuple):
    """Of one image: see above; the margin is a difference of cosines, retrieval a share."""

    margin: float
    retrieval: float


def shift_of(grid_side: int) -> int:
    """Patches between two windows of `grid_side` patches, one at least."""
    return max(1, grid_side // _SHIFT)


def picture_side(size: int, patch_size: int) -> int:
    """Side L of the pictures that windows of `size` pixels are cut from."""
    return size + shift_of(size // patch_size) * patch_size


def views_of(number: int, kind: Kind, *, size: int, patch_size: int) -> tuple[View, View]:
    """Two windows of a picture; which corners they are in follows from the picture's number."""
    far = shift_of(size // patch_size) * patch_size
    corners = [((0, 0), (far, far)), ((0, far), (far, 0)), ((0, 0), (0, far)), ((0, 0), (far, 0))]
    first, second = (View(*corner, size) for corner in corners[number % len(corners)])
    if kind == "shift":
        return first, second
    margin = size / (2 * _ZOOM)
    return first, View(first.top + margin, first.left + margin, size - 2 * margin)


def cut(picture_3LL: Tensor, view: View, size: int) -> Tensor:
    """The pixels of a view, uint8 [3, size, size]."""
    top, left, bottom, right = (
        round(edge) for edge in (view.top, view.left, view.top + view.side, view.left + view.side)
    )
    return resize_image(picture_3LL[:, top:bottom, left:right], (size, size)).contiguous()


def matches(view: View, other: View, grid_side: int) -> tuple[Tensor, Tensor]:
    """Tokens of a view whose middle the other shows too, and the tokens that it is in there.

    Returns:
        Token numbers in raster order, int64 [M] each.
    """
    middles = (torch.arange(grid_side, dtype=torch.float64) + 0.5) / grid_side

    def along(start: float, other_start: float) -> Tensor:
        places = (start + middles * view.side - other_start) / other.side * grid_side
        return places.floor().long()

    rows, columns = along(view.top, other.top), along(view.left, other.left)
    is_row, is_column = ((p >= 0) & (p < grid_side) for p in (rows, columns))
    here = (is_row[:, None] & is_column).flatten().nonzero().flatten()
    there = (rows[:, None] * grid_side + columns).flatten()[here]
    return here, there


def agreement(
    tokens_NC: Tensor, other_NC: Tensor, here_M: Tensor, there_M: Tensor, *, grid_side: int
) -> Agreement:
    """How far the tokens of two views of one image agree.

    Args:
        tokens_NC, other_NC: Tokens of the views; their length does not count.
        here_M, there_M: Of `matches`: which of them show the same place.
        grid_side: Tokens of a view are a square of this side, 2 at least.
    """
    unit_MC = F.normalize(tokens_NC[here_M].float(), dim=-1)
    cosines_MN = unit_MC @ F.normalize(other_NC.float(), dim=-1).T
    num_matched, num_tokens = cosines_MN.shape
    matched_M = cosines_MN.take_along_dim(there_M[:, None], dim=1).double()
    same = matched_M.mean()
    others = (cosines_MN.double().sum() - matched_M.sum()) / (num_matched * (num_tokens - 1))
    best_M = cosines_MN.argmax(dim=1)
    rows_M = (best_M // grid_side - there_M // grid_side).abs()
    columns_M = (best_M % grid_side - there_M % grid_side).abs()
    is_found_M = (rows_M <= 1) & (columns_M <= 1)
    return Agreement(float(same - others), float(is_found_M.double().mean()))


def view_consistency(
    encode: Callable[[Tensor], Tensor],
    pictures_BLL: Tensor,
    *,
    size: int,
    patch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[Kind, list[Agreement]]:
    """Agreement of the views of each picture; three forwards a picture.

    Args:
        encode: uint8 [B, 3, size, size] to tokens [B, N, C].
        pictures_BLL: uint8 [B, 3, L, L], L = `picture_side`.
        size: Side of a view in pixels, two patches at least.
        patch_size: In pixels.
        advance: Told about every picture that is done.
    """
    grid_side = size // patch_size
    found: dict[Kind, list[Agreement]] = {kind: [] for kind in KINDS}
    for number, picture_3LL in enumerate(pictures_BLL):
        tokens: dict[View, Tensor] = {}
        for kind in KINDS:
            pair = views_of(number, kind, size=size, patch_size=patch_size)
            for view in pair:
                if view not in tokens:
                    tokens[view] = encode(cut(picture_3LL, view, size)[None])[0]
            both = [
                agreement(tokens[a], tokens[b], *matches(a, b, grid_side), grid_side=grid_side)
                for a, b in (pair, pair[::-1])
            ]
            found[kind].append(Agreement(*(sum(two) / 2 for two in zip(*both, strict=True))))
        advance(1)
    return found
