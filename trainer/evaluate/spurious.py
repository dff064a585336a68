"""How many tokens of an image are spurious, by kind; no labels needed.

Each image is encoded twice, as it is served (a refined backbone with its register border): alone,
and joined with a strip of the reference image. A token is

* a fixed pattern (FP) when it resembles a token of the reference image encoded alone;
* a global proxy (GP) when it resembles a token of the strip that shares its canvas;
* an attention hijackee (AH) when it gets little attention from the image's tokens.

"Resembles" is a cosine above a threshold. A refined backbone is compared with its raw one under the
same thresholds (`Thresholds.of_scores` of the raw one) and by the same patterns: what is counted
then is how many of its tokens still carry the raw backbone's spurious features. Against its own
patterns the two differ in both, tokens and what they are compared with.

Dimension key: B = images, N = tokens of an image, S = tokens of unrelated content, C = channels.

Source: UniRefiner, arXiv:2605.19622, the three kinds and their tests.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from backbone import DenseEncoder
from backbone.registers import register_mask
from kernels import Flow
from trainer.channels import unit_tokens
from trainer.crops import Side, compose
from trainer.filters import attention_hijack, crop_inflow, max_cosine_scores

Encode = Callable[[Tensor], Sequence[Tensor]]
"""uint8 images [B, 3, h, w] to tokens [B, N, C] of every layer that is measured."""

STRIP_SHARE = 0.35
"""Width of the strip over the image's."""


class SpuriousScores(NamedTuple):
    """Of every token of every image, one after the other."""

    fixed_pattern: Tensor  # [tokens], best cosine with the reference image's tokens
    global_proxy: Tensor  # [tokens], best cosine with the strip's tokens
    is_hijacked: Tensor  # bool [tokens]; all False without attention layers

    def by_image(self, num_images: int) -> list["SpuriousScores"]:
        """The scores of each image, all of one size."""
        parts = (scores.chunk(num_images) for scores in self)
        return [SpuriousScores(*scores) for scores in zip(*parts, strict=True)]


class Thresholds(NamedTuple):
    """Cosines above which a token counts as spurious."""

    fixed_pattern: float = 0.5
    global_proxy: float = 0.5

    @classmethod
    def of_scores(cls, scores: SpuriousScores, sigma: float) -> "Thresholds":
        """Mean plus `sigma` standard deviations of a backbone's own scores."""
        found = (s.mean() + sigma * s.std() for s in (scores.fixed_pattern, scores.global_proxy))
        return cls(*(float(threshold) for threshold in found))


class SpuriousShares(NamedTuple):
    """Shares of the images' tokens, 0 to 1."""

    fixed_pattern: float
    global_proxy: float
    fp_gp: float
    """Fixed pattern or global proxy."""
    hijacked: float
    """0 also where nobody asked for it."""
    clean: float
    """None of the three."""


class Pair(NamedTuple):
    """Whose tokens are compared with whose patterns: numbers of encoders."""

    tokens: int
    patterns: int


@torch.inference_mode()
def pattern_scores(
    encoders: Sequence[Encode],
    pairs: Sequence[Pair],
    images: Iterable[Tensor],
    reference: Tensor,
    *,
    patch_size: int,
    channels: Sequence[int] = (),
    strip_share: float = STRIP_SHARE,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[SpuriousScores]]:
    """Score every token of some images; every encoder encodes an image twice, whatever the pairs.

    Args:
        encoders: The backbones as they are served.
        pairs: What is compared with what.
        images: uint8 [3, h, w], whole patches, all of one size.
        reference: The reference image, uint8, at the same size.
        patch_size: Of all encoders.
        channels: Channels to zero before cosines; a refined backbone's manifest has them.
        strip_share: Width of the strip over the image's.
        advance: Told about every image that is done.

    Returns:
        The scores of every pair, and in it of every layer of the encoders.
    """

    def unit(layers: Sequence[Tensor]) -> list[Tensor]:
        return [unit_tokens(tokens, _channel_index(channels, tokens)) for tokens in layers]

    reference_13hw = reference[None]
    references = [unit(encode(reference_13hw)) for encode in encoders]
    num_layers = len(references[0])
    found: list[list[tuple[list[Tensor], list[Tensor]]]] = [
        [([], []) for _ in range(num_layers)] for _ in pairs
    ]
    sides = get_args(Side)
    for number, image in enumerate(images):
        image_13hw = image[None]
        composite = compose(
            image_13hw,
            reference_13hw,
            side=sides[number % len(sides)],  # every side as often, the same for every backbone
            share=strip_share,
            patch_size=patch_size,
        )
        alone = [unit(encode(image_13hw)) for encode in encoders]
        joined = [unit(encode(composite.pixels)) for encode in encoders]
        for (of, against), layers in zip(pairs, found, strict=True):
            for layer, (fixed, proxies) in enumerate(layers):
                own_1TC, other_1TC = joined[of][layer], joined[against][layer]
                is_image = composite.is_crop.to(own_1TC.device)
                fixed.append(max_cosine_scores(alone[of][layer], references[against][layer]))
                proxies.append(max_cosine_scores(own_1TC[:, is_image], other_1TC[:, ~is_image]))
        advance(1)
    if not found[0][0][0]:
        raise ValueError("no images to score")
    return [[_joined(*parts) for parts in layers] for layers in found]


