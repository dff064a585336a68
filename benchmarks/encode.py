"""Speed of the served forward against timm's own, on the same images.

    python -m benchmarks.encode --model models/demo

Rounds of the two alternate. On a CPU one thread runs and its processor time counts: what other
programs do does not. On a GPU each round ends with a synchronisation and the clock counts.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch

from backbone import DenseEncoder, open_model

_CASES = ((224, 1), (224, 8), (448, 1), (448, 2))  # side of the images in pixels, images


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encode", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", default="models/demo", help="an artifact (default: models/demo)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=15, help="of each case (default: 15)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    served, timms = (
        open_model(arguments.model, device=arguments.device, precision=arguments.precision)
        for _ in range(2)
    )
    timms._is_served = False
    sys.stdout.write("| pixels | images | served, ms | timm's, ms | timm's / served |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    for side, batch in _CASES:
        ours, theirs = _alternate(served, timms, side, batch, arguments.rounds)
        sys.stdout.write(
            f"| {side} | {batch} | {ours * 1e3:.1f} | {theirs * 1e3:.1f} | {theirs / ours:.3f} |\n"
        )
    return 0


def _alternate(
    served: DenseEncoder, timms: DenseEncoder, side: int, batch: int, rounds: int
) -> tuple[float, float]:
    """Median seconds of each; their features are compared first."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, side, side)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    tokens = [encoder.encode(images)[0].tokens.float() for encoder in (served, timms)]
    scale = tokens[1].abs().max().item()
    tolerance = {"fp32": 1e-4, "bf16": 5e-2}[served.precision]
    torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=tolerance * scale)
    on_gpu = served.device.type == "cuda"
    clock: Callable[[], float] = time.perf_counter if on_gpu else time.process_time
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for encoder, taken in zip((served, timms), seconds, strict=True):
            started = clock()
            encoder.encode(images)
            if on_gpu:
                torch.cuda.synchronize(served.device)
            taken.append(clock() - started)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    sys.exit(main())
