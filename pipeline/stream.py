"""Sample ids to bytes: reads the spans of packed shards by offset, and feeds loader workers.

A map-style dataset under a `DataLoader` whose sampler is the order itself: workers hold no state,
so any number of them gives the same batches, and prefetching never moves a cursor. What the bytes
mean is `pipeline.batch`'s business.
"""

import atexit
import functools
import itertools
import math
import multiprocessing
import os
import signal
import time
import zlib
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from pipeline import rng
from pipeline.batch import Batch, RawSample, SampleError, assemble
from pipeline.fit import Fit
from pipeline.order import Order, SampleIds
from shards import storage
from shards.format import FormatError, Manifest, Receipt, SampleSpan, ShardEntry, parse_index
from shards.storage import UserError

# File descriptors of one reader; a process may usually have 1024.
_MAX_FILES = 256


class Shard(NamedTuple):
    """A shard of the dataset at `root`."""

    root: str
    entry: ShardEntry


class SampleReader:
    """Reads samples by (shard, index), on local storage, with one `pread` each.

    Indexes and receipts are read when a shard is first needed, so opening costs the same for any
    number of shards. May be used after a fork and pickled to a spawned worker.
    """

    def __init__(self, shards: Iterable[Shard], *, open_shards: int = 64) -> None:
        self.shards = tuple(shards)
        self.open_shards = open_shards
        self._files: OrderedDict[int, int] = OrderedDict()
        self._spans = functools.lru_cache(maxsize=open_shards)(self._read_index)
        self._receipt = functools.lru_cache(maxsize=open_shards)(self._read_receipt)

    def __reduce__(self) -> tuple[Any, tuple[tuple[Shard, ...]]]:
        return functools.partial(SampleReader, open_shards=self.open_shards), (self.shards,)

    def __del__(self) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    @property
    def shard_samples(self) -> list[int]:
        """How many samples each shard has."""
        return [shard.entry.samples for shard in self.shards]

    def key(self, shard: int, index: int) -> str:
        """The sample's key, from the shard's index."""
        return self._spans(shard)[index].key

    def read(self, shard: int, index: int) -> RawSample:
        """The members of one sample, checked against the CRC-32 of its shard's receipt.

        Raises:
            SampleError: the bytes are damaged or the shard is cut short.
        """
        span = self._spans(shard)[index]
        where = f"{self.shards[shard].entry.name} {span.key}"
        data = bytearray(span.size)
        try:
            if os.preadv(self._descriptor(shard), [data], span.offset) != span.size:
                raise SampleError(f"{where}: the shard ends inside the sample")
        except OSError as error:
            raise SampleError(f"{where}: cannot be read ({error.strerror})") from error
        if zlib.crc32(data) != self._receipt(shard).crc32[index]:
            raise SampleError(f"{where}: CRC-32 differs from the receipt's")
        view = memoryview(data)
        members = {}
        for member in span.members:
            start = member.offset - span.offset
            members[member.extension] = view[start : start + member.size]
        return RawSample(where, span.key, members)

    def _descriptor(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= min(self.open_shards, _MAX_FILES):
            os.close(self._files.popitem(last=False)[1])
        root, entry = self.shards[shard]
        path = storage.local_path(storage.join(root, entry.name))
        self._files[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[shard]

    def _read_index(self, shard: int) -> list[SampleSpan]:
        root, entry = self.shards[shard]
        url = storage.join(root, entry.index_name)
        spans = parse_index(storage.read_text(url), url)
        if len(spans) != entry.samples:
            raise UserError(
                f"{url}: {len(spans)} samples, the manifest says {entry.samples}; "
                "run `pixloom verify` on the dataset"
            )
        return spans

    def _read_receipt(self, shard: int) -> Receipt:
        root, entry = self.shards[shard]
        url = storage.join(root, entry.receipt_name)
        receipt = Receipt.from_json(storage.read_text(url), url)
        if receipt.shard != entry:
            raise UserError(f"{url}: is of another shard than the manifest's; pack was mixed up")
        return receipt


@dataclass(frozen=True)
class BatchPlan:
    """What one batch holds: a microbatch of a step, or a batch of a validation pass.

    `first_place` is the place of the first sample in the global batch, `epoch` keys augmentation.
    """

    step: int
    micro: int
    epoch: int
    first_place: int
    ids: SampleIds


class BatchDataset(Dataset[Batch]):
    """Turns a `BatchPlan` into a `Batch`: a pure function, so any worker may do it."""

    def __init__(
        self,
        reader: SampleReader,
        *,
        image_CHW: tuple[int, int, int],
        with_tokens: bool,
        seed: int = 0,
        fit: Fit | None = None,
    ) -> None:
        self.reader = reader
        self.image_CHW = image_CHW
        self.fit = fit
        self.seed = seed
        self.with_tokens = with_tokens

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """Reads and decodes one batch.

        Raises:
            UserError, FormatError: an index or a receipt is missing or damaged.
        """
        samples: list[RawSample | SampleError] = []
        augment_keys = []
        for shard, index in zip(plan.ids.shard_G.tolist(), plan.ids.index_G.tolist(), strict=True):
            try:
                samples.append(self.reader.read(shard, index))
            except SampleError as error:
                samples.append(error)
            augment_keys.append(rng.torch_seed(self.seed, "augment", plan.epoch, shard, index))
        return assemble(
            samples,
            keys=[
                self.reader.key(*at) for at in zip(plan.ids.shard_G, plan.ids.index_G, strict=True)
            ],
            augment_keys=augment_keys,
            image_CHW=self.image_CHW,
            fit=self.fit,
            with_tokens=self.with_tokens,
            step=plan.step,
            micro=plan.micro,
            first_place=plan.first_place,
        )


def open_shards_of(manifest: Manifest, split: str, *, lanes: int, window: int) -> int:
    """How many shards a reader of the training order had better keep open."""
    # A lane reads a window's samples at random: all its shards stay open, in every lane.
    mean_samples = manifest.num_samples(split) / len(manifest.splits[split])
    return (lanes or 8) * (2 + math.ceil(window / mean_samples))


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
            epoch, _ = self.order.epoch_of(step)
            for micro in self.micros:
                part = ids[micro * size : (micro + 1) * size]
                yield BatchPlan(step, micro, epoch, micro * size, part)


def make_loader(
    dataset: BatchDataset, plans: Sampler[BatchPlan] | list[BatchPlan], *, workers: int, pin: bool
) -> Iterator[Batch]:
    """One `Batch` a plan, in the plans' order.

    Raises:
        UserError, FormatError: as `BatchDataset` does, from a worker too.
    """
    loader: DataLoader[Batch | Exception] = DataLoader(
        _Answers(dataset),
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_as_is,
        worker_init_fn=_leave_signals_to_the_parent,
        # Given so that iterating never draws from the global random state, which would make
        # dropout depend on when a loader was started.
        generator=torch.Generator(),
    )
    others = set(multiprocessing.active_children())
    answers = iter(loader)
    kill = functools.partial(_kill_at_exit, set(multiprocessing.active_children()) - others)
    atexit.register(kill)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
        yield answer
    atexit.unregister(kill)


class _Answers(Dataset[Batch | Exception]):
    """Hands errors of the user's from a worker to its parent as values: the loader itself would
    wrap them into a traceback."""

    def __init__(self, dataset: BatchDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, plan: BatchPlan) -> Batch | Exception:
        try:
            return self.dataset[plan]
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


def _leave_signals_to_the_parent(worker: int) -> None:
    """SIGTERM to a whole job must reach the step's end: the parent stops, and its workers with it.

    Otherwise a worker dies of the signal, and the run with it, before anything is saved.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def grouped(loader: Iterable[Batch], size: int) -> Generator[tuple[list[Batch], float]]:
    """The loader's batches, `size` at a time, and the seconds that each group was waited for."""
    batches = iter(loader)
    while True:
        start_s = time.perf_counter()
        group = list(itertools.islice(batches, size))
        if not group:
            return
        yield group, time.perf_counter() - start_s
