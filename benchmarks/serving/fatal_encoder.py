"""The service with a model that fails for good, as after a CUDA error, once a file appears.

    python -m benchmarks.serving.fatal_encoder --fatal-when FILE --model models/demo ...

All other flags are the service's. Before the file exists the model is the usual one; a CPU cannot
have the error itself, so the text of a real one is raised, from every forward, as CUDA does.
"""

import sys
from pathlib import Path
from typing import Any

from backbone import DenseEncoder
from service.__main__ import main

_ERROR = (
    "CUDA error: an illegal memory access was encountered (planted by "
    "benchmarks.serving.fatal_encoder)"
)


def fail_when(trigger: Path) -> None:
    """Let every encoder of this process fail as soon as `trigger` exists."""
    encode = DenseEncoder.encode

    def encode_or_fail(self: DenseEncoder, *arguments: Any, **options: Any) -> Any:
        if trigger.exists():
            raise RuntimeError(_ERROR)
        return encode(self, *arguments, **options)

    DenseEncoder.encode = encode_or_fail  # type: ignore[method-assign]


if __name__ == "__main__":
    position = sys.argv.index("--fatal-when")
    fail_when(Path(sys.argv[position + 1]))
    sys.exit(main(sys.argv[1:position] + sys.argv[position + 2 :]))
