"""Building timm models: from the hub, from folders, from files, or with random weights."""

import difflib
import inspect
from pathlib import Path
from typing import Any

import timm
from torch import nn

from backbone.errors import ModelError, ModelNotFoundError

LOCAL_DIR = "local-dir:"


def build_timm_model(
    spec: str, *, weights: Path | None = None, random_weights: bool = False, **model_args: Any
) -> tuple[nn.Module, str]:
    """A timm vision transformer without classifier, and its architecture name.

    The name carries the tag of timm's weights (`.lvd142m`) when it is those that were loaded.

    Args:
        spec: timm model name, `local-dir:PATH`, or a folder in timm's local-dir format.
        weights: Checkpoint file for the named model.
        random_weights: Random weights, and no download.
        model_args: Constructor arguments that override the model's own.

    Raises:
        ModelNotFoundError: unknown name, missing folder or file, or no weights without a network.
        ModelError: the checkpoint does not fit the model.
    """
    if weights is not None and random_weights:
        raise ModelError(f"both weights {weights} and random weights were asked for; choose one")
    path = _folder(spec)
    name = LOCAL_DIR + str(path) if path else spec
    if path is None:
        _check_name(spec)
    arguments = {"num_classes": 0, **_dynamic_size(name, path), **model_args}
    overlay = None
    if weights is not None:
        if not weights.is_file():
            raise ModelNotFoundError(f"weights file {weights} does not exist")
        # timm applies its key converters to a file given this way, and not to `checkpoint_path`.
        overlay = {"file": str(weights)}
    try:
        vit: nn.Module = timm.create_model(
            name, pretrained=not random_weights, pretrained_cfg_overlay=overlay, **arguments
        )
    except Exception as error:
        if "No pretrained weights exist" in str(error):
            raise ModelNotFoundError(
                f"timm knows no weights for {spec}; name one that has them "
                "(timm.list_pretrained()), give a checkpoint file with --weights FILE, or ask for "
                "--random-weights"
            ) from error
        if _is_about_reach(error) and path is None and weights is None:
            raise ModelNotFoundError(
                f"the weights of {spec} are not here and the hub cannot be reached "
                f"({type(error).__name__}); give a folder (PATH or local-dir:PATH), a "
                "checkpoint file with --weights FILE, or ask for --random-weights"
            ) from error
        if isinstance(error, RuntimeError | ValueError | KeyError | OSError):
            source = weights or path or spec
            raise ModelError(f"{source} cannot be loaded as {spec}: {error}") from error
        raise
    config: dict[str, Any] = vit.pretrained_cfg  # type: ignore[assignment]
    architecture = str(config.get("architecture") or spec)
    has_timms_weights = path is None and weights is None and not random_weights
    tag = config.get("tag") if has_timms_weights else None
    return vit.eval(), f"{architecture}.{tag}" if tag else architecture


def _folder(spec: str) -> Path | None:
    text = spec.removeprefix(LOCAL_DIR)
    path = Path(text)
    looks_like_path = spec.startswith(LOCAL_DIR) or "/" in text or path.is_dir()
    if spec.startswith("hf-hub:") or not looks_like_path:
        return None
    if not (path / "config.json").is_file():
        raise ModelNotFoundError(
            f"{text} is not a model folder: it has no config.json; give an artifact, a folder in "
            "timm's local-dir format, a timm model name, or hf-hub:OWNER/NAME"
        )
    return path


def _check_name(name: str) -> None:
    if name.startswith("hf-hub:"):
        return
    architecture = name.split(".", 1)[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ModelNotFoundError(f"no timm model and no folder is called {name!r}; {hint}")


def _dynamic_size(name: str, path: Path | None) -> dict[str, Any]:
    """`dynamic_img_size=True` where the architecture takes it: any size works then."""
    if name.startswith("hf-hub:") or path is not None:
        return {"dynamic_img_size": True}
    entry = timm.model_entrypoint(name.split(".", 1)[0])
    module = inspect.getmodule(entry)
    family = getattr(module, "__name__", "").rsplit(".", 1)[-1]
    return {"dynamic_img_size": True} if family in ("vision_transformer", "eva") else {}


def _is_about_reach(error: Exception) -> bool:
    """Whether loading failed because the hub, or the cached copy of it, was out of reach."""
    from huggingface_hub import errors as hub

    kinds = (
        hub.HfHubHTTPError,
        hub.LocalEntryNotFoundError,
        hub.OfflineModeIsEnabled,
        ConnectionError,
        TimeoutError,
    )
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, kinds):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
