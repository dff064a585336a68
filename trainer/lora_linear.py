"""A linear layer with its LoRA in one step of the graph, which keeps little for the backward pass.

PEFT's own forward keeps, beside the input of every layer, the input after dropout and (on a CPU)
the dropout's factors as numbers. Here a layer keeps its input alone, and draws its dropout again
from a seed; on a CPU, where drawing is slow, it keeps what was drawn as bytes. Where the input is
what a norm or an activation made, not even that is kept: those keep their own input anyway, from
which the backward pass makes it again, with the same bits.

Dimension key: X = tokens of all samples, I = channels in, O = channels out, r = rank.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from timm.layers.activations import GELUTanh, QuickGELU
from timm.layers.norm import RmsNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

# Of one tensor, by elements or by rows, and cheap: a thousandth of the layer that follows.
_CHEAP = (nn.LayerNorm, RmsNorm, nn.GELU, nn.SiLU, nn.ReLU, GELUTanh, QuickGELU)
_LEVELS = 1 << 16  # dropout is drawn 16 bits at a time: a draw costs more than what is done with it


class Origin(NamedTuple):
    """How a tensor was made: `make(source)` gives it again."""

    make: Callable[[Tensor], Tensor]
    source: Tensor


class LoraLinear(Linear):
    """PEFT's layer, under its names, with another forward. Dropout differs in the draws only."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name, *others = self.active_adapters
        if self.disable_adapters or self.merged or others or args or kwargs:
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        base = self.get_base_layer()
        dropout = self.lora_dropout[name]
        share = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        # Of the global generator, so that checkpointing, which rewinds it, draws the same again.
        seed = int(torch.randint(2**62, ())) if share else 0
        out: Tensor = _Adapted.apply(
            x,
            base.weight,
            base.bias,
            self.lora_A[name].weight,
            self.lora_B[name].weight,
            getattr(x, "_origin", None) if torch.is_grad_enabled() else None,
            self.scaling[name],
            share,
            seed,
        )
        return out


def note_origins(blocks: nn.Module) -> list[RemovableHandle]:
    """Make norms and activations say how to make their output again, as long as the hooks stay."""
    cheap = [module for module in blocks.modules() if isinstance(module, _CHEAP)]
    return [module.register_forward_hook(_note_origin) for module in cheap]


def _note_origin(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():  # else it would only keep the input alive
        output._origin = Origin(module.forward, inputs[0].detach())  # type: ignore[attr-defined]


class _Adapted(torch.autograd.Function):
    """`x W^T + bias + scale * dropout(x) A^T B^T`; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        down_rI: Tensor,
        up_Or: Tensor,
        origin: Origin | None,
        scale: float,
        share: float,
        seed: int,
    ) -> Tensor:
        device = x.device.type
        narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        ctx.dtypes = x.dtype, down_rI.dtype, up_Or.dtype
        ctx.share, ctx.seed = round(share * _LEVELS) / _LEVELS, seed
        ctx.scale = scale / (1 - ctx.share)
        ctx.make = None if origin is None else origin.make
        ctx.autocast = narrow if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            x, down_rI, up_Or = (t.to(narrow) for t in (x, down_rI, up_Or))
            bias_O = None if bias_O is None else bias_O.to(narrow)
            out = F.linear(x, weight_OI.to(narrow), bias_O)
            kept = _kept(x, ctx.share, seed)
            hidden_Xr = (x if kept is None else x * kept).flatten(0, -2) @ down_rI.mT
            out.view(-1, out.shape[-1]).addmm_(hidden_Xr, up_Or.mT, alpha=ctx.scale)
        ctx.save_for_backward(
            x if origin is None else origin.source,
            weight_OI,
            down_rI,
            up_Or,
            hidden_Xr,
            kept if device == "cpu" else None,
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OI, down_rI, up_Or, hidden_Xr, kept = ctx.saved_tensors
        if ctx.make is not None:
            # As in the forward pass: under autocast a norm takes an input of another dtype than its
            # weights have, and elsewhere on a GPU it refuses it.
            autocast = torch.autocast(
                grad.device.type, ctx.autocast, enabled=ctx.autocast is not None
            )
            with torch.no_grad(), autocast:
                x = ctx.make(x)
            x = x.to(grad.dtype)
        grad_XO = grad.flatten(0, -2)
        grad_up_Or = (grad_XO.mT @ hidden_Xr).mul_(ctx.scale)
        grad_hidden_Xr = (grad_XO @ up_Or).mul_(ctx.scale)
        if kept is None:
            kept = _kept(x, ctx.share, ctx.seed)
        dropped_XI = (x if kept is None else x * kept).flatten(0, -2)
        grad_down_rI = grad_hidden_Xr.mT @ dropped_XI
        grad_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            shape = x.shape
            del x, dropped_XI
            grad_XI = grad_XO @ weight_OI.to(grad.dtype)
            if kept is None:
                grad_XI.addmm_(grad_hidden_Xr, down_rI)
            else:
                grad_XI.addcmul_(grad_hidden_Xr @ down_rI, kept.flatten(0, -2))
            grad_x = grad_XI.view(shape).to(ctx.dtypes[0])
        return (
            grad_x,
            None,
            None,
            grad_down_rI.to(ctx.dtypes[1]),
            grad_up_Or.to(ctx.dtypes[2]),
            *(None,) * 4,
        )


def _kept(x: Tensor, share: float, seed: int) -> Tensor | None:
    """What dropout leaves of `x`, bool; None when it is all. The same whenever the seed is."""
    if share == 0:
        return None
    generator = torch.Generator(x.device).manual_seed(seed)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    level = round(share * _LEVELS) - _LEVELS // 2
    return (words.view(torch.int16)[: x.numel()] >= level).view(x.shape)
