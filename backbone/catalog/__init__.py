"""The backbones that are known: how each is built, and what is known about its dense features.

    entry = find("siglip2-so400m")
    entry.build()                     # a timm model with random weights; under torch.device("meta")
                                      # it costs no memory

`Backbone.load` takes an entry's name; so does a recipe. Any other timm ViT works by its timm name.

Sources: the models' papers and cards, timm's configurations (a test compares), and for dense norm,
attention layers and resolution the recipes of the authors' release where there is one. For the rest
the resolution makes a grid of 32 x 32 patches, as those recipes do with 224 px models too.
"""

from collections.abc import Mapping
from types import MappingProxyType

from backbone.catalog import families, singles
from backbone.catalog.entry import Entry

__all__ = ["CATALOG", "Entry", "find"]

_SOURCES = (
    families.dinov2,
    families.dinov3,
    singles.siglip2,
    singles.large,
    singles.clip,
    families.aimv2,
    families.pe_spatial,
    families.c_radio,
)

CATALOG: Mapping[str, Entry] = MappingProxyType(
    {entry.name: entry for source in _SOURCES for entry in source()}
)
"""Every entry by its name."""


def find(name: str) -> Entry | None:
    """The entry of a catalogue name, of its timm name with tag, or of its constructor; or None."""
    if name in CATALOG:
        return CATALOG[name]
    return next((e for e in CATALOG.values() if name in (e.timm, e.constructor)), None)
