"""A packed dataset in any PyTorch loop: batches in the trainer's order, resumable at any step.

    from pipeline.loader import Loader

    loader = Loader("s3://bucket/screens", batch_size=32, size=(224, 224), workers=2)
    for batch in loader:
        images_BCHW = batch.images("cuda", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

A step is one global batch, over all processes; a `Batch` is one forward pass of it. The position
is the number of steps that were delivered whole. Order and reading are those of `pipeline.order`
and `pipeline.stream`; nothing here needs Accelerate.
"""

import contextlib
import math
import operator
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from torch import distributed

from pipeline.batch import Batch
from pipeline.cache import Node
from pipeline.datasets import Datasets
from pipeline.fit import Fit, FitKind
from pipeline.order import Order
from pipeline.stream import BatchDataset, SampleReader, TrainPlans, check_reads, make_loader
from shards.errors import redact
from shards.limits import MAX_PIXELS
from shards.storage import UserError
from shards.tokens import TokenizerFile

STATE_VERSION = 1


class Loader:
    """Iterates over a split in shuffled epochs: this process's `Batch`es, in order.

    Args:
        url: root of a packed dataset, where manifest.json lies; or those of several, mixed.
        weights: of several datasets, each one's part of the samples, in any unit; above 0;
            default: by size.
        batch_size: samples of a `Batch`: of one forward pass of one process.
        global_size: samples of a step, over all processes; a multiple of `batch_size`. Default:
            `batch_size * world_size` (or the loaded state's), so that a `Batch` is a step's whole
            share. If it is larger, a process gets several of a step, to accumulate gradients over:
            those with the same `batch.step`.
        size: (width, height) in pixels to scale images to; default: as they were packed.
        fit: with `size`: `stretch`, `crop` or `pad`.
        split: one of the dataset's.
        seed: of the order; any whole number.
        epochs: stop after so many, counted from the order's beginning; None never stops. `len()`
            is one epoch's in either case.
        workers: processes that read and decode; 0 does it in this one. They share out the threads
            that PyTorch has here (`torch.get_num_threads()`), and decode with them.
        lanes, window: of the shuffle, as in `pipeline.order.Order`.
        cache_dir, cache_bytes: of this node, for shards of object stores, as the configuration's
            `data.cache_dir` and `data.cache_bytes`.
        max_bad: damaged samples before an iteration ends with an error; None allows any number.
            This process counts those that it has met since the loader was made; no state holds
            them.
        rank, world_size: of this process; default: those of `torch.distributed` where it is
            initialised, else of the environment (RANK, WORLD_SIZE), else 0 of 1. Where the
            environment says otherwise, the process counts as a node of its own.

    A damaged sample that is allowed keeps its place, all black, with `batch.weight_B` 0, and is
    warned of once.

    Raises:
        UserError: an argument is out of range; there is no such dataset or split; sizes do not fit
            it or the processes; the cache cannot hold what this node needs at once.
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
        max_bad: int | None = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self.split = split
        self.workers = _whole("workers", workers, 0)
        self.epochs = _whole_or_none("epochs", epochs, 1)
        self.max_bad = _whole_or_none("max_bad", max_bad, 0)
        own_rank, num_ranks = _place()
        self.rank = _whole("rank", own_rank if rank is None else rank, 0)
        self.world_size = _whole("world_size", num_ranks if world_size is None else world_size, 1)
        if self.rank >= self.world_size:
            raise UserError(
                f"rank = {self.rank}: with world_size = {self.world_size}, count from 0"
            )
        self._node = _node_of(self.rank, self.world_size)
        self._batch_size = _whole("batch_size", batch_size, 1)
        self._fixed_size = _whole_or_none("global_size", global_size, 1)
        self._layout = {
            "seed": _whole("seed", seed),
            "lanes": _whole("lanes", lanes, 0),
            "window": _whole("window", window, 1),
        }
        cache_bytes = _whole("cache_bytes", cache_bytes, 0)
        pixels = _pixels_of(size, fit)
        roots = _roots_of(url)
        self._weights = _weights_of(weights, roots)
        self._data = Datasets.open(roots, any_size=pixels is not None)
        image = self._data.image
        scaled = None if pixels is None else Fit(pixels[1], pixels[0], fit, image.background)
        height = image.height if scaled is None else scaled.height
        width = image.width if scaled is None else scaled.width
        if height is None or width is None:
            raise UserError(
                f"{self._data.label}: images differ in size; give size = (width, height)"
            )
        self.order, self._micros = self._order_of(
            self._fixed_size or self._batch_size * self.world_size
        )
        with self._in_our_words():
            cache = self._data.cache(str(cache_dir), cache_bytes)
        lanes, window = self._layout["lanes"], self._layout["window"]
        reader = SampleReader(
            self._data.shards(split),
            open_shards=self._data.open_shards(split, lanes=lanes, window=window),
            cache=cache,
        )
        self.dataset = BatchDataset(
            reader,
            image_CHW=(image.channels, height, width),
            with_tokens=self._data.kind == "pairs",
            tokenizer=TokenizerFile.of(self._data.roots[0], self._data.manifests[0]),
            seed=self.order.seed,
            fit=scaled,
        )
        self._check_reads(self.order, say=True)
        self._step = 0
        self._runs = 0
        self._bad: dict[str, str] = {}
        self._warned_of_end = False

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
        """This process's batches of one epoch, whatever `epochs` is."""
        return self.steps_per_epoch * len(self._micros)

    def __iter__(self) -> Iterator[Batch]:
        """From the position on, to the end of `epochs`: nothing, with a warning, where they are
        over."""
        if self.epochs is not None and self.epoch >= self.epochs and not self._warned_of_end:
            self._warned_of_end = True
            warnings.warn(
                f"the loader's epochs are over (epochs = {self.epochs}, step {self._step}): it "
                "gives no batch; loader.one_epoch() reads one more",
                stacklevel=2,
            )
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
            UserError: the state is of another dataset, seed or layout, whose step K is another;
                or the cache cannot hold what this node needs at once of its global size.
        """
        if state.get("version") != STATE_VERSION:
            raise UserError(f"state_dict of version {state.get('version')}: not of this Loader")
        step = _whole("the state's step", state.get("step"), 0)
        global_size = _whole("the state's global_size", state.get("global_size"), 1)
        if self._fixed_size is None:
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
        if wanted != self.order.global_size:
            self._check_reads(order, say=False)
        self.order, self._micros = order, micros
        self._step = step
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
        with self._in_our_words():
            order = self._data.order(
                self.split,
                self._weights,
                global_size=global_size,
                micro_size=self._batch_size,
                **self._layout,
            )
            try:
                return order, order.micros_of(self.rank, self.world_size)
            except ValueError as error:
                raise UserError(str(error)) from error

    def _check_reads(self, order: Order, *, say: bool) -> None:
        if self.dataset.reader.cache is not None:
            with self._in_our_words():
                check_reads(order, self.dataset, self._node, say=say)

    @contextlib.contextmanager
    def _in_our_words(self) -> Iterator[None]:
        """Messages of the parts name configuration keys and the split `train`; here they are
        arguments."""
        try:
            yield
        except UserError as error:
            text = str(error)
            for theirs, ours in _OUR_WORDS:
                text = text.replace(theirs, ours.format(split=self.split))
            if text == str(error):
                raise
            raise UserError(text) from error

    def _batches(self, epochs: int | None) -> Iterator[Batch]:
        self._runs += 1
        run = self._runs
        # Without an end the plans are those of more steps than anyone lives to see.
        stop = 2**40 if epochs is None else epochs * self.steps_per_epoch
        plans = TrainPlans(
            self.order, self._micros, self._step, max(stop, self._step), node=self._node
        )
        pin = torch.cuda.is_available()
        made = make_loader(self.dataset, plans, workers=self.workers, pin=pin)
        with contextlib.closing(made) as batches:
            while (batch := self._next_of(batches)) is not None:
                self._account_for_bad(batch)
                if batch.micro == self._micros[-1]:
                    self._step = batch.step + 1
                yield batch
                if run != self._runs:
                    raise RuntimeError(
                        "the Loader went elsewhere: another iteration or load_state_dict began"
                    )

    def _next_of(self, batches: Iterator[Batch]) -> Batch | None:
        with self._in_our_words():
            return next(batches, None)

    def _account_for_bad(self, batch: Batch) -> None:
        allowed = math.inf if self.max_bad is None else self.max_bad
        for name, line in zip(batch.bad_names, batch.bad, strict=True):
            if name not in self._bad:
                self._bad[name] = line
                if len(self._bad) <= allowed:
                    warnings.warn(f"{line}; its weight is 0", stacklevel=3)
        if batch.bad and len(self._bad) > allowed:
            *_, newest = self._bad.values()
            raise UserError(
                f"{newest} ({len(self._bad)} damaged samples, max_bad allows {self.max_bad}); run "
                "`pixloom verify --deep` on the dataset: it is damaged, or the dataset was "
                "replaced after this loader was made"
            )


_OUR_WORDS = (
    ("batch.micro_size", "batch_size"),
    ("batch.global_size", "global_size"),
    (" of data.lanes; lower it", "; lower lanes"),
    ("data.lanes", "lanes"),
    ("data.window", "window"),
    ("data.weights", "weights"),
    ("data.cache_bytes", "cache_bytes"),
    ("data.cache_dir", "cache_dir"),
    ("the training split", "the split {split!r}"),
    (" training samples", " samples of the split {split!r}"),
)


def _place() -> tuple[int, int]:
    """(rank, world_size) of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _node_of(rank: int, world_size: int) -> Node:
    """The environment's, if it knows this process by that rank; else one of this process alone."""
    node, all_ranks = Node.of_environment(), range(world_size)
    if (
        (node.ranks.start + node.local_rank, node.world_size) == (rank, world_size)
        and node.ranks[0] in all_ranks
        and node.ranks[-1] in all_ranks
    ):
        return node
    return Node(range(rank, rank + 1), world_size, 0)


