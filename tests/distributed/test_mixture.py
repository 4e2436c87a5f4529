"""A mixture that is killed and resumed on another number of processes reads what it would have."""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import checkpoint, order
from shards import pack, synth

STEPS = 24


def last_row(run: Path) -> dict[str, Any]:
    """The last training row of metrics.jsonl so far; step 0 before there is one."""
    try:
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if "split" not in row][-1]  # type: ignore[no-any-return]
    except (OSError, IndexError, ValueError):
        return {"step": 0}


def test_a_mixture_resumes_exactly_on_another_number_of_ranks(
    start: Callable[..., Any],
    make_config: Callable[..., Path],
    screens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """SIGKILL to both ranks at a random step, then three; undisturbed on one. The second dataset
    is read more than once in these 24 steps. Validation counts both, alike on any ranks."""
    assert synth.main([str(tmp_path / "raw"), "--samples", "45", "--seed", "6"]) == 0
    words = f"--size 80x48 --split train=rest,val=5 --tokenizer {screens / 'tokenizer.json'}"
    more = tmp_path / "more"
    assert pack.main([str(tmp_path / "raw"), str(more), *words.split(), "--workers", "0"]) == 0
    data = {"url": "", "urls": [str(screens), str(more)], "weights": [1, 1], "window": 16}
    config = make_config("mix", data=data)

    def train(run: Path, world_size: int) -> Any:
        words = ["--config", config, "--run.dir", run, "--run.steps", STEPS]
        return start("pipeline.train", *words, "--data.workers", 1, world_size=world_size)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, 1).succeed()
    at = random.randint(5, STEPS - 8)
    job = train(killed, 2)
    saved = str(killed / "checkpoints")
    while last_row(killed)["step"] < at or not checkpoint.committed(saved):
        assert job.alive(), job.output()
        time.sleep(0.001)
    job.kill()
    assert last_row(killed)["step"] < STEPS, "the kill came too late to show anything"
    train(killed, 3).succeed()
    expected, found = last_row(whole), last_row(killed)
    assert found["step"] == STEPS
    assert found["order_digest"] == expected["order_digest"]
    assert found["epochs"] == expected["epochs"]
    assert found["epochs"]["more"] > 1.5

    capsys.readouterr()
    words_of_order = ["--config", str(whole / "config.toml"), "--step", str(STEPS - 1)]
    assert order.main([*words_of_order, "--digest", "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["order_digest"] == expected["order_digest"]
    assert len(proof["datasets"]) == len(proof["keys"]) == 8

    results = set()
    for world_size in (1, 3):
        start("pipeline.validate", killed, "--split", "val", world_size=world_size).succeed()
        results.add((killed / "validate-val.json").read_text())
    assert len(results) == 1
    assert json.loads(results.pop())["samples"] == 5 + 5
