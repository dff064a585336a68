"""Feature maps, finished images and items of requests, made without a model."""

from types import SimpleNamespace

import torch

from service.batcher import EncodedLayer
from service.boxes import Regions
from service.finishing import finish
from service.maps import FeatureMap
from service.options import FeatureOptions
from service.wire import ImageAnswer, Source
from service.work import Item
from tests.service.plans import plan, served_model

PATCH = 16
CHANNELS = 4
ENCODER = SimpleNamespace(digest="abc", patch_size=PATCH)
MODEL = served_model(ENCODER, name="demo")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def encoded_layer(grid, *, seed=0, channels=CHANNELS, dtype=torch.float32, **parts):
    """A layer of noise with one prefix token; `parts` replace what it has."""
    made = {
        "tokens_NC": noise(grid[0] * grid[1], channels, seed=seed, dtype=dtype),
        "prefix_PC": noise(1, channels, seed=seed + 1000, dtype=dtype),
        "registers_RC": None,
        "spurious_N2": None,
        "boxes_VC": None,
    }
    return EncodedLayer(**(made | parts))


def feature_map(grid=(2, 3), *, layers=None, regions=None, **about):
    """A map with one layer, which `about` describes, unless `layers` are given."""
    made = layers or (encoded_layer(grid, **about),)
    return FeatureMap(tuple(made), grid, (2 * PATCH * grid[0], 2 * PATCH * grid[1]), regions)


def regions(*boxes, box_size=1, normalize=False):
    """Boxes in shares of the image's sides."""
    return Regions(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), box_size, normalize)


def source(layers=(1,), **options):
    return Source(MODEL, layers, FeatureOptions(**options))


def answer(source, index=0, *, grid=(2, 3), boxes=None, **about):
    """Image `index` of noise as it is answered, with as many layers as the source has."""
    layers = [
        encoded_layer(grid, **({"seed": 10 * index + number} | about))
        for number in range(len(source.layers))
    ]
    features = feature_map(grid, layers=layers)
    return ImageAnswer(
        index=index,
        image=finish(features, boxes, source.options, index=index),
        original=features.original,
        resized=(grid[0] * PATCH, grid[1] * PATCH),
        num_boxes=boxes.num_boxes if boxes else None,
    )


def item(key, original=(64, 96), *, index=0, model=MODEL):
    """An image of a request whose map has the name `key`."""
    return Item(
        index=index,
        source=b"",
        original=original,
        asked_size=(32, 32),
        plan=plan(model=model),
        num_tokens=4,
        key=key,
        regions=None,
    )
