"""What the report shows of images: features of a raw and a refined backbone, and their faults.

Dimension key: H, W = pixels, h, w = patches, N = h * w image tokens, R = tokens of the register
border, C = channels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from backbone import DenseEncoder
from backbone.preprocess import load_image, resize_image, resolve_size
from trainer.channels import unit_tokens
from trainer.data import ImageFolder
from trainer.errors import DataError
from trainer.evaluate.norms import before_final_norm
from trainer.evaluate.spurious import (
    Encode,
    Pair,
    SpuriousScores,
    SpuriousShares,
    Thresholds,
    hijacked_tokens,
    pattern_scores,
    spurious_shares,
)

OWN_PATTERNS = "refined, its own patterns"


@dataclass(frozen=True)
class Options:
    """How images are measured.

    Attributes:
        size: Longest side in pixels; the aspect is kept, in whole patches.
        threshold: Cosine from which a token counts as FP or GP.
        sigma: Instead: the first backbone's mean score plus so many deviations.
        attention_layers: Blocks whose attention is tapped for AH; none leaves it out.
        register_width: Of the refined backbone in patches; default its own rule.
        reference_3HW: The reference image, uint8.
    """

    size: int
    threshold: float
    sigma: float | None
    attention_layers: tuple[int, ...]
    register_width: int | None
    reference_3HW: Tensor


@dataclass(frozen=True)
class View:
    """One image as one backbone sees it.

    Attributes:
        unit_NC: Tokens of unit norm, channels of the mask at zero.
        norms_N: Norms before the final norm, which makes all tokens about equally long.
        registers_RC: The border's tokens, of unit norm too; None without a border.
        width: Of the border, in patches.
        scores: Against the first backbone's patterns.
    """

    unit_NC: Tensor
    norms_N: Tensor
    registers_RC: Tensor | None
    width: int
    scores: SpuriousScores


@dataclass(frozen=True)
class Shown:
    """One image, seen by each backbone.

    Attributes:
        views: By the backbone's title, raw first.
        own_scores: Of the refined one against its own patterns; None without a raw one.
    """

    name: str
    image_3HW: Tensor
    grid: tuple[int, int]
    views: Mapping[str, View]
    own_scores: SpuriousScores | None


@dataclass(frozen=True)
class Measured:
    """All images, and the thresholds that hold for them."""

    shown: tuple[Shown, ...]
    thresholds: Thresholds
    channels: tuple[int, ...]
    has_attention: bool

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(self.shown[0].views) if self.shown else ()

    def shares(self) -> dict[str, list[SpuriousShares]]:
        """Per row of the table: the shares of every image."""
        found = {
            name: [spurious_shares(one.views[name].scores, self.thresholds) for one in self.shown]
            for name in self.subjects
        }
        own = [one.own_scores for one in self.shown if one.own_scores is not None]
        if own:
            found[OWN_PATTERNS] = [spurious_shares(scores, self.thresholds) for scores in own]
        return found


def choose_images(places: Sequence[Path], *, num_images: int, seed: int) -> list[Path]:
    """Files as they are given, and `num_images` of each folder, chosen by the seed.

    Raises:
        DataError: a place does not exist, or a folder has no images.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += ImageFolder.scan(place, seed=seed, max_images=num_images).files
        elif place.is_file():
            found.append(place)
        else:
            raise DataError(f"{place} does not exist; give image files, or folders of images")
    return found


def read_images(paths: Sequence[Path], *, size: int, patch_size: int) -> list[Tensor]:
    """Images as uint8 [3, H, W] each, the longest side about `size`, in whole patches.

    Raises:
        ImageError, DataError: one cannot be read, or the size is less than a patch.
    """
    images = []
    for path in paths:
        pixels_3HW = read_image(path)
        wanted = resolve_size(pixels_3HW.shape[1], pixels_3HW.shape[2], size, patch_size)
        images.append(resize_image(pixels_3HW, wanted))
    return images


def read_image(path: Path, what: str = "image") -> Tensor:
    """`load_image`, whose errors of the file system are for the user too.

    Raises:
        ImageError, DataError: it cannot be read.
    """
    try:
        return load_image(path)
    except OSError as error:
        raise DataError(f"the {what} {path} cannot be read: {error.strerror}") from error


