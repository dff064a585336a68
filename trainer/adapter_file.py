"""The adapter as a folder that can be shipped without the weights it belongs to.

    adapter/
      adapter_config.json, adapter_model.safetensors    PEFT's format
      refinery-adapter.json                             the description below
      registers.safetensors                             only with a learnable border: its patches
      README.md                                         model card of the run

A run writes its description beside its checkpoint too, so that an adapter can be taken from there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from backbone import Backbone, RegisterBorder
from backbone.registers import LearnableBorder
from trainer.checkpoint import Checkpoint
from trainer.config import LoraSection, Recipe
from trainer.errors import AdapterError
from trainer.prepare import register_border

SCHEMA_VERSION = 1
DESCRIPTION_FILE = "refinery-adapter.json"
WEIGHTS_FILE = "adapter_model.safetensors"
BORDER_FILE = "registers.safetensors"
CARD_FILE = "README.md"
_VIT = "backbone.vit."  # what parameters of the transformer start with in a checkpoint
_BORDER = "border.patches"


class BaseWeights(BaseModel):
    """The weights that an adapter was trained on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """As the recipe named them: a catalogue or timm name, or a folder."""
    file: str | None = None
    """Name of the checkpoint file, where one was given."""
    architecture: str
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What they were loaded in, which the digest depends on, and what the adapter is added to."""
    digest: str
    """SHA-256, see `backbone.artifact.weights_digest`."""


class AdapterDescription(BaseModel):
    """`refinery-adapter.json`: what an adapter is for, and what its artifact's manifest says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    base: BaseWeights
    border: RegisterBorder
    native_size: tuple[int, int]
    """(h, w) in pixels that it was trained at."""
    dense_norm: bool
    channel_mask: tuple[int, ...] = ()
    weights_dtype: Literal["float32", "float16", "bfloat16"] = Field("float32")
    """What the merged weights are stored in."""
    recipe: dict[str, Any]
    data: dict[str, Any] = {}
    metrics: dict[str, float] = {}
    evaluations: tuple[dict[str, Any], ...] = ()
    """See `backbone.Manifest`; left out of the file where there are none."""

    def artifact_arguments(self) -> dict[str, Any]:
        """What `backbone.save_artifact` is to be told of the merged backbone."""
        return {
            "border": self.border,
            "native_size": self.native_size,
            "channel_mask": self.channel_mask,
            "recipe": self.recipe,
            "data": self.data,
            "metrics": self.metrics,
            "evaluations": self.evaluations,
            "weights_dtype": getattr(torch, self.weights_dtype),
        }

    def write(self, folder: Path) -> None:
        """Write the description into a folder."""
        # Without what versions from before the field refuse.
        unknown = set() if self.evaluations else {"evaluations"}
        text = self.model_dump_json(indent=2, exclude=unknown) + "\n"
        (folder / DESCRIPTION_FILE).write_text(text)


