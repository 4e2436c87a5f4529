"""Shared memory for the images of batches: workers decode into it, their parent lends it out.

Fresh shared memory costs a page fault for every 4 KiB in both processes, in sum a third of what
decoding a photograph costs. So slots are made once, and used again as soon as the last tensor that
looks into one is gone. All accounts are the parent's: it picks a slot before it asks a worker for
a batch, so processes have nothing to agree on.
"""

import functools
import itertools
import math
import weakref
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pipeline.batch import Batch, lend, new_shared


class Slots:
    """`number` slots of `size` bytes each. Made before the workers, who take it along."""

    def __init__(self, number: int, size: int) -> None:
        self.size = size
        self.key = next(_keys)
        self._memory = new_shared(number * size).view(number, size).unbind()
        self._free = list(range(number))
        _slots[self.key] = self

    def take(self) -> int | None:
        """A free slot for the next batch; None while there is none."""
        # The last one that came back: some of it may still be in the processor's cache.
        return self._free.pop() if self._free else None

    def memory(self, slot: int) -> Tensor:
        """uint8 (size)"""
        return self._memory[slot]

    def lend(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """uint8 of `shape`, what a worker left there. The slot is free when all views are gone."""
        array = self._memory[slot].numpy()[: math.prod(shape)]
        return lend(array, functools.partial(self._free.append, slot)).view(shape)


@dataclass(frozen=True)
class InSlot:
    """What a worker sends: its parent receives the batch, whose images are in the slot."""

    batch: Batch
    key: int
    slot: int

    def __reduce__(self) -> tuple[Any, ...]:
        receive, (image_BHWC, *rest) = self.batch.__reduce__()
        return _received, (self.key, self.slot, tuple(image_BHWC.shape), receive, rest)


_keys = itertools.count()
_slots: "weakref.WeakValueDictionary[int, Slots]" = weakref.WeakValueDictionary()


def _received(key: int, slot: int, shape: tuple[int, ...], receive: Any, rest: list[Any]) -> Batch:
    batch: Batch = receive(_slots[key].lend(slot, shape), *rest)
    return batch