def measure(
    encoders: Mapping[str, DenseEncoder],
    names: Sequence[str],
    images: Sequence[Tensor],
    options: Options,
    *,
    channels: Sequence[int],
    advance: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Encode every image by every backbone, and score its tokens.

    Args:
        encoders: By title, the raw one first; its patterns are what tokens are compared with.
        names: Of the images.
        images: uint8 [3, H, W] each, whole patches; sizes may differ.
        channels: Zeroed before every cosine.
        advance: Called with the number of images that are done anew.
    """
    found: dict[int, Shown] = {}
    for size in dict.fromkeys(image.shape[-2:] for image in images):
        places = [place for place, image in enumerate(images) if image.shape[-2:] == size]
        alike = [images[place] for place in places]
        fitted_3HW = resize_image(options.reference_3HW, (size[0], size[1]))
        scores, own = _scores(encoders, alike, fitted_3HW, options, channels, advance)
        for number, place in enumerate(places):
            views = {
                title: _view(encoder, images[place], options, channels, scores[title][number])
                for title, encoder in encoders.items()
            }
            found[place] = Shown(
                name=names[place],
                image_3HW=images[place],
                grid=next(iter(encoders.values())).backbone.grid(size[0], size[1]),
                views=views,
                own_scores=own[number] if own else None,
            )
    shown = tuple(found[place] for place in range(len(images)))
    first = next(iter(encoders))
    return Measured(
        shown,
        _thresholds([one.views[first].scores for one in shown], options),
        tuple(channels),
        bool(options.attention_layers),
    )


def _scores(
    encoders: Mapping[str, DenseEncoder],
    images: Sequence[Tensor],
    reference_3HW: Tensor,
    options: Options,
    channels: Sequence[int],
    advance: Callable[[int], None],
) -> tuple[dict[str, list[SpuriousScores]], list[SpuriousScores]]:
    """By title, the scores of images of one size; and the last one's against its own patterns."""
    last = len(encoders) - 1
    pairs = [Pair(number, 0) for number in range(len(encoders))]
    if last:
        pairs.append(Pair(last, last))
    of_pairs = pattern_scores(
        [_last_layer(encoder, _width(encoder, options)) for encoder in encoders.values()],
        pairs,
        images,
        reference_3HW,
        patch_size=next(iter(encoders.values())).patch_size,
        channels=channels,
        advance=advance,
    )
    found = {}
    hijacked = {}
    for (title, encoder), (scores,) in zip(encoders.items(), of_pairs, strict=False):
        if options.attention_layers:
            hijacked[title] = hijacked_tokens(
                encoder,
                images,
                layers=options.attention_layers,
                register_width=_width(encoder, options),
            )
            scores = scores._replace(is_hijacked=hijacked[title])
        found[title] = scores.by_image(len(images))
    if not last:
        return found, []
    own = of_pairs[-1][0]
    if hijacked:
        own = own._replace(is_hijacked=list(hijacked.values())[-1])
    return found, own.by_image(len(images))


def _width(encoder: DenseEncoder, options: Options) -> int | None:
    return options.register_width if encoder.border else None


def _last_layer(encoder: DenseEncoder, register_width: int | None) -> Encode:
    return lambda images: [encoder.encode(images, register_width=register_width)[0].tokens]


def _view(
    encoder: DenseEncoder,
    image_3HW: Tensor,
    options: Options,
    channels: Sequence[int],
    scores: SpuriousScores,
) -> View:
    width = encoder.register_width(image_3HW.shape[1], image_3HW.shape[2], _width(encoder, options))
    (features,) = encoder.encode(image_3HW[None], register_width=width, registers=True)
    stream = before_final_norm(encoder).encode(image_3HW[None], register_width=width)[0].tokens[0]
    index = torch.tensor(list(channels), device=encoder.device) if channels else None
    registers = features.registers
    return View(
        unit_NC=unit_tokens(features.tokens[0], index).float().cpu(),
        norms_N=stream.float().norm(dim=-1).cpu(),
        registers_RC=None if registers is None else unit_tokens(registers[0], index).float().cpu(),
        width=width,
        scores=scores,
    )


def _thresholds(scores: Sequence[SpuriousScores], options: Options) -> Thresholds:
    if options.sigma is None:
        return Thresholds(options.threshold, options.threshold)
    joined = SpuriousScores(*(torch.cat(parts) for parts in zip(*scores, strict=True)))
    return Thresholds.of_scores(joined, options.sigma)
