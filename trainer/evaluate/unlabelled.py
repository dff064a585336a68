"""What can be measured of backbones by images alone: spurious tokens, norms, view consistency.

result = evaluate_spurious([raw, refined], pictures, SpuriousSettings(), dataset="photographs")

Shares are of an image's tokens, and every score is a mean over images with a 95 % interval by the
bootstrap over them; the difference of two subjects is taken image by image.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pydantic import JsonValue
from torch import Tensor

from kernels import Flow
from trainer.channels import unit_tokens
from trainer.evaluate.errors import EvaluationError
from trainer.evaluate.layers import BY_LAYER, OWN, PEAK, layer_rows
from trainer.evaluate.norms import DEVIATIONS, before_final_norm, norm_outliers
from trainer.evaluate.pictures import Pictures, check_square_size
from trainer.evaluate.progress import SILENT, Progress
from trainer.evaluate.results import Result, Row, new_result
from trainer.evaluate.spurious import (
    STRIP_SHARE,
    Encode,
    Pair,
    SpuriousScores,
    Thresholds,
    hijacked_tokens,
    pattern_scores,
    spurious_shares,
)
from trainer.evaluate.subjects import LocalSubject, Subject
from trainer.evaluate.tally import Tally, difference
from trainer.evaluate.views import KINDS, view_consistency

_PROTOCOL = (
    "Shares of image tokens that resemble tokens of an unrelated reference image (FP), or of a "
    "strip of it on the same canvas (GP), by {whose} patterns (arXiv:2605.19622); {norms}and how "
    "far tokens of two crops agree that show the same place (trainer/evaluate/views.py)."
)
_NORMS = (
    "norms before the final norm beyond the image's median by {k:g} robust deviations (after "
    "arXiv:2309.16588); "
)


@dataclass(frozen=True)
class SpuriousSettings:
    """What counts as spurious.

    Attributes:
        threshold: Cosine of FP and GP.
        sigma: Instead: the first subject's mean score plus so many standard deviations.
        attention_layers: Blocks for AH; none leaves it out.
        deviations: Robust deviations from which a norm is an outlier.
        by_layer: Also every block's shares.
        strip_share: Width of the strip of the reference image over the image's.
        flow, hijack_threshold: See `hijacked_tokens`.
    """

    threshold: float = 0.5
    sigma: float | None = None
    attention_layers: tuple[int, ...] = ()
    deviations: float = DEVIATIONS
    by_layer: bool = False
    strip_share: float = STRIP_SHARE
    flow: Flow = "paper"
    hijack_threshold: float = -0.5


def evaluate_spurious(
    subjects: Sequence[Subject],
    pictures: Pictures,
    settings: SpuriousSettings,
    *,
    dataset: str,
    channels: Sequence[int] = (),
    register_width: int | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Measure a backbone, or a refined one beside its raw one.

    Args:
        subjects: The raw one first: its thresholds and patterns hold for the other.
        pictures: What is encoded.
        settings: What counts.
        dataset: What the pictures are called.
        channels: Zeroed before every cosine; a refined backbone's manifest has them.
        register_width: What local subjects with a border were given.
        progress: Is told about images.

    Raises:
        EvaluationError: subjects that cannot be compared, or that lack what the settings need.
    """
    started = time.monotonic()
    _check(subjects, pictures, settings)
    local = [_Local.of(s, register_width) for s in subjects if isinstance(s, LocalSubject)]
    pairs = [Pair(0, 0), *(p for n in range(1, len(subjects)) for p in (Pair(n, 0), Pair(n, n)))]
    with progress.stage("spurious tokens", total=len(pictures.images_BSS)) as advance:
        scores = pattern_scores(
            [each.encode_layers for each in local] if settings.by_layer else _last(subjects),
            pairs,
            pictures.images_BSS,
            pictures.reference_3SS,
            patch_size=subjects[0].patch_size,
            channels=channels,
            strip_share=settings.strip_share,
            advance=advance,
        )
    thresholds = [_thresholds(layer, settings) for layer in scores[0]]
    rows: list[Row] = []
    for number, subject in enumerate(subjects):
        first, own = pairs.index(Pair(number, 0)), pairs.index(Pair(number, number))
        tally = Tally(len(pictures.images_BSS))
        tally.shares(scores[first], thresholds)
        if len(subjects) > 1:
            tally.shares(scores[own], thresholds, OWN)
        if local:
            last = scores[first][-1], thresholds[-1]
            _measure_attention(tally, local[number], *last, pictures, settings)
            _measure_norms(tally, local[number], pictures, settings, progress)
        _measure_views(tally, subject, pictures, channels, progress)
        details: dict[str, JsonValue] = {}
        if settings.by_layer:
            details[BY_LAYER] = layer_rows(tally.by_layer)
        rows.append(
            Row(
                subject=subject.name,
                spec=subject.spec,
                digest=subject.digest,
                scores=tuple(tally.scores),
                details=details,
            )
        )
    return new_result(
        task="spurious",
        dataset=dataset,
        protocol=_PROTOCOL.format(
            whose="the raw backbone's and (own) each one's own" if len(subjects) > 1 else "its own",
            norms=_NORMS.format(k=settings.deviations) if local else "",
        ),
        settings=_described(pictures, settings, thresholds[-1], channels, register_width),
        rows=[*rows, *(difference(rows[0], row) for row in rows[1:])],
        seconds=time.monotonic() - started,
    )


