"""Where a tower's files are: a folder, one file, or a repository of the Hugging Face hub.

No code of a repository is ever run: what is read is tensors, a configuration and a tokenizer.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import errors as hub
from huggingface_hub import hf_hub_download, snapshot_download
from torch import Tensor

from backbone.checkpoints import Checkpoint, open_checkpoint
from backbone.checkpoints.files import INDEX_FILES, WEIGHTS_FILES, read_index
from backbone.checkpoints.hub import REACH_ERRORS
from trainer.evaluate.zeroshot.errors import ZeroshotError

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt"),
)
# Of a vision tower only what lies behind its blocks is needed, and the patches, to know it again.
_VISION_BLOCKS = r"(vision_model|visual|visual\.trunk)\.(encoder\.layers|blocks|transformer)\."


@dataclass(frozen=True)
class TowerFiles:
    """A checkpoint with what is beside it.

    Attributes:
        checkpoint: Its tensors.
        config: Of its config.json; empty where there is none.
        tokenizer: Folder to look for a tokenizer in.
        is_quick_gelu: OpenCLIP's configuration, where it lies beside, says that activations are
            QuickGELU, as in OpenAI's models: a checkpoint does not say it.
    """

    checkpoint: Checkpoint
    config: dict[str, Any]
    tokenizer: Path
    is_quick_gelu: bool = False

    def read(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """Copies of the tensors whose keys are wanted; no other is read."""
        found = {}
        for shard in self.checkpoint.shards:
            keys = [key for key in shard.keys if wanted(key)]
            if not keys:
                continue
            with shard.open() as tensors:
                found.update({key: tensors[key].clone() for key in keys})
        return found


def find_tower(spec: str, *, tokenizer: str | None = None) -> TowerFiles:
    """The files of a tower.

    Args:
        spec: Folder in transformers' layout, checkpoint file, or id of a hub repository.
        tokenizer: Folder or hub id of the tokenizer; default the tower's own.

    Raises:
        ZeroshotError: there is nothing of that name, or the hub cannot be reached.
        ModelError: the weights cannot be read.
    """
    path = Path(spec.removeprefix("local-dir:"))
    if not path.exists():
        path = _downloaded(spec)
    folder = path if path.is_dir() else path.parent
    # A file of another name than transformers' may lie beside a configuration of something else.
    is_described = path.is_dir() or path.name in (*INDEX_FILES, *WEIGHTS_FILES)
    config = _read_config(folder / "config.json") if is_described else {}
    model = _read_config(folder / "open_clip_config.json").get("model_cfg")
    return TowerFiles(
        checkpoint=open_checkpoint(path),
        config=config,
        tokenizer=_tokenizer_folder(tokenizer) if tokenizer else folder,
        is_quick_gelu=isinstance(model, dict) and bool(model.get("quick_gelu")),
    )


def _tokenizer_folder(spec: str) -> Path:
    path = Path(spec)
    if path.is_dir():
        return path
    if path.exists() or not _is_hub_id(spec):
        raise ZeroshotError(f"--tokenizer {spec} is neither a folder nor the id of a repository")
    return _fetched(spec, list(TOKENIZER_FILES))


def _downloaded(spec: str) -> Path:
    if not _is_hub_id(spec):
        raise ZeroshotError(
            f"{spec}, given as text tower, is neither a folder or file that is here nor the id of "
            "a Hugging Face repository (OWNER/NAME)"
        )
    beside = ["config.json", *TOKENIZER_FILES]
    unreachable: Exception | None = None
    for index, single in zip(INDEX_FILES, WEIGHTS_FILES, strict=True):
        for name in (index, single):
            try:
                path = Path(hf_hub_download(spec, name))
            except hub.RepositoryNotFoundError as error:
                raise _out_of_reach(spec, error) from error
            except hub.RemoteEntryNotFoundError:
                continue  # it has another of the four
            except REACH_ERRORS as error:
                unreachable = error  # another of the four may be in the cache
                continue
            shards = {file for key, file in _index_of(path, name).items() if _is_needed(key)}
            return _fetched(spec, [*beside, name, *sorted(shards)])
    if unreachable is not None:
        raise _out_of_reach(spec, unreachable) from unreachable
    raise ZeroshotError(
        f"{spec} has none of {', '.join((*INDEX_FILES, *WEIGHTS_FILES))}; download its weights and "
        "give the file"
    )


def _index_of(path: Path, name: str) -> dict[str, str]:
    return read_index(path) if name in INDEX_FILES else {}


def _is_needed(key: str) -> bool:
    return re.match(_VISION_BLOCKS, key) is None


def _fetched(spec: str, names: list[str]) -> Path:
    try:
        # Names, not patterns: an index that says * would fetch everything.
        return Path(snapshot_download(spec, allow_patterns=[glob.escape(name) for name in names]))
    except (hub.RepositoryNotFoundError, *REACH_ERRORS) as error:
        raise _out_of_reach(spec, error) from error


def _out_of_reach(spec: str, error: Exception) -> ZeroshotError:
    return ZeroshotError(
        f"{spec} is not here and cannot be had from the hub ({type(error).__name__}); download it "
        f"where there is a network (hf download {spec}), accept its licence first if it has one, "
        "and give the folder"
    )


def _is_hub_id(spec: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", spec) is not None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ZeroshotError(f"{path} cannot be read ({error}); download it again") from error
    return config if isinstance(config, dict) else {}
