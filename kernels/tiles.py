"""Tile sizes of the kernels, from the tables in `configs/`: nothing is tuned while serving.

A table has a list of rows for each kernel. A row is `{"up_to": {fact: limit, ...}, "tiles": {...},
"source": where the numbers are from}` and the first whose limits hold counts; a row without `up_to`
always holds. A list `<operation>_backend` has `"backend": "triton"` or `"sdpa"` in place of tiles.
"""

import functools
import json
import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

_FOLDER = Path(__file__).parent / "configs"
_FALLBACK = "default"


def tiles(kernel: str, device: torch.device, **facts: int) -> dict[str, int]:
    """Launch parameters of a kernel: its constexprs, `num_warps` and `num_stages`.

    Args:
        kernel: Name of the list of rows.
        device: CUDA devices have the table of their architecture (`sm_90.json`), or `default.json`
            where it has none. The CPU (interpreter) has that of sm_90.
        facts: Numbers that rows may limit (`head_dim=64`).
    """
    return dict(_row(kernel, device, facts)["tiles"])


def backend(operation: str, device: torch.device, **facts: int) -> str:
    """Which implementation is the faster one: rows of `<operation>_backend` name it as `backend`.

    Args:
        operation, device, facts: As `tiles`.
    """
    return str(_row(f"{operation}_backend", device, facts)["backend"])


def _row(rows: str, device: torch.device, facts: dict[str, int]) -> dict[str, Any]:
    for row in _table(architecture(device))[rows]:
        if all(facts[fact] <= limit for fact, limit in row.get("up_to", {}).items()):
            return row
    raise LookupError(f"no row of {rows} in {architecture(device)}.json holds for {facts}")


@functools.cache
def architecture(device: torch.device) -> str:
    """Name of the table that serves a device."""
    if device.type != "cuda":
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    name = f"sm_{major}{minor}"
    if (_FOLDER / f"{name}.json").is_file():
        return name
    logger.warning("there is no table of tiles for %s: kernels take %s.json", name, _FALLBACK)
    return _FALLBACK


@functools.cache
def _table(name: str) -> dict[str, list[dict[str, Any]]]:
    table: dict[str, list[dict[str, Any]]] = json.loads((_FOLDER / f"{name}.json").read_text())
    return table
