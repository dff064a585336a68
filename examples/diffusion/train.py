"""Train a small diffusion transformer on pixels, with and without alignment to served features.

    python -m service --model models/demo --port 8123 &
    python examples/diffusion/train.py --images photographs --url http://127.0.0.1:8123 \\
        --output runs/sit

Two equal transformers see the same crops, times and noise. Both learn the velocity of the linear
path from image to noise (SiT, arXiv:2401.08740). One also has the hidden state of its middle
block, through a small projection, match the clean image's features patch by patch (REPA,
arXiv:2410.06940). Features come from a client that works ahead in the background. Prints how both
fare, and writes it to OUTPUT/metrics.jsonl.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from prefetch import Prefetcher
from sit import SiT, losses
from torch import Tensor

from service.client import FeatureClient

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Learner:
    """A transformer and its optimiser; all learners begin with the same weights."""

    def __init__(self, *, alignment: float, **architecture: int) -> None:
        torch.manual_seed(0)
        self.model = SiT(**architecture)
        self.alignment = alignment
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    def step(
        self, pixels_B3SS: Tensor, noise_B3SS: Tensor, time_B: Tensor, features_BNC: Tensor
    ) -> dict[str, float]:
        """One step; the losses before it."""
        velocity, misalignment = losses(self.model, pixels_B3SS, noise_B3SS, time_B, features_BNC)
        loss = velocity + self.alignment * misalignment if self.alignment else velocity
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        terms = {"velocity": velocity.item()}
        return terms | ({"cosine": -misalignment.item()} if self.alignment else {})


def train(
    learners: Mapping[str, Learner],
    prefetcher: Prefetcher,
    *,
    steps: int,
    batch_size: int,
    log_every: int,
) -> list[dict[str, float]]:
    """All learners on the same batches; every `log_every` steps, the means of their losses."""
    generator = torch.Generator().manual_seed(0)
    history: list[dict[str, float]] = []
    sums: dict[str, float] = {}
    started = time.monotonic()
    waited = 0.0
    for step in range(1, steps + 1):
        waiting = time.monotonic()
        pixels_B3SS, features_BNC = prefetcher.take(batch_size)
        waited += time.monotonic() - waiting
        noise_B3SS = torch.randn(pixels_B3SS.shape, generator=generator)
        time_B = torch.rand(batch_size, generator=generator)
        for name, learner in learners.items():
            terms = learner.step(pixels_B3SS, noise_B3SS, time_B, features_BNC)
            for term, value in terms.items():
                sums[f"{name}_{term}"] = sums.get(f"{name}_{term}", 0.0) + value
        if step % log_every == 0 or step == steps:
            count = step - (history[-1]["step"] if history else 0)
            means = {name: value / count for name, value in sums.items()}
            sums.clear()
            seconds = time.monotonic() - started
            history.append({"step": step, "seconds": seconds, "waited_seconds": waited, **means})
            shown = " ".join(f"{name} {value:.4f}" for name, value in means.items())
            sys.stdout.write(
                f"step {step} {shown} ({seconds:.0f} s, {waited:.0f} s waiting for features)" + "\n"
            )
            sys.stdout.flush()
    return history


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--output", type=Path, required=True, help="folder for metrics.jsonl")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the service")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=32, help="pixels that are learned")
    parser.add_argument("--patch", type=int, default=4, help="pixels, of the transformer")
    parser.add_argument("--dim", type=int, default=96, help="width of the transformer")
    parser.add_argument("--depth", type=int, default=4, help="its blocks; the middle is aligned")
    parser.add_argument("--alignment", type=float, default=0.5, help="weight of the alignment")
    parser.add_argument("--log-every", type=int, default=20, help="steps")
    arguments = parser.parse_args()

    photographs = [p for p in sorted(arguments.images.rglob("*")) if p.suffix.lower() in SUFFIXES]
    if not photographs:
        parser.error(f"no images in {arguments.images}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    # The service and the prefetcher want cores too; threads that wait for one another cost most.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    with FeatureClient(arguments.url, max_connections=2) as client:
        info = client.info()["model"]
        learners = {
            name: Learner(
                side=arguments.side,
                patch=arguments.patch,
                channels=info["embed_dim"],
                dim=arguments.dim,
                depth=arguments.depth,
                alignment=weight,
            )
            for name, weight in (("plain", 0.0), ("aligned", arguments.alignment))
        }
        prefetcher = Prefetcher(
            client,
            photographs,
            side=arguments.side,
            # As many patches for the service as tokens for the transformer.
            view=arguments.side // arguments.patch * info["patch_size"],
            ahead=2 * arguments.batch_size,
        )
        try:
            history = train(
                learners,
                prefetcher,
                steps=arguments.steps,
                batch_size=arguments.batch_size,
                log_every=arguments.log_every,
            )
        finally:
            prefetcher.close()
    lines = "".join(json.dumps(entry) + "\n" for entry in history)
    (arguments.output / "metrics.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
