"""The campaign of kills under streaming in short; 60 of them are in the benchmarks' results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("stream_kills.py")


def test_whoever_is_killed_every_step_sees_the_samples_of_the_order(
    run_script: Callable[..., dict[str, Any]],
) -> None:
    result = run_script(SCRIPT, "--kills", 4, "--steps", 24, "--seed", 1)
    assert sum(result["kills"].values()) >= 4
    assert result["runs_completed"] >= 1
    assert result["steps_compared"] > 24
    assert sum(result["faults"].values()) > 0
    # With room for all of them, each shard is downloaded once.
    assert 0 < result["downloads_undisturbed"] <= result["shards"]
    # The small cache evicts: else what it may download would say nothing more.
    assert 0 < result["evictions_small_cache"] < result["downloads_small_cache"]
    assert result["downloads_small_cache"] <= result["needs_small_cache"]
    assert 0 < result["evictions_disturbed"] < result["downloads_disturbed"]
    assert 0 < result["most_cached_bytes"] <= result["cache_bytes"]
