"""Sample ids to bytes: reads the spans of packed shards by offset, and feeds loader workers.

A batch is a function of its number: workers hold no state, so any number of them gives the same
batches, and prefetching never moves a cursor. What the bytes mean is `pipeline.batch`'s business.
"""

import contextlib
import ctypes
import errno
import functools
import itertools
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, TypeVar

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from pipeline import rng
from pipeline.batch import Batch, RawSample, SampleError, assemble, new_shared
from pipeline.cache import LookAhead, Node, NodeCache, Outlook, Reads, Schedule, reads_of
from pipeline.cache import Shard as Shard
from pipeline.fit import Fit
from pipeline.order import (
    Order,
    SampleIds,
    ShardUse,
    shard_starts,
    validation_batch,
    validation_uses,
)
from pipeline.slots import InSlot, Slots
from pipeline.threads import Threads, some_ahead
from pipeline.workers import Workers
from shards import storage
from shards.errors import redact, tell
from shards.format import FormatError, Receipt, SampleSpan, parse_index
from shards.storage import UserError
from shards.tokens import TokenizerFile

T = TypeVar("T")
R = TypeVar("R")

MAX_NODE_LINES = 8
"""Of what nodes read."""

# How a root is named in messages, and where it lies: computed once, not for every sample.
_shown = functools.cache(redact)
_is_remote = functools.cache(storage.is_remote)

# File descriptors of one reader; a process may usually have 1024.
_MAX_FILES = 256
# Batches that a worker is asked for in one request. It reads both, decodes both and sends both: the
# second time, the code of each of these is still in the processor's cache.
_TOGETHER = 2
# Requests that each worker has ahead of need.
_PREFETCH = 2
# Decoding threads of one process: what they do in Python, they do one at a time.
_MAX_THREADS = 8
# glibc's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, in bytes.
_MALLOC_OPTIONS = {-3: 32 * 2**20, -1: 64 * 2**20}


class SampleReader:
    """Reads samples by (shard, index) with one `pread` each, from shards on local storage, and
    from those of object stores through the node's `cache`. Without one, only their keys.

    Indexes and receipts are read when a shard is first needed, so opening costs the same for any
    number of shards. May be used by several threads, after a fork, and pickled to a spawned worker.
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
        # A thread may read ahead, for this iteration or for one that was given up.
        self._lock = Lock()
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
        if _is_remote(self.shards[shard].root):
            return self._read_cached(shard, index)
        with self._lock:  # nobody closes the file meanwhile
            try:
                descriptor = self._descriptor(shard)
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    raise  # it says nothing about the shard
                where = self._where(shard, self._spans(shard)[index].key)
                raise SampleError(f"{where}: cannot be opened ({error.strerror})") from error
            return self._read_from(descriptor, shard, index)

    def _read_from(self, descriptor: int, shard: int, index: int) -> RawSample:
        span = self._spans(shard)[index]
        offset, size, where = span.offset, span.size, self._where(shard, span.key)
        try:
            data = os.pread(descriptor, size, offset)
        except OSError as error:
            raise SampleError(f"{where}: cannot be read ({error.strerror})") from error
        if len(data) != size:
            raise SampleError(f"{where}: the shard ends inside the sample")
        # By zlib-ng, in a sixth of zlib's time. (isal is as fast, but where it was called before,
        # the same PNGs took a third longer to decode.)
        if crc32(data) != self._receipt(shard).crc32[index]:
            raise SampleError(f"{where}: CRC-32 differs from the receipt's")
        view, members = memoryview(data), {}
        for member in span.members:
            first = member.offset - offset
            members[member.extension] = view[first : first + member.size]
        return RawSample(where, span.key, members)

    def _where(self, shard: int, key: str) -> str:
        root, entry, _ = self.shards[shard]
        return f"{_shown(root)}/{entry.name} {key}"

    def _read_cached(self, shard: int, index: int) -> RawSample:
        if self.cache is None:
            raise UserError(f"{self.shards[shard].url}: on an object store, and there is no cache")
        while True:
            # Opened for each sample: a file held open would keep its room after its eviction.
            descriptor = self.cache.open(self.shards[shard], self.schedule)
            try:
                return self._read_from(descriptor, shard, index)
            except SampleError:
                if not self.cache.recheck(self.shards[shard]):
                    raise
            finally:
                os.close(descriptor)
            self._spans.cache_clear()
            self._receipt.cache_clear()

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


@dataclass(frozen=True)
class RawBatch:
    """The bytes of a batch, and what decoding them adds to it."""

    plan: BatchPlan
    samples: list[RawSample | SampleError]
    keys: list[str]
    augment_keys: list[int]


class BatchDataset:
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
        return self.decode(self.fetch(plan))

    def fetch(self, plan: BatchPlan) -> RawBatch:
        """Reads one batch, all of it before any is decoded: in turns, both take longer by 2%.

        Raises:
            UserError, FormatError: an index or a receipt is missing or damaged.
        """
        schedule = self.reader.schedule
        if schedule is not None:
            schedule.step = plan.step
        ids = plan.ids
        epochs, *columns = (column.tolist() for column in (ids.epoch_G, ids.shard_G, ids.index_G))
        places = list(zip(*columns, strict=True))
        return RawBatch(
            plan,
            [self._sample(*place) for place in places],
            [self.reader.key(*place) for place in places],
            rng.torch_seeds((self.seed, "augment"), zip(epochs, *columns, strict=True)),
        )

    def decode(
        self, raw: RawBatch, memory: Tensor | None = None, threads: Threads | None = None
    ) -> Batch:
        """The images are decoded into `memory` and by `threads`, as `assemble` says."""
        batch = assemble(
            raw.samples,
            keys=raw.keys,
            augment_keys=raw.augment_keys,
            image_CHW=self.image_CHW,
            fit=self.fit,
            with_tokens=self.with_tokens,
            tokenizer=self.tokenizer,
            step=raw.plan.step,
            micro=raw.plan.micro,
            first_place=raw.plan.first_place,
            memory=memory,
            threads=threads,
        )
        if not batch.bad:
            return batch
        ids = raw.plan.ids[batch.weight_B.numpy() == 0]
        places = zip(ids.shard_G.tolist(), ids.index_G.tolist(), strict=True)
        return replace(batch, bad_names=tuple(f"{shard}/{index}" for shard, index in places))

    def _sample(self, shard: int, index: int) -> RawSample | SampleError:
        try:
            return self.reader.read(shard, index)
        except SampleError as error:
            return error


def node_places(order: Order, node: Node) -> range:
    """The places of the global batch that a node's ranks compute."""
    first, last = (
        order.micros_of(rank, node.world_size) for rank in (node.ranks[0], node.ranks[-1])
    )
    return range(first.start * order.micro_size, last.stop * order.micro_size)


