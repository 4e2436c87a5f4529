"""A run that is killed and resumed equals the run that never stopped."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipeline import checkpoint
from pipeline.order import Order
from pipeline.state import TrainState
from shards.format import Receipt
from shards.storage import load_manifest

STEPS = 40


def last_checkpoint(run: Path) -> str:
    return checkpoint.committed(str(run / "checkpoints"))[-1]


def state_of(run: Path) -> TrainState:
    return checkpoint.Meta.read(last_checkpoint(run)).state


def relative_difference(one: Path, two: Path, prefix: str = "model/") -> float:
    """L2 over all tensors of one kind, relative to the first run's."""
    first, second = (checkpoint.load_tensors(last_checkpoint(run)) for run in (one, two))
    assert first.keys() == second.keys()
    names = [name for name in first if name.startswith(prefix)]
    apart = sum(float((first[n].double() - second[n].double()).square().sum()) for n in names)
    size = sum(float(first[n].double().square().sum()) for n in names)
    return float((apart / size) ** 0.5)


def logged_steps(run: Path) -> int:
    """The last step in metrics.jsonl so far; 0 before there is one."""
    try:
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def rows_without_speed(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("samples_per_s", "data_wait")} for row in rows
    ]


@pytest.mark.parametrize("model", ["seq2seq", "autoencoder"])
def test_resume_is_exact_on_any_number_of_ranks(
    model: str, start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """SIGKILL to both ranks at a random step of 40 (an epoch has 12), then 2, 1 and 3 ranks.

    The runs that are killed and resumed read through loader workers, the undisturbed one not.
    """
    config = make_config("run", model)

    def train(run: Path, world_size: int, workers: int = 1) -> Any:
        words = ["--config", config, "--run.dir", run, "--data.workers", workers]
        return start("pipeline.train", *words, world_size=world_size)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole, 2, workers=0).succeed()
    at = random.randint(5, STEPS - 8)
    job = train(killed, 2)
    # A step is logged before the checkpoint of an earlier one may be whole.
    while logged_steps(killed) < at or not checkpoint.committed(str(killed / "checkpoints")):
        assert job.alive(), job.output()
        time.sleep(0.001)
    job.kill()
    assert state_of(killed).step < STEPS, "the kill came too late to show anything"
    for world_size in (1, 3):
        shutil.copytree(killed, tmp_path / f"resumed-{world_size}")
    resumed = {2: killed, 1: tmp_path / "resumed-1", 3: tmp_path / "resumed-3"}
    for world_size, run in resumed.items():
        train(run, world_size).succeed()
        assert state_of(run).step == STEPS
        assert state_of(run).order_digest == state_of(whole).order_digest
        difference = relative_difference(whole, run)
        print(f"{model}, killed at step {at}, on {world_size} ranks: {difference:.2e}")
        assert difference <= (0.0 if world_size == 2 else 1e-5)
    assert relative_difference(whole, killed, "optimizer/") == 0.0
    assert rows_without_speed(whole) == rows_without_speed(killed)


def test_three_ranks_resume_bit_for_bit(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """With three ranks the layout of DDP's buckets decides how gradients round."""
    config = make_config("run")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    words = ["--config", config, "--run.steps", 12]
    start("pipeline.train", *words, "--run.dir", whole, world_size=3).succeed()
    shutil.copytree(whole, stopped)
    for newer in checkpoint.committed(str(stopped / "checkpoints"))[1:]:
        shutil.rmtree(newer)
    assert state_of(stopped).step == 4
    start("pipeline.train", *words, "--run.dir", stopped, world_size=3).succeed()
    assert relative_difference(whole, stopped) == 0.0
    assert relative_difference(whole, stopped, "optimizer/") == 0.0


def test_sigterm_finishes_the_step_saves_and_asks_for_a_requeue(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--config", make_config("run", checkpoint={"every_steps": 1000}), "--run.dir", run]
    job = start("pipeline.train", *words, "--data.workers", 1, world_size=2)
    while logged_steps(run) < 3:
        assert job.alive(), job.output()
        time.sleep(0.001)
    # As a scheduler does it: to one rank and to all of its loader workers.
    rank = psutil.Process(job.processes[1].pid)
    for process in [*rank.children(), rank]:
        process.send_signal(signal.SIGTERM)
    assert job.wait() == [75, 75], job.output()
    assert 3 <= state_of(run).step < STEPS
    start("pipeline.train", *words, world_size=1).succeed()
    assert state_of(run).step == STEPS


def test_a_damaged_checkpoint_is_passed_over_and_named(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["--config", make_config("run"), "--run.dir", run, "--run.steps", 9]
    start("pipeline.train", *words, world_size=1).succeed()
    digest = state_of(run).order_digest
    victim = next(Path(last_checkpoint(run)).glob("tensors-*"))
    body = bytearray(victim.read_bytes())
    body[len(body) // 2] ^= 1
    victim.write_bytes(body)
    job = start("pipeline.train", *words, world_size=2)
    job.succeed()
    assert "step-00000009 does not verify" in job.output()
    assert "resumed from step-00000008" in job.output()
    assert state_of(run).order_digest == digest
    assert not checkpoint.verify(last_checkpoint(run))


def spread_of_lengths(root: Path) -> int:
    """Longest minus shortest sequence of the first global batch."""
    manifest = load_manifest(str(root))
    entries = manifest.splits["train"]
    order = Order([e.samples for e in entries], seed=11, global_size=8, micro_size=2, window=16)
    ids = order.samples_of(0)
    receipts = [Receipt.from_json((root / e.receipt_name).read_text(), e.name) for e in entries]
    lengths = [
        receipts[shard].num_tokens[index]
        for shard, index in zip(ids.shard_G, ids.index_G, strict=True)
    ]
    return max(lengths) - min(lengths)


def test_gradients_do_not_depend_on_accumulation(
    start: Callable[..., Any], make_config: Callable[..., Path], screens: Path, tmp_path: Path
) -> None:
    """One batch, 4 microbatches on one rank, 2 on each of two, and 1, 1, 2 on three."""
    gradients = {}
    assert spread_of_lengths(screens) > 60
    for name, world_size, micro_size in [("1x1", 1, 8), ("1x4", 1, 2), ("2x2", 2, 2), ("3", 3, 2)]:
        config = make_config(
            name,
            batch={"micro_size": micro_size},
            model={"dropout": 0.0, "latent_dropout": 0.0},
            optim={"name": "sgd", "clip_norm": 0.0, "weight_decay": 0.0, "warmup_steps": 0},
        )
        run = tmp_path / name
        words = ["--config", config, "--run.steps", 1, "--run.dir", run]
        start("pipeline.train", *words, world_size=world_size).succeed()
        # After its first step, SGD's momentum buffer is the gradient.
        tensors = checkpoint.load_tensors(last_checkpoint(run))
        gradients[name] = torch.cat(
            [
                tensors[n].double().flatten()
                for n in sorted(tensors)
                if n.endswith("momentum_buffer")
            ]
        )
    one = gradients.pop("1x1")
    assert one.norm() > 0
    for name, gradient in gradients.items():
        difference = float((gradient - one).norm() / one.norm())
        print(f"{name}: {difference:.1e}")
        assert difference <= 1e-5
