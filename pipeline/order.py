"""Pure arithmetic: which samples step K trains on, on any number of processes.

The order is a function of the shards' sample counts, the seed and the batch layout; no state is
kept, so standing at any step costs the same. `pipeline.stream` turns the ids into bytes.

    python -m pipeline.order --config run.toml --step 1200          the keys of step 1200
    python -m pipeline.order --config run.toml --step 1200 --digest the run's order_digest there

Legend of shape suffixes: G = samples of a global batch, B = samples of a microbatch.
"""

import argparse
import functools
import hashlib
import heapq
import itertools
import json
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import rng
from shards import storage
from shards.errors import redact
from shards.storage import UserError

DIGEST_START = "0" * 32
"""`order_digest` before the first step."""


@dataclass(frozen=True)
class SampleIds:
    """Where samples lie: `shard_G` counts the split's shards in manifest order (of several
    datasets end to end), `index_G` is the sample's place in its shard, and `epoch_G` says how
    often its dataset was read before. All int64, of equal length."""

    shard_G: NDArray[np.int64]
    index_G: NDArray[np.int64]
    epoch_G: NDArray[np.int64]

    def __getitem__(self, part: slice | NDArray[np.bool_]) -> "SampleIds":
        return SampleIds(self.shard_G[part], self.index_G[part], self.epoch_G[part])

    def __len__(self) -> int:
        return len(self.shard_G)

    @classmethod
    def joined(cls, parts: Sequence["SampleIds"]) -> "SampleIds":
        """One part after the other; there may be none."""
        parts = parts or [cls(*np.empty((3, 0), dtype=np.int64))]
        columns = zip(*((ids.shard_G, ids.index_G, ids.epoch_G) for ids in parts), strict=True)
        return cls(*map(np.concatenate, columns))


