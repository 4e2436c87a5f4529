"""The small talk between processes: exact sums of CPU tensors, over a gloo group of its own.

Counts, digests, flags and metric rows go this way, so that none of them waits for the device or
shares a stream with the gradients. One process talks to itself.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from shards.format import FormatError
from shards.storage import StorageError, UserError


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """For errors that all processes meet alike: the first one of a machine says it, all end.

    What a process could not read or write is said by each, for the others may have been able to.
    """
    try:
        yield
    except StorageError:
        raise
    except (UserError, FormatError):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        sys.exit(2)


@dataclass(frozen=True)
class Ranks:
    """This process's `rank` among `world_size` processes."""

    rank: int = 0
    world_size: int = 1
    group: "dist.ProcessGroup | None" = None

    @classmethod
    def of_run(cls, timeout: timedelta = timedelta(minutes=30)) -> "Ranks":
        """From the initialised default process group, or one process without it."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)  # every rank is a member
        return cls(dist.get_rank(), dist.get_world_size(), group)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The element-wise sum over ranks of a CPU tensor, in place; int64 wraps modulo 2**64."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_int(self, *values: int) -> list[int]:
        """Sums of Python ints over ranks, modulo 2**64, each in [-2**63, 2**63)."""
        wrapped = [(value + 2**63) % 2**64 - 2**63 for value in values]
        summed: list[int] = self.sum(torch.tensor(wrapped, dtype=torch.int64)).tolist()
        return summed

    def join_text(self, text: str) -> str:
        """The texts of all ranks end to end, in their order. Nothing is pickled."""
        own = text.encode()
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(own)
        ends = self.sum(sizes).cumsum(0).tolist()
        whole = torch.zeros(ends[-1], dtype=torch.uint8)
        whole[ends[self.rank] - len(own) : ends[self.rank]] = torch.frombuffer(
            bytearray(own or b"\0"), dtype=torch.uint8
        )[: len(own)]
        return bytes(self.sum(whole).tolist()).decode()

    def barrier(self) -> None:
        self.sum_int(0)
