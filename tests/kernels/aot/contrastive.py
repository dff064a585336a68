"""Launches of the floored logsumexp to compile: a chunk, with its gradient or not."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels._contrastive_device import launch_floored_logsumexp
from tests.kernels.aot.case import Case

# Columns: the tokens of an image, the registers of one, odd numbers of them.
NUM_COLUMNS = (1024, 1369, 1029, 132, 196)


def cases() -> Iterator[Case]:
    for num_columns in NUM_COLUMNS:
        name = f"{num_columns} columns"
        yield Case(f"{name}, detach", partial(launch, num_columns), has_mma=False)
    for num_columns in NUM_COLUMNS[:1] + NUM_COLUMNS[3:4]:
        name = f"{num_columns} columns"
        yield Case(
            f"{name}, replace", partial(launch, num_columns, is_replaced=True), has_mma=False
        )
        yield Case(
            f"{name}, value", partial(launch, num_columns, wants_gradient=False), has_mma=False
        )


def launch(num_columns: int, *, is_replaced: bool = False, wants_gradient: bool = True) -> object:
    level = torch.empty((), device="cuda")
    return launch_floored_logsumexp(
        torch.empty(4, 256, num_columns, device="cuda"),
        torch.empty(4, 1024, device="cuda")[:, 256:512],
        level,
        level if is_replaced else None,
        temperature=0.2,
        wants_gradient=wants_gradient,
    )