class _Local(NamedTuple):
    """A subject of this process, whose blocks can be looked into."""

    subject: LocalSubject
    register_width: int | None

    @classmethod
    def of(cls, subject: LocalSubject, register_width: int | None) -> "_Local":
        return cls(subject, register_width if subject.encoder.border else None)

    def encode_layers(self, images_B3hw: Tensor) -> list[Tensor]:
        encoder = self.subject.encoder
        layers = range(encoder.backbone.depth)
        found = encoder.encode(images_B3hw, layers=layers, register_width=self.register_width)
        return [features.tokens for features in found]


def _last(subjects: Sequence[Subject]) -> list[Encode]:
    def encode(subject: Subject) -> Encode:
        return lambda images: [subject.encode(images)]

    return [encode(subject) for subject in subjects]


def _measure_attention(
    tally: Tally,
    local: _Local,
    scores: SpuriousScores,
    thresholds: Thresholds,
    pictures: Pictures,
    settings: SpuriousSettings,
) -> None:
    """AH, and what is left clean; nothing where nobody asked for it."""
    if not settings.attention_layers:
        return
    hijacked = hijacked_tokens(
        local.subject.encoder,
        pictures.images_BSS,
        layers=settings.attention_layers,
        register_width=local.register_width,
        flow=settings.flow,
        threshold=settings.hijack_threshold,
    )
    whole = scores._replace(is_hijacked=hijacked)
    shares = [spurious_shares(s, thresholds) for s in whole.by_image(len(pictures.images_BSS))]
    tally.add("AH", [[share.hijacked for share in shares]])
    tally.add("clean", [[share.clean for share in shares]], better="higher")


def _measure_norms(
    tally: Tally,
    local: _Local,
    pictures: Pictures,
    settings: SpuriousSettings,
    progress: Progress,
) -> None:
    encoder = before_final_norm(local.subject.encoder)
    layers = range(encoder.backbone.depth) if settings.by_layer else (-1,)
    shares: list[list[float]] = [[] for _ in layers]
    peaks: list[list[float]] = [[] for _ in layers]
    title = f"norms of {local.subject.name}"
    with progress.stage(title, total=len(pictures.images_BSS)) as advance:
        for image in pictures.images_BSS:
            features = encoder.encode(
                image[None], layers=layers, register_width=local.register_width
            )
            for share, peak, layer in zip(shares, peaks, features, strict=True):
                outliers = norm_outliers(layer.tokens, deviations=settings.deviations)
                share.append(float(outliers.share_B))
                peak.append(float(outliers.peak_B))
            advance(1)
    tally.add("norm outliers", shares)
    tally.add(PEAK, peaks, unit="ratio")


