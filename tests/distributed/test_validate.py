"""Validation counts every sample once, and gives the same bits on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.storage import load_manifest


@pytest.mark.parametrize("model", ["seq2seq", "autoencoder"])
def test_metrics_are_equal_to_the_last_bit(
    model: str,
    start: Callable[..., Any],
    make_config: Callable[..., Path],
    screens: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = ["--config", make_config("run", model), "--run.dir", run, "--run.steps", 6]
    start("pipeline.train", *words, world_size=1).succeed()
    results = {}
    for world_size in (1, 2, 3, 5):
        job = start("pipeline.validate", run, "--split", "test", world_size=world_size)
        job.succeed()
        results[world_size] = (run / "validate-test.json").read_text()
        (run / "validate-test.json").unlink()
    samples = load_manifest(str(screens)).num_samples("test")
    assert all(samples % world_size for world_size in (2, 3, 5))
    assert json.loads(results[1])["samples"] == samples
    assert set(results.values()) == {results[1]}
