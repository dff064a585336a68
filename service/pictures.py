"""Principal components of an image's features, and the picture that they make.

Dimension key: h, w = patch grid, V = vectors, C = channels, k = principal components.
"""

import io
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from service.errors import FeatureOverflowError

# Shares of the values that are cut off on either side: one odd patch must not darken the rest.
_CLIPPED = 0.01
_MIN_SIDE = 448


class Components(NamedTuple):
    """The first principal components of some vectors."""

    scores_Vk: Tensor  # (vectors - mean) @ basis.T
    basis_kC: Tensor  # orthonormal, the largest entry of each positive
    mean_C: Tensor


def principal_components(vectors_VC: Tensor, num_components: int) -> Components:
    """The first `num_components` principal components, largest variance first.

    Args:
        vectors_VC: float32, finite.
        num_components: At most min(V, C).
    """
    assert num_components <= min(vectors_VC.shape)
    mean_C = vectors_VC.mean(dim=0)
    centred_VC = (vectors_VC - mean_C).double()
    # The smaller of the two products has the same variances.
    if vectors_VC.shape[0] >= vectors_VC.shape[1]:
        _, vectors_CC = torch.linalg.eigh(centred_VC.T @ centred_VC)
        basis_kC = vectors_CC.flip(1)[:, :num_components].T
    else:
        _, vectors_VV = torch.linalg.eigh(centred_VC @ centred_VC.T)
        directions_kC = vectors_VV.flip(1)[:, :num_components].T @ centred_VC
        # Not divided by their lengths: without variance these are rounding, which repeats others.
        basis_kC = torch.linalg.qr(directions_kC.T).Q.T
    largest_k1 = basis_kC.abs().argmax(dim=-1, keepdim=True)
    basis_kC = basis_kC * torch.where(basis_kC.gather(1, largest_k1) < 0, -1.0, 1.0)
    scores_Vk = centred_VC @ basis_kC.T
    return Components(scores_Vk.float(), basis_kC.float().contiguous(), mean_C)


def pca_picture(vectors_VC: Tensor, grid: tuple[int, int]) -> bytes:
    """A PNG of the first three principal components as red, green and blue, one square a patch.

    Raises:
        FeatureOverflowError: a value is not finite.
    """
    if not bool(torch.isfinite(vectors_VC).all()):
        raise FeatureOverflowError(
            "features of image 0 are not finite, so they make no picture; check the weights",
            index=0,
        )
    h, w = grid
    num_components = min(3, *vectors_VC.shape)
    scores_Vk = principal_components(vectors_VC.float(), num_components).scores_Vk
    low_k, high_k = torch.quantile(
        scores_Vk, torch.tensor([_CLIPPED, 1 - _CLIPPED]), dim=0
    ).unbind()
    shares_Vk = ((scores_Vk - low_k) / (high_k - low_k).clamp_min(1e-12)).clamp(0, 1)
    rgb_V3 = torch.zeros(h * w, 3)
    rgb_V3[:, :num_components] = shares_Vk
    pixels_hw3 = (rgb_V3.reshape(h, w, 3) * 255).round().to(torch.uint8)
    factor = max(1, -(-_MIN_SIDE // max(h, w)))
    picture = Image.fromarray(pixels_hw3.numpy())
    large = picture.resize((w * factor, h * factor), Image.Resampling.NEAREST)
    file = io.BytesIO()
    large.save(file, "PNG")
    return file.getvalue()
