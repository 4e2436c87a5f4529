"""A packed dataset in any PyTorch loop: batches in the trainer's order, resumable at any step.

    from pipeline.loader import Loader

    loader = Loader("s3://bucket/screens", batch_size=32, size=(224, 224), workers=2)
    for batch in loader:
        images_BCHW = batch.images("cuda", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

A step is one global batch, over all processes; a `Batch` is one forward pass of it. The position
is the number of steps that were delivered whole. Order and reading are those of `pipeline.order`
and `pipeline.stream`; nothing here needs Accelerate.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from pipeline.batch import Batch
from pipeline.datasets import Datasets
from pipeline.fit import Fit, FitKind
from pipeline.order import Order
from pipeline.stream import BatchDataset, SampleReader, TrainPlans, make_loader
from shards.storage import UserError
from shards.tokens import TokenizerFile

STATE_VERSION = 1


class Loader:
    """Iterates over a split in shuffled epochs: this process's `Batch`es, in order.

    Args:
        url: root of a packed dataset, where manifest.json lies; or those of several, mixed.
        weights: of several datasets, each one's part of the samples, in any unit; default: by
            size.
        batch_size: samples of a `Batch`: of one forward pass of one process.
        global_size: samples of a step, over all processes; a multiple of `batch_size`. Default:
            `batch_size * world_size` (or the loaded state's), so that a `Batch` is a step's whole
            share. If it is larger, a process gets several of a step, to accumulate gradients over:
            those with the same `batch.step`.
        size: (width, height) in pixels to scale images to; default: as they were packed.
        fit: with `size`: `stretch`, `crop` or `pad`.
        split: one of the dataset's.
        seed: of the order.
        epochs: stop after so many; None never stops.
        workers: processes that read and decode; 0 does it in this one. They share out the threads
            that PyTorch has here (`torch.get_num_threads()`), and decode with them.
        lanes, window: of the shuffle, as in `pipeline.order.Order`.
        cache_dir, cache_bytes: of this node, for shards of object stores, as the configuration's
            `data.cache_dir` and `data.cache_bytes`.
        rank, world_size: of this process; default: those of `torch.distributed` where it is
            initialised, else of the environment (RANK, WORLD_SIZE), else 0 of 1.

    A sample that cannot be read keeps its place, all black, with `batch.weight_B` 0, and is warned
    of once.

    Raises:
        UserError: there is no such dataset or split, or sizes do not fit it or the processes.
    """

    def __init__(
        self,
        url: str | Path | Sequence[str | Path],
        *,
        weights: Sequence[float] = (),
        batch_size: int,
        global_size: int | None = None,
        size: tuple[int, int] | None = None,
        fit: FitKind = "stretch",
        split: str = "train",
        seed: int = 0,
        epochs: int | None = None,
        workers: int = 0,
        lanes: int = 0,
        window: int = 8192,
        cache_dir: str | Path = "",
        cache_bytes: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.split, self.workers, self.epochs = split, workers, epochs
        default_rank, default_world_size = _place()
        self.rank = default_rank if rank is None else rank
        self.world_size = default_world_size if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise UserError(
                f"rank = {self.rank}: with world_size = {self.world_size}, count from 0"
            )
        roots = (url,) if isinstance(url, str | Path) else url
        self._data = Datasets.open(tuple(map(str, roots)), any_size=size is not None)
        image = self._data.image
        scaled = None if size is None else Fit(size[1], size[0], fit, image.background)
        height = image.height if scaled is None else scaled.height
        width = image.width if scaled is None else scaled.width
        if height is None or width is None:
            raise UserError(
                f"{self._data.label}: images differ in size; give size = (width, height)"
            )
        self._layout = {"seed": seed, "lanes": lanes, "window": window}
        self._weights = tuple(weights)
        self._batch_size = batch_size
        self._fixed_size = global_size
        self.order, self._micros = self._order_of(global_size or batch_size * self.world_size)
        reader = SampleReader(
            self._data.shards(split),
            open_shards=self._data.open_shards(split, lanes=lanes, window=window),
            cache=self._data.cache(str(cache_dir), cache_bytes),
        )
        self.dataset = BatchDataset(
            reader,
            image_CHW=(image.channels, height, width),
            with_tokens=self._data.kind == "pairs",
            tokenizer=TokenizerFile.of(self._data.roots[0], self._data.manifests[0]),
            seed=seed,
            fit=scaled,
        )
        self._step = 0
        self._runs = 0
        self._warned: set[str] = set()

    @property
    def step(self) -> int:
        """Steps delivered whole: the number of the next one."""
        return self._step

    @property
    def epoch(self) -> int:
        """The epoch of the next step, from 0."""
        return self.order.epoch_of(self._step)[0]

    @property
    def steps_per_epoch(self) -> int:
        return self.order.steps_per_epoch

    def __len__(self) -> int:
        """This process's batches of one epoch."""
        return self.steps_per_epoch * len(self._micros)

    def __iter__(self) -> Iterator[Batch]:
        """From the position on, to the end of `epochs`."""
        return self._batches(self.epochs)

    def one_epoch(self) -> Iterator[Batch]:
        """From the position on, to the end of its epoch: all of it, unless a state was loaded."""
        return self._batches(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """The position, as plain values; the same on all processes after the same step.

        In the midst of a step (when `global_size` leaves a process several batches) it is the
        step's beginning, since the gradients gathered so far are not kept either.
        """
        return {"version": STATE_VERSION, "step": self._step, **self._identity(self.order)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes to the position of a state, also one of another number of processes or workers.

        An iteration that is under way ends with an error.

        Raises:
            UserError: the state is of another dataset, seed or layout, whose step K is another.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"state_dict of version {state.get('version')}: not of this Loader")
        global_size = state.get("global_size")
        if self._fixed_size is None and isinstance(global_size, int):
            if global_size % self._batch_size:
                raise UserError(
                    f"batch_size = {self._batch_size} does not divide the state's global_size = "
                    f"{global_size}; choose a divisor"
                )
            wanted = global_size
        else:
            wanted = self.order.global_size
        order, micros = self._order_of(wanted)
        for name, value in self._identity(order).items():
            if state.get(name) != value:
                raise UserError(
                    f"{self._data.label}: the state is of {name} = {state.get(name)!r}, the "
                    f"loader has {value!r}: its steps hold other samples"
                )
        self.order, self._micros = order, micros
        self._step = int(state["step"])
        self._runs += 1

    def _identity(self, order: Order) -> dict[str, Any]:
        """What says which samples a step holds."""
        return {
            "data_digest": self._data.data_digest,
            "weights": list(self._weights),
            "split": self.split,
            "seed": order.seed,
            "global_size": order.global_size,
            "lanes": order.lanes,
            "window": order.window,
        }

    def _order_of(self, global_size: int) -> tuple[Order, range]:
        """The order, and this process's microbatches of every step of it."""
        try:
            order = self._data.order(
                self.split,
                self._weights,
                global_size=global_size,
                micro_size=self._batch_size,
                **self._layout,
            )
            return order, order.micros_of(self.rank, self.world_size)
        except (UserError, ValueError) as error:
            raise UserError(_in_our_words(str(error))) from error

    def _batches(self, epochs: int | None) -> Iterator[Batch]:
        self._runs += 1
        run = self._runs
        # Without an end the plans are those of more steps than anyone lives to see.
        stop = 2**40 if epochs is None else epochs * self.steps_per_epoch
        plans = TrainPlans(self.order, self._micros, self._step, max(stop, self._step))
        pin = torch.cuda.is_available()
        for batch in make_loader(self.dataset, plans, workers=self.workers, pin=pin):
            for line in batch.bad:
                if line not in self._warned:
                    self._warned.add(line)
                    warnings.warn(f"{line}; its weight is 0", stacklevel=2)
            if batch.micro == self._micros[-1]:
                self._step = batch.step + 1
            yield batch
            if run != self._runs:
                raise RuntimeError(
                    "the Loader went elsewhere: another iteration or load_state_dict began"
                )


def _place() -> tuple[int, int]:
    """(rank, world_size) of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _in_our_words(text: str) -> str:
    """The order's message names configuration keys; here they are arguments."""
    for key, argument in (
        ("batch.micro_size", "batch_size"),
        ("batch.global_size", "global_size"),
        ("data.lanes", "lanes"),
    ):
        text = text.replace(key, argument)
    return text
