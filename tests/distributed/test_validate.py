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
    found = run / "validate-test.json"
    for world_size in (1, 2, 3, 5):
        start("pipeline.validate", run, "--split", "test", world_size=world_size).succeed()
        results[world_size] = found.read_text()
        found.unlink()
    if model == "seq2seq":
        flags = ["--beam", "3", "--length-penalty", "0.6", "--grammar", "web"]
        beams = {}
        for world_size in (1, 3):
            words = [run, "--split", "test", *flags]
            start("pipeline.validate", *words, world_size=world_size).succeed()
            beams[world_size] = found.read_text()
            found.unlink()
        assert beams[1] == beams[3]
        row, plain = json.loads(beams[1]), json.loads(results[1])
        assert row["validity"] == 1
        assert row["skeleton_match"] >= row["exact_match"]
        assert (row["beam"], row["length_penalty"], row["grammar"]) == (3, 0.6, "web")
        assert row["loss"] == plain["loss"]
        assert not {"validity", "skeleton_match", "beam"} & set(plain)
    samples = load_manifest(str(screens)).num_samples("test")
    assert all(samples % world_size for world_size in (2, 3, 5))
    assert json.loads(results[1])["samples"] == samples
    assert set(results.values()) == {results[1]}