def _measure_views(
    tally: Tally,
    subject: Subject,
    pictures: Pictures,
    channels: Sequence[int],
    progress: Progress,
) -> None:
    index = torch.tensor(list(channels)) if channels else None
    with progress.stage(f"views of {subject.name}", total=len(pictures.larger_BLL)) as advance:
        agreements = view_consistency(
            lambda images: unit_tokens(subject.encode(images), index),
            pictures.larger_BLL,
            size=pictures.images_BSS.shape[-1],
            patch_size=subject.patch_size,
            advance=advance,
        )
    for kind in KINDS:
        margins, retrieved = zip(*agreements[kind], strict=True)
        tally.add(f"view margin ({kind})", [margins], better="higher", unit="ratio")
        tally.add(f"view retrieval ({kind})", [retrieved], better="higher")


def _thresholds(scores: SpuriousScores, settings: SpuriousSettings) -> Thresholds:
    if settings.sigma is None:
        return Thresholds(settings.threshold, settings.threshold)
    return Thresholds.of_scores(scores, settings.sigma)


def _described(
    pictures: Pictures,
    settings: SpuriousSettings,
    thresholds: Thresholds,
    channels: Sequence[int],
    register_width: int | None,
) -> dict[str, JsonValue]:
    side = pictures.images_BSS.shape[-1]
    described: dict[str, JsonValue] = {
        "size": [side, side],
        "images": len(pictures.images_BSS),
        "FP threshold": round(thresholds.fixed_pattern, 4),
        "GP threshold": round(thresholds.global_proxy, 4),
        "norm deviations": settings.deviations,
    }
    if settings.sigma is not None:
        described["sigma"] = settings.sigma
    if settings.attention_layers:
        described["attention layers"] = list(settings.attention_layers)
    if channels:
        described["masked channels"] = list(channels)
    if register_width is not None:
        described["register width"] = register_width
    return described


def _check(subjects: Sequence[Subject], pictures: Pictures, settings: SpuriousSettings) -> None:
    first = subjects[0]
    check_square_size(pictures.images_BSS.shape[-1], first.patch_size, first.name)
    for other in subjects[1:]:
        if other.patch_size != first.patch_size:
            raise EvaluationError(
                f"{other.spec} has patches of {other.patch_size} px and {first.spec} of "
                f"{first.patch_size} px, so their tokens cannot be compared; give the --baseline "
                "that the model was refined from"
            )
    widths = [int(s.encode(pictures.reference_3SS[None]).shape[-1]) for s in subjects]
    for other, width in zip(subjects[1:], widths[1:], strict=True):
        if width != widths[0]:
            raise EvaluationError(
                f"{other.spec} has tokens of {width} channels and {first.spec} of {widths[0]}, so "
                "they cannot be compared; give the --baseline that the model was refined from"
            )
    inside = [subject for subject in subjects if isinstance(subject, LocalSubject)]
    if len(inside) < len(subjects) and (settings.by_layer or settings.attention_layers):
        raise EvaluationError(
            "a service gives features of its last layer alone; leave --by-layer and "
            "--attention-layers out, or measure without --url"
        )
    depths = {subject.encoder.backbone.depth for subject in inside}
    if settings.by_layer and len(depths) > 1:
        raise EvaluationError(
            f"the backbones have {' and '.join(map(str, sorted(depths)))} blocks, so they cannot "
            "be compared block by block; give the --baseline that the model was refined from"
        )
    for layer in settings.attention_layers:
        if not 0 <= layer < min(depths):
            raise EvaluationError(
                f"layer {layer} does not exist: {inside[0].encoder.backbone.name} has blocks 0 to "
                f"{min(depths) - 1}"
            )
