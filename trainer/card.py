"""README.md of an artifact: the model card."""

from pathlib import Path
from string import Template
from typing import Any

from trainer.loop import Loop

_CARD = Template("""\
---
library_name: timm
license: $license
tags: [feature-extraction, vision-transformer, dense-features]
---

# $backbone, refined

A vision transformer whose dense features were refined by the recipe `$recipe` of vit-refinery,
after UniRefiner (arXiv 2605.19622): spurious tokens are gathered in a register border around the
image, and the image's own tokens say what is at their place. `preview.png` shows features before
and after.

| | |
|---|---|
| base weights | `$base`; licence: $license_words |
| input | RGB, mean $mean, std $std; refined at $size x $size px, patch size $patch |
| register border | $width patches wide at that size ($fill) |
| images | $images ($seen seen in $steps steps of $batch) |
| training time | $minutes min on $device |
| seed | $seed |

Means over the last steps of training, 20 at most:

| | |
|---|---|
$metrics

## Use

    python -m service --model PATH        # serves clean features, border added and stripped

    import backbone
    encoder = backbone.open_model("PATH")
    features, = encoder.encode(images)    # uint8 [B, 3, h, w] -> features.tokens [B, N, C]

timm alone loads the weights too, as `timm.create_model("local-dir:PATH")`; the border is then the
caller's to add. `refinery.json` has the whole recipe, `adapter/` the LoRA adapter in PEFT format.
""")

_SHOWN = ("loss", "alignment", "clean")


def model_card(loop: Loop, metrics: dict[str, float]) -> str:
    """The text of the card of a run that is done, without what is measured of its artifact.

    That is for `trainer.evaluate.record` to add, before the section on its use.
    """
    refiner, recipe, progress = loop.refiner, loop.recipe, loop.progress
    backbone = refiner.backbone
    base, licence = base_weights(loop)
    shown = [n for n in metrics if n in _SHOWN or n.startswith("clean_")]
    return _CARD.substitute(
        backbone=backbone.name,
        recipe=recipe.name,
        base=base,
        license=licence or "other",
        license_words=licence or "not stated in the weights' configuration; see their source",
        mean=tuple(round(value, 4) for value in backbone.mean),
        std=tuple(round(value, 4) for value in backbone.std),
        size=refiner.size,
        patch=backbone.patch_size,
        width=refiner.width,
        fill=recipe.registers.fill,
        images=len(loop.folder),
        seen=progress.step * loop.global_batch,
        steps=progress.step,
        batch=loop.global_batch,
        minutes=f"{progress.seconds / 60:.1f}",
        device=refiner.device.type.upper(),
        seed=recipe.run.seed,
        metrics="\n".join(f"| {name.replace('_', ' ')} | {metrics[name]:.4f} |" for name in shown),
    )


def base_weights(loop: Loop) -> tuple[str, str]:
    """What was refined, and its licence where the weights came with one."""
    section = loop.recipe.backbone
    if section.weights is not None:
        return f"{section.name}, {Path(section.weights).name}", ""
    if section.random_weights:
        return f"{section.name}, random weights", ""
    config: Any = loop.refiner.backbone.vit.pretrained_cfg
    return section.name, str(config.get("license") or "")
