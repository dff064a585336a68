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
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from backbone import Backbone
from backbone.errors import ModelError
from trainer.config import LoraSection
from trainer.errors import AdapterError
from trainer.lora_linear import LoraLinear, note_origins


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
        self._hooks: list[RemovableHandle] = []

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
        config._register_custom_module({nn.Linear: LoraLinear})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = get_peft_model(backbone.vit, config)
        assert isinstance(model, PeftModel)
        adapter = cls(backbone, model)
        adapter._hooks = note_origins(backbone.vit.blocks)
        return adapter

    @classmethod
    def load(cls, backbone: Backbone, folder: Path) -> "Adapter":
        """Put a saved adapter into `backbone.vit`, in place.

        Raises:
            AdapterError: it cannot be read, or is made for another architecture.
        """
        path = folder / SAFETENSORS_WEIGHTS_NAME
        if not (folder / CONFIG_NAME).is_file():  # PEFT would ask the hub for such a repository
            raise AdapterError(f"the adapter {folder} has no {CONFIG_NAME}; copy it again")
        backbone.eval().requires_grad_(False)
        try:
            stored = LoraConfig.from_pretrained(str(folder))
            # Only what Adapter.attach writes: other settings of PEFT may change the base weights.
            config = LoraConfig(
                r=stored.r,
                lora_alpha=stored.lora_alpha,
                lora_dropout=stored.lora_dropout,
                target_modules=stored.target_modules,
                bias="none",
            )
            state = load_file(path)
            model = get_peft_model(backbone.vit, config)
        except (OSError, ValueError, TypeError, SafetensorError) as error:
            raise AdapterError(
                f"the adapter {folder} cannot be put into {backbone.name}: {error}"
            ) from error
        assert isinstance(model, PeftModel)
        wanted = {n: t.shape for n, t in get_peft_model_state_dict(model).items()}
        found = {n: t.shape for n, t in state.items()}
        if wanted != found:
            name = min(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
            raise AdapterError(
                f"{path} does not fit {backbone.name}: {name} is {_shape(found.get(name))} in the "
                f"file and {_shape(wanted.get(name))} in the model; give the backbone that the "
                "adapter was trained on"
            )
        set_peft_model_state_dict(model, state)
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

    def merge(self, scale: float = 1.0) -> None:
        """Add the adapter to the weights, in place, and remove it from `backbone.vit`.

        On the CPU, whatever it was trained on, so that an adapter merged elsewhere gives the same
        weights to the bit.

        Args:
            scale: Factor on the adapter's part.
        """
        model = self._model.cpu()
        for layer in self._layers:
            layer.scale_layer(scale)
        for hook in self._hooks:
            hook.remove()
        self.backbone.vit = model.merge_and_unload().eval()


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(list(shape))
