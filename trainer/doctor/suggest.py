"""From what was measured to values of a recipe, each with its reason."""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config import Recipe
from trainer.doctor.measure import CropScores, zscores
from trainer.doctor.widths import WidthResult

LOWEST, HIGHEST = 0.4, 0.8
"""Shares of tokens between which a similarity filter is left as it is."""
_AIM = 0.6
_NARROW = 0.05
_TOP_SHARE = 0.02
_LIGHT_TAIL = 0.06
_VALLEY_DEPTH = 0.8
_AS_GOOD = 0.7
_BINS = 64


class Advice(NamedTuple):
    """A judgement, and the `--set` values that follow from it; none where nothing is to change."""

    text: str
    settings: tuple[str, ...] = ()


class Threshold(NamedTuple):
    value: float
    share: float
    """Kept at it."""
    how: str


def advise_fp_gp(scores: CropScores, recipe: Recipe) -> Advice:
    """One threshold for both comparisons: a token is clean when its higher score is below it."""
    section = recipe.filters.fp_gp
    both = (scores.fixed_pattern_QN, scores.global_proxy_QN)
    cosine_QN = torch.maximum(*both)
    zscore_QN = torch.maximum(*(zscores(score_QN) for score_QN in both))
    judged = cosine_QN if section.criterion == "cosine" else zscore_QN
    share = _share_below(judged, section.threshold)
    if LOWEST <= share <= HIGHEST:
        return Advice(
            f"Both comparisons together keep {share:.0%} at {section.threshold:g}: between "
            f"{LOWEST:.0%} and {HIGHEST:.0%}, as it should be."
        )
    trouble = (
        f"Both comparisons together keep {share:.0%} at {section.threshold:g}, and should keep "
        f"{LOWEST:.0%} to {HIGHEST:.0%}: with less the losses see few places of an image, with "
        "more they learn spurious features too."
    )
    low, high = _quantiles(cosine_QN, LOWEST, HIGHEST)
    name = "filters.fp_gp"
    if section.criterion == "cosine" and high - low < _NARROW:
        found = find_threshold(zscore_QN)
        return Advice(
            f"{trouble} The cosines that would do so lie within {low:.3f} to {high:.3f}, too "
            f"narrow for a fixed one; standard deviations over each crop's own mean fit instead. "
            f"{found.how}",
            (f"{name}.criterion=zscore", f"{name}.threshold={found.value:g}"),
        )
    found = find_threshold(judged)
    return Advice(f"{trouble} {found.how}", (f"{name}.threshold={found.value:g}",))


def advise_register_guided(scores: CropScores, recipe: Recipe) -> Advice:
    """Untrained registers only show whether the threshold is out of reach."""
    threshold = recipe.filters.register_guided.threshold
    share = _share_below(scores.register_QN, threshold)
    note = (
        f"An untrained border's registers leave {share:.0%} at {threshold:g}. They come to "
        "resemble spurious tokens in training, and the share falls then"
    )
    if share >= LOWEST:
        return Advice(note + ".")
    found = find_threshold(scores.register_QN)
    return Advice(
        f"{note}: it is too low already. {found.how}",
        (f"filters.register_guided.threshold={found.value:g}",),
    )


def tail_shares(layer_inflow_LQN: Tensor) -> list[float]:
    """Of each block: the part of all attention that the most attended 2 % of tokens receive."""
    flat_LX = layer_inflow_LQN.flatten(1)
    count = max(1, round(_TOP_SHARE * flat_LX.shape[1]))
    top_L = flat_LX.topk(count, dim=1).values.sum(dim=1) / flat_LX.sum(dim=1).clamp(min=1e-12)
    return [float(share) for share in top_L]


