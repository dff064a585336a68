"""What weights are, and where they came from."""

import hashlib
from collections.abc import Mapping

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor


class Origin(BaseModel):
    """The checkpoint that a backbone was loaded from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    """Hub id, or name of the file or folder."""
    layout: str
    """Whose key names it had."""
    dtype: str
    """What the weights were loaded in."""
    digest: str
    """SHA-256 of the weights as loaded, see `weights_digest`."""


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of tensors, whatever file they came from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
