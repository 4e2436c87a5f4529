"""A mistake ends every rank at once, with one line: nobody waits in a collective for the others."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch.micro_size", 4], "3 processes, but batch.global_size / batch.micro_size = 2"),
        (["--data.url", "/nowhere"], "/nowhere: no such directory"),
    ],
)
def test_a_mistake_is_said_once_and_nobody_hangs(
    flags: list[object],
    message: str,
    start: Callable[..., Any],
    make_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    words = ["--config", make_config("run"), "--run.dir", tmp_path / "run", *flags]
    job = start("pipeline.train", *words, world_size=3)
    assert job.wait(60) == [2, 2, 2], job.output()
    lines = [line for log in job.logs for line in log.read_text().splitlines()]
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_initial_weights_that_do_not_fit_are_said_once(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """All ranks read the file, after they have met; one says what is wrong with it."""
    torch.save({"another": torch.ones(2)}, tmp_path / "weights.pth")
    words = ["--config", make_config("run"), "--run.dir", tmp_path / "run"]
    job = start("pipeline.train", *words, "--run.init", tmp_path / "weights.pth", world_size=2)
    assert job.wait(60) == [2, 2], job.output()
    assert job.output().count("pixloom train: error: run.init: ") == 1
    assert "Traceback" not in job.output()


def test_damage_on_one_rank_stops_all(
    start: Callable[..., Any], make_config: Callable[..., Path], screens: Path, tmp_path: Path
) -> None:
    """Only the rank that reads a damaged sample sees it; all of them stop, and it is named."""
    shard = screens / "train" / "000001.tar"
    body = shard.read_bytes()
    try:
        shard.write_bytes(body[: len(body) // 2] + b"\xff" * 64 + body[len(body) // 2 + 64 :])
        words = ["--config", make_config("run"), "--run.dir", tmp_path / "run"]
        job = start("pipeline.train", *words, world_size=2)
        assert job.wait(120) == [2, 2], job.output()
    finally:
        shard.write_bytes(body)
    assert "train/000001.tar train-" in job.output()
    assert job.output().count("data.max_bad allows 0") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_one_rank_misses_is_named(
    workers: int,
    start: Callable[..., Any],
    make_config: Callable[..., Path],
    screens: Path,
    tmp_path: Path,
) -> None:
    """Whichever rank meets it says so in one line, from a loader worker too; nobody hangs."""
    receipt = screens / "train" / "000002.json"
    hidden = receipt.rename(tmp_path / "hidden.json")
    try:
        words = ["--config", make_config("run"), "--run.dir", tmp_path / "run"]
        job = start("pipeline.train", *words, "--data.workers", workers, world_size=2)
        statuses = job.wait(120)
    finally:
        hidden.rename(receipt)
    assert 0 not in statuses, job.output()
    assert f"pixloom train: error: {receipt}: No such file or directory" in job.output()


@pytest.mark.parametrize("what", ["restore", "step"])
def test_what_one_rank_alone_meets_is_said_by_it_and_ends_all(
    what: str, start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--config", make_config("run"), "--run.dir", tmp_path / "run", "--run.steps", 8]
    if what == "restore":
        start("tests.distributed.stop_at", 4, *words, world_size=1).succeed()
    job = start("tests.distributed.disturbed", what, *words, world_size=2)
    statuses = job.wait(60)
    assert statuses[1] == 2, job.output()
    assert statuses[0] != 0
    said = "pixloom train: error: this rank alone is out of luck"
    assert said in job.logs[1].read_text()
    assert "Traceback" not in job.logs[1].read_text()
    if what == "restore":
        assert statuses[0] == 2
        assert "Traceback" not in job.output()


def test_a_signal_during_the_last_save_does_not_lose_it(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--config", make_config("run"), "--run.dir", run, "--run.steps", 8]
    start("tests.distributed.disturbed", "signal", *words, world_size=2).succeed()
    newest = checkpoint.committed(str(run / "checkpoints"))[-1]
    assert checkpoint.step_of(newest) == 8
    assert checkpoint.verify(newest) == []


def test_two_jobs_do_not_share_a_folder(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--config", make_config("run"), "--run.dir", tmp_path / "run", "--run.steps", 10**6]
    first = start("pipeline.train", *words, world_size=1)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.alive(), first.output()
        time.sleep(0.01)
    second = start("pipeline.train", *words, world_size=2)
    assert second.wait(120) == [2, 2], second.output()
    assert second.output().count("another job trains in this folder") == 1
    assert first.alive()
    first.kill()
