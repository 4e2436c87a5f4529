"""Pure arithmetic: the training order of several datasets, each with its weight and its epochs.

A lane of a mixture is cut into blocks of `BLOCK` places. In each block every dataset has the same
exact number of places, shuffled anew; at these, the lane draws the next samples of the same lane
of that dataset (`pipeline.order.Lanes`), however often the others have been read. So what was
drawn before any place is a product and one block: standing at any step costs the same.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import rng
from pipeline.order import Lanes, Order, SampleIds, ShardUse

BLOCK = 4096
"""places of a lane in which every dataset has its exact share"""


class Mixture(Order):
    """The training order of several datasets' splits. Their shards are numbered end to end.

    Every sample of a dataset comes at most once in an epoch of that dataset, which has
    `lanes * floor(N / lanes)` samples. An epoch of the mixture is as many steps as all datasets
    together would fill, `floor(sum of N / global_size)`, whatever is drawn from each.

    Args:
        shard_samples: samples in each shard in manifest order, by name of the dataset.
        weights: each dataset's part of the samples that are drawn, in any unit; none: its size.
            Rounded to whole places of a block (largest remainders first).
        others: as `Order`.

    Raises:
        ValueError: a size or a weight does not fit; the message names the configuration key.
    """

    def __init__(
        self,
        shard_samples: Mapping[str, Sequence[int]],
        weights: Sequence[float] = (),
        *,
        seed: int,
        global_size: int,
        micro_size: int,
        lanes: int = 0,
        window: int = 8192,
    ) -> None:
        self._shards = list(shard_samples.values())
        self.names = tuple(shard_samples)
        super().__init__(
            [samples for shards in self._shards for samples in shards],
            seed=seed,
            global_size=global_size,
            micro_size=micro_size,
            lanes=lanes,
            window=window,
        )
        self.shares = block_shares(self.names, weights or [sum(shards) for shards in self._shards])
        self._remember()

    def _remember(self) -> None:
        # A step needs one block a lane; `uses` also looks ahead, as far in each dataset's windows.
        size = (2 + len(self.names)) * self.lanes
        self._block = functools.lru_cache(maxsize=size)(self._make_block)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_block"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    def epochs_after(self, steps: int) -> dict[str, Any]:
        """For the log: also how often each dataset was read in so many steps, by name."""
        place = steps * self.per_lane
        drawn = np.sum([self._drawn(lane, place) for lane in range(self.lanes)], axis=0)
        epochs = {
            name: round(number / (self.lanes * dataset.length), 4)
            for name, number, dataset in zip(self.names, drawn.tolist(), self.datasets, strict=True)
        }
        return {**super().epochs_after(steps), "epochs": epochs}

    @property
    def summary(self) -> str:
        parts = ", ".join(
            f"{name} {share / BLOCK:.2%} of the draws"
            for name, share in zip(self.names, self.shares.tolist(), strict=True)
        )
        return f"{super().summary} ({parts})"

    def _open_lanes(self) -> tuple[Lanes, ...]:
        opened = []
        for number, (name, shards) in enumerate(zip(self.names, self._shards, strict=True)):
            length = sum(shards) // self.lanes
            if not length:
                raise ValueError(
                    f"{name} has {sum(shards)} training samples, fewer than the {self.lanes} "
                    "lanes of data.lanes; lower it, or leave the dataset out"
                )
            opened.append(
                Lanes(
                    shards,
                    seed=rng.key(self.seed, "dataset", number),
                    num_lanes=self.lanes,
                    window=self.window,
                    length=length,
                    first_shard=sum(map(len, self._shards[:number])),
                )
            )
        return tuple(opened)

    def _draw(self, parts: Sequence[tuple[int, int, int]]) -> SampleIds:
        sources: list[NDArray[np.int16]] = []
        parts_of: list[list[tuple[int, int, int]]] = [[] for _ in self.datasets]
        for lane, start, stop in parts:
            bounds = zip(
                self._drawn(lane, start).tolist(), self._drawn(lane, stop).tolist(), strict=True
            )
            for number, (first, last) in enumerate(bounds):
                parts_of[number].append((lane, first, last))
            while start < stop:
                block, offset = divmod(start, BLOCK)
                sources.append(self._block(lane, block)[offset : offset + stop - start])
                start += len(sources[-1])
        source_G = np.concatenate(sources)
        shard_G, index_G, epoch_G = np.empty((3, len(source_G)), dtype=np.int64)
        for number, dataset in enumerate(self.datasets):
            own, ids = source_G == number, dataset.draw(parts_of[number])
            shard_G[own], index_G[own], epoch_G[own] = ids.shard_G, ids.index_G, ids.epoch_G
        return SampleIds(shard_G, index_G, epoch_G)

    def _uses(self, lane: int, step: int) -> list[Iterator[ShardUse]]:
        drawn = self._drawn(lane, step * self.per_lane).tolist()

        def of_dataset(number: int) -> Iterator[ShardUse]:
            first = self._step_of(lane, number, drawn[number])
            for _, stop, shards in self.datasets[number].windows(lane, drawn[number]):
                # Both are mostly in one block, which need not be shuffled twice.
                last, following = (self._step_of(lane, number, at) for at in (stop - 1, stop))
                yield ShardUse(first, last, shards)
                first = following

        return [of_dataset(number) for number in range(len(self.datasets))]

    def _drawn(self, lane: int, place: int) -> NDArray[np.int64]:
        """How many samples of each dataset a lane has drawn before a place."""
        block, offset = divmod(place, BLOCK)
        drawn = block * self.shares
        if offset:
            drawn = drawn + np.bincount(
                self._block(lane, block)[:offset], minlength=len(self.shares)
            )
        return drawn

    def _step_of(self, lane: int, number: int, draw: int) -> int:
        """The step in which a lane makes its `draw`-th draw, from 0, of a dataset."""
        block, rank = divmod(draw, int(self.shares[number]))
        offset = int(np.flatnonzero(self._block(lane, block) == number)[rank])
        return (block * BLOCK + offset) // self.per_lane

    def _make_block(self, lane: int, number: int) -> NDArray[np.int16]:
        """Which dataset each place of a block draws from."""
        sources = np.repeat(np.arange(len(self.shares), dtype=np.int16), self.shares)
        return sources[rng.permutation(rng.key(self.seed, "mixture", lane, number), BLOCK)]


def block_shares(names: Sequence[str], weights: Sequence[float]) -> NDArray[np.int64]:
    """Each dataset's places of a block: its weight's part of `BLOCK`, rounded by largest
    remainders, so that the parts add up.

    Raises:
        ValueError: a weight has less than one place; the message names the dataset.
    """
    total = sum(map(Fraction, weights))
    exact = [Fraction(weight) * BLOCK / total for weight in weights]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(exact)), key=lambda n: shares[n] - exact[n])
    for number in by_remainder[: BLOCK - sum(shares)]:
        shares[number] += 1
    for name, share, part in zip(names, shares, exact, strict=True):
        if not share:
            raise ValueError(
                f"{name} has {float(part / BLOCK):.1e} of all weight, less than one in {BLOCK} "
                "samples; raise its data.weights, or leave it out"
            )
    return np.array(shares, dtype=np.int64)
