"""Ship adapters instead of weights: take one from a run, apply one to the weights it belongs to.

    python -m trainer.merge --export runs/siglip --output adapters/siglip
    python -m trainer.merge --backbone NAME|PATH --adapter adapters/siglip --output refined

The second writes the artifact that the run wrote, with the same digest, from the base weights and
a few megabytes.
"""

import argparse
import logging
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from backbone import Manifest, is_artifact, save_artifact
from backbone.digest import weights_digest
from backbone.errors import RefineryError
from trainer.adapter_file import (
    CARD_FILE,
    DESCRIPTION_FILE,
    AdapterDescription,
    adapter_of_checkpoint,
    read_border,
    read_description,
)
from trainer.checkpoint import load_checkpoint
from trainer.errors import AdapterError, TrainerError
from trainer.loop import checkpoint_path
from trainer.lora import Adapter
from trainer.place import ARTIFACT_FOLDER
from trainer.prepare import load_backbone
from trainer.recipe_file import make_recipe
from trainer.record import final_metrics

logger = logging.getLogger("trainer.merge")

EXIT_USER_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.export is not None and (options.backbone or options.weights):
        parser.error("--export takes no --backbone and no --weights: it needs no base weights")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    console = Console(stderr=True)
    try:
        if options.export is not None:
            export_adapter(options.export, options.output)
            size = sum(file.stat().st_size for file in options.output.iterdir()) / 2**20
            sys.stdout.write(f"adapter: {options.output} ({size:.1f} MiB)\n")
            return 0
        manifest = apply_adapter(
            options.adapter,
            options.output,
            backbone=options.backbone,
            weights=options.weights,
            scale=options.scale,
            force=options.force,
        )
    except RefineryError as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return EXIT_USER_ERROR
    sys.stdout.write(
        f"artifact: {options.output} (digest {manifest.digest})\n"
        f"serve it: python -m service --model {options.output}\n"
    )
    return 0


def export_adapter(source: Path, output: Path) -> AdapterDescription:
    """Write the adapter of a run alone.

    Args:
        source: Folder of a run (its artifact where it has one, else its checkpoint), an artifact,
            or a checkpoint.
        output: The adapter's folder; must not exist.

    Raises:
        TrainerError: there is no adapter, nothing says what it belongs to, or `output` exists.
    """
    if output.exists():
        raise TrainerError(f"{output} exists; choose another --output")
    run = source.parent if source.is_file() else source
    artifact = next((p for p in (source, source / ARTIFACT_FOLDER) if is_artifact(p)), None)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        if artifact is not None:
            description = read_description(artifact / "adapter")
            shutil.copytree(artifact / "adapter", temporary, dirs_exist_ok=True)
        else:
            path = source if source.is_file() else checkpoint_path(run)
            description = _export_checkpoint(path, run, temporary)
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return description


def _export_checkpoint(path: Path, run: Path, folder: Path) -> AdapterDescription:
    if not path.is_file():
        raise AdapterError(
            f"{run} is no run's folder, artifact or checkpoint: it has no {ARTIFACT_FOLDER}/ and "
            f"no {path.name}"
        )
    if not (run / DESCRIPTION_FILE).is_file():
        raise AdapterError(
            f"{path} has no {DESCRIPTION_FILE} beside it, so nothing says which weights its "
            "adapter belongs to; copy it from the run's folder, or repeat the run's command with "
            "--resume, which writes it"
        )
    described, checkpoint = read_description(run), load_checkpoint(path)
    if checkpoint.weights != described.base.digest:
        raise AdapterError(
            f"{path} was trained on weights {checkpoint.weights[:12]}, and {DESCRIPTION_FILE} "
            f"beside it is of {described.base.digest[:12]}: they are of different runs"
        )
    num_seen = checkpoint.step * checkpoint.global_batch
    seen = {"images_seen": num_seen, "skipped": len(checkpoint.bad_images)}
    description = described.model_copy(
        update={"data": described.data | seen, "metrics": final_metrics(run)}
    )
    adapter_of_checkpoint(folder, checkpoint, description)
    description.write(folder)
    return description


def apply_adapter(
    adapter: Path,
    output: Path,
    *,
    backbone: str | None = None,
    weights: Path | None = None,
    scale: float = 1.0,
    force: bool = False,
) -> Manifest:
    """Write the artifact of an adapter and the weights it was trained on.

    Args:
        adapter: An adapter's folder.
        output: Of the artifact.
        backbone: The base: a catalogue or timm name, or a folder; default what the run named.
        weights: Checkpoint file for it.
        scale: Factor on the adapter's part of the weights.
        force: Apply it to other weights too.

    Raises:
        TrainerError, ModelError: what the user can mend.
    """
    if output.exists() and not is_artifact(output):
        raise TrainerError(f"{output} exists and is not an artifact; choose another --output")
    description = read_description(adapter)
    recipe = make_recipe(description.recipe, f"of the adapter {adapter}")
    base = recipe.backbone.model_copy(
        update={
            "name": backbone or description.base.name,
            "weights": None if weights is None else str(weights),
            "random_weights": recipe.backbone.random_weights and backbone is None,
        }
    )
    model = load_backbone(
        recipe.model_copy(update={"backbone": base}), dtype=getattr(torch, description.base.dtype)
    )
    # Random weights have no origin.
    digest = model.origin.digest if model.origin else weights_digest(model.vit.state_dict())
    if digest != description.base.digest:
        given = f"{weights or base.name} ({model.name}) has digest {digest[:12]}"
        message = f"the adapter {adapter} was trained on {_named(description)}, and {given}"
        if not force:
            raise AdapterError(
                f"{message}; give the weights that it was trained on, or apply it to these all "
                "the same with --force"
            )
        logger.warning("%s; applied all the same", message)
    learned = None
    if description.border.fill == "learnable":
        learned = read_border(adapter, model.patch_size)
    Adapter.load(model, adapter).merge(scale)
    arguments = description.artifact_arguments()
    card = adapter / CARD_FILE
    text = card.read_text() if card.is_file() else f"# {model.name}, refined\n"
    if scale != 1 or digest != description.base.digest:
        applied = {"adapter_scale": scale, "base_digest": digest}
        arguments |= {"data": description.data | applied, "evaluations": ()}
        text += (
            f"\nThe adapter was applied by `trainer.merge` at scale {scale:g} to weights of digest "
            f"`{digest}`; the numbers above are of scale 1 and weights of digest "
            f"`{description.base.digest}`.\n"
        )
    return save_artifact(
        output, model, **arguments, model_card=text, learned_border=learned, adapter=adapter
    )


def _named(description: AdapterDescription) -> str:
    base = description.base
    return f"{base.file or base.name} ({base.architecture}) of digest {base.digest[:12]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.merge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--export",
        type=Path,
        metavar="RUN",
        help="write the adapter of a run's folder, of an artifact or of a checkpoint",
    )
    what.add_argument("--adapter", type=Path, metavar="DIR", help="adapter to merge into weights")
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="what is written")
    add("--backbone", metavar="NAME|PATH", help="base weights (default: as the run named them)")
    add("--weights", type=Path, metavar="FILE", help="checkpoint file for --backbone")
    add("--scale", type=float, default=1.0, help="factor on the adapter's part (default 1)")
    add("--force", action="store_true", help="apply it to weights it was not trained on")
    return parser


if __name__ == "__main__":
    sys.exit(main())
