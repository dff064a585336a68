"""Several processes, one run: `torchrun --nproc-per-node=8 -m trainer ...`.

    with process_group(device) as ranks:
        ranks.rank, ranks.size
        ranks.sum(tensor)                    # over all processes, without gradient
        with ranks.agreed():                 # an error in one of them ends all
            images = next(stream)

Every process holds the whole model and takes its own images. Nothing of PyTorch's
DistributedDataParallel is used: what trains is an adapter of a few megabytes, whose gradients are
summed at once when a step's last backward pass is done. There is nothing to overlap with.
"""

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from backbone import find_devices
from trainer.errors import TrainerError

Value = TypeVar("Value")

# Rank 0 searches the channel mask, and later merges and writes the artifact, while others wait.
_PATIENCE = datetime.timedelta(minutes=60)


class PeerError(Exception):
    """Another process of the run has ended with an error, and says so itself.

    Attributes:
        is_lost: It was not heard of: it may have been killed.
    """

    def __init__(self, message: str, *, is_lost: bool = False) -> None:
        super().__init__(message)
        self.is_lost = is_lost


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run; one process alone by default."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and logs."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This rank's share of `count` things that belong to all; `size` divides it."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks, without gradient. The argument is left as it is."""
        return self._reduced(value, dist.ReduceOp.SUM)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all ranks, without gradient; of a floating-point type."""
        total = self.sum(value)
        return total if self.size == 1 else total / self.size

    def max(self, *values: int) -> list[int]:
        """The greatest of every number, by way of the CPU."""
        return [int(v) for v in self._reduced(torch.tensor(values), dist.ReduceOp.MAX)]

    def all(self, value: Value) -> list[Value]:
        """What every rank has, by rank; anything that can be pickled."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        _collective(dist.all_gather_object, values, value)
        return values

    def send(self, tensor: Tensor, source: int) -> Tensor:
        """`tensor` of the rank `source`, into this one's in place."""
        if self.size > 1:
            _collective(dist.broadcast, tensor, src=source)
        return tensor

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Make every gradient the mean over the ranks; one that is missing counts as zero."""
        if self.size == 1 or not parameters:
            return
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        _collective(dist.all_reduce, flat)
        flat /= self.size
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """Wait for all ranks at the end; an error inside in one of them is an error in all.

        Inside, nothing may wait for other ranks.

        Raises:
            PeerError: another rank's error counts.
        """
        own: Exception | None = None
        try:
            yield
        except PeerError:
            raise
        except Exception as error:  # noqa: BLE001 - raised again when all have heard of it
            own = error
        speaker = self._first_with(own)
        if own is not None and speaker in (self.rank, None):
            raise own
        if speaker is not None:
            raise PeerError(f"process {speaker} says why") from own

    def _first_with(self, error: Exception | None) -> int | None:
        """The lowest rank with an error: of those that met the same, one is enough to tell."""
        try:
            (failed,) = self.max(0 if error is None else self.size - self.rank)
        except PeerError:
            if error is None:
                raise
            return None
        return self.size - failed if failed else None

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What rank 0 makes, on every rank.

        Raises:
            PeerError: rank 0 failed; on rank 0 itself, its error.
        """
        made: list[Any] = []
        with self.agreed():
            if self.is_first:
                made.append(make())
        value: Value = self.all(made)[0][0]
        return value

    def _reduced(self, value: Tensor, operation: Any) -> Tensor:
        if self.size == 1:
            return value.detach()
        value = value.detach().clone()
        _collective(dist.all_reduce, value, op=operation)
        return value


ALONE = Ranks()


def _collective(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except torch.OutOfMemoryError:  # a RuntimeError too, and this process's own
        raise
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        raise PeerError(
            f"another process of the run is gone, or cannot be reached: {error}", is_lost=True
        ) from error


def world_size() -> int:
    """Processes of the run, as torchrun says; 1 without it."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this is rank 0, also before the processes are connected."""
    return _number("RANK", 0) == 0


def is_first_here() -> bool:
    """Whether this is the first process of the run on this machine."""
    return _number("LOCAL_RANK", 0) == 0


def choose_device(name: str) -> torch.device:
    """The device of this process: of several it is the one with its local rank.

    Args:
        name: `auto`, `cpu`, or CUDA devices with commas between.

    Raises:
        DeviceError, TrainerError: not here, too few, or more than this process can use.
    """
    is_alone = world_size() == 1
    devices = find_devices("auto" if name == "cuda" and not is_alone else name)
    local, num_local = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
    if is_alone and name == "auto":
        return torch.device(devices[0])
    if is_alone and len(devices) > 1:
        raise TrainerError(
            f"--device {name} has {len(devices)} devices, and one process trains on one; start "
            f"torchrun --standalone --nproc-per-node={len(devices)} -m trainer ..."
        )
    if devices == ["cpu"]:
        return torch.device("cpu")
    if len(devices) < num_local:
        raise TrainerError(
            f"{num_local} processes were started on this machine, and --device {name} has "
            f"{len(devices)} devices: {', '.join(devices)}; start as many as there are devices"
        )
    return torch.device(devices[local])


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Connect the processes that torchrun started; without it there is nothing to connect.

    After an error the connection is left as it is: the others may be waiting in the middle of
    something, and see this process end.
    """
    if world_size() == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # What the processes agree upon goes through the CPU: a GPU must not be waited for.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    yield Ranks(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdigit():
        raise TrainerError(f"{variable}={text!r} is not a number; start with torchrun, or unset it")
    return int(text)
