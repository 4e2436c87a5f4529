"""Sample ids to bytes: reads the spans of packed shards by offset, and feeds loader workers.

A map-style dataset under a `DataLoader` whose sampler is the order itself: workers hold no state,
so any number of them gives the same batches, and prefetching never moves a cursor. What the bytes
mean is `pipeline.batch`'s business.
"""

import atexit
import contextlib
import ctypes
import functools
import itertools
import math
import multiprocessing
import os
import signal
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline import rng
from pipeline.batch import Batch, RawSample, SampleError, assemble
from pipeline.cache import LookAhead, Node, NodeCache, Outlook, Schedule
from pipeline.cache import Shard as Shard
from pipeline.fit import Fit
from pipeline.order import Order, SampleIds, ShardUse, validation_batches, validation_uses
from pipeline.slots import InSlot, Slots
from pipeline.threads import Threads
from shards import storage
from shards.errors import redact
from shards.format import FormatError, Receipt, SampleSpan, parse_index
from shards.storage import UserError
from shards.tokens import TokenizerFile

T = TypeVar("T")

# How a root is named in messages, computed once, not for every sample.
_shown = functools.cache(redact)

# File descriptors of one reader; a process may usually have 1024.
_MAX_FILES = 256
# Batches that are asked of each worker ahead of need.
_PREFETCH = 2
# Decoding threads of one process: what they do in Python, they do one at a time.
_MAX_THREADS = 8
# glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes.
_MALLOC_OPTIONS = {-3: 32 * 2**20, -1: 64 * 2**20}


class SampleReader:
    """Reads samples by (shard, index) with one `pread` each, from shards on local storage, and
    from those of object stores through the node's `cache`. Without one, only their keys.

    Indexes and receipts are read when a shard is first needed, so opening costs the same for any
    number of shards. May be used after a fork and pickled to a spawned worker.
    """

    def __init__(
        self, shards: Iterable[Shard], *, open_shards: int = 64, cache: NodeCache | None = None
    ) -> None:
        self.shards = tuple(shards)
        self.cache = cache
        self.schedule: Schedule | None = None
        """while a loader reads: what comes next"""
        self.open_shards = open_shards
        self._files: OrderedDict[int, int] = OrderedDict()
        self._spans = functools.lru_cache(maxsize=open_shards)(self._read_index)
        self._receipt = functools.lru_cache(maxsize=open_shards)(self._read_receipt)
        for shard in self.shards:
            if cache is not None and shard.is_remote:
                cache.adopt(shard)

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(SampleReader, open_shards=self.open_shards, cache=self.cache)
        return make, (self.shards,), {"schedule": self.schedule}

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def shard_samples(self) -> list[int]:
        """How many samples each shard has."""
        return [shard.entry.samples for shard in self.shards]

    def key(self, shard: int, index: int) -> str:
        """The sample's key, from the shard's index; of another than the first dataset with that
        one's number before it, because keys are unique in a dataset only."""
        key, dataset = self._spans(shard)[index].key, self.shards[shard].dataset
        return f"{dataset} {key}" if dataset else key

    def read(self, shard: int, index: int) -> RawSample:
        """The members of one sample, checked against the CRC-32 of its shard's receipt.

        Raises:
            SampleError: the bytes are damaged or the shard is cut short or missing.
            UserError: the storage does not answer.
        """
        span = self._spans(shard)[index]
        where = f"{_shown(self.shards[shard].root)}/{self.shards[shard].entry.name} {span.key}"
        data = bytearray(span.size)
        if self.shards[shard].is_remote:
            self._read_cached(shard, index, data, where)
        else:
            self._read_span(self._descriptor(shard), shard, index, data, where)
        view = memoryview(data)
        members = {}
        for member in span.members:
            start = member.offset - span.offset
            members[member.extension] = view[start : start + member.size]
        return RawSample(where, span.key, members)

    def _read_span(
        self, descriptor: int, shard: int, index: int, data: bytearray, where: str
    ) -> None:
        try:
            if os.preadv(descriptor, [data], self._spans(shard)[index].offset) != len(data):
                raise SampleError(f"{where}: the shard ends inside the sample")
        except OSError as error:
            raise SampleError(f"{where}: cannot be read ({error.strerror})") from error
        if zlib.crc32(data) != self._receipt(shard).crc32[index]:
            raise SampleError(f"{where}: CRC-32 differs from the receipt's")

    def _read_cached(self, shard: int, index: int, data: bytearray, where: str) -> None:
        if self.cache is None:
            raise UserError(f"{self.shards[shard].url}: on an object store, and there is no cache")
        while True:
            # Opened for each sample: a file held open would keep its room after its eviction.
            descriptor = self.cache.open(self.shards[shard], self.schedule)
            try:
                self._read_span(descriptor, shard, index, data, where)
                return
            except SampleError:
                if not self.cache.recheck(self.shards[shard]):
                    raise
            finally:
                os.close(descriptor)
            self._spans.cache_clear()
            self._receipt.cache_clear()
            data[:] = bytes(self._spans(shard)[index].size)

    def prefetch(self, shard: int, outlook: Outlook) -> None:
        """Brings index and receipt of a remote shard to this node; from any thread."""
        self._read_index(shard, outlook)
        self._read_receipt(shard, outlook)

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= min(self.open_shards, _MAX_FILES):
            os.close(self._files.popitem(last=False)[1])
        root, entry, _ = self.shards[shard]
        path = storage.local_path(storage.join(root, entry.name))
        # Not to wait for a writer, should it be a pipe.
        self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return self._files[shard]

    def _read_index(self, shard: int, outlook: Outlook | None = None) -> list[SampleSpan]:
        samples = self.shards[shard].entry.samples

        def parse(text: str, url: str) -> list[SampleSpan]:
            hint = (
                "run `pixloom verify` on the dataset: it is damaged, or the dataset was replaced "
                "after this run had begun"
            )
            try:
                spans = parse_index(text, url, self.shards[shard].entry.bytes)
            except FormatError as error:
                raise FormatError(f"{error}; {hint}") from error
            if len(spans) != samples:
                raise UserError(f"{url}: {len(spans)} samples, the manifest says {samples}; {hint}")
            return spans

        return self._read_text(shard, self.shards[shard].entry.index_name, parse, outlook)

    def _read_receipt(self, shard: int, outlook: Outlook | None = None) -> Receipt:
        entry = self.shards[shard].entry

        def parse(text: str, url: str) -> Receipt:
            receipt = Receipt.from_json(text, url)
            if receipt.shard != entry:
                raise UserError(
                    f"{url}: is of another shard than the manifest's; pack was mixed up, or the "
                    "dataset was replaced after this run had begun"
                )
            return receipt

        return self._read_text(shard, entry.receipt_name, parse, outlook)

    def _read_text(
        self, shard: int, name: str, parse: Callable[[str, str], T], outlook: Outlook | None
    ) -> T:
        if self.cache is not None and self.shards[shard].is_remote:
            return self.cache.text(self.shards[shard], name, parse, outlook)
        url = storage.join(self.shards[shard].root, name)
        return parse(storage.read_text(url), url)