def advise_layers(scores: CropScores, recipe: Recipe) -> Advice:
    """The blocks where few tokens draw most attention: there they overwrite the others."""
    section = recipe.filters.attention_hijack
    tails = tail_shares(scores.layer_inflow_LQN)
    current = section.layer_range(len(tails))
    length = len(current)
    # The first blocks mix neighbours of equal colour, the last serve the pre-training's head.
    outer = len(tails) // 6
    if len(tails) - 2 * outer < length:
        outer = 0
    starts = range(outer, len(tails) - outer - length + 1)
    # The median: one odd block must not choose its neighbours too.
    means = {s: statistics.median(tails[s : s + length]) for s in starts}
    best = max(means, key=lambda s: means[s])
    now = statistics.median(tails[current.start : current.stop])
    name = "filters.attention_hijack"
    described = (
        f"The most attended 2 % of tokens receive {now:.0%} of the attention in blocks "
        f"{current.start} to {current.stop - 1}; the tail is heaviest in blocks {best} to "
        f"{best + length - 1}, with {means[best]:.0%}."
    )
    if means[best] < _LIGHT_TAIL:
        text = (
            f"{described} That is not far from even: nothing says that tokens are overwritten "
            "here, and the filter would only cut the lower end of an ordinary spread."
        )
        return Advice(text, (f"{name}.enabled=false",) if section.enabled else ())
    if not section.enabled:
        return Advice(f"{described} The recipe leaves the filter off, and so does this advice.")
    if now >= _AS_GOOD * means[best]:
        return Advice(f"{described} The recipe's blocks are as good.")
    return Advice(described, (f"{name}.layers=[{best}, {best + length - 1}]",))


def advise_width(results: list[WidthResult], default: int, *, refined: bool) -> tuple[int, Advice]:
    """The narrowest width, of the default and wider ones, within a point of the lowest share."""
    allowed = [result for result in results if result.width >= default]
    lowest = min(result.fp_gp for result in allowed)
    best = next(result for result in allowed if result.fp_gp <= lowest + 0.01)
    usual = allowed[0]
    if best is usual:
        text = (
            f"A border wider than the default of {default} is no better: with the default "
            f"{best.fp_gp:.0%} of the tokens still carry spurious features."
        )
    else:
        text = (
            f"With a border of {best.width}, {best.fp_gp:.0%} of the tokens still carry spurious "
            f"features, with the default of {default} {usual.fp_gp:.0%}; no wider one is better "
            "by a point."
        )
    if not refined:
        text += (
            " The border is untrained here: measure the refined backbone again, then ask the "
            "service for what is best (option register_width)."
        )
    elif best is not usual:
        text += f" Ask the service for it: register_width={best.width}."
    return best.width, Advice(text)


def find_threshold(scores: Tensor) -> Threshold:
    """A threshold that separates, if the scores have two humps; else one that keeps 60 %."""
    low, high = _quantiles(scores, LOWEST, HIGHEST)
    valley = find_valley(scores)
    if valley is not None and low <= valley <= high:
        value = round(valley, 2)
        share = _share_below(scores, value)
        return Threshold(
            value, share, f"The scores have two humps; {value:g}, between them, keeps {share:.0%}."
        )
    (middle,) = _quantiles(scores, _AIM)
    value = round(middle, 2)
    if not LOWEST <= _share_below(scores, value) <= HIGHEST:
        value = float(f"{middle:.4g}")  # scores so close together that two digits miss the aim
    share = _share_below(scores, value)
    return Threshold(
        value,
        share,
        f"The scores have no two humps with a valley in reach; {value:g} keeps {share:.0%}.",
    )


def find_valley(scores: Tensor) -> float | None:
    """The lowest point between the two highest humps of a smoothed histogram, if there are two."""
    flat = scores.flatten().float()
    low, high = float(flat.min()), float(flat.max())
    if high - low < 1e-6:
        return None
    counts = torch.histc(flat, _BINS, min=low, max=high)
    kernel = torch.exp(-0.5 * (torch.arange(-6, 7) / 2.0) ** 2)
    smooth = torch.nn.functional.conv1d(
        counts[None, None], (kernel / kernel.sum())[None, None], padding=6
    )[0, 0]
    inner = smooth[1:-1]
    peaks = ((inner > smooth[:-2]) & (inner >= smooth[2:])).nonzero().flatten() + 1
    if len(peaks) < 2:
        return None
    first, second = sorted(peaks[smooth[peaks].topk(2).indices].tolist())
    bottom = first + int(smooth[first : second + 1].argmin())
    if smooth[bottom] > _VALLEY_DEPTH * min(smooth[first], smooth[second]):
        return None
    return float(low + (bottom + 0.5) * (high - low) / _BINS)


def _share_below(scores: Tensor, threshold: float) -> float:
    return float((scores < threshold).float().mean())


def _quantiles(scores: Tensor, *shares: float) -> list[float]:
    ascending = scores.flatten().sort().values
    return [float(ascending[round(share * (len(ascending) - 1))]) for share in shares]
