"""A backbone whose dense tokens are embeddings of the space that text is in."""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

from backbone.value_path import ValuePath, check_value_path, encode_value_path
from trainer.evaluate.subjects import LocalSubject
from trainer.evaluate.zeroshot.heads import VisualHead, embed_tokens
from trainer.evaluate.zeroshot.tokens import Family


def default_path(family: Family) -> ValuePath:
    """Which value path a family's last block has.

    CLIP and EVA-CLIP pool in the last block, by its class token's attention. SigLIP pools behind
    it, so that its value path is the pooling's alone and the block stays as it is.
    """
    return "attention" if family == "clip" else "none"


class AlignedSubject:
    """A subject as evaluations take it; `encode` gives unit embeddings `[B, N, P]`.

    Args:
        subject: The backbone.
        head: Its projection.
        path: Through the last block, see `backbone.value_path`.
        register_width: Border in patches; default the artifact's rule.

    Raises:
        ModelError: the backbone has no such value path.
    """

    def __init__(
        self,
        subject: LocalSubject,
        head: VisualHead,
        path: ValuePath,
        *,
        register_width: int | None = None,
    ) -> None:
        backbone = subject.encoder.backbone
        if path != "none":
            check_value_path(backbone.vit, backbone.name)
        self._encoder, self._head, self._path = subject.encoder, head, path
        self._register_width = register_width if subject.encoder.border else None
        self.name = subject.name
        self.spec = subject.spec
        self.digest = subject.digest
        self.patch_size = subject.patch_size
        self.native_size = subject.native_size
        parts = [subject.key, head.digest, path, str(self._register_width)]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Unit embeddings of uint8 images of whole patches: float32 `[B, N, P]` on the CPU."""
        features = encode_value_path(
            self._encoder, images_B3HW, path=self._path, register_width=self._register_width
        )
        embedded = embed_tokens(self._head, features.tokens)
        return embedded.to("cpu", torch.float32, copy=True).clone()
