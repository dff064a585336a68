"""Features that travel inside of the page, so that a reader can ask for any patch's cosines.

Tokens are projected to the directions that hold most of them and stored in eight bits per number.
What is lost of a cosine is about a hundredth, less than an eye sees in a map's colours.

Dimension key: N = tokens of an image, C = channels, D = directions kept.
"""

import base64
import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.report.measure import Measured
from trainer.report.pictures import SCALE

_BUDGET = 1_000_000
"""Bytes of all features together, before base64 makes them a third larger."""
_MOST = 64
_FEWEST = 8


class Quantised(NamedTuple):
    """`values_ND` times `scales_D` are coordinates whose products approximate cosines."""

    values_ND: Tensor  # int8
    scales_D: Tensor  # float32

    def cosines(self, place: int) -> Tensor:
        """Cosines of the token at `place` with all, as the page's script computes them."""
        scaled_ND = self.values_ND.float() * self.scales_D
        cosines_N = scaled_ND @ scaled_ND[place]
        cosines_N[place] = 1
        return cosines_N


def quantise(unit_NC: Tensor, num_directions: int) -> Quantised:
    """Tokens of unit norm as int8 coordinates in their own most important directions."""
    count = min(num_directions, *unit_NC.shape)
    # Not centred: products of the coordinates have to be cosines of the tokens.
    _, _, directions_XC = torch.linalg.svd(unit_NC.double(), full_matrices=False)
    kept_ND = unit_NC.double() @ directions_XC[:count].T
    scales_D = kept_ND.abs().amax(dim=0).clamp(min=1e-12) / 127
    return Quantised((kept_ND / scales_D).round().to(torch.int8), scales_D.float())


def num_directions(measured: Measured) -> int:
    """As many as fit into the page's budget, the same for every image."""
    tokens = sum(len(one.views) * one.grid[0] * one.grid[1] for one in measured.shown)
    return max(_FEWEST, min(_MOST, _BUDGET // tokens))


def to_json(grid: tuple[int, int], views: Mapping[str, Quantised], default: tuple[int, int]) -> str:
    """What the page's script reads of one image, safe inside of a script element."""
    content = {
        "grid": grid,
        "default": default,
        "colors": SCALE,
        "views": {
            title: {
                "scales": [float(f"{scale:.5g}") for scale in one.scales_D.tolist()],
                "values": base64.b64encode(one.values_ND.contiguous().numpy().tobytes()).decode(),
            }
            for title, one in views.items()
        },
    }
    return json.dumps(content).replace("<", "\\u003c")
