"""Embeddings of class names: the mean over prompt templates, kept on disk.

What a file is of is in its name: the tower's key and the token numbers of all prompts, so that
another tokenizer, template or spelling has another file, and data sets share what they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from trainer.evaluate.files import replace_file
from trainer.evaluate.progress import SILENT, Progress
from trainer.evaluate.zeroshot.errors import ZeroshotError
from trainer.evaluate.zeroshot.text import TextTower


class ClassEmbeddings:
    """Embeddings by one text tower and one list of templates.

    Args:
        tower: Embeds.
        templates: Sentences with `{}` for the name.
        folder: Where embeddings are kept; None: nowhere but in memory.
    """

    def __init__(
        self, tower: TextTower, templates: Sequence[str], folder: Path | None = None
    ) -> None:
        self._tower, self._templates, self._folder = tower, tuple(templates), folder
        self._known: dict[str, Tensor] = {}

    def embed(self, names: Sequence[str], *, progress: Progress = SILENT) -> Tensor:
        """Unit vectors `[names, P]`, float32: of each the mean over its sentences, made unit.

        Raises:
            ZeroshotError: the folder cannot be written.
        """
        missing = [name for name in dict.fromkeys(names) if name not in self._known]
        with progress.stage("embed class names", len(missing)) as advance:
            for name in missing:
                self._known[name] = self._embedding(name)
                advance(1)
        return torch.stack([self._known[name] for name in names])

    def _embedding(self, name: str) -> Tensor:
        tokens = self._tower.tokenize([template.format(name) for template in self._templates])
        path = None
        if self._folder is not None:
            digest = hashlib.sha256(self._tower.key.encode())
            digest.update(f"{list(tokens.shape)}".encode())
            digest.update(tokens.numpy().tobytes())
            path = self._folder / f"{digest.hexdigest()}.safetensors"
            found = _read(path)
            if found is not None and found.shape == (self._tower.dim,):
                return found
        mean_P = self._tower.embed_tokens(tokens).mean(dim=0)
        embedding_P = F.normalize(mean_P, dim=0)
        if path is not None:
            _write(path, embedding_P)
        return embedding_P


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path).get("embedding")
    except (OSError, SafetensorError):
        return None  # not there, or cut short: it is computed


def _write(path: Path, embedding_P: Tensor) -> None:
    try:
        replace_file(path, save({"embedding": embedding_P}))
    except OSError as error:
        raise ZeroshotError(
            f"text embeddings cannot be written to {path.parent} ({error.strerror}); give another "
            "folder by --text-cache DIR, or --text-cache none"
        ) from error
