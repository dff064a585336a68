"""Prompts to token numbers, as each family of text towers was trained.

CLIP lower-cases, starts and ends every text, and reads the embedding at the first end. SigLIP reads
it at the last of a fixed number of tokens, so that texts are padded to it; its first version also
drops punctuation (`canonicalize_text` of its authors' code).
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from trainer.evaluate.zeroshot.errors import ZeroshotError

Family = Literal["clip", "siglip"]
Tokenize = Callable[[Sequence[str]], Tensor]


def open_tokenizer(folder: Path, family: Family, *, length: int, vocabulary: int) -> Tokenize:
    """A function from texts to token numbers, int64 `[texts, length]`.

    Args:
        folder: With tokenizer.json, or CLIP's vocab.json and merges.txt.
        family: Of the text tower.
        length: Tokens per text, the tower's number of positions.
        vocabulary: Tokens that the tower knows.

    Raises:
        ZeroshotError: there is no tokenizer, or it has tokens that the tower does not know.
    """
    tokenize = _clip(folder, length) if family == "clip" else _siglip(folder, length)
    highest = int(tokenize(["a photo of a cat."]).max())
    if highest >= vocabulary:
        raise ZeroshotError(
            f"the tokenizer in {folder} gives token {highest}, and the text tower knows "
            f"{vocabulary}; it is that of another model, give its own with --tokenizer"
        )
    return tokenize


def _clip(folder: Path, length: int) -> Tokenize:
    from transformers import CLIPTokenizer

    has_parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not (folder / "tokenizer.json").is_file() and not has_parts:
        raise ZeroshotError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt); give a "
            "folder or repository that has it with --tokenizer. All CLIP and EVA-CLIP models read "
            "the tokens of openai/clip-vit-base-patch16"
        )
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file makes it raise anything
        raise ZeroshotError(f"the tokenizer in {folder} cannot be read: {error}") from error

    def tokenize(texts: Sequence[str]) -> Tensor:
        found = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
        # Zeros behind the end, as CLIP's authors pad: earlier tokens do not see them.
        return _padded(found, length, 0)

    return tokenize


def _siglip(folder: Path, length: int) -> Tokenize:
    path = folder / "tokenizer.json"
    if not path.is_file():
        hint = (
            " (it has spiece.model: save it as tokenizer.json with transformers, where "
            "sentencepiece is installed)"
            if (folder / "spiece.model").is_file()
            else ""
        )
        raise ZeroshotError(
            f"{folder} has no tokenizer.json{hint}; give a folder or repository that has it with "
            "--tokenizer"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # a damaged file makes it raise anything
        raise ZeroshotError(f"{path} cannot be read: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = _special_tokens(folder)
    # Gemma's tokenizer (SigLIP 2) has <eos> and <pad>; T5's (SigLIP) pads with the end itself.
    end = _number(tokenizer, path, special.get("eos_token"), "</s>", "<eos>")
    padding = _number(tokenizer, path, special.get("pad_token"), "<pad>", "</s>")
    keeps_punctuation = tokenizer.token_to_id("<eos>") is not None
    drop = str.maketrans("", "", string.punctuation)

    def tokenize(texts: Sequence[str]) -> Tensor:
        plain = [
            text.lower() if keeps_punctuation else text.lower().translate(drop) for text in texts
        ]
        plain = [" ".join(text.split()) for text in plain]
        encoded = tokenizer.encode_batch(plain, add_special_tokens=False)
        return _padded([[*each.ids[: length - 1], end] for each in encoded], length, padding)

    return tokenize


def _special_tokens(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # optional: there are usual names
        for key in ("eos_token", "pad_token"):
            value = content.get(key)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[key] = text
    return found


def _number(tokenizer: Tokenizer, path: Path, *names: str | None) -> int:
    for name in names:
        number = tokenizer.token_to_id(name) if name else None
        if number is not None:
            return number
    raise ZeroshotError(f"{path} has none of the tokens {', '.join(filter(None, names))}")


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> Tensor:
    filled = torch.full((len(rows), length), padding, dtype=torch.int64)
    for row, numbers in zip(filled, rows, strict=True):
        row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
    return filled
