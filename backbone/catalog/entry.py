"""What the catalogue says about a backbone."""

from dataclasses import dataclass
from typing import Any

import timm
from torch import nn

from backbone import architectures
from backbone.architectures import Statistics


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A backbone of the catalogue.

    Attributes:
        name: What a recipe calls it.
        timm: timm model name with the tag of its weights; None for our own constructors.
        constructor: Name of a function in `backbone.architectures`; None for timm's.
        depth: Blocks, without `dropped_blocks`.
        width: Channels of a token.
        heads: Attention heads.
        hidden: Channels between the two layers of the MLP (of one branch, when it is gated).
        patch: Side of a patch in pixels.
        prefix: Class and native register tokens.
        native_size: Side in pixels that the weights' position embeddings are for.
        size: Side in pixels to refine at.
        r_reg: Image tokens per register token of width.
        dense_norm: Whether dense features are taken after the final norm.
        hijack_layers: First and last block of the attention-hijack filter; None where the
            authors switch it off or have no recipe.
        dropped_blocks: Blocks at the end of the checkpoint that are left out.
        statistics: Normalisation of the input; `mean` and `std` are its two parts.
        licence: Of the weights; read the model card before distributing refined ones.
        hub: Hugging Face ids, the one that is downloaded first.
        notes: What a user has to know.
    """

    name: str
    timm: str | None = None
    constructor: str | None = None
    depth: int
    width: int
    heads: int
    hidden: int
    patch: int
    prefix: int
    native_size: int
    size: int
    r_reg: int = 32
    dense_norm: bool = True
    hijack_layers: tuple[int, int] | None = None
    dropped_blocks: int = 0
    statistics: Statistics
    licence: str
    hub: tuple[str, ...]
    notes: str = ""

    def __post_init__(self) -> None:
        assert (self.timm is None) != (self.constructor is None), self.name
        assert self.constructor is None or hasattr(architectures, self.constructor), self.name

    @property
    def mean(self) -> tuple[float, float, float]:
        return self.statistics.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.statistics.std

    @property
    def architecture(self) -> str:
        """The name that timm builds it by, without tag."""
        name = self.timm or self.constructor
        assert name is not None
        return name.split(".", 1)[0]

    @property
    def model_args(self) -> dict[str, Any]:
        """Constructor arguments that differ from the architecture's own."""
        return {"depth": self.depth} if self.dropped_blocks else {}

    def build(self, **changes: Any) -> nn.Module:
        """The model with random weights, without classifier, for any image size."""
        arguments = {"num_classes": 0, "dynamic_img_size": True, **self.model_args, **changes}
        return timm.create_model(self.timm or self.architecture, pretrained=False, **arguments)
