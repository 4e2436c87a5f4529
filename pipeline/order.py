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
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import rng
from shards import storage
from shards.storage import UserError

DIGEST_START = "0" * 32
"""`order_digest` before the first step."""


@dataclass(frozen=True)
class SampleIds:
    """Where samples lie: `shard_G` counts the split's shards in manifest order, `index_G` is the
    sample's place in its shard. Both int64, of equal length."""

    shard_G: NDArray[np.int64]
    index_G: NDArray[np.int64]

    def __getitem__(self, part: slice) -> "SampleIds":
        return SampleIds(self.shard_G[part], self.index_G[part])

    def __len__(self) -> int:
        return len(self.shard_G)


class ShardUse(NamedTuple):
    """Steps [first_step, last_step] read samples of these shards."""

    first_step: int
    last_step: int
    shards: tuple[int, ...]


@dataclass(frozen=True)
class _Epoch:
    """Shards in this epoch's order, and `starts[k]` = samples before the k-th of them."""

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]


class Order:
    """The training order of one split.

    1. The shards are permuted anew each epoch and laid end to end.
    2. The sequence is cut into `lanes` of equal length (give or take one sample); a lane is
       permuted in consecutive windows of `window` samples.
    3. Global batch t of an epoch takes the next `global_size / lanes` samples of every lane,
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
        self.steps_per_epoch = self.num_samples // global_size
        self._remember()

    def _remember(self) -> None:
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)
        self._window = functools.lru_cache(maxsize=2 * self.lanes)(self._make_window)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_epoch", "_window")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def epoch_of(self, step: int) -> tuple[int, int]:
        """(epoch, step within that epoch) of a step, both from 0."""
        return divmod(step, self.steps_per_epoch)

    def samples_of(self, step: int) -> SampleIds:
        """The global batch of a step, in order: `global_size` ids."""
        epoch, t = self.epoch_of(step)
        per_lane = self.global_size // self.lanes
        position_G = np.concatenate(
            [
                self._lane_positions(epoch, lane, t * per_lane, (t + 1) * per_lane)
                for lane in range(self.lanes)
            ]
        )
        layout = self._epoch(epoch)
        place_G = np.searchsorted(layout.starts, position_G, side="right") - 1
        return SampleIds(layout.shards[place_G], position_G - layout.starts[place_G])

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
        per_lane = self.global_size // self.lanes
        if not places:
            return
        lanes = range(places[0] // per_lane, places[-1] // per_lane + 1)
        first_epoch, t = self.epoch_of(step)
        for epoch in itertools.count(first_epoch):
            layout, begin = self._epoch(epoch), epoch * self.steps_per_epoch
            used = self.steps_per_epoch * per_lane  # the rest of a lane is not read
            skipped = t * per_lane // self.window if epoch == first_epoch else 0
            for start in range(skipped * self.window, used, self.window):
                stop = min(start + self.window, used)
                first, last = begin + start // per_lane, begin + (stop - 1) // per_lane
                for lane in lanes:
                    lane_start, lane_stop = (
                        place * self.num_samples // self.lanes for place in (lane, lane + 1)
                    )
                    # Shuffled as a whole: also a sample that is not read may lend its place.
                    end = min(lane_start + start + self.window, lane_stop)
                    ends = (lane_start + start, end - 1)
                    low, high = np.searchsorted(layout.starts, ends, side="right")
                    yield ShardUse(first, last, tuple(layout.shards[low - 1 : high].tolist()))

    def _lane_positions(self, epoch: int, lane: int, start: int, stop: int) -> NDArray[np.int64]:
        """Positions [start, stop) of a shuffled lane, as positions in the epoch's sequence."""
        lane_start, lane_stop = (
            place * self.num_samples // self.lanes for place in (lane, lane + 1)
        )
        pieces = []
        while start < stop:
            number, offset = divmod(start, self.window)
            length = min(self.window, lane_stop - lane_start - number * self.window)
            take = min(stop - start, length - offset)
            shuffled = self._window(epoch, lane, number, length)
            pieces.append(shuffled[offset : offset + take] + (lane_start + number * self.window))
            start += take
        return np.concatenate(pieces)

    def _make_window(self, epoch: int, lane: int, number: int, length: int) -> NDArray[np.int64]:
        return rng.permutation(rng.key(self.seed, "window", epoch, lane, number), length)

    def _make_epoch(self, epoch: int) -> _Epoch:
        shards = rng.permutation(rng.key(self.seed, "shards", epoch), len(self.shard_samples))
        # Empty shards hold no position: leaving them out keeps `starts` strictly increasing.
        shards = shards[self.shard_samples[shards] > 0]
        ends = np.cumsum(self.shard_samples[shards])
        return _Epoch(shards, np.concatenate([[0], ends[:-1]]))


def validation_batches(shard_samples: Sequence[int], size: int) -> Iterator[SampleIds]:
    """Every sample once, in manifest order, in batches of `size` (the last may be shorter)."""
    samples = np.asarray(shard_samples, dtype=np.int64)
    starts = np.cumsum(samples) - samples
    total = int(samples.sum())
    for first in range(0, total, size):
        position = np.arange(first, min(first + size, total))
        shard = np.searchsorted(starts, position, side="right") - 1
        yield SampleIds(shard, position - starts[shard])


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
    parser.add_argument("--step", type=int, required=True, help="the step, from 0")
    parser.add_argument(
        "--digest",
        action="store_true",
        help="also compute order_digest after this step, from step 0 on",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    add_config_flags(parser)
    return storage.command("order", lambda: _print_step(parse_flags(parser, argv)))


def _print_step(arguments: argparse.Namespace) -> int:
    from pipeline.build import cache_of, order_of
    from pipeline.config import config_from
    from pipeline.stream import SampleReader, Shard

    if arguments.step < 0:
        raise UserError(f"--step {arguments.step}: steps count from 0")
    if arguments.config is None:  # neither reaches the order
        setattr(arguments, "run.dir", getattr(arguments, "run.dir") or ".")
        setattr(arguments, "run.steps", getattr(arguments, "run.steps") or "1")
    config = config_from(arguments)
    manifest = storage.load_manifest(config.data.url)
    order = order_of(config, manifest)
    shards = (Shard(config.data.url, entry) for entry in manifest.splits["train"])
    reader = SampleReader(shards, cache=cache_of(config, config.data.url))

    def keys_of(step: int) -> list[str]:
        ids = order.samples_of(step)
        return [reader.key(*at) for at in zip(ids.shard_G, ids.index_G, strict=True)]

    keys = keys_of(arguments.step)
    digest = DIGEST_START
    for step in range(arguments.step + 1 if arguments.digest else 0):
        hashes = [sample_hash(place, key) for place, key in enumerate(keys_of(step))]
        digest = fold_digest(digest, sum(hashes))
    if arguments.json:
        epoch, place = order.epoch_of(arguments.step)
        body = {"step": arguments.step, "epoch": epoch, "step_of_epoch": place, "keys": keys}
        print(json.dumps({**body, **({"order_digest": digest} if arguments.digest else {})}))
    else:
        print("\n".join(keys))
        if arguments.digest:
            print(f"order_digest {digest}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
