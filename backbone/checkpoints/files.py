"""Reading checkpoints: one file, or shards with an index; safetensors or PyTorch's own format.

    checkpoint = open_checkpoint(Path("EVA-CLIP-8B-448"))
    for shard in checkpoint.shards:
        with shard.open() as tensors:
            tensors["vision_model.post_layernorm.weight"]

A file is mapped while it is open and let go afterwards, so that a checkpoint never costs more
memory than one of its files. Pickles are read with `weights_only=True`: they can hold tensors, and
run no code.
"""

import contextlib
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbone.errors import ModelError, ModelNotFoundError

logger = logging.getLogger(__name__)

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
# What training codes wrap their weights in.
_WRAPPERS = ("state_dict", "model", "module")


@dataclass(frozen=True)
class Shard:
    """One file, and the keys that are to be read from it."""

    path: Path
    keys: tuple[str, ...]

    @contextlib.contextmanager
    def open(self) -> Iterator[Mapping[str, Tensor]]:
        """Its tensors by key, valid inside the `with`; each is read when it is asked for.

        Raises:
            ModelError: the file is missing or damaged, or lacks a key that the index names.
        """
        if not self.path.is_file():
            raise ModelError(
                f"{self.path} is named by the checkpoint's index and is not there; "
                "download the checkpoint again"
            )
        with _opened(self.path) as tensors:
            absent = [key for key in self.keys if key not in tensors]
            if absent:
                raise ModelError(
                    f"{self.path} has no {absent[0]} ({len(absent)} keys are missing), which the "
                    "checkpoint's index says it has; download the checkpoint again"
                )
            yield tensors


@dataclass(frozen=True)
class Checkpoint:
    """Files with weights. `name` is what errors and records call it."""

    name: str
    shards: tuple[Shard, ...]

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(key for shard in self.shards for key in shard.keys)

    def file_of(self, key: str) -> Path:
        return next(shard.path for shard in self.shards if key in shard.keys)


def open_checkpoint(path: Path, *, name: str | None = None) -> Checkpoint:
    """What is in a file, or in a folder with one checkpoint in a Hugging Face layout.

    Args:
        path: The file, an index of shards, or a folder with either.
        name: What errors and records call it; default the path's own.

    Raises:
        ModelNotFoundError: nothing is there.
        ModelError: it cannot be read.
    """
    if path.is_file():
        if path.name in INDEX_FILES:
            return _indexed(path, name or path.name)
        with _opened(path) as tensors:
            return Checkpoint(name or path.name, (Shard(path, tuple(tensors)),))
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}, given as weights, does not exist")
    for index, single in zip(INDEX_FILES, WEIGHTS_FILES, strict=True):
        if (path / index).is_file():
            return _indexed(path / index, name or path.name)
        if (path / single).is_file():
            return open_checkpoint(path / single, name=name or path.name)
    raise ModelNotFoundError(
        f"{path} holds no weights: none of {', '.join((*INDEX_FILES, *WEIGHTS_FILES))} is there"
    )


def read_index(path: Path) -> dict[str, str]:
    """File names by key, of an index.

    Raises:
        ModelError: it is not an index.
    """
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        files = {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not the index of a sharded checkpoint: {error!r}") from error
    outside = next((name for name in files.values() if Path(name).name != name), None)
    if outside is not None:
        raise ModelError(f"{path} names {outside}, which is not a file beside it")
    return files


def _indexed(path: Path, checkpoint_name: str) -> Checkpoint:
    keys: dict[str, list[str]] = {}
    for key, name in read_index(path).items():
        keys.setdefault(name, []).append(key)
    shards = tuple(Shard(path.parent / name, tuple(keys[name])) for name in sorted(keys))
    return Checkpoint(checkpoint_name, shards)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Mapping[str, Tensor]]:
    if path.suffix == ".safetensors":
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from error
        with file as opened:
            yield _SafetensorsFile(path, opened)
    else:
        yield _read_pickle(path)


class _SafetensorsFile(Mapping[str, Tensor]):
    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._keys = frozenset(file.keys())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        try:
            tensor: Tensor = self._file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self._path, error) from error
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._keys))

    def __len__(self) -> int:
        return len(self._keys)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        content = _load(path)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is damaged, or holds more than tensors, and unpickling that could run any "
            f"code: {_first_line(error)}; save its weights alone, best as safetensors"
        ) from error
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # a damaged file makes the unpickler raise anything
        raise _unreadable(path, error) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}, not tensors by name")
    return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        logger.info("%s is in PyTorch's format from before 1.6: it is read whole", path)
        return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable(path: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{path} cannot be read ({path.stat().st_size} bytes; {_first_line(error)}): it is "
        "truncated, or of another format than its name says; download it again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]