@dataclass(frozen=True)
class BatchPlan:
    """What one batch holds: a microbatch of a step, or a batch of a validation pass, whose number
    is then both `step` and `micro`.

    `first_place` is the place of the first sample in the global batch.
    """

    step: int
    micro: int
    first_place: int
    ids: SampleIds


Request = tuple[BatchPlan, int | None]
"""A batch, and the slot for its images."""


class BatchDataset(Dataset[Batch]):
    """Turns a `BatchPlan` into a `Batch`: a pure function, so any worker may do it."""

    def __init__(
        self,
        reader: SampleReader,
        *,
        image_CHW: tuple[int, int, int],
        with_tokens: bool,
        tokenizer: TokenizerFile | None = None,
        seed: int = 0,
        fit: Fit | None = None,
    ) -> None:
        self.reader = reader
        self.image_CHW = image_CHW
        self.fit = fit
        self.seed = seed
        self.with_tokens = with_tokens
        self.tokenizer = tokenizer

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """Reads and decodes one batch.

        Raises:
            UserError, FormatError: an index or a receipt is missing or damaged.
        """
        return self.read(plan)

    def read(
        self, plan: BatchPlan, memory: Tensor | None = None, threads: Threads | None = None
    ) -> Batch:
        """The same, with the images decoded into `memory` and by `threads`, as `assemble` says."""
        if self.reader.schedule is not None:
            self.reader.schedule.step = plan.step
        ids = plan.ids
        shards, indexes = ids.shard_G.tolist(), ids.index_G.tolist()
        return assemble(
            (self._sample(*at) for at in zip(shards, indexes, strict=True)),
            keys=[self.reader.key(*at) for at in zip(shards, indexes, strict=True)],
            augment_keys=[
                rng.torch_seed(self.seed, "augment", epoch, shard, index)
                for epoch, shard, index in zip(ids.epoch_G.tolist(), shards, indexes, strict=True)
            ],
            image_CHW=self.image_CHW,
            fit=self.fit,
            with_tokens=self.with_tokens,
            tokenizer=self.tokenizer,
            step=plan.step,
            micro=plan.micro,
            first_place=plan.first_place,
            memory=memory,
            threads=threads,
        )

    def _sample(self, shard: int, index: int) -> RawSample | SampleError:
        try:
            return self.reader.read(shard, index)
        except SampleError as error:
            return error


