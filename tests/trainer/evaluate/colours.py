"""A subject that sees mean colours, and folders of images whose targets those tell."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

PATCH = 8


class Colours:
    """Tokens are the mean colours of 8 px patches; counts what it encodes."""

    name = "raw"
    spec = "models/colours"
    digest = "c" * 64
    patch_size = PATCH
    native_size = (32, 48)

    def __init__(self, *, name: str = "raw", key: str = "c0104") -> None:
        self.name = name
        self.key = key
        self.num_encoded = 0

    def encode(self, images_B3HW: Tensor) -> Tensor:
        self.num_encoded += len(images_B3HW)
        pooled = torch.nn.functional.avg_pool2d(images_B3HW.float() / 255, PATCH)
        return pooled.flatten(2).transpose(1, 2)


def write_images(folder, kind, targets, *, num_train=6, num_val=2):
    """Images of dark and bright columns, 48x32 px, and what `targets` makes of their classes."""
    generator = np.random.default_rng(0)
    for part, count in (("train", num_train), ("val", num_val)):
        for name in ("images", kind):
            (folder / part / name).mkdir(parents=True)
        for index in range(count):
            cells = np.broadcast_to(generator.permutation([0, 0, 0, 1, 1, 1]), (4, 6))
            bright = cells.astype(np.uint8).repeat(PATCH, axis=0).repeat(PATCH, axis=1)
            image = np.repeat(bright[..., None] * 200, 3, axis=2)
            Image.fromarray(image).save(folder / part / "images" / f"{index}.png")
            Image.fromarray(targets(bright)).save(folder / part / kind / f"{index}.png")
    return folder
