"""What is measured: backbones as they are served, in this process or by a service.

Raw and refined stand side by side in every evaluation: without the first, the second says nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from backbone import DenseEncoder, find_devices, open_model
from backbone.artifact import Manifest
from backbone.encoder import Precision
from backbone.errors import ModelError
from trainer.evaluate.errors import SubjectError
from trainer.evaluate.served import ServedSubject, ServiceConnection, served_baseline

__all__ = [
    "LocalSubject",
    "ServedSubject",
    "Subject",
    "add_subject_arguments",
    "open_subjects",
    "subjects_of",
]

logger = logging.getLogger(__name__)

_NONE = "none"
_ADVICE = "give --baseline PATH, or --baseline none to measure it alone"
_DECIDING = ("vit-refinery", "torch", "timm")


class Subject(Protocol):
    """One set of weights, as it is served.

    Attributes:
        name: Before its row: "raw", "refined".
        spec: Path, hub name, or URL and name.
        digest: SHA-256 of the weights.
        key: Hex; two subjects share it only when they give the same tokens for the same pixels.
        patch_size: In pixels.
        native_size: (h, w) in pixels.
    """

    @property
    def name(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def native_size(self) -> tuple[int, int]: ...

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """Tokens of uint8 images of whole patches: float32 `[B, N, C]` on the CPU.

        In raster order, of the last layer, the register border stripped.
        """
        ...


class LocalSubject:
    """An encoder of this process.

    Args:
        encoder: The backbone with its border.
        register_width: Border in patches; default the artifact's rule.
        name: Before its row.
        spec: Where it is from.
    """

    def __init__(
        self,
        encoder: DenseEncoder,
        register_width: int | None = None,
        *,
        name: str = "model",
        spec: str = "",
    ) -> None:
        encoder.register_width(*encoder.native_size, register_width)  # refuses what it cannot have
        self.encoder = encoder
        self.name = name
        self.spec = spec or encoder.backbone.name
        self.digest = encoder.digest
        self.patch_size = encoder.patch_size
        self.native_size = encoder.native_size
        self._register_width = register_width
        parts = [encoder.fingerprint, str(register_width), *map(_version, _DECIDING)]
        self.key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def encode(self, images_B3HW: Tensor) -> Tensor:
        """See `Subject`."""
        features = self.encoder.encode(images_B3HW, register_width=self._register_width)[0]
        # A copy outside of inference mode: a head can be trained on it.
        return features.tokens.to("cpu", torch.float32, copy=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "0+checkout"


def add_subject_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every subcommand shares: what is measured, and where."""
    add = parser.add_argument_group("what is measured").add_argument
    add("--model", help="artifact, timm folder or timm name; with --url its name there")
    add(
        "--baseline",
        help="the raw backbone beside it, or none; default what the artifact was refined from "
        "(with --url: the served raw model of the same architecture)",
    )
    add("--weights", type=Path, help="checkpoint for a --model that is a timm name")
    add("--random-weights", action="store_true", help="--model with random weights, as a trial")
    add("--url", help="measure models of a running service, as http://127.0.0.1:8000")
    add("--api-key-file", type=Path, metavar="FILE", help="its first line is sent with --url")
    add("--register-width", type=int, metavar="R", help="border in patches; default the model's")
    add("--device", help="auto, cpu, cuda or cuda:N (default auto)")
    add("--precision", choices=("auto", "fp32", "bf16"), help="default auto")


def subjects_of(arguments: argparse.Namespace) -> list[Subject]:
    """The subjects that the arguments of `add_subject_arguments` name, raw first.

    Raises:
        SubjectError: they cannot be had, or arguments exclude each other.
        RefineryError: a model that cannot be loaded.
    """
    if arguments.url is None:
        if arguments.api_key_file is not None:
            raise SubjectError("--api-key-file is for --url; leave it out, or give the URL too")
        return open_subjects(
            arguments.model,
            arguments.baseline,
            weights=arguments.weights,
            random_weights=arguments.random_weights,
            register_width=arguments.register_width,
            device=arguments.device or "auto",
            precision=arguments.precision or "auto",
        )
    for flag in ("weights", "random_weights", "device", "precision"):
        if getattr(arguments, flag):
            raise SubjectError(
                f"--{flag.replace('_', '-')} is for models of this process, and --url measures "
                "those of a service, which has its own; leave one of the two out"
            )
    return open_subjects(
        arguments.model,
        arguments.baseline,
        url=arguments.url,
        api_key=_read_key(arguments.api_key_file),
        register_width=arguments.register_width,
    )