def check_reads(
    order: Order, dataset: BatchDataset, node: Node | None = None, *, say: bool = True
) -> None:
    """Says once what each node reads of an epoch: a line a node, if there are several of them or
    the data is remote. `node` is this one; default: the environment's.

    Raises:
        UserError: the cache cannot hold what this node needs at once.
    """
    reader, node = dataset.reader, node or Node.of_environment()

    @functools.cache  # this node's are asked for twice
    def reads(one: Node) -> Reads:
        uses = order.uses(0, node_places(order, one))
        return reads_of(reader.shards, uses, order.steps_per_epoch)

    cache = reader.cache
    if cache is not None:
        own = reads(node)
        if own.working_bytes > cache.room_bytes:
            raise UserError(
                f"data.cache_bytes = {cache.bound_bytes}, room for {cache.room_bytes} bytes of "
                f"shards: one window of this node's lanes needs {own.num_working} shards, "
                f"{own.working_bytes} bytes, at once; raise it (in "
                f"{cache.folder}), or lower data.window or data.lanes"
            )
    nodes = node.all
    speaks = say and node.ranks[0] == 0 and node.is_first
    if not speaks or (cache is None and len(nodes) == 1):
        return
    per_lane = order.global_size // order.lanes
    for number, one in enumerate(nodes[:MAX_NODE_LINES]):
        places, found = node_places(order, one), reads(one)
        lanes = f"{places[0] // per_lane} to {places[-1] // per_lane}"
        print(
            f"pixloom: node {number} reads lanes {lanes} of {order.lanes}: {found.num_shards} "
            f"shards, {found.bytes / 1e6:.1f} MB "
            + (
                "an epoch"
                if found.num_steps == order.steps_per_epoch
                else f"in the first {found.num_steps} steps"
            )
            + (
                f"; cache {cache.folder}, {cache.bound_bytes / 1e6:.1f} MB at most" if cache else ""
            ),
            file=sys.stderr,
            flush=True,
        )
    if len(nodes) > MAX_NODE_LINES:
        print(f"pixloom: and {len(nodes) - MAX_NODE_LINES} nodes more", file=sys.stderr, flush=True)


class Plans(ABC):
    """This rank's batches, in order. Each is computed from its number alone, by who needs it.

    `node` has this rank; by default it is the environment's.
    """

    def __init__(self, node: Node | None) -> None:
        self.node = node or Node.of_environment()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, number: int) -> BatchPlan: ...

    def __iter__(self) -> Iterator[BatchPlan]:
        return map(self.__getitem__, range(len(self)))

    @abstractmethod
    def step_of(self, number: int) -> int:
        """The `step` of a batch."""

    @abstractmethod
    def uses(self, step: int) -> Iterator[ShardUse]:
        """What `node` reads from a step on."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Samples of a batch, at most."""

    @property
    def num_together(self) -> int:
        """Batches that are used together."""
        return 1


