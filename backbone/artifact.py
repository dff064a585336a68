"""The artifact: a refined backbone as a folder that timm can load, alone unless it lacks the model.

    refined/
      config.json, model.safetensors    timm's local-dir format, LoRA merged; architectures that
                                        timm lacks need `import backbone.architectures` first
      refinery.json                     the manifest below
      registers.safetensors             only with a learnable border: its patches
      adapter/                          the LoRA adapter in PEFT format
      README.md, preview.png            model card and PCA picture

Written into a temporary folder beside its place and renamed, so that a reader sees all of it or
nothing. Loading checks the digest of the weights and is strict about keys.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor

from backbone.checkpoints import assign
from backbone.digest import Origin
from backbone.digest import weights_digest as weights_digest
from backbone.errors import ArtifactError
from backbone.folders import make_readable, replace_folder, sync
from backbone.loading import build_timm_model
from backbone.registers import Fill, LearnableBorder, Rounding, border_width, seeded_border
from backbone.vit import Backbone

SCHEMA_VERSION = 1
MANIFEST_FILE = "refinery.json"
WEIGHTS_FILE = "model.safetensors"
REGISTERS_FILE = "registers.safetensors"
_RECORDED_DISTRIBUTIONS = ("torch", "torchvision", "timm", "peft", "safetensors", "vit-refinery")


class RegisterBorder(BaseModel):
    """The register border that the backbone was refined with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    r_reg: int = Field(32, ge=1)
    """Image tokens per register token of width."""
    rounding: Rounding = "ceil"
    fill: Fill = "gaussian"
    seed: int = Field(0, ge=0)
    """Seed of the border drawn for inference; the same canvas always gets the same border."""

    def width(self, grid: tuple[int, int]) -> int:
        """Register tokens on each side of an image of `grid` (h, w) patches."""
        return border_width(grid, self.r_reg, self.rounding)

    def pixels(
        self, canvas: tuple[int, int], width: int, learned: LearnableBorder | None
    ) -> Tensor:
        """The border used at inference on a canvas (Hc, Wc) in pixels: float32 [3, Hc, Wc]."""
        if self.fill == "learnable":
            if learned is None:
                raise ArtifactError("the border's fill is learnable, but its patches are missing")
            with torch.no_grad():
                patches: Tensor = learned(canvas, width)
            return patches
        return seeded_border(self.fill, canvas, self.seed)


class Manifest(BaseModel):
    """`refinery.json`: what a refined backbone is and where it comes from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    backbone: str
    """timm architecture name of the weights."""
    patch_size: int = Field(ge=1)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    native_size: tuple[int, int]
    """(h, w) in pixels that the backbone was refined at, and the default size when served."""
    dense_norm: bool
    """Dense features are taken after the model's final norm."""
    num_prefix_tokens: int = Field(ge=0)
    border: RegisterBorder
    channel_mask: tuple[int, ...] = ()
    """Channels zeroed before every normalisation in training; served features keep them."""
    recipe: dict[str, Any]
    data: dict[str, Any]
    """Fingerprint of the training images."""
    versions: dict[str, str]
    metrics: dict[str, float] = {}
    digest: str
    """SHA-256 of the weights, see `weights_digest`."""
    origin: Origin | None = None
    """The weights that were refined; left out of the file where it is not known."""
    evaluations: tuple[dict[str, Any], ...] = ()
    """Results of `python -m trainer.evaluate --record`; left out where there are none."""


class Artifact(NamedTuple):
    """A loaded artifact."""

    backbone: Backbone
    manifest: Manifest
    learned_border: LearnableBorder | None


def is_artifact(path: str | Path) -> bool:
    """Whether a folder has a manifest."""
    return (Path(path) / MANIFEST_FILE).is_file()


