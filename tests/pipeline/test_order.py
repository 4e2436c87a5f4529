"""The order is the same for everyone: any ranks, any workers, any interruption."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import (
    DIGEST_START,
    Order,
    SampleIds,
    fold_digest,
    sample_hash,
    validation_batches,
)


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@st.composite
def orders(draw: st.DrawFn) -> Order:
    global_size = draw(st.integers(1, 24))
    shards = draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    if sum(shards) < global_size:
        shards.append(global_size)
    return Order(
        shards,
        seed=draw(st.integers(0, 2**40)),
        global_size=global_size,
        micro_size=draw(st.sampled_from(divisors(global_size))),
        lanes=draw(st.sampled_from([0, *divisors(global_size)])),
        window=draw(st.integers(1, 64)),
    )


def pairs(ids: SampleIds) -> list[tuple[int, int]]:
    return list(zip(ids.shard_G.tolist(), ids.index_G.tolist(), strict=True))


@given(orders(), st.integers(0, 3))
def test_an_epoch_holds_each_sample_at_most_once(order: Order, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    seen = [
        pair
        for step in range(first, first + order.steps_per_epoch)
        for pair in pairs(order.samples_of(step))
    ]
    assert len(seen) == len(set(seen)) == order.num_samples - order.num_samples % order.global_size
    assert all(0 <= index < order.shard_samples[shard] for shard, index in seen)


@given(orders(), st.integers(1, 6), st.integers(0, 200))
def test_ranks_share_the_global_batch(order: Order, world_size: int, step: int) -> None:
    if world_size > order.num_micro:
        with pytest.raises(ValueError, match=f"{world_size} processes"):
            order.micros_of(0, world_size)
        return
    shares = [order.micros_of(rank, world_size) for rank in range(world_size)]
    assert list(itertools.chain(*shares)) == list(range(order.num_micro))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(orders(), st.integers(0, 500))
def test_a_step_does_not_depend_on_what_was_asked_before(order: Order, step: int) -> None:
    fresh = Order(
        order.shard_samples.tolist(),
        seed=order.seed,
        global_size=order.global_size,
        micro_size=order.micro_size,
        lanes=order.lanes,
        window=order.window,
    )
    for before in range(max(0, step - 3), step):
        order.samples_of(before)
    assert pairs(order.samples_of(step)) == pairs(fresh.samples_of(step))


@given(orders(), st.integers(0, 500), st.data())
def test_some_places_of_a_step_are_a_part_of_it(
    order: Order, step: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, order.global_size))
    stop = data.draw(st.integers(start, order.global_size))
    part = order.samples_of(step, range(start, stop))
    assert pairs(part) == pairs(order.samples_of(step))[start:stop]


def test_epochs_and_seeds_differ() -> None:
    def keys(seed: int, epoch: int) -> list[tuple[int, int]]:
        order = Order([50, 50, 50], seed=seed, global_size=10, micro_size=5)
        return [p for t in range(15) for p in pairs(order.samples_of(epoch * 15 + t))]

    assert keys(0, 0) != keys(0, 1)
    assert keys(0, 0) != keys(1, 0)
    assert sorted(keys(0, 0)) == sorted(keys(0, 1))


def test_the_order_is_the_one_of_format_version_1() -> None:
    """Golden: a released order must never move under a running job."""
    order = Order([5, 0, 7, 4], seed=3, global_size=8, micro_size=4, lanes=2, window=4)
    assert [pairs(order.samples_of(step)) for step in (0, 1, 2)] == GOLDEN


@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(1, 20))
def test_validation_covers_every_sample_once_in_manifest_order(
    shards: list[int], size: int
) -> None:
    batches = [pairs(ids) for ids in validation_batches(shards, size)]
    everything = [(shard, index) for shard, count in enumerate(shards) for index in range(count)]
    assert list(itertools.chain(*batches)) == everything
    assert all(len(batch) == size for batch in batches[:-1])


@settings(max_examples=30)
@given(st.permutations(list(range(12))))
def test_digest_does_not_depend_on_who_hashed_what(places: list[int]) -> None:
    keys = [f"train-{place:09d}" for place in range(12)]
    whole = sum(sample_hash(place, keys[place]) for place in range(12))
    shuffled = sum(sample_hash(place, keys[place]) for place in places) % 2**64
    assert fold_digest(DIGEST_START, whole) == fold_digest(DIGEST_START, shuffled)
    swapped = whole - sample_hash(0, keys[0]) - sample_hash(1, keys[1])
    swapped += sample_hash(0, keys[1]) + sample_hash(1, keys[0])
    assert fold_digest(DIGEST_START, whole) != fold_digest(DIGEST_START, swapped)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_size": 3}, "batch.micro_size = 3 does not divide"),
        ({"lanes": 3}, "data.lanes = 3 does not divide"),
        ({"global_size": 32, "micro_size": 4}, "has 16 samples, fewer than one step"),
    ],
)
def test_sizes_that_do_not_fit_name_the_key(change: dict[str, int], message: str) -> None:
    sizes = {"global_size": 8, "micro_size": 4, **change}
    with pytest.raises(ValueError, match=message):
        Order([5, 7, 4], seed=0, **sizes)


def test_a_billion_samples_cost_what_the_shards_cost() -> None:
    """Memory of the order is O(shards + lanes x window), wherever it stands."""
    order = Order([10_000] * 100_000, seed=0, global_size=256, micro_size=32, lanes=8)
    ids = order.samples_of(int(0.9 * order.steps_per_epoch))
    assert len(set(pairs(ids))) == 256
    assert ids.shard_G.dtype == np.int64


GOLDEN: list[list[tuple[int, int]]] = [
    [(0, 0), (0, 1), (0, 3), (0, 2), (2, 3), (2, 4), (2, 5), (2, 6)],
    [(2, 2), (2, 1), (2, 0), (0, 4), (3, 1), (3, 3), (3, 0), (3, 2)],
    [(0, 1), (0, 2), (0, 0), (0, 3), (2, 6), (2, 4), (2, 5), (2, 3)],
]
