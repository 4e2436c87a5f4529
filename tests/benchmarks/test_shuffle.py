"""The order shuffles as well as its layout allows: measured, from fixed seeds."""

import numpy as np
from benchmarks.shuffle import Layout, buffered, measure, ours

LAYOUT = Layout(samples=40_000, per_shard=1000, global_size=64)


def figures(*, lanes: int, window: int) -> dict[str, float]:
    method = ours(LAYOUT, lanes, window)
    return measure(LAYOUT, [method.epoch(epoch) for epoch in range(3)])


def test_one_window_over_the_whole_split_is_a_full_shuffle() -> None:
    everything = np.random.default_rng(0)
    full = measure(LAYOUT, [everything.permutation(LAYOUT.samples) for _ in range(3)])
    found = figures(lanes=1, window=LAYOUT.samples)
    assert abs(found["neighbours"]) < 0.02
    assert abs(found["shards"] / full["shards"] - 1) < 0.01
    assert abs(found["spread"] / full["spread"] - 1) < 0.01
    assert 0.85 < found["batches"] / full["batches"] < 1.15


def test_more_lanes_and_wider_windows_mix_better() -> None:
    narrow, wide = figures(lanes=1, window=2000), figures(lanes=1, window=8000)
    lanes = figures(lanes=8, window=2000)
    assert narrow["shards"] < wide["shards"] < lanes["shards"]
    assert narrow["spread"] < wide["spread"]
    assert narrow["batches"] > 2 * wide["batches"]
    assert narrow["batches"] > 2 * lanes["batches"]


def test_lanes_mix_better_than_a_buffer_that_holds_as_many_samples() -> None:
    method = buffered(LAYOUT, 1, 8000)
    buffer = measure(LAYOUT, [method.epoch(epoch) for epoch in range(3)])
    assert figures(lanes=8, window=1000)["batches"] < buffer["batches"]
