"""Subjects whose tokens are known: each patch of a picture is of one colour, and its red is its id.

Ids below 32 become one token that is the same everywhere, a fixed pattern; those below 64 one that
depends on the whole canvas, a global proxy; the others tokens of their own, which say what is
there.
"""

import torch
from torch.nn import functional as F

from trainer.evaluate.pictures import Pictures

PATCH, GRID = 4, 8
SIZE = PATCH * GRID
FIXED, PROXY, CONTENT = range(0, 32), range(32, 64), range(64, 256)


class PlantedSubject:
    """As `trainer.evaluate.subjects.Subject` has it; `spurious=False` refines it perfectly."""

    patch_size = PATCH
    native_size = (SIZE, SIZE)

    def __init__(self, name="raw", *, spurious=True):
        self.name = name
        self.spec = f"planted {name}"
        self.digest = name * 8
        self.key = name
        self._spurious = spurious

    def encode(self, images):
        half = PATCH // 2
        ids = images[:, 0, half::PATCH, half::PATCH].flatten(1).long()
        tokens = F.one_hot(ids, 2000).float()
        if self._spurious:
            is_fixed, is_proxy = ids < FIXED.stop, (ids >= PROXY.start) & (ids < PROXY.stop)
            tokens[is_fixed] = F.one_hot(torch.tensor(256), 2000).float()
            scene = F.one_hot(300 + ids.sum(dim=1) % 1699, 2000).float()
            tokens = torch.where(is_proxy[..., None], scene[:, None], tokens)
        return tokens


class SameSubject(PlantedSubject):
    """One token everywhere."""

    def encode(self, images):
        return torch.ones(len(images), images[0, 0].numel() // PATCH**2, 16)


class NoiseSubject(PlantedSubject):
    """Tokens of nothing."""

    def encode(self, images):
        generator = torch.Generator().manual_seed(int(images.long().sum()))
        shape = (len(images), images[0, 0].numel() // PATCH**2, 64)
        return torch.randn(shape, generator=generator)


def picture(ids):
    """uint8 [3, H, W] of patches [h, w] with these ids."""
    pixels = torch.as_tensor(ids, dtype=torch.uint8)
    pixels = pixels.repeat_interleave(PATCH, dim=0).repeat_interleave(PATCH, dim=1)
    return pixels.expand(3, -1, -1).contiguous()


def content(side, seed):
    """A picture of places that all differ, of ids that the reference has not."""
    generator = torch.Generator().manual_seed(seed)
    return picture(64 + torch.randperm(144, generator=generator)[: side**2].view(side, side))


def reference():
    """Patterns of both kinds along every edge, and content of its own."""
    rows = torch.arange(GRID)
    ids = torch.full((GRID, GRID), 250)
    ids[(rows[:, None] + rows) % 3 == 0] = 0
    ids[(rows[:, None] + rows) % 3 == 1] = 40
    return picture(ids)


def pictures(count=4, num_fixed=6, num_proxy=10):
    """Images with so many tokens of either kind among 64."""
    images = []
    for seed in range(count):
        image = content(GRID, seed)
        ids = image[0, ::PATCH, ::PATCH].flatten().clone()
        ids[:num_fixed] = 5
        ids[20 : 20 + num_proxy] = 50
        images.append(picture(ids.view(GRID, GRID)))
    larger = [content(GRID + GRID // 4, seed) for seed in range(count)]
    return Pictures(torch.stack(images), torch.stack(larger), reference())
