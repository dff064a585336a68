"""The adapter: LoRA on every linear layer of the blocks, by full name.

    adapter = Adapter.attach(backbone, section, seed=0)   # in place: backbone.vit is the student
    with adapter.off():                                   # and here it is the teacher
        backbone.encode(pixels)

Short names of layers would match too much: `proj` is also the patch embedding's convolution, and
`fc1` also sits in pooling heads that dense features do not use.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from backbone import Backbone
from backbone.errors import ModelError
from trainer.config import LoraSection


def linear_names(vit: nn.Module) -> list[str]:
    """Full names of the linear layers in `blocks`."""
    return [
        name
        for name, module in vit.named_modules()
        if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]


class Adapter:
    """LoRA layers in a backbone's blocks; everything else in it is frozen."""

    def __init__(self, backbone: Backbone, model: PeftModel) -> None:
        self.backbone = backbone
        self._model = model
        self._layers = [m for m in model.modules() if isinstance(m, LoraLayer)]

    @classmethod
    def attach(cls, backbone: Backbone, section: LoraSection, *, seed: int) -> "Adapter":
        """Put an adapter into `backbone.vit`, in place. It changes nothing before training.

        Raises:
            ModelError: the backbone has no linear layers in its blocks.
        """
        names = linear_names(backbone.vit)
        if not names:
            raise ModelError(f"{backbone.name} has no linear layers in its blocks to adapt")
        backbone.eval().requires_grad_(False)
        config = LoraConfig(
            r=section.rank,
            lora_alpha=section.alpha,  # type: ignore[arg-type]  # any number works
            lora_dropout=section.dropout,
            target_modules=names,
            bias="none",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(backbone.vit, config)
        assert isinstance(model, PeftModel)
        return cls(backbone, model)

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the backbone computes what it did before the adapter was attached."""
        with self._model.disable_adapter():
            yield

    def train_dropout(self, mode: bool) -> None:
        """Switch the adapter's dropout; the backbone itself always stays in evaluation mode."""
        self.backbone.eval()
        for layer in self._layers:
            layer.lora_dropout.train(mode)

    def save(self, folder: Path) -> None:
        """Write the adapter in PEFT's format."""
        self._model.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's form for a card, not filled in

    def merge(self) -> None:
        """Add the adapter to the weights, in place, and remove it from `backbone.vit`."""
        self.backbone.vit = self._model.merge_and_unload().eval()
