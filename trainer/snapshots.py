"""Pictures of what the student has learned so far: OUTPUT/snapshots/step-000100.png.

The same images each time, encoded as they will be served. Every image has colours of its own, from
the principal components of its raw features, and keeps them: what changes in a picture from step to
step changed in the features.
"""

from pathlib import Path
from typing import Self

import torch
from PIL import Image

from trainer.config import Recipe
from trainer.data import BadImages, Source
from trainer.lora import Adapter
from trainer.prepare import (
    encode_raw,
    encode_surrounded,
    readable_images,
    register_border,
    uses_bf16,
)
from trainer.preview import ColorBasis, draw_sheet, png
from trainer.refiner import Refiner

SNAPSHOTS_FOLDER = "snapshots"


class Snapshots:
    """Draws the student of a refiner.

    Args:
        folder: Where the pictures go; made with the first.
        refiner: With the student in it.
        adapter: Of the refiner.
        recipe: Its sections `registers` and `run` are used.
        images_I3SS: uint8.
    """

    def __init__(
        self,
        folder: Path,
        refiner: Refiner,
        adapter: Adapter,
        recipe: Recipe,
        images_I3SS: torch.Tensor,
    ) -> None:
        self._folder = folder
        self._refiner = refiner
        self._images = images_I3SS
        self._border = register_border(recipe)
        device = refiner.device
        self._bf16 = uses_bf16(recipe, device)
        with adapter.off():
            raw_INC = encode_raw(refiner.backbone, images_I3SS, batch=1, bf16=self._bf16)
        self._bases = [ColorBasis.fit(tokens_NC) for tokens_NC in raw_INC]
        self._before_IN3 = self._colors(raw_INC)

    @classmethod
    def of_run(
        cls,
        output: Path,
        refiner: Refiner,
        adapter: Adapter,
        recipe: Recipe,
        images: Source,
        bad: BadImages,
    ) -> Self | None:
        """Of the first images of a run; None where the recipe asks for no snapshots."""
        run = recipe.run
        if not run.snapshot_every:
            return None
        order = range(len(images))
        shown = readable_images(
            images, order, recipe, bad, size=refiner.size, count=run.preview_images
        )
        return cls(output / SNAPSHOTS_FOLDER, refiner, adapter, recipe, shown)

    def take(self, step: int) -> Image.Image:
        """Draw the student as it is now, and write the picture. The student is left as it was."""
        refiner = self._refiner
        # A learned border stays where it is: the optimiser's state is there too.
        pixels = self._border.pixels(refiner.canvas, refiner.width, refiner.border)
        was_training = refiner.training
        refiner.eval()
        try:
            now_INC = encode_surrounded(
                refiner.backbone, self._images, pixels, width=refiner.width, bf16=self._bf16
            )
        finally:
            refiner.train(was_training)
        columns = {"before": self._before_IN3, f"step {step}": self._colors(now_INC)}
        picture = draw_sheet(self._images, columns, refiner.grid)
        self._folder.mkdir(exist_ok=True)
        (self._folder / f"step-{step:06}.png").write_bytes(png(picture))
        return picture

    def _colors(self, tokens_INC: torch.Tensor) -> torch.Tensor:
        pairs = zip(self._bases, tokens_INC, strict=True)
        return torch.stack([basis.colors(tokens_NC) for basis, tokens_NC in pairs])
