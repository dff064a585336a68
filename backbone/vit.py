"""A pre-trained vision transformer as a source of dense features.

    backbone = Backbone.load("vit_base_patch16_siglip_512.v2_webli")   # or a folder, see `load`
    features = backbone.encode(pixels)              # normalised [B, 3, H, W], whole patches
    features.tokens                                 # [B, N, C], one vector per patch
    with backbone.tap_attention([10, 11]) as taps:
        backbone.encode(pixels)
    q, k = taps[10]                                 # [B, heads, tokens, D]

Entries of `backbone.catalog` work by their names, and any other timm model of the VisionTransformer
and Eva families; position embeddings are resampled to the image's grid by timm.

Dimension key: B = images, N = patch tokens, P = prefix tokens, R = register tokens, C = channels,
T = all tokens (prefix and patch), D = channels of a head.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from backbone.architectures import RiceVit
from backbone.digest import Origin
from backbone.errors import ImageSizeError, ModelError
from backbone.loading import load_vit


@dataclass(frozen=True)
class DenseFeatures:
    """One vector per image patch, in raster order.

    Attributes:
        tokens: [B, N, C].
        grid: (h, w) in patches, h * w = N.
        patch_size: Side of a patch in pixels.
        prefix: Class and native register tokens, [B, P, C]; P may be 0.
        registers: Tokens of the stripped register border, [B, R, C]; None without a border, and
            when `DenseEncoder.encode` was not asked for them.
    """

    tokens: Tensor
    grid: tuple[int, int]
    patch_size: int
    prefix: Tensor
    registers: Tensor | None = None

    def __post_init__(self) -> None:
        h, w = self.grid
        if self.tokens.ndim != 3 or self.tokens.shape[1] != h * w:
            raise ValueError(
                f"tokens are {tuple(self.tokens.shape)}, expected [B, {h * w}, C] of a {h}x{w} grid"
            )

    @property
    def maps(self) -> Tensor:
        """The tokens as feature maps, [B, C, h, w]."""
        return self.tokens.transpose(1, 2).reshape(self.tokens.shape[0], -1, *self.grid)


@dataclass
class AttentionTaps(Mapping[int, tuple[Tensor, Tensor]]):
    """Queries and keys of the tapped layers, of the latest forward.

    `taps[layer]` is `(q, k)`, each [B, heads, T, D], as projected: after the q/k norm where the
    backbone has one, before rotary embedding and before the softmax scale. RICE alone is tapped
    after rotary embedding, as its recipe has it.
    """

    layers: tuple[int, ...]
    _queries: dict[int, Tensor] = field(default_factory=dict)
    _keys: dict[int, Tensor] = field(default_factory=dict)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self._keys:
            raise KeyError(f"layer {layer} was not recorded; tapped: {list(self.layers)}")
        return self._queries[layer], self._keys[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class Backbone(nn.Module):
    """A timm vision transformer and what is known about its dense features.

    Attributes:
        vit: The timm model. LoRA layers are injected into it in place.
        name: timm architecture name.
        patch_size: Side of a patch in pixels.
        mean, std: Normalisation of the input, per channel.
        native_size: (h, w) in pixels that the weights were trained at.
        dense_norm: Whether dense features are taken after the model's final norm.
        origin: Where the weights are from; None for random ones, and where nobody said.
    """

    def __init__(
        self,
        vit: nn.Module,  # refused below unless it is of a supported family
        *,
        name: str,
        dense_norm: bool = True,
        native_size: tuple[int, int] | None = None,
        origin: Origin | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(vit, VisionTransformer | Eva):
            raise ModelError(
                f"{name} is a {type(vit).__name__}; dense features need a timm model of the "
                "VisionTransformer or Eva family"
            )
        config: dict[str, Any] = vit.pretrained_cfg  # type: ignore[assignment]
        patch: tuple[int, int] = tuple(vit.patch_embed.patch_size)
        if patch[0] != patch[1]:
            raise ModelError(f"{name} has {patch[0]}x{patch[1]} px patches; only square ones work")
        self.vit: VisionTransformer | Eva = vit
        self.name = name
        self.patch_size = patch[0]
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        built_for = getattr(vit.patch_embed, "img_size", None) or config["input_size"][1:]
        self.native_size: tuple[int, int] = native_size or (int(built_for[0]), int(built_for[1]))
        self.dense_norm = dense_norm
        self.origin = origin
        self.embed_dim = int(vit.embed_dim)
        self.depth = len(vit.blocks)
        self.num_prefix_tokens = int(vit.num_prefix_tokens)
        _call_fused_projections(vit)

    @classmethod
    def load(
        cls,
        spec: str | Path,
        *,
        weights: Path | None = None,
        random_weights: bool = False,
        dense_norm: bool | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Load a backbone that has not been refined.

        Args:
            spec: Name of a catalogue entry or a timm model name (weights from the hub),
                `local-dir:PATH` or a folder in timm's format; for artifacts use `load_artifact`,
                which also reads the manifest.
            weights: A checkpoint for the model that `spec` names: a file, or a folder with a file
                or shards and their index, in any layout of `backbone.checkpoints` or of timm.
            random_weights: Build the model with random weights. Never a fallback.
            dense_norm: Take dense features after the final norm. None: as the catalogue says, and
                for a model that is not in it, yes.
            dtype: Of the parameters; large checkpoints are best read in bfloat16.

        Raises:
            ModelNotFoundError: no such model, or no weights without a network.
            ModelError: the model is of another family, or the weights do not fit.
        """
        vit, name, entry, origin = load_vit(
            str(spec), weights=weights, random_weights=random_weights, dtype=dtype
        )
        if dense_norm is None:
            dense_norm = entry.dense_norm if entry else True
        return cls(vit, name=name, dense_norm=dense_norm, origin=origin)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """The token grid (h, w) of an image of `height` x `width` pixels.

        Raises:
            ImageSizeError: a side is not a whole number of patches.
        """
        p = self.patch_size
        if height < p or width < p or height % p or width % p:
            near = [max(1, round(side / p)) * p for side in (height, width)]
            raise ImageSizeError(
                f"image is {height}x{width} px, which is not a whole number of {p} px patches; "
                f"resize to {near[0]}x{near[1]}"
            )
        return height // p, width // p

    def encode(self, pixels_B3HW: Tensor) -> DenseFeatures:
        """Dense features of the last layer. See `encode_layers`."""
        return self.encode_layers(pixels_B3HW, [-1])[0]

    def encode_layers(self, pixels_B3HW: Tensor, layers: Sequence[int]) -> list[DenseFeatures]:
        """Dense features of several layers from one forward.

        Args:
            pixels_B3HW: Normalised images, sides whole patches.
            layers: Block numbers from 0; negative ones count from the end. The final norm is
                applied to every layer when `dense_norm` says so.

        Returns:
            One `DenseFeatures` per entry of `layers`, in that order.

        Raises:
            ImageSizeError: the images are not whole patches.
            ValueError: a layer that the backbone does not have.
        """
        grid = self.grid(*pixels_B3HW.shape[-2:])
        wanted = [self.layer_number(layer) for layer in layers]
        ascending = sorted(set(wanted))
        outputs: list[Any] = self.vit.forward_intermediates(  # type: ignore[assignment]
            pixels_B3HW,
            indices=ascending,
            return_prefix_tokens=self.num_prefix_tokens > 0,
            norm=self.dense_norm,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        features: dict[int, DenseFeatures] = {}
        for layer, output in zip(ascending, outputs, strict=True):
            tokens, prefix = output if self.num_prefix_tokens else (output, output[:, :0])
            features[layer] = DenseFeatures(tokens, grid, self.patch_size, prefix)
        return [features[layer] for layer in wanted]

    def layer_number(self, layer: int) -> int:
        """A block number from 0, of one that may count from the end."""
        if not -self.depth <= layer < self.depth:
            raise ValueError(
                f"layer {layer} does not exist: {self.name} has {self.depth} blocks, "
                f"numbered {-self.depth} to {self.depth - 1}"
            )
        return layer % self.depth

    @contextlib.contextmanager
    def tap_attention(self, layers: Sequence[int]) -> Iterator[AttentionTaps]:
        """Record q and k of some layers during the forwards inside the `with`.

        timm calls `q_norm` and `k_norm` of an attention module whether its projections are fused or
        not, and whether it has a norm or an identity there: they are the one place where q and k
        pass by in every supported class.
        """
        wanted = tuple(dict.fromkeys(self.layer_number(layer) for layer in layers))
        taps = AttentionTaps(wanted)
        handles = []
        rotation: _Rotation | None = None
        if isinstance(self.vit, RiceVit):
            rotation = _Rotation(self.vit)
            handles.append(self.vit.patch_embed.register_forward_hook(rotation.prepare))
        for layer in wanted:
            attention = list(self.vit.blocks)[layer].attn
            for store, norm in ((taps._queries, "q_norm"), (taps._keys, "k_norm")):
                module = getattr(attention, norm, None)
                if not isinstance(module, nn.Module):
                    raise ModelError(
                        f"block {layer} of {self.name} ({type(attention).__name__}) has no {norm}: "
                        "its q and k cannot be tapped; switch the attention filter off"
                    )
                handles.append(module.register_forward_hook(_recorder(store, layer, rotation)))
        try:
            yield taps
        finally:
            for handle in handles:
                handle.remove()


class _Rotation:
    """RICE's rotary embedding for the grid of the forward that is under way."""

    def __init__(self, vit: RiceVit) -> None:
        self._vit = vit
        self._table: Tensor | None = None

    def prepare(self, _module: nn.Module, _inputs: Any, patches_BhwC: Tensor) -> None:
        h, w = patches_BhwC.shape[1:3]
        self._table = self._vit.rotary_table((h, w))

    def __call__(self, x_BHTD: Tensor) -> Tensor:
        assert self._table is not None
        return apply_rot_embed_cat(x_BHTD, self._table, half=True).type_as(x_BHTD)


def _recorder(store: dict[int, Tensor], layer: int, rotation: _Rotation | None) -> Any:
    def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        store[layer] = output if rotation is None else rotation(output)

    return record


def _call_fused_projections(vit: nn.Module) -> None:
    """Make EvaAttention call its fused `qkv` module when it has q and v biases.

    By default it passes `qkv.weight` to `F.linear` instead: an adapter or hook on the module would
    be dead, with no error and no gradient. The result is the same to the bit.
    """
    for module in vit.modules():
        if isinstance(module, EvaAttention) and module.qkv is not None:
            module.qkv_bias_separate = True
