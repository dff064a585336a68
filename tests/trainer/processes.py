"""Several processes in a test, as torchrun would start them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from trainer.distributed import process_group


def in_processes(
    folder: Path, size: int, function: Callable[..., Any], *arguments: Any
) -> list[Any]:
    """What `function(ranks, *arguments)` returns in each of `size` new processes.

    The function lives in a module, and what it returns can be saved by `torch.save`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.start_processes(
        _work, (size, port, folder, function, arguments), nprocs=size, start_method="spawn"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _work(
    rank: int,
    size: int,
    port: int,
    folder: Path,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with process_group(torch.device("cpu")) as ranks:
        torch.save(function(ranks, *arguments), folder / f"{rank}.pt")