class ShardUse(NamedTuple):
    """Steps [first_step, last_step] read samples of these shards."""

    first_step: int
    last_step: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class _Epoch:
    """Shards (of all datasets') in this epoch's order, and `starts[k]` = samples before the k-th of
    them."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]


class Lanes:
    """One dataset's split as `num_lanes` endless sequences of samples, epoch after epoch.

    1. The shards are permuted anew each epoch and laid end to end.
    2. The sequence is cut into lanes of equal length (give or take one sample); a lane is
       permuted in consecutive windows of `window` samples.
    3. An epoch of a lane is its first `length` samples, so none comes twice in it.

    Args:
        shard_samples: samples in each shard, in manifest order.
        seed: any integer.
        length: samples of a lane in an epoch; at most the samples divided by `num_lanes`.
        first_shard: number of the split's first shard among those of all datasets.
    """

    def __init__(
        self,
        shard_samples: Sequence[int] | NDArray[np.int64],
        *,
        seed: int,
        num_lanes: int,
        window: int,
        length: int,
        first_shard: int = 0,
    ) -> None:
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.num_samples = int(self.shard_samples.sum())
        self.seed, self.num_lanes, self.window = seed, num_lanes, window
        self.length, self.first_shard = length, first_shard
        self._remember()

    def _remember(self) -> None:
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=2 * self.num_lanes)(self._make_window)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def draw(self, parts: Iterable[tuple[int, int, int]]) -> SampleIds:
        """The samples at places [start, stop) of a lane, for each part (lane, start, stop)."""
        pieces: list[tuple[int, NDArray[np.int64]]] = []
        for lane, start, stop in parts:
            while start < stop:
                epoch, place = divmod(start, self.length)
                take = min(stop - start, self._window_stop(place) - place)
                pieces.append((epoch, self._positions(epoch, lane, place, take)))
                start += take
        # Looked up together as long as they are of one epoch, as mostly all of them are.
        found = [
            self._looked_up(epoch, np.concatenate([piece for _, piece in of_epoch]))
            for epoch, of_epoch in itertools.groupby(pieces, key=operator.itemgetter(0))
        ]
        return found[0] if len(found) == 1 else SampleIds.joined(found)

    def windows(self, lane: int, start: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """A lane's windows from place `start` on, endless: their places [start, stop), and the
        shards that hold these."""
        while True:
            epoch, place = divmod(start, self.length)
            stop = start - place + self._window_stop(place)
            first, last = self._span(lane, place // self.window)
            if stop - start == last - first:
                # All of the window, in whatever order: nothing needs to be shuffled to know.
                layout = self._epoch(epoch)
                low, high = np.searchsorted(layout.starts, (first, last - 1), side="right")
                shards = np.sort(layout.shards[low - 1 : high])
            else:
                shards = np.unique(self.draw([(lane, start, stop)]).shard_G)
            yield start, stop, tuple(shards.tolist())
            start = stop

    def _looked_up(self, epoch: int, position_G: NDArray[np.int64]) -> SampleIds:
        """The samples at these positions of the epoch's sequence."""
        layout = self._epoch(epoch)
        ids = samples_at(layout.starts, position_G)
        return SampleIds(layout.shards[ids.shard_G], ids.index_G, ids.epoch_G + epoch)

    def _window_stop(self, place: int) -> int:
        """The end of the window around a place of a lane's epoch, or of the epoch."""
        return min((place // self.window + 1) * self.window, self.length)

    def _positions(self, epoch: int, lane: int, place: int, count: int) -> NDArray[np.int64]:
        """The next `count` places of one window, as positions in the epoch's sequence."""
        number, offset = divmod(place, self.window)
        return self._window(epoch, lane, number)[offset : offset + count]

    def _span(self, lane: int, number: int) -> tuple[int, int]:
        """The positions [first, last) in the epoch's sequence of a lane's window."""
        lane_start, lane_stop = (
            place * self.num_samples // self.num_lanes for place in (lane, lane + 1)
        )
        first = lane_start + number * self.window
        return first, min(first + self.window, lane_stop)

    def _make_window(self, epoch: int, lane: int, number: int) -> NDArray[np.int64]:
        first, last = self._span(lane, number)
        key = rng.key(self.seed, "window", epoch, lane, number)
        return rng.permutation(key, last - first) + first

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = rng.permutation(rng.key(self.seed, "shards", epoch), len(self.shard_samples))
        # Empty shards hold no position: leaving them out keeps `starts` strictly increasing.
        shards = shards[self.shard_samples[shards] > 0]
        ends = np.cumsum(self.shard_samples[shards])
        return _Epoch(shards + self.first_shard, np.concatenate([[0], ends[:-1]]))


class Order:
    """The training order of one dataset's split; `pipeline.mixture` has that of several.

    Global batch t takes the next `global_size / lanes` samples of every lane (see `Lanes`),
    lane-major; an epoch has `floor(N / global_size)` steps, so no sample comes twice in it.

    Args:
        shard_samples: samples in each shard, in manifest order.
        seed: any integer.
        global_size: samples of a step, over all processes.
        micro_size: samples of one forward pass; divides `global_size`.
        lanes: streams read side by side; divides `global_size`. 0 takes the largest divisor up
            to 8.
        window: samples of a lane that are shuffled together.

    Raises:
        ValueError: a size does not fit; the message names the configuration key.
    """

    def __init__(
        self,
        shard_samples: Sequence[int],
        *,
        seed: int,
        global_size: int,
        micro_size: int,
        lanes: int = 0,
        window: int = 8192,
    ) -> None:
        self.shard_samples = np.asarray(shard_samples, dtype=np.int64)
        self.num_samples = int(self.shard_samples.sum())
        if global_size % micro_size:
            raise ValueError(
                f"batch.micro_size = {micro_size} does not divide "
                f"batch.global_size = {global_size}; make one a multiple of the other"
            )
        lanes = lanes or max(d for d in range(1, 9) if global_size % d == 0)
        if global_size % lanes:
            raise ValueError(
                f"data.lanes = {lanes} does not divide batch.global_size = {global_size}; "
                "choose a divisor, or 0 for the largest one up to 8"
            )
        if self.num_samples < global_size:
            raise ValueError(
                f"the training split has {self.num_samples} samples, fewer than one step of "
                f"batch.global_size = {global_size}; lower it"
            )
        self.seed = seed
        self.global_size = global_size
        self.micro_size = micro_size
        self.lanes = lanes
        self.window = window
        self.num_micro = global_size // micro_size
        self.per_lane = global_size // lanes
        self.steps_per_epoch = self.num_samples // global_size
        self.datasets = self._open_lanes()

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within that epoch) of a step, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def epochs_after(self, steps: int) -> dict[str, Any]:
        """For the log: the epoch that the last of so many steps belongs to."""
        return {"epoch": self.epoch_of(steps - 1)[0]}

    @property
    def summary(self) -> str:
        """For people: what is read, in one line."""
        return f"{self.num_samples} samples, {self.steps_per_epoch} steps an epoch"

    def samples_of(self, step: int, places: range | None = None) -> SampleIds:
        """The global batch of a step, in order: `global_size` ids, or those at some places of it,
        which cost no more than they are."""
        places = range(self.global_size) if places is None else places
        parts = []
        for lane in range(places.start // self.per_lane, -(-places.stop // self.per_lane)):
            first = max(places.start - lane * self.per_lane, 0)
            last = min(places.stop - lane * self.per_lane, self.per_lane)
            start = step * self.per_lane
            parts.append((lane, start + first, start + last))
        return self._draw(parts)

    def micros_of(self, rank: int, world_size: int) -> range:
        """The microbatches of every step that this rank computes: [rM/W, (r+1)M/W).

        Raises:
            ValueError: more processes than microbatches.
        """
        if world_size > self.num_micro:
            raise ValueError(
                f"{world_size} processes, but batch.global_size / batch.micro_size = "
                f"{self.num_micro} microbatches a step: start fewer processes or lower "
                "batch.micro_size"
            )
        first, last = (place * self.num_micro // world_size for place in (rank, rank + 1))
        return range(first, last)

    def uses(self, step: int, places: range) -> Iterator[ShardUse]:
        """Which shards are read when: the windows, from `step` on, of the lanes that these places
        of the global batch touch. In order of `first_step`, epoch after epoch without end."""
        if not places:
            return iter(())
        lanes = range(places[0] // self.per_lane, places[-1] // self.per_lane + 1)
        uses = [use for lane in lanes for use in self._uses(lane, step)]
        return heapq.merge(*uses, key=lambda use: use.first_step)

    def _open_lanes(self) -> tuple[Lanes, ...]:
        """The lanes of each dataset."""
        length = self.steps_per_epoch * self.per_lane
        return (
            Lanes(
                self.shard_samples,
                seed=self.seed,
                num_lanes=self.lanes,
                window=self.window,
                length=length,
            ),
        )

    def _draw(self, parts: Sequence[tuple[int, int, int]]) -> SampleIds:
        """The samples at places [start, stop) of a lane, for each part (lane, start, stop)."""
        return self.datasets[0].draw(parts)

    def _uses(self, lane: int, step: int) -> list[Iterator[ShardUse]]:
        """As `uses`, of one lane; an iterator a dataset."""

        def of_lane() -> Iterator[ShardUse]:
            for start, stop, shards in self.datasets[0].windows(lane, step * self.per_lane):
                yield ShardUse(start // self.per_lane, (stop - 1) // self.per_lane, shards)

        return [of_lane()]


def validation_batches(shard_samples: Sequence[int], size: int) -> Iterator[SampleIds]:
    """Every sample once, in manifest order, in batches of `size` (the last may be shorter)."""
    starts = shard_starts(shard_samples)
    return (validation_batch(starts, size, number) for number in range(-(-starts[-1] // size)))


def validation_batch(starts: NDArray[np.int64], size: int, number: int) -> SampleIds:
    """The batch of this number, given `shard_starts`."""
    return samples_at(starts, np.arange(number * size, min((number + 1) * size, starts[-1])))


def samples_at(starts: NDArray[np.int64], position_G: NDArray[np.int64]) -> SampleIds:
    """The samples at these positions of shards that lie end to end, given `shard_starts`."""
    # By the method: NumPy's function of this name leads to it through Python code, which no cache
    # holds any more after a batch was decoded.
    shard_G = starts.searchsorted(position_G, "right") - 1
    return SampleIds(shard_G, position_G - starts[shard_G], np.zeros_like(shard_G))


def shard_starts(shard_samples: Sequence[int]) -> NDArray[np.int64]:
    """How many samples come before each shard in manifest order, and last how many there are."""
    return np.concatenate([[0], np.cumsum(np.asarray(shard_samples, dtype=np.int64))])


def validation_uses(
    shard_samples: Sequence[int], size: int, step: int, ranks: range, world_size: int
) -> Iterator[ShardUse]:
    """Which shards the batches of `validation_batches` read that fall on these ranks, from batch
    `step` on: batch b is rank (b mod W)'s."""
    ends = np.cumsum(np.asarray(shard_samples, dtype=np.int64))
    total = int(ends[-1]) if len(ends) else 0
    for batch in range(step, -(-total // size)):
        if batch % world_size in ranks:
            bounds = (batch * size, min((batch + 1) * size, total) - 1)
            low, high = np.searchsorted(ends, bounds, side="right").tolist()
            yield ShardUse(batch, batch, tuple(range(low, high + 1)))


def sample_hash(place: int, key: str) -> int:
    """64-bit hash of "this key was at this place of the global batch".

    A step's hashes are added modulo 2**64, so ranks can sum theirs in any order.
    """
    digest = hashlib.blake2b(f"{place}:{key}".encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def fold_digest(order_digest: str, step_hash: int) -> str:
    """The rolling `order_digest` after a step, 32 hex digits, from the one before it."""
    text = f"{order_digest}:{step_hash % 2**64:016x}"
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom order`: what a run sees at a step, computed from its configuration alone."""
    # Here, not above: the modules that the command needs are built on this one.
    from pipeline.config import add_config_flags, parse_flags

    parser = argparse.ArgumentParser(
        prog="pixloom order", description="Print the sample keys of one step, in order."
    )
    parser.add_argument(
        "--step",
        type=int,
        required=True,
        help="the step, from 0: step K - 1 is the last one in the row `step` K of metrics.jsonl",
    )
    parser.add_argument(
        "--digest",
        action="store_true",
        help="also compute order_digest after this step, from step 0 on: that of the row K",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_config_flags(parser)
    return storage.command("order", lambda: _print_step(parse_flags(parser, argv)))


def _print_step(arguments: argparse.Namespace) -> int:
    from pipeline.build import order_of
    from pipeline.config import config_from
    from pipeline.datasets import Datasets
    from pipeline.stream import SampleReader

    if arguments.step < 0:
        raise UserError(f"--step {arguments.step}: steps count from 0")
    if arguments.config is None:  # neither reaches the order
        setattr(arguments, "run.dir", getattr(arguments, "run.dir") or ".")
        setattr(arguments, "run.steps", getattr(arguments, "run.steps") or "1")
    config = config_from(arguments)
    data = Datasets.of(config.data)
    order = order_of(config, data)
    reader = SampleReader(
        data.shards("train"), cache=data.cache(config.data.cache_dir, config.data.cache_bytes)
    )

    def keys_of(step: int) -> list[str]:
        ids = order.samples_of(step)
        return [reader.key(*at) for at in zip(ids.shard_G, ids.index_G, strict=True)]

    shards = [reader.shards[shard] for shard in order.samples_of(arguments.step).shard_G]
    roots = [redact(shard.root) for shard in shards] if len(data.roots) > 1 else []
    keys = [key.rpartition(" ")[2] for key in keys_of(arguments.step)]
    digest = DIGEST_START
    for step in range(arguments.step + 1 if arguments.digest else 0):
        hashes = [sample_hash(place, key) for place, key in enumerate(keys_of(step))]
        digest = fold_digest(digest, sum(hashes))
    if arguments.json:
        epoch, place = order.epoch_of(arguments.step)
        body = {"step": arguments.step, "epoch": epoch, "step_of_epoch": place, "keys": keys}
        body |= {"datasets": roots} if roots else {}
        body |= {"order_digest": digest} if arguments.digest else {}
        print(json.dumps(body))
    else:
        lines = (f"{root}\t{key}" for root, key in zip(roots, keys, strict=True))
        print("\n".join(lines if roots else keys))
        if arguments.digest:
            print(f"order_digest {digest}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
