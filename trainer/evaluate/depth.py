"""Monocular depth by a linear probe: raw and refined features on images with measured depth.

result = evaluate_depth(dataset, subjects, store=store, size=(480, 640), ...)
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from pydantic import JsonValue

from trainer.evaluate.datasets import DepthDataset
from trainer.evaluate.depth_probe import DepthProbe, DepthSettings, depth_probe
from trainer.evaluate.feature_store import FeatureStore
from trainer.evaluate.images import Size
from trainer.evaluate.probing import Parts, check_dataset, describe_all, probe_all, targets
from trainer.evaluate.progress import SILENT, Advance, Progress
from trainer.evaluate.results import Result, Row, new_result, score
from trainer.evaluate.subjects import Subject
from trainer.evaluate.windows import Windows


def evaluate_depth(
    dataset: DepthDataset,
    subjects: Sequence[Subject],
    *,
    store: FeatureStore,
    size: Size,
    windows: Windows | None = None,
    batch_size: int = 16,
    settings_by_seed: Sequence[DepthSettings] = (DepthSettings(),),
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> Result:
    """Train and score a linear depth probe for every subject and seed.

    Arguments and what is kept are those of `evaluate_segmentation`.

    Raises:
        RefineryError: Data, features or settings that no probe can be trained on.
    """
    started = time.monotonic()
    check_dataset(dataset, subjects, settings_by_seed)
    train_depths = targets(dataset.train, dataset.read_depth)
    val_depths = targets(dataset.val, dataset.read_depth)

    def measure(parts: Parts, settings: DepthSettings, advance: Advance) -> DepthProbe:
        return depth_probe(
            parts.train_grids,
            train_depths,
            parts.val_grids,
            val_depths,
            min_depth=dataset.min_depth,
            max_depth=dataset.max_depth,
            eval_mask=dataset.eval_mask,
            settings=settings,
            device=device,
            advance=advance,
        )

    probed = probe_all(
        dataset,
        subjects,
        DepthProbe,
        measure,
        store=store,
        size=size,
        windows=windows,
        batch_size=batch_size,
        settings_by_seed=settings_by_seed,
        decides={
            "layout": dataset.layout,
            "range": [dataset.min_depth, dataset.max_depth],
            "units_per_metre": dataset.units_per_metre,
            "crop": str(dataset.crop),
        },
        device=device,
        progress=progress,
    )
    settings = describe_all(settings_by_seed, size, windows)
    return new_result(
        task="depth",
        dataset=dataset.name,
        protocol=_protocol(dataset, settings_by_seed[0]),
        settings={**settings, "depth_range": f"{dataset.min_depth:g} to {dataset.max_depth:g} m"},
        rows=[_row(subject, probes) for subject, probes in probed],
        seconds=time.monotonic() - started,
    )


def _protocol(dataset: DepthDataset, settings: DepthSettings) -> str:
    part = "" if dataset.crop is None else " inside the evaluation crop"
    return (
        "Linear probe on frozen patch tokens of the last layer after DINOv2 (arXiv:2304.07193, "
        f"section 7.4): {settings.normalization} normalisation by the statistics of train, a 1x1 "
        f"convolution to {settings.num_bins} depth bins ({settings.bins}), linearly normalised, "
        "their mean upsampled bilinearly, the scale-invariant loss of Eigen et al. without "
        f"DINOv2's gradient loss, trained on {len(dataset.train)} images without augmentation; "
        f"scores at the measured pixels{part} of each of {len(dataset.val)} images, then their "
        "mean over images, as of BTS and AdaBins; of "
        f"{len(settings.learning_rates)} learning rates the best on these same images counts, as "
        "is the field's habit, for raw and refined alike."
    )


def _row(subject: Subject, probes: Sequence[DepthProbe]) -> Row:
    scores = [probe.scores for probe in probes]
    rates: list[JsonValue] = [probe.best_learning_rate for probe in probes]
    by_rate: list[JsonValue] = [
        {f"{rate:g}": rmse for rate, rmse in probe.rmse_by_learning_rate.items()}
        for probe in probes
    ]
    return Row(
        subject=subject.name,
        spec=subject.spec,
        digest=subject.digest,
        scores=(
            score("RMSE", [s.rmse for s in scores], better="lower", unit="metres"),
            score("AbsRel", [s.abs_rel for s in scores], better="lower", unit="ratio"),
            score("delta_1", [100 * s.delta_1 for s in scores], better="higher", unit="percent"),
            score(
                "RMSE of all pixels",
                [s.rmse_all_pixels for s in scores],
                better="lower",
                unit="metres",
            ),
        ),
        details={
            "best_learning_rates": rates,
            "rmse_by_learning_rate": by_rate,
            "at_edge_of_learning_rates": any(probe.is_at_edge for probe in probes),
        },
    )