def save_artifact(
    folder: str | Path,
    backbone: Backbone,
    *,
    border: RegisterBorder,
    model_card: str,
    native_size: tuple[int, int] | None = None,
    channel_mask: tuple[int, ...] = (),
    recipe: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    evaluations: Sequence[Mapping[str, Any]] = (),
    weights_dtype: torch.dtype = torch.float32,
    learned_border: LearnableBorder | None = None,
    adapter: Path | None = None,
    preview: bytes | None = None,
) -> Manifest:
    """Write an artifact; an older artifact at the same place is replaced.

    Args:
        folder: Where it will stand. Anything but an artifact that is already there is an error.
        backbone: The merged backbone: no adapter layers left in it.
        border: The register border of the training.
        model_card: Text of README.md.
        native_size: (h, w) in pixels of the training; default the backbone's.
        channel_mask, recipe, data, metrics, evaluations: See `Manifest`.
        weights_dtype: What floating-point weights are stored in.
        learned_border: Needed by the fill `learnable`.
        adapter: A folder in PEFT format that is copied.
        preview: Bytes of preview.png.

    Raises:
        ArtifactError: something else is at `folder`, adapter layers are left in the backbone, or
            weights are too large for `weights_dtype`.
    """
    folder = Path(folder)
    if folder.exists() and not is_artifact(folder):
        raise ArtifactError(f"{folder} exists and is not an artifact; choose another place")
    state = _stored_weights(backbone, weights_dtype)
    border_state = {} if learned_border is None else _border_state(learned_border)
    manifest = Manifest(
        backbone=backbone.name,
        patch_size=backbone.patch_size,
        mean=_three(backbone.mean),
        std=_three(backbone.std),
        native_size=native_size or backbone.native_size,
        dense_norm=backbone.dense_norm,
        num_prefix_tokens=backbone.num_prefix_tokens,
        border=border,
        channel_mask=channel_mask,
        recipe=dict(recipe or {}),
        data=dict(data or {}),
        versions=_versions(),
        metrics=dict(metrics or {}),
        evaluations=tuple(dict(evaluation) for evaluation in evaluations),
        digest=weights_digest(state | border_state),
        origin=backbone.origin,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        save_config_for_hf(backbone.vit, str(temporary / "config.json"))
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        if learned_border is not None:
            header = {"trained_width": str(learned_border.trained_width)}
            save_file(border_state, temporary / REGISTERS_FILE, metadata=header)
        (temporary / MANIFEST_FILE).write_text(_manifest_text(manifest))
        (temporary / "README.md").write_text(model_card)
        if preview is not None:
            (temporary / "preview.png").write_bytes(preview)
        if adapter is not None:
            shutil.copytree(adapter, temporary / "adapter")
        make_readable(temporary)
        sync(temporary)
        replace_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def load_artifact(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> Artifact:
    """Load an artifact and verify it.

    Args:
        folder: Where it is.
        dtype: Of the backbone's parameters, whatever the weights are stored in.

    Raises:
        ArtifactError: a file is missing or damaged, the schema version is unknown, the weights'
            digest is another, or keys do not fit the architecture.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    state = _read_tensors(folder / WEIGHTS_FILE)
    learned = _read_border(folder, manifest) if manifest.border.fill == "learnable" else None
    border_state = {} if learned is None else _border_state(learned)
    digest = weights_digest(state | border_state)
    if digest != manifest.digest:
        raise ArtifactError(
            f"{folder}: the weights' digest is {digest[:12]}, the manifest says "
            f"{manifest.digest[:12]}; the artifact was damaged or changed: copy it again"
        )
    with torch.device("meta"):
        vit, _ = build_timm_model(f"local-dir:{folder}", random_weights=True)
    try:
        assign(vit, state, dtype=dtype)
    except RuntimeError as error:
        raise ArtifactError(f"{folder}: the weights do not fit config.json: {error}") from error
    backbone = Backbone(
        vit,
        name=manifest.backbone,
        dense_norm=manifest.dense_norm,
        native_size=manifest.native_size,
        origin=manifest.origin,
    )
    backbone.mean, backbone.std = manifest.mean, manifest.std
    _check_agreement(folder, backbone, manifest)
    return Artifact(backbone, manifest, learned)


def read_manifest(folder: Path) -> Manifest:
    """Read and check `refinery.json`.

    Raises:
        ArtifactError: it is missing, not JSON, of another schema version, or has unknown fields.
    """
    path = folder / MANIFEST_FILE
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtifactError(f"{folder} is not an artifact: it has no {MANIFEST_FILE}") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version!r}; this version of vit-refinery reads "
            f"{SCHEMA_VERSION}: use the version that wrote it, or refine again"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise ArtifactError(f"{path} is not a valid manifest: {error}") from error


def _manifest_text(manifest: Manifest) -> str:
    """Without what is not known, so that versions from before such a field read it too."""
    unknown = {name for name in ("origin", "evaluations") if not getattr(manifest, name)}
    return manifest.model_dump_json(indent=2, exclude=unknown) + "\n"


def _check_agreement(folder: Path, backbone: Backbone, manifest: Manifest) -> None:
    for name in ("patch_size", "num_prefix_tokens"):
        built, stated = getattr(backbone, name), getattr(manifest, name)
        if built != stated:
            raise ArtifactError(
                f"{folder}: {name} is {built} in config.json, {stated} in the manifest"
            )


def _stored_weights(backbone: Backbone, dtype: torch.dtype) -> dict[str, Tensor]:
    state = backbone.vit.state_dict()
    left = [name for name in state if "lora_" in name or "base_layer" in name]
    if left:
        raise ArtifactError(
            f"adapter layers are not merged, for example {left[0]}; merge them first"
        )
    stored = {
        name: tensor.detach()
        .cpu()
        .to(dtype if tensor.is_floating_point() else tensor.dtype)
        .clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    for name, tensor in stored.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(
                f"the weights {name} are not finite in {dtype}; float16 ends at 65504: store them "
                "in bfloat16 or float32"
            )
    return stored


def _border_state(learned: LearnableBorder) -> dict[str, Tensor]:
    return {"border.patches": learned.patches.detach().cpu().contiguous()}


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def _read_border(folder: Path, manifest: Manifest) -> LearnableBorder:
    from safetensors import safe_open

    path = folder / REGISTERS_FILE
    patches = _read_tensors(path).get("border.patches")
    if patches is None:
        raise ArtifactError(f"{path} has no border.patches; refine again")
    with safe_open(path, framework="pt") as file:
        width = int((file.metadata() or {}).get("trained_width", 1))
    p = manifest.patch_size
    learned = LearnableBorder((patches.shape[1] * p, patches.shape[2] * p), width, p)
    learned.load_state_dict({"patches": patches})
    return learned


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _RECORDED_DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ArtifactError(f"{len(values)} input channels; only RGB backbones are supported")
    return values[0], values[1], values[2]