def _whole(name: str, value: object, least: float = -math.inf) -> int:
    """An argument as a plain int; NumPy's whole numbers are whole, too. Raises `UserError`."""
    try:
        number = int(operator.index(value))  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{name} = {value!r}: must be a whole number") from None
    if number < least:
        raise UserError(f"{name} = {number}: must be at least {least}")
    return number


def _whole_or_none(name: str, value: object, least: float) -> int | None:
    return None if value is None else _whole(name, value, least)


def _roots_of(url: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    try:
        roots = (str(url),) if isinstance(url, str | Path) else tuple(map(str, url))
    except TypeError:
        raise UserError(f"url = {url!r}: give the root of a packed dataset") from None
    if not roots or "" in roots:
        raise UserError("url: is empty; give the root of a packed dataset, or those of several")
    for root in roots:
        if roots.count(root) > 1:
            raise UserError(f"url: {redact(root)} is there twice; give it a weight instead")
    return roots


def _weights_of(weights: Sequence[float], roots: Sequence[str]) -> tuple[float, ...]:
    try:
        numbers = tuple(map(float, weights))
    except (TypeError, ValueError):
        raise UserError(f"weights = {weights!r}: must be numbers") from None
    if numbers and len(roots) == 1:
        raise UserError("weights: belong to several datasets, and url names one")
    if numbers and len(numbers) != len(roots):
        raise UserError(
            f"weights: {len(numbers)} of them for {len(roots)} datasets; give one for each, or none"
        )
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(f"weights = {numbers}: each must be above 0 and finite")
    return numbers


def _pixels_of(size: tuple[int, int] | None, fit: str) -> tuple[int, int] | None:
    """Width and height of `size`, when `fit` goes with it."""
    if fit not in get_args(FitKind):
        raise UserError(f"fit = {fit!r}: choose one of {', '.join(get_args(FitKind))}")
    if size is None:
        if fit != "stretch":
            raise UserError(f"fit = {fit!r}: needs size = (width, height)")
        return None
    try:
        width, height = size
    except (TypeError, ValueError):
        raise UserError(f"size = {size!r}: give (width, height) in pixels") from None
    width, height = _whole("size", width, 1), _whole("size", height, 1)
    if width * height > MAX_PIXELS:
        raise UserError(f"size = ({width}, {height}): more than {MAX_PIXELS} pixels")
    return width, height
