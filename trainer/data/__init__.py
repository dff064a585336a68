"""Training images: where they lie, their order, and batches that are ready in time.

source = find_images("photos", seed=0, max_images=5000)   # a folder, a list, tar shards
with contextlib.closing(Batches(source, section, size=512, seed=0, bad=bad)) as stream:
    for images, position in stream:
        images                                             # uint8 [B, 3, size, size]
"""

from trainer.data.loader import BadImages, Batch, Batches, source_image, square_image
from trainer.data.rate import LoaderWatch
from trainer.data.shards import TarShards
from trainer.data.sources import ImageFolder, Source, find_images

# The name that reads best in a loop.
batches = Batches

__all__ = [
    "BadImages",
    "Batch",
    "Batches",
    "ImageFolder",
    "LoaderWatch",
    "Source",
    "TarShards",
    "batches",
    "find_images",
    "source_image",
    "square_image",
]
