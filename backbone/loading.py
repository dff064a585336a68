"""Building backbones: from the catalogue, the hub, folders, files, or with random weights."""

import contextlib
import difflib
import inspect
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub import hf_hub_download
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from backbone import architectures, catalog
from backbone.catalog import Entry
from backbone.checkpoints import download, fill, find_plan, open_checkpoint
from backbone.checkpoints.hub import REACH_ERRORS
from backbone.digest import Origin, weights_digest
from backbone.errors import ModelError, ModelNotFoundError

LOCAL_DIR = "local-dir:"
_FAMILIES = ("vision_transformer", "eva", "architectures")
# What dense features do not use: checkpoints may come without it.
_UNUSED = ("attn_pool.", "fc_norm.", "head")
_TIMM_LOADS = threading.Lock()


class LoadedVit(NamedTuple):
    """A model in evaluation mode, and what is known about it.

    Attributes:
        name: Its architecture, with the tag of timm's weights (`.lvd142m`) if it has those.
        entry: Its entry in the catalogue, if it has one; of a folder, that of its constructor.
        origin: Where its weights are from; None for random ones.
    """

    vit: nn.Module
    name: str
    entry: Entry | None
    origin: Origin | None


def load_vit(
    spec: str,
    *,
    weights: Path | None = None,
    random_weights: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LoadedVit:
    """A vision transformer without classifier, its weights read in `dtype`.

    Args:
        spec: Name of a catalogue entry, timm model name, `local-dir:PATH`, or a folder in timm's
            local-dir format.
        weights: Checkpoint for the named model: a file, an index of shards, or a folder with
            either; in timm's key names, those of a published layout, or any that timm converts.
        random_weights: Random weights, and no download.
        dtype: Of all parameters. Checkpoints in a known layout are cast tensor by tensor, so that
            the model never exists in another precision.

    Raises:
        ModelNotFoundError: unknown name, missing folder or file, or no weights without a network.
        ModelError: the checkpoint is damaged or does not fit the model.
    """
    if weights is not None and random_weights:
        raise ModelError(f"both weights {weights} and random weights were asked for; choose one")
    entry = catalog.find(spec)
    path = None if entry else _folder(spec)
    name = LOCAL_DIR + str(path) if path else spec
    if entry is not None:
        name = entry.timm or entry.architecture
    model_args = entry.model_args if entry else {}
    if random_weights:
        with _default_dtype(dtype):
            vit, architecture = build_timm_model(name, random_weights=True, **model_args)
        return LoadedVit(vit, architecture, entry, None)

    source = weights or path
    label = source.absolute().name if source else name
    if source is None and entry is not None and entry.constructor:
        source, label = download(entry.hub[0]), entry.hub[0]
    if source is None and dtype is not torch.float32:
        source, name = _timm_file(name)  # timm would read it whole, and in its own precision
        label = name
    if source is not None and source.suffix != ".npz":  # Google's format: timm alone reads it
        with torch.device("meta"):
            vit, architecture = build_timm_model(name, random_weights=True, **model_args)
        checkpoint = open_checkpoint(source, name=label)
        plan = find_plan(
            vit,
            checkpoint,
            model=architecture,
            dropped_blocks=entry.dropped_blocks if entry else 0,
            timm_converts=len(checkpoint.shards) == 1 and not _is_ours(architecture),
        )
        if plan is not None:
            fill(vit, checkpoint, plan, model=architecture, dtype=dtype)
            has_timms_weights = weights is None and path is None and not _is_ours(architecture)
            return LoadedVit(
                vit.eval(),
                name if has_timms_weights else architecture,
                entry or catalog.find(architecture),
                _origin(vit, label, plan.layout.name, dtype),
            )
    vit, architecture = build_timm_model(name, weights=weights, **model_args)
    vit.to(dtype)
    return LoadedVit(vit, architecture, entry, _origin(vit, label, "converted by timm", dtype))


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
    left_over: list[_IncompatibleKeys] = []
    try:
        with contextlib.nullcontext() if random_weights else _noting_keys(left_over):
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
            raise _out_of_reach(spec, error) from error
        if isinstance(error, RuntimeError | ValueError | KeyError | OSError):
            source = weights or path or spec
            raise ModelError(f"{source} cannot be loaded as {spec}: {error}") from error
        raise
    _check_keys(left_over, f"{weights or path or spec}", spec)
    config: dict[str, Any] = vit.pretrained_cfg  # type: ignore[assignment]
    architecture = str(config.get("architecture") or spec)
    has_timms_weights = path is None and weights is None and not random_weights
    tag = config.get("tag") if has_timms_weights else None
    return vit.eval(), f"{architecture}.{tag}" if tag else architecture


@contextlib.contextmanager
def _noting_keys(found: list[_IncompatibleKeys]) -> Iterator[None]:
    """Collect the keys that did not match whenever timm loads weights inside.

    timm is strict only where the checkpoint's classifier is the model's, and ours have none: what a
    checkpoint lacks would stay random, without a word.
    """
    builder: Any = timm.models._builder

    def note(_model: nn.Module, keys: _IncompatibleKeys) -> None:
        found.append(_IncompatibleKeys(list(keys.missing_keys), list(keys.unexpected_keys)))

    def load_and_note(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        handle = model.register_load_state_dict_post_hook(note)  # type: ignore[no-untyped-call]
        try:
            load(model, *args, **kwargs)
        finally:
            handle.remove()

    with _TIMM_LOADS:
        load = builder.load_pretrained
        builder.load_pretrained = load_and_note
        try:
            yield
        finally:
            builder.load_pretrained = load


def _check_keys(found: list[_IncompatibleKeys], source: str, model: str) -> None:
    for keys in found:
        missing = [key for key in keys.missing_keys if not key.startswith(_UNUSED)]
        if missing:
            raise ModelError(
                f"{source} lacks {len(missing)} of the tensors of {model}, the first {missing[0]}; "
                "it is incomplete, or of another model"
            )
        unexpected = [key for key in keys.unexpected_keys if key.startswith("blocks.")]
        if unexpected:
            raise ModelError(
                f"{source} has {len(unexpected)} tensors of blocks that {model} has no place for, "
                f"the first {unexpected[0]}; it is of another model"
            )


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New parameters are of this dtype inside: eight billion random numbers once, not twice."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _origin(vit: nn.Module, source: str, layout: str, dtype: torch.dtype) -> Origin:
    return Origin(
        source=source,
        layout=layout,
        dtype=str(dtype).removeprefix("torch."),
        digest=weights_digest(vit.state_dict()),
    )


def _is_ours(architecture: str) -> bool:
    return hasattr(architectures, architecture)


def _timm_file(name: str) -> tuple[Path | None, str]:
    """The file of a timm model on the hub, if it has one in timm's format; its name with tag."""
    _check_name(name)
    config = None if name.startswith("hf-hub:") else timm.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id or config.hf_hub_filename or config.custom_load:
        return None, name
    tagged = f"{config.architecture}.{config.tag}" if config.tag else name
    try:
        return Path(hf_hub_download(config.hf_hub_id, "model.safetensors")), tagged
    except hub_errors.RemoteEntryNotFoundError:
        return None, name
    except REACH_ERRORS as error:
        raise _out_of_reach(name, error) from error


def _out_of_reach(spec: str, error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"the weights of {spec} are not here and the hub cannot be reached "
        f"({type(error).__name__}); give a folder (PATH or local-dir:PATH), a "
        "checkpoint file with --weights FILE, or ask for --random-weights"
    )


def _folder(spec: str) -> Path | None:
    text = spec.removeprefix(LOCAL_DIR)
    path = Path(text)
    looks_like_path = spec.startswith(LOCAL_DIR) or "/" in text or path.is_dir()
    if spec.startswith("hf-hub:") or not looks_like_path:
        return None
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise ModelNotFoundError(
            f"{text} is not a model folder: it has no config.json; give an artifact, a folder in "
            "timm's local-dir format, a timm model name, or hf-hub:OWNER/NAME"
        )
    if "architecture" not in config:
        raise ModelError(
            f"{text} is not in timm's format: its config.json names no architecture; name the "
            "model, and give this folder as its weights"
        )
    return path


def _check_name(name: str) -> None:
    if name.startswith("hf-hub:"):
        return
    architecture = name.split(".", 1)[0]
    if not timm.is_model(architecture):
        known = [*catalog.CATALOG, *timm.list_models()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models()"
        raise ModelNotFoundError(f"no timm model and no folder is called {name!r}; {hint}")


def _dynamic_size(name: str, path: Path | None) -> dict[str, Any]:
    """`dynamic_img_size=True` where the architecture takes it: any size works then."""
    if name.startswith("hf-hub:") or path is not None:
        return {"dynamic_img_size": True}
    entry = timm.model_entrypoint(name.split(".", 1)[0])
    module = inspect.getmodule(entry)
    family = getattr(module, "__name__", "").rsplit(".", 1)[-1]
    return {"dynamic_img_size": True} if family in _FAMILIES else {}


def _is_about_reach(error: Exception) -> bool:
    """Whether loading failed because the hub, or the cached copy of it, was out of reach."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, REACH_ERRORS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
