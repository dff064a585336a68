"""The service under load: against the bare model and its peers, and in the trouble of real use.

    python -m benchmarks.serve --model models/demo --images DIR --scenario targets

Before anything is timed, served features of several kinds of images are compared with those of the
bare model in every dtype. Then each scenario starts servers of its own, measures, and holds the
figures against its criteria. Everything that is printed was measured in that run.

    rounds   served, bare and pipelined in turn at --clients   (the default)
    targets  every promise of docs/performance.md, with the peers; peers: the peers alone
    C1 C2    closed loop over concurrency: one size; mixed sizes
    O1 O2    open loop at shares of the knee: Poisson, bursts
    X1-X8    overload, disconnects, bad images, a storm of one image, Redis failing, SIGTERM,
             slow readers, a CUDA error
    soak     ten minutes of everything, with flat memory

The exit status is 1 when a criterion is missed.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from backbone import open_model
from benchmarks.report import machine, plot, to_markdown, versions
from benchmarks.serving import capacity, faults, outages, paced, slow_readers, soak, targets
from benchmarks.serving.bare import artifact, check_parity
from benchmarks.serving.bench import Bench
from benchmarks.serving.images import MIXED_SIDES, read_images
from benchmarks.serving.outcome import Outcome
from benchmarks.serving.processes import CoreShare, get_json, serving

T = TypeVar("T")

SCENARIOS: dict[str, Callable[[Bench], Outcome]] = {
    "rounds": capacity.rounds,
    "targets": targets.targets,
    "peers": targets.peers,
    "C1": capacity.c1,
    "C2": capacity.c2,
    "O1": paced.o1,
    "O2": paced.o2,
    "X1": paced.x1,
    "X2": faults.x2,
    "X3": faults.x3,
    "X4": faults.x4,
    "X5": outages.x5,
    "X6": outages.x6,
    "X7": slow_readers.x7,
    "X8": outages.x8,
    "soak": soak.soak,
}


def main() -> int:
    """Run the scenarios that were asked for; 1 when a criterion is missed."""
    arguments = parse_arguments()
    if "OMP_WAIT_POLICY" not in os.environ:
        # As the service does; torch reads it once, when it is loaded, which has happened here.
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.serve", *sys.argv[1:]])
    # Otherwise SIGTERM would end this process and leave its servers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    about = machine()
    images = read_images(arguments.images, arguments.num_images)
    cores = CoreShare()
    with artifact(arguments.model, random_weights=arguments.random_weights) as model:
        bench, parity = prepare(arguments, model, images)
        outcomes = []
        for name in arguments.scenario:
            sys.stderr.write(f"{name} ...\n")
            outcomes.append(SCENARIOS[name](bench))
            for check in outcomes[-1].checks:
                verdict = {True: "pass", False: "FAIL", None: "not tried"}[check.passed]
                sys.stderr.write(f"  {verdict}: {check.criterion}: {check.measured}\n")
    result = {
        # The folder is whoever's; what lies in it the results cannot say.
        "command": "python -m benchmarks.serve "
        + " ".join(sys.argv[1:]).replace(str(arguments.images), "PHOTOS"),
        "machine": about,
        "cores_taken_by_others": cores.others(),
        "versions": versions(),
        "model": bench.info["model"],
        "size": bench.size,
        "images": len(images),
        "parity": parity,
    }
    text = to_markdown(result, outcomes)
    sys.stdout.write(text + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(text + "\n")
    if arguments.json:
        document = result | {"scenarios": [to_document(outcome) for outcome in outcomes]}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if arguments.plot and not plot(outcomes, arguments.plot):
        sys.stderr.write("nothing to plot: no scenario has a curve\n")
    return int(any(outcome.failed for outcome in outcomes))


def prepare(
    arguments: argparse.Namespace, model: str, images: list[bytes]
) -> tuple[Bench, list[dict[str, object]]]:
    """What scenarios work with, after the comparison with the bare model, and its results."""
    with serving(model, precision=arguments.precision, flags=arguments.service) as server:
        info = get_json(server.url + "/info")
        size = (arguments.size,) * 2 if arguments.size else tuple(info["model"]["native_size"])
        device = info["model"]["devices"][0]
        encoder = open_model(model, precision=info["model"]["precision"], device=device)
        differences = check_parity(
            server.url,
            encoder,
            images,
            size,
            dtypes=info["dtypes"],
            tolerance=info["tolerance"]["max_relative_error"],
        )
    bench = Bench(
        model=model,
        precision=info["model"]["precision"],
        size=size,
        images=images,
        encoder=encoder,
        info=info,
        arguments=arguments,
    )
    return bench, [difference._asdict() for difference in differences]


def to_document(outcome: Outcome) -> dict[str, object]:
    """An outcome for JSON."""
    return {
        "scenario": outcome.scenario,
        "what": outcome.what,
        "checks": [check._asdict() for check in outcome.checks],
        "figures": outcome.figures,
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve",
        description="The service under load, against the bare model and its peers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scenario", nargs="+", choices=SCENARIOS, default=["rounds"])
    parser.add_argument("--model", required=True, help="as for python -m service")
    parser.add_argument("--random-weights", action="store_true", help="random weights and a border")
    parser.add_argument("--images", type=Path, required=True, help="folder of JPEG files")
    parser.add_argument("--num-images", type=int, default=400, help="images of a round")
    parser.add_argument("--size", type=int, help="side in pixels; default the model's own size")
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=list(MIXED_SIDES),
        help="longest sides of mixed traffic",
    )
    parser.add_argument("--seconds", type=float, help="of each measured part; default by scenario")
    parser.add_argument(
        "--concurrency", type=numbers(int), help="clients of sweeps, with commas, from 1 up"
    )
    parser.add_argument(
        "--shares",
        type=numbers(float),
        default=(0.5, 0.8, 1.0),
        help="of the knee's rate, for O1, with commas",
    )
    parser.add_argument("--clients", type=int, default=16, help="requests at a time in rounds")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contender")
    parser.add_argument("--precision", default="auto", help="as for python -m service")
    parser.add_argument(
        "--slo-ms", type=float, help="objective for goodput; default 10 single-request latencies"
    )
    parser.add_argument("--deadline-ms", type=int, default=5000, help="x-deadline-ms of X1")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and of the mix")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--markdown", type=Path, help="file for the result as tables")
    parser.add_argument("--plot", type=Path, help="file for the curves, as PNG or SVG")
    parser.add_argument(
        "--service", nargs=argparse.REMAINDER, default=[], help="more flags of the service, last"
    )
    return parser.parse_args()


def numbers(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """A parser of numbers with commas between them."""
    return lambda text: tuple(kind(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