class TrainPlans(Plans):
    """This rank's microbatches of steps [start, stop), across epochs."""

    def __init__(
        self, order: Order, micros: range, start: int, stop: int, *, node: Node | None = None
    ) -> None:
        super().__init__(node)
        self.order, self.micros, self.start, self.stop = order, micros, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * len(self.micros)

    def __getitem__(self, number: int) -> BatchPlan:
        micro, size = self.micros[number % len(self.micros)], self.order.micro_size
        places = range(micro * size, (micro + 1) * size)
        step = self.step_of(number)
        return BatchPlan(step, micro, places.start, self.order.samples_of(step, places))

    def step_of(self, number: int) -> int:
        return self.start + number // len(self.micros)

    def uses(self, step: int) -> Iterator[ShardUse]:
        uses = self.order.uses(step, node_places(self.order, self.node))
        return itertools.takewhile(lambda use: use.first_step < self.stop, uses)

    @property
    def size(self) -> int:
        return self.order.micro_size

    @property
    def num_together(self) -> int:
        return len(self.micros)


class ValidationPlans(Plans):
    """This rank's batches of one pass over a split; `num_batches` are all ranks'."""

    def __init__(
        self,
        shard_samples: list[int],
        size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        node: Node | None = None,
    ) -> None:
        super().__init__(node)
        self.shard_samples, self._size = shard_samples, size
        self.rank, self.world_size = rank, world_size
        self.num_batches = -(-sum(shard_samples) // size)
        self._starts = shard_starts(shard_samples)

    def __len__(self) -> int:
        return len(range(self.rank, self.num_batches, self.world_size))

    def __getitem__(self, number: int) -> BatchPlan:
        batch = self.step_of(number)
        ids = validation_batch(self._starts, self.size, batch)
        return BatchPlan(batch, batch, batch * self.size, ids)

    def step_of(self, number: int) -> int:
        return self.rank + number * self.world_size

    @property
    def size(self) -> int:
        return self._size

    def uses(self, step: int) -> Iterator[ShardUse]:
        ranks, world_size = self.node.ranks, self.world_size
        return validation_uses(self.shard_samples, self.size, step, ranks, world_size)


def make_loader(
    dataset: BatchDataset, plans: Plans, *, workers: int, pin: bool
) -> Generator[Batch, None, None]:
    """One `Batch` a plan, in the plans' order; with `pin` in page-locked memory, for a GPU.

    So many worker processes read and decode; without any, this one does, and one of its decoding
    threads reads the next batch while one is in use. Shards of object stores are fetched ahead by
    the first process of each node, as the plans know it.

    Raises:
        UserError, FormatError: as `BatchDataset` does, from a worker too; or a worker was killed.
        RuntimeError: as `Workers.in_turn` does.
    """
    reader = dataset.reader
    with contextlib.ExitStack() as stack:
        schedule = None
        if reader.cache is not None:
            schedule = _schedule_of(reader, plans, workers)
            reader.schedule = schedule  # before workers are started: they take it along
            reader.cache.follow(schedule)
            stack.callback(_unfollow, reader, schedule)
        threads = stack.enter_context(contextlib.closing(Threads(decoding_threads(workers))))
        batches: Iterator[Batch]
        if workers:
            held = 2 * plans.num_together  # a step is computed, one is collected
            image_bytes = math.prod(dataset.image_CHW)
            slots = Slots(_num_ahead(workers) + held, plans.size * image_bytes)
            # They are started before the threads of this loader.
            answer = _Answer(dataset, plans, slots, threads)
            team = Workers(answer, workers, prepare=_keep_freed_memory)
            stack.callback(team.close)
            requests = _requests(plans, schedule, slots, workers)
            batches = _one_by_one(team.in_turn(requests, ahead=_PREFETCH))
        else:
            decode = functools.partial(dataset.decode, threads=threads)
            batches = threads.one_ahead(map(dataset.fetch, plans), decode)
        if pin:
            batches = map(Batch.pin_memory, batches)
        if pin and workers:
            device = torch.accelerator.current_device_index()
            prepare = functools.partial(_prepare_pinning, device)
            thread = stack.enter_context(ThreadPoolExecutor(1, "pixloom-pin", prepare))
            batches = some_ahead(thread, batches, _as_is, number=plans.num_together)
            stack.callback(team.hang_up)  # else that thread would be waited for
        if schedule is not None and reader.cache is not None and plans.node.is_first:
            look_ahead = LookAhead(reader.cache, schedule, reader.prefetch)
            stack.callback(_end_look_ahead, look_ahead, plans.node.number)
        yield from batches


def decoding_threads(workers: int) -> int:
    """Of each of a loader's processes: they share out the threads that PyTorch has in this one,
    which OMP_NUM_THREADS sets, and launchers of several ranks set to 1."""
    return min(max(1, torch.get_num_threads() // max(1, workers)), _MAX_THREADS)


def _num_ahead(workers: int) -> int:
    """Batches, at most, that workers were asked for and that nobody has taken yet."""
    return (workers * _PREFETCH + 1) * _TOGETHER - 1


def _schedule_of(reader: SampleReader, plans: Plans, workers: int) -> Schedule:
    # A loader hands out so many plans at a time; the ranks of a node are a step apart at most.
    num_plans = 1 + (_num_ahead(workers) if workers else 1)
    slack_steps = (
        num_plans * plans.world_size
        if isinstance(plans, ValidationPlans)
        else 1 + math.ceil(num_plans / max(1, plans.num_together))
    )
    step = plans.step_of(0) if len(plans) else 0
    return Schedule(reader.shards, plans.uses, step=step, slack_steps=slack_steps)


def _unfollow(reader: SampleReader, schedule: Schedule) -> None:
    if reader.cache is not None:
        reader.cache.unfollow(schedule)
    if reader.schedule is schedule:  # else another iteration has begun
        reader.schedule = None


def _end_look_ahead(look_ahead: LookAhead, number: int) -> None:
    look_ahead.close()
    if look_ahead.num_fetched:
        tell(f"pixloom: node {number} {look_ahead.line}")


Place = tuple[int, int | None]
"""The number of a plan, and the slot for its images."""
Request = list[Place]
Answer = list[Batch | InSlot | Exception]
"""A batch a place, or as many as there are before an error."""


def _requests(
    plans: Plans, schedule: Schedule | None, slots: Slots, workers: int
) -> Iterator[Request]:
    number, total = 0, len(plans)
    while number < total:
        # One by one while the first batch is waited for; and at the end, where else some workers
        # would have nothing left to do.
        alone = number < workers or total - number <= _num_ahead(workers)
        numbers = range(number, number + (1 if alone else _TOGETHER))
        if schedule is not None:
            schedule.step = plans.step_of(numbers[-1])
        yield [(each, slots.take()) for each in numbers]
        number = numbers.stop


@dataclass(frozen=True)
class _Answer:
    """What a worker does. Hands an error of the user's to its parent as a value, after the batches
    before it."""

    dataset: BatchDataset
    plans: Plans
    slots: Slots
    threads: Threads

    def __call__(self, request: Request) -> Answer:
        raws = _up_to_an_error(self._fetch, request)
        return _up_to_an_error(self._decode, zip(raws, request, strict=False))

    def _fetch(self, place: Place) -> RawBatch:
        return self.dataset.fetch(self.plans[place[0]])

    def _decode(self, work: tuple[RawBatch | Exception, Place]) -> Batch | InSlot:
        raw, (_, slot) = work
        if isinstance(raw, Exception):
            raise raw
        memory = new_shared(self.slots.size) if slot is None else self.slots.memory(slot)
        batch = self.dataset.decode(raw, memory, self.threads)
        return batch if slot is None else InSlot(batch, self.slots.key, slot)


def _up_to_an_error(function: Callable[[T], R], values: Iterable[T]) -> list[R | Exception]:
    """`function` of the values before the first that leads to an error of the user's, and that."""
    results: list[R | Exception] = []
    try:
        for value in values:
            results.append(function(value))
    except (UserError, FormatError) as error:
        results.append(error)
    return results


def _one_by_one(answers: Iterator[Answer]) -> Iterator[Batch]:
    for answer in answers:
        answer.reverse()
        while answer:
            yield _checked(answer.pop())  # here nobody holds on to what was given away


def _checked(found: Batch | InSlot | Exception) -> Batch:
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, Batch)  # what an `InSlot` arrives as
    return found


def _keep_freed_memory() -> None:
    """Memory that an image leaves is kept for the next one, where the C library is glibc: else it
    goes back to the system, and each of its pages must be asked for again."""
    with contextlib.suppress(AttributeError, OSError):
        for option, value in _MALLOC_OPTIONS.items():
            ctypes.CDLL(None).mallopt(option, value)


def _as_is(batch: Batch) -> Batch:
    return batch


def _prepare_pinning(device: int) -> None:
    """What a thread does first whose work is to copy to page-locked memory."""
    torch.set_num_threads(1)  # of this thread alone
    torch.accelerator.set_device_index(device)


def grouped(loader: Iterable[Batch], size: int) -> Generator[tuple[list[Batch], float]]:
    """The loader's batches, `size` at a time, and the seconds that each group was waited for."""
    batches = iter(loader)
    while True:
        start_s = time.perf_counter()
        group = list(itertools.islice(batches, size))
        if not group:
            return
        yield group, time.perf_counter() - start_s
