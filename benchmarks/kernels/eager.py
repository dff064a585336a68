"""What one would write without the kernels: the same results by library calls alone.

Dimension key: that of the operation in `kernels`.
"""

import logging
from collections.abc import Callable, Mapping

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels import TokenWindow

logger = logging.getLogger("benchmarks.kernels")

SDPA_BACKENDS: Mapping[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def roi_align(
    tokens_BTC: Tensor, rois_BK4: Tensor, window: TokenWindow, output_size: tuple[int, int]
) -> Tensor:
    """torchvision's, with the permutes and the float32 copy that it needs.

    Its boxes are in tokens, not normalised.
    """
    (h, w), extra = window.grid, 2 * window.border
    canvas = tokens_BTC[:, window.prefix :].reshape(len(tokens_BTC), h + extra, w + extra, -1)
    maps_BChw = canvas[:, window.border :, window.border :][:, :h, :w].permute(0, 3, 1, 2)
    wide = maps_BChw if maps_BChw.dtype == torch.float64 else maps_BChw.float()
    rois = torchvision.ops.roi_align(
        wide.contiguous(), list(rois_BK4.to(wide.dtype)), output_size, aligned=True
    )
    result: Tensor = rois.flatten(2).mT.to(tokens_BTC.dtype)
    return result


def attention_inflow(q_BHND: Tensor, k_BHND: Tensor) -> Tensor:
    """From the attention maps, in the number format of the queries."""
    scores = q_BHND @ k_BHND.mT * q_BHND.shape[-1] ** -0.5
    inflow_BN: Tensor = scores.softmax(dim=-1).sum(dim=-2, dtype=_wide(q_BHND)).mean(dim=1)
    return inflow_BN


def release_inflow(q_BHND: Tensor, k_BHND: Tensor) -> Tensor:
    """The `release` variant from its maps: heads joined, unit norm, no scale."""
    q_BNC, k_BNC = (
        F.normalize(x.transpose(1, 2).flatten(2).to(_wide(x)), dim=-1).to(x.dtype)
        for x in (q_BHND, k_BHND)
    )
    return (q_BNC @ k_BNC.mT).softmax(dim=-1).sum(dim=-2, dtype=_wide(q_BHND))


def max_similarity(queries_BNC: Tensor, keys_BMC: Tensor) -> tuple[Tensor, Tensor]:
    """Through the table of all products."""
    values, indices = (queries_BNC @ keys_BMC.mT).max(dim=-1)
    return values, indices


def logsumexp_mean(
    rows_BNC: Tensor, columns_BMC: Tensor, *, temperature: float, threshold: float
) -> Tensor:
    """Mean logsumexp of the similarities; those below the threshold pass no gradient."""
    similarity_BNM = rows_BNC @ columns_BMC.mT
    floored = torch.where(similarity_BNM < threshold, similarity_BNM.detach(), similarity_BNM)
    return (floored / temperature).logsumexp(dim=-1).mean()


def attention(q: Tensor, k: Tensor, v: Tensor, window: TokenWindow) -> Tensor:
    """All queries, packed, as a block of timm computes them; the wanted ones are cut out after."""
    out_BTHD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
    return _wanted(out_BTHD, window, axis=1)


def windowed_attention(
    q: Tensor, k: Tensor, v: Tensor, window: TokenWindow, backend: SDPBackend | None = None
) -> Tensor:
    """The wanted queries cut out first, then SDPA (with one backend, or torch's choice)."""
    wanted = _wanted(q, window, axis=2)
    if backend is None:
        return F.scaled_dot_product_attention(wanted, k, v).transpose(1, 2).contiguous()
    with sdpa_kernel([backend]):
        return F.scaled_dot_product_attention(wanted, k, v).transpose(1, 2).contiguous()


def _wanted(tokens: Tensor, window: TokenWindow, *, axis: int) -> Tensor:
    """Prefix and image tokens, by slices; without a border the tokens themselves."""
    if window.border == 0:
        return tokens
    (h, w), border = window.grid, window.border
    prefix = tokens.narrow(axis, 0, window.prefix)
    canvas = tokens.narrow(axis, window.prefix, tokens.shape[axis] - window.prefix)
    size = (*canvas.shape[:axis], h + 2 * border, w + 2 * border, *canvas.shape[axis + 1 :])
    image = canvas.reshape(size).narrow(axis, border, h).narrow(axis + 1, border, w)
    return torch.cat([prefix, image.flatten(axis, axis + 1)], dim=axis)


def supported(name: str, run: Callable[[], object]) -> bool:
    """Whether a contender can do the shape at all: not every SDPA backend has every head dim."""
    try:
        run()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logger.info("%s does not take part: %s", name, str(error).splitlines()[0])
        return False
    return True


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