def open_subjects(
    model: str | None,
    baseline: str | None = None,
    *,
    url: str | None = None,
    api_key: str | None = None,
    weights: Path | None = None,
    random_weights: bool = False,
    register_width: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
) -> list[Subject]:
    """The raw and the refined backbone, in this order; one alone where there is no other.

    Args:
        model: Artifact, timm folder or timm name; of a service the name there, or None for its
            default one.
        baseline: The raw backbone, "none", or None: what the artifact was refined from, of a
            service its raw model of the same architecture.
        url, api_key: Of a service.
        weights, random_weights: Of `model`, see `backbone.open_model`.
        register_width: Of the refined one, in patches; default its rule.
        device, precision: Of local models.

    Raises:
        SubjectError: a model is not named, not there, or does not say what it was refined from.
        RefineryError: a model cannot be loaded.
    """
    if url is not None:
        connection = ServiceConnection(url, api_key=api_key)
        return list(_served(connection, model, baseline, register_width))
    if model is None:
        raise SubjectError("no --model was named; give an artifact, a timm folder or a timm name")
    place = _Place(find_devices(device)[0], precision)
    if random_weights:
        torch.manual_seed(0)
    encoder = open_model(model, weights=weights, random_weights=random_weights, **place._asdict())
    is_refined = encoder.manifest is not None
    name = "refined" if is_refined else "random" if random_weights else "raw"
    last = LocalSubject(encoder, register_width, name=name, spec=model)
    if baseline == _NONE or (baseline is None and not is_refined):
        return [last]
    if baseline is not None:
        raw = open_model(baseline, expects_raw=True, **place._asdict())
        name = "raw" if raw.manifest is None else "baseline"
        if not is_refined:
            last.name = "model"
        return [LocalSubject(raw, name=name, spec=baseline), last]
    assert encoder.manifest is not None
    return [_raw_of(Path(model.removeprefix("local-dir:")), encoder.manifest, place), last]


class _Place(NamedTuple):
    device: str
    precision: Precision


def _raw_of(artifact: Path, manifest: Manifest, place: _Place) -> LocalSubject:
    """The backbone that an artifact was refined from, as its manifest names it."""
    section = manifest.recipe.get("backbone")
    named = section.get("name") if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(named, str):
        raise SubjectError(f"{artifact} does not say what it was refined from; {_ADVICE}")
    if section.get("random_weights"):
        raise SubjectError(
            f"{artifact} was refined from random weights, which are not kept; {_ADVICE}"
        )
    weights = section.get("weights")
    raw, spec = _open_raw(artifact, manifest, named, weights, place)
    raw.backbone.dense_norm = manifest.dense_norm  # a recipe may say other than the catalogue
    if _has_other_weights(raw, manifest):
        assert raw.backbone.origin is not None
        assert manifest.origin is not None
        logger.warning(
            "%s has other weights (%s) than those that %s was refined from (%s)",
            spec,
            raw.backbone.origin.digest[:12],
            artifact,
            manifest.origin.digest[:12],
        )
    return LocalSubject(raw, name="raw", spec=spec)


def _open_raw(
    artifact: Path, manifest: Manifest, named: str, weights: str | None, place: _Place
) -> tuple[DenseEncoder, str]:
    """The raw backbone and its path: the first with the artifact's weights, else the first."""
    paths = _found(artifact, named.removeprefix("local-dir:"))
    specs = [str(path) for path in paths] or [named]
    files = (_found(artifact, weights) or [Path(weights)]) if weights else [None]
    first: tuple[DenseEncoder, str] | None = None
    problem: ModelError | None = None
    for spec, file in itertools.product(specs, files):
        try:
            raw = open_model(spec, weights=file, expects_raw=True, **place._asdict())
        except ModelError as error:
            problem = problem or error
            continue
        if not _has_other_weights(raw, manifest):
            return raw, spec
        first = first or (raw, spec)
    if first is None:
        raise SubjectError(
            f"{artifact} was refined from {named}, which cannot be loaded ({problem}; paths were "
            f"looked for from {Path.cwd()}, then from {artifact.resolve().parent} and every folder "
            f"above it); {_ADVICE}"
        ) from problem
    return first


def _has_other_weights(raw: DenseEncoder, manifest: Manifest) -> bool:
    """Whether they are known not to be the artifact's; a digest depends on the precision."""
    found, known = raw.backbone.origin, manifest.origin
    return bool(found and known and found.dtype == known.dtype and found.digest != known.digest)


def _found(artifact: Path, named: str) -> list[Path]:
    """A path of a recipe, which counts from where the run was started: wherever that may be.

    From the current folder, then from the artifact's folder upwards.
    """
    found: dict[Path, Path] = {}
    for folder in (Path(), *artifact.resolve().parents):
        path = folder / named
        if path.exists():
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _served(
    connection: ServiceConnection, model: str | None, baseline: str | None, width: int | None
) -> Iterator[ServedSubject]:
    last = ServedSubject(connection, model, register_width=width)
    last.name = "refined" if last.model.is_refined else "raw"
    if baseline is None and last.model.is_refined:
        baseline = served_baseline(connection.info().models, last.model)
    if baseline not in (None, _NONE):
        first = ServedSubject(connection, baseline)
        first.name = "baseline" if first.model.is_refined else "raw"
        if not last.model.is_refined:
            last.name = "model"
        yield first
    yield last


def _read_key(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SubjectError(
            f"--api-key-file {path} cannot be read ({error}); give a file with the key alone"
        ) from None  # a cause could show the key
    key = lines[0].strip() if lines else ""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise SubjectError(f"--api-key-file {path} has no key in its first line")
    return key