def describe(
    recipe: Recipe,
    backbone: Backbone,
    *,
    size: int,
    digest: str,
    channels: tuple[int, ...],
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> AdapterDescription:
    """Describe the adapter of a run.

    Args:
        recipe: Of the run.
        backbone: The base, with or without the adapter in it.
        size: Side of the training images in pixels.
        digest: Of the base weights.
        channels: Masked channels.
        data, metrics: See `backbone.Manifest`.
    """
    section = recipe.backbone
    return AdapterDescription(
        base=BaseWeights(
            name=section.name,
            file=Path(section.weights).name if section.weights else None,
            architecture=backbone.name,
            dtype=_dtype(backbone),
            digest=digest,
        ),
        border=register_border(recipe),
        native_size=(size, size),
        dense_norm=backbone.dense_norm,
        channel_mask=channels,
        weights_dtype=recipe.run.weights_dtype,
        recipe=recipe.model_dump(mode="json"),
        data=dict(data or {}),
        metrics=dict(metrics or {}),
    )


def _dtype(backbone: Backbone) -> Any:
    if backbone.origin is not None:
        return backbone.origin.dtype
    return str(next(backbone.vit.patch_embed.parameters()).dtype).removeprefix("torch.")


def read_description(folder: Path) -> AdapterDescription:
    """Read and check an adapter's description.

    Raises:
        AdapterError: the folder is no adapter, one of an older version, or its description is not
            valid.
    """
    path = folder / DESCRIPTION_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        if not (folder / "adapter_config.json").is_file():
            raise AdapterError(
                f"{folder} is not an adapter: it has no adapter_config.json; give the folder "
                "adapter/ of an artifact, or what --export wrote"
            ) from error
        raise AdapterError(
            f"{folder} has no {DESCRIPTION_FILE}, so nothing says which weights and border it "
            "belongs to: it was written by an older version; repeat its run's command with "
            "--resume, which writes its artifact again, or refine again"
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise AdapterError(
            f"{path} has schema version {version!r}, and this version of vit-refinery reads "
            f"{SCHEMA_VERSION}: use the version that wrote it"
        )
    try:
        return AdapterDescription.model_validate(content)
    except ValidationError as error:
        raise AdapterError(f"{path} is not a valid description: {error}") from error


def write_extras(
    folder: Path,
    description: AdapterDescription,
    *,
    learned_border: LearnableBorder | None,
    card: str | None,
) -> None:
    """Put beside an adapter in PEFT's format what merging it takes."""
    description.write(folder)
    if learned_border is not None:
        _write_border(folder, learned_border.patches, learned_border.trained_width)
    if card is not None:
        (folder / CARD_FILE).write_text(card)


def read_border(folder: Path, patch_size: int) -> LearnableBorder:
    """The learned border of an adapter.

    Raises:
        AdapterError: it is missing or damaged.
    """
    path = folder / BORDER_FILE
    try:
        with safe_open(path, framework="pt") as file:
            patches: Tensor = file.get_tensor(_BORDER)
            width = int((file.metadata() or {})["trained_width"])
    except (OSError, SafetensorError, KeyError) as error:
        raise AdapterError(
            f"{path} cannot be read, and the adapter's border was learned: {error}; copy it again"
        ) from error
    rows, columns = patches.shape[1:3]
    learned = LearnableBorder((rows * patch_size, columns * patch_size), width, patch_size)
    learned.load_state_dict({"patches": patches})
    return learned


def adapter_of_checkpoint(
    folder: Path, checkpoint: Checkpoint, description: AdapterDescription
) -> None:
    """Write a checkpoint's adapter in PEFT's format, and its learned border if it has one.

    Args:
        folder: Exists.
        checkpoint: Of the run.
        description: Of its run.

    Raises:
        AdapterError: there is no adapter in the checkpoint.
    """
    adapter: dict[str, Tensor] = {}
    modules: list[str] = []
    for name, tensor in checkpoint.parameters.items():
        module, marker, rest = name.removeprefix(_VIT).partition(".lora_")
        if marker:
            key = f"base_model.model.{module}.lora_{rest.replace('.default', '')}"
            adapter[key] = tensor.contiguous()
            modules.append(module)
    if not adapter:
        raise AdapterError("the checkpoint has no adapter in it; it is not of a refinement")
    lora = LoraSection.model_validate(description.recipe["lora"])
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
        lora_dropout=lora.dropout,
        target_modules=sorted(set(modules)),
        bias="none",
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    save_file(adapter, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    patches = checkpoint.parameters.get(_BORDER)
    if patches is not None:
        height, width = (side // patches.shape[-1] for side in description.native_size)
        _write_border(folder, patches, description.border.width((height, width)))


def _write_border(folder: Path, patches: Tensor, width: int) -> None:
    state = {_BORDER: patches.detach().cpu().to(torch.float32).contiguous()}
    save_file(state, folder / BORDER_FILE, metadata={"trained_width": str(width)})