def node_places(order: Order, node: Node | None = None) -> range:
    """The places of the global batch that a node's ranks compute; this node's if None is given."""
    node = node or Node.of_environment()
    first, last = (
        order.micros_of(rank, node.world_size) for rank in (node.ranks[0], node.ranks[-1])
    )
    return range(first.start * order.micro_size, last.stop * order.micro_size)


class TrainPlans(Sampler[BatchPlan]):
    """This rank's microbatches of steps [start, stop), in order, across epochs."""

    def __init__(self, order: Order, micros: range, start: int, stop: int) -> None:
        self.order, self.micros, self.start, self.stop = order, micros, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.micros)

    def __iter__(self) -> Iterator[BatchPlan]:
        size = self.order.micro_size
        for step in range(self.start, self.stop):
            ids = self.order.samples_of(step)
            for micro in self.micros:
                part = ids[micro * size : (micro + 1) * size]
                yield BatchPlan(step, micro, micro * size, part)

    def uses(self, step: int) -> Iterator[ShardUse]:
        """What this node reads from a step on."""
        uses = self.order.uses(step, node_places(self.order))
        return itertools.takewhile(lambda use: use.first_step < self.stop, uses)


class ValidationPlans(Sampler[BatchPlan]):
    """This rank's batches of one pass over a split; `num_batches` are all ranks'."""

    def __init__(
        self, shard_samples: list[int], size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.shard_samples, self.size = shard_samples, size
        self.rank, self.world_size = rank, world_size
        self.num_batches = -(-sum(shard_samples) // size)

    def __len__(self) -> int:
        return len(range(self.rank, self.num_batches, self.world_size))

    def __iter__(self) -> Iterator[BatchPlan]:
        for number, ids in enumerate(validation_batches(self.shard_samples, self.size)):
            if number % self.world_size == self.rank:
                yield BatchPlan(number, number, number * self.size, ids)

    def uses(self, batch: int) -> Iterator[ShardUse]:
        """What this node reads from a batch on."""
        ranks = Node.of_environment().ranks
        return validation_uses(self.shard_samples, self.size, batch, ranks, self.world_size)


Plans = TrainPlans | ValidationPlans | list[BatchPlan]


class _Requests(Sampler[Request]):
    """Plans in their order, each with a slot for its images where there are slots.

    Tells `schedule` the step of the one that was taken last.
    """

    def __init__(self, plans: Plans, schedule: Schedule | None, slots: Slots | None) -> None:
        self.plans, self.schedule, self.slots = plans, schedule, slots

    def __len__(self) -> int:
        return len(self.plans)

    def __iter__(self) -> Iterator[Request]:
        for plan in self.plans:
            if self.schedule is not None:
                self.schedule.step = plan.step
            yield plan, None if self.slots is None else self.slots.take()


def make_loader(
    dataset: BatchDataset,
    plans: Plans,
    *,
    workers: int,
    pin: bool,
) -> Iterator[Batch]:
    """One `Batch` a plan, in the plans' order.

    Shards of object stores are fetched ahead by the first process of each node.

    Raises:
        UserError, FormatError: as `BatchDataset` does, from a worker too.
    """
    reader, schedule = dataset.reader, None
    if reader.cache is not None and not isinstance(plans, list):
        schedule = _schedule_of(reader, plans, workers)
        reader.schedule = schedule  # before workers are started: they take it along
        reader.cache.follow(schedule)
    slots = _slots_for(dataset, plans, workers) if workers else None
    # None is started before it is needed, so each worker has its own: threads outlive no fork.
    threads = Threads(decoding_threads(workers))
    loader: DataLoader[Any] = DataLoader(
        _Answers(dataset, slots, threads),
        batch_size=None,
        sampler=_Requests(plans, schedule, slots),
        num_workers=workers,
        prefetch_factor=_PREFETCH if workers else None,
        pin_memory=pin,
        collate_fn=_as_is,
        worker_init_fn=_prepare_worker,
        # Given so that iterating never draws from the global random state, which would make
        # dropout depend on when a loader was started.
        generator=torch.Generator(),
    )
    others = set(multiprocessing.active_children())
    answers: Iterator[Batch | Exception] = iter(loader)
    kill = functools.partial(_kill_at_exit, set(multiprocessing.active_children()) - others)
    atexit.register(kill)
    ahead = None
    if schedule is not None and reader.cache is not None and Node.of_environment().is_first:
        ahead = LookAhead(reader.cache, schedule, reader.prefetch)
    try:
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        threads.close()
        if ahead is not None:
            ahead.close()
            if ahead.num_fetched:
                number = Node.of_environment().number
                print(f"pixloom: node {number} {ahead.line}", file=sys.stderr, flush=True)
        if schedule is not None and reader.cache is not None:
            reader.cache.unfollow(schedule)
            reader.schedule = None
    atexit.unregister(kill)


def decoding_threads(workers: int) -> int:
    """Of each of a loader's processes: they share out the threads that PyTorch has in this one,
    which OMP_NUM_THREADS sets, and launchers of several ranks set to 1."""
    return min(max(1, torch.get_num_threads() // max(1, workers)), _MAX_THREADS)


def _schedule_of(
    reader: SampleReader, plans: TrainPlans | ValidationPlans, workers: int
) -> Schedule:
    first = next(iter(plans), None)
    # A loader hands out so many plans at a time; the ranks of a node are a step apart at most.
    num_plans = 1 + _PREFETCH * workers
    slack_steps = (
        1 + math.ceil(num_plans / max(1, len(plans.micros)))
        if isinstance(plans, TrainPlans)
        else num_plans * plans.world_size
    )
    step = 0 if first is None else first.step
    return Schedule(reader.shards, plans.uses, step=step, slack_steps=slack_steps)


def _slots_for(dataset: BatchDataset, plans: Plans, workers: int) -> Slots:
    """For what workers are asked ahead, and for two steps: one that is computed, one collected."""
    if isinstance(plans, list):
        held, largest = 2, max((len(plan.ids) for plan in plans), default=0)
    elif isinstance(plans, TrainPlans):
        held, largest = 2 * len(plans.micros), plans.order.micro_size
    else:
        held, largest = 2, plans.size
    return Slots(workers * _PREFETCH + held, largest * math.prod(dataset.image_CHW))


class _Answers(Dataset[Batch | InSlot | Exception]):
    """Hands errors of the user's from a worker to its parent as values: the loader itself would
    wrap them into a traceback."""

    def __init__(self, dataset: BatchDataset, slots: Slots | None, threads: Threads) -> None:
        self.dataset, self.slots, self.threads = dataset, slots, threads

    def __getitem__(self, request: Request) -> Batch | InSlot | Exception:
        plan, slot = request
        try:
            if self.slots is None or slot is None:
                return self.dataset.read(plan, threads=self.threads)
            batch = self.dataset.read(plan, self.slots.memory(slot), self.threads)
            return InSlot(batch, self.slots.key, slot)
        except (UserError, FormatError) as error:
            return error


def _as_is(answer: Any) -> Any:
    return answer


def _kill_at_exit(workers: Iterable[BaseProcess]) -> None:
    """Ends workers that an error left behind: they hold no state, and ignore the SIGTERM by which
    they would otherwise be ended, so that this process would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else the loader reports their death
    for worker in workers:
        worker.kill()


def _prepare_worker(worker: int) -> None:
    """What each worker does first."""
    # SIGTERM to a whole job must reach the step's end: the parent stops, and its workers with it.
    # Else a worker dies of the signal, and the run with it, before anything is saved.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # Memory that an image leaves is kept for the next one, where the C library is glibc: else it
    # goes back to the system, and each of its pages must be asked for again.
    with contextlib.suppress(AttributeError, OSError):
        for option, value in _MALLOC_OPTIONS.items():
            ctypes.CDLL(None).mallopt(option, value)


def grouped(loader: Iterable[Batch], size: int) -> Generator[tuple[list[Batch], float]]:
    """The loader's batches, `size` at a time, and the seconds that each group was waited for."""
    batches = iter(loader)
    while True:
        start_s = time.perf_counter()
        group = list(itertools.islice(batches, size))
        if not group:
            return
        yield group, time.perf_counter() - start_s