def _joined(fixed: list[Tensor], proxies: list[Tensor]) -> SpuriousScores:
    fixed_pattern = torch.cat(fixed).flatten().cpu()
    nobody = torch.zeros_like(fixed_pattern, dtype=torch.bool)
    return SpuriousScores(fixed_pattern, torch.cat(proxies).flatten().cpu(), nobody)


def _channel_index(channels: Sequence[int], tokens: Tensor) -> Tensor | None:
    return torch.tensor(list(channels), device=tokens.device) if channels else None


@torch.inference_mode()
def hijacked_tokens(
    encoder: DenseEncoder,
    images: Iterable[Tensor],
    *,
    layers: Sequence[int],
    register_width: int | None = None,
    flow: Flow = "paper",
    threshold: float = -0.5,
) -> Tensor:
    """Which tokens of images are attention hijackees, one image after the other: bool [tokens].

    Args:
        encoder: The backbone as it is served.
        images: uint8 [3, h, w], whole patches, all of one size.
        layers: Blocks whose attention is summed.
        register_width: Of the border, in patches; default the artifact's rule.
        flow: See `kernels.attention_inflow`.
        threshold: Standard deviations of the image, see `trainer.filters.attention_hijack`.
    """
    found = []
    for image in images:
        with encoder.backbone.tap_attention(layers) as taps:
            features = encoder.encode(image[None], register_width=register_width)[0]
        height, image_width = image.shape[-2:]
        width = encoder.register_width(height, image_width, register_width)
        is_image = ~register_mask(features.grid, width, encoder.device)
        positions = encoder.backbone.num_prefix_tokens + is_image.nonzero().flatten()
        inflow_1N = crop_inflow([taps[layer] for layer in taps], positions, variant=flow)
        kept_1N = torch.ones_like(inflow_1N, dtype=torch.bool)
        found.append(~attention_hijack(inflow_1N, kept_1N, threshold=threshold))
    return torch.cat(found).flatten().cpu()


def spurious_scores(
    encoder: DenseEncoder,
    images: Iterable[Tensor],
    reference: Tensor,
    *,
    against: DenseEncoder | None = None,
    channels: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
    strip_share: float = STRIP_SHARE,
) -> SpuriousScores:
    """Score one backbone's last layer.

    Args:
        encoder, images, reference, channels, strip_share: See `pattern_scores`.
        against: Whose patterns are looked for; default the encoder's own.
        attention_layers: Blocks for the test of AH, see `hijacked_tokens`; none skips it.
    """
    images = list(images)
    encoders = [encoder] if against is None or against is encoder else [encoder, against]
    [[scores]] = pattern_scores(
        [_last_layer(each) for each in encoders],
        [Pair(0, len(encoders) - 1)],
        images,
        reference,
        patch_size=encoder.patch_size,
        channels=channels,
        strip_share=strip_share,
    )
    if not attention_layers:
        return scores
    hijacked = hijacked_tokens(encoder, images, layers=attention_layers)
    return scores._replace(is_hijacked=hijacked)


def _last_layer(encoder: DenseEncoder) -> Encode:
    return lambda images: [features.tokens for features in encoder.encode(images)]


def spurious_shares(scores: SpuriousScores, thresholds: Thresholds) -> SpuriousShares:
    """Shares of tokens over the thresholds."""
    is_fixed = scores.fixed_pattern > thresholds.fixed_pattern
    is_proxy = scores.global_proxy > thresholds.global_proxy
    is_fp_gp = is_fixed | is_proxy

    def share(mask: Tensor) -> float:
        return float(mask.float().mean())

    return SpuriousShares(
        fixed_pattern=share(is_fixed),
        global_proxy=share(is_proxy),
        fp_gp=share(is_fp_gp),
        hijacked=share(scores.is_hijacked),
        clean=share(~is_fp_gp & ~scores.is_hijacked),
    )
