"""Measure backbones: raw and refined side by side, with confidence intervals.

python -m trainer.evaluate segmentation --model models/demo --data CAMVID --json result.json
python -m trainer.evaluate depth --model models/demo --data NYU
python -m trainer.evaluate zeroshot --model NAME --data VOC
python -m trainer.evaluate spurious --model models/demo --images DIR

Each has a --help of its own. Tables go to stdout; progress and log lines to stderr.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from rich.logging import RichHandler

from backbone.errors import RefineryError
from kernels.dispatch import KernelError, mode
from trainer.evaluate.commands import depth, segmentation, spurious, zeroshot
from trainer.evaluate.progress import stderr_console

logger = logging.getLogger("trainer.evaluate")

_COMMANDS = {
    "segmentation": segmentation,
    "depth": depth,
    "zeroshot": zeroshot,
    "spurious": spurious,
}
_USER_ERROR = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one evaluation; returns the exit status."""
    arguments = parser().parse_args(argv)
    _set_up_logging()
    try:
        mode()
        status: int = _COMMANDS[arguments.command].run(arguments)
        return status
    except (RefineryError, KernelError) as error:
        logger.error("%s", error)
        return _USER_ERROR
    except KeyboardInterrupt:
        logger.error("interrupted; features that were computed are kept: run the same command")
        return _INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    made = argparse.ArgumentParser(
        prog="python -m trainer.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = made.add_subparsers(dest="command", required=True)
    for command in _COMMANDS.values():
        command.add_parser(commands)
    return made


def _set_up_logging() -> None:
    console = stderr_console()
    handler: logging.Handler
    if console.is_terminal:  # above the progress bar
        handler = RichHandler(console=console, show_path=False, markup=False)
        handler.setFormatter(logging.Formatter("%(message)s", "%X"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("backbone", "trainer"):
        logging.getLogger(name).setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
