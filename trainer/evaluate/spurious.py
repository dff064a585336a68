"""How many tokens of an image are spurious, by kind; no labels needed.

Each image is encoded twice, as it is served (a refined backbone with its register border): alone,
and joined with a strip of the reference image. A token is

* a fixed pattern (FP) when it resembles a token of the reference image encoded alone;
* a global proxy (GP) when it resembles a token of the strip that shares its canvas;
* an attention hijackee (AH) when it gets little attention from the image's tokens.

"Resembles" is a cosine above a threshold. A refined backbone is compared with its raw one under the
same thresholds (`Thresholds.of_scores` of the raw one) and, with `against`, by the same patterns:
what is counted then is how many of its tokens still carry the raw backbone's spurious features.
Against its own patterns the two differ in both, tokens and what they are compared with.

Dimension key: B = images, N = tokens of an image, S = tokens of unrelated content, C = channels.

Source: UniRefiner, arXiv:2605.19622, the three kinds and their tests.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from backbone import DenseEncoder, DenseFeatures
from backbone.registers import register_mask
from kernels import Flow
from trainer.channels import unit_tokens
from trainer.crops import Side, compose
from trainer.filters import attention_hijack, crop_inflow, max_cosine_scores


class SpuriousScores(NamedTuple):
    """Of every token of every image, one after the other."""

    fixed_pattern: Tensor  # [tokens], best cosine with the reference image's tokens
    global_proxy: Tensor  # [tokens], best cosine with the strip's tokens
    is_hijacked: Tensor  # bool [tokens]; all False without attention layers


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
    clean: float
    """None of the three."""


def spurious_scores(
    encoder: DenseEncoder,
    images: Iterable[Tensor],
    reference: Tensor,
    *,
    against: DenseEncoder | None = None,
    channels: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
    flow: Flow = "paper",
    hijack_threshold: float = -0.5,
    strip_share: float = 0.35,
) -> SpuriousScores:
    """Score every token of some images.

    Args:
        encoder: The backbone as it is served.
        images: uint8 [3, h, w], whole patches, all of one size.
        reference: The reference image, uint8, at the same size.
        against: Whose tokens of the reference image and the strips are compared with; default the
            encoder's own.
        channels: Channels to zero before cosines; a refined backbone's manifest has them.
        attention_layers: Blocks whose attention is tapped for AH; none skips the test.
        flow: See `kernels.attention_inflow`.
        hijack_threshold: Standard deviations, see `trainer.filters.attention_hijack`.
        strip_share: Width of the strip over the image's.
    """
    against = against or encoder
    index = torch.tensor(list(channels), device=encoder.device) if channels else None

    def unit(features: DenseFeatures) -> Tensor:
        return unit_tokens(features.tokens, index)

    reference_13hw = reference[None]
    reference_1SC = unit(against.encode(reference_13hw)[0])
    sides = get_args(Side)
    fixed, proxies, hijacked = [], [], []
    for number, image in enumerate(images):
        image_13hw = image[None]
        with encoder.backbone.tap_attention(attention_layers) as taps:
            alone = encoder.encode(image_13hw)[0]
        fixed.append(max_cosine_scores(unit(alone), reference_1SC))
        side = sides[number % len(sides)]  # every side as often, and the same for every backbone
        composite = compose(
            image_13hw,
            reference_13hw,
            side=side,
            share=strip_share,
            patch_size=encoder.patch_size,
        )
        joined_1TC = unit(encoder.encode(composite.pixels)[0])
        compared_1TC = (
            joined_1TC if against is encoder else unit(against.encode(composite.pixels)[0])
        )
        is_image = composite.is_crop.to(joined_1TC.device)
        proxies.append(max_cosine_scores(joined_1TC[:, is_image], compared_1TC[:, ~is_image]))
        if attention_layers:
            inflow_1N = crop_inflow(
                [taps[layer] for layer in taps], _image_positions(encoder, alone), variant=flow
            )
            kept_1N = torch.ones_like(inflow_1N, dtype=torch.bool)
            clean_1N = attention_hijack(inflow_1N, kept_1N, threshold=hijack_threshold)
            hijacked.append(~clean_1N)
    if not fixed:
        raise ValueError("no images to score")
    fixed_pattern = torch.cat(fixed).flatten().cpu()
    return SpuriousScores(
        fixed_pattern,
        torch.cat(proxies).flatten().cpu(),
        torch.cat(hijacked).flatten().cpu()
        if hijacked
        else torch.zeros_like(fixed_pattern, dtype=torch.bool),
    )


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


def _image_positions(encoder: DenseEncoder, features: DenseFeatures) -> Tensor:
    """Where the image's tokens are among all tokens of the backbone's forward."""
    h, w = features.grid
    p = features.patch_size
    width = encoder.register_width(h * p, w * p)
    is_image = ~register_mask(features.grid, width, encoder.device)
    return encoder.backbone.num_prefix_tokens + is_image.nonzero().flatten()


class SpuriousReport(NamedTuple):
    """Shares of one backbone, or of a refined one beside its raw one."""

    num_images: int
    size: int
    thresholds: Thresholds
    channels: tuple[int, ...]
    shares: dict[str, SpuriousShares]
    """With a baseline `raw`, `refined, raw patterns`, `refined, own patterns`; else `model`."""


def compare_spurious(
    encoder: DenseEncoder,
    baseline: DenseEncoder | None,
    images: Sequence[Tensor],
    reference: Tensor,
    *,
    sigma: float | None = None,
    threshold: float = 0.5,
    channels: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
) -> SpuriousReport:
    """Count spurious tokens of a backbone, and of the raw one it was refined from.

    Args:
        encoder: The backbone.
        baseline: The raw one; it sets the thresholds and the patterns.
        images, reference: See `spurious_scores`.
        sigma: Thresholds are the raw backbone's mean score plus so many deviations.
        threshold: Cosine for both kinds, without `sigma`.
        channels, attention_layers: See `spurious_scores`.
    """

    def score(of: DenseEncoder, against: DenseEncoder | None = None) -> SpuriousScores:
        return spurious_scores(
            of,
            images,
            reference,
            against=against,
            channels=channels,
            attention_layers=attention_layers,
        )

    first = score(baseline or encoder)
    thresholds = (
        Thresholds(threshold, threshold) if sigma is None else Thresholds.of_scores(first, sigma)
    )
    scores = {"model" if baseline is None else "raw": first}
    if baseline is not None:
        scores["refined, raw patterns"] = score(encoder, baseline)
        scores["refined, own patterns"] = score(encoder)
    shares = {name: spurious_shares(of, thresholds) for name, of in scores.items()}
    return SpuriousReport(
        len(images), int(images[0].shape[-1]), thresholds, tuple(channels), shares
    )
