"""Losses that read the model out, and averaged weights, on any number and kind of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import checkpoint

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
SAMPLING = {"sampling_share": 0.5, "sampling_start": 0.0, "sampling_end": 0.5, "max_tokens": 120}
RISK = {"risk_weight": 0.5, "risk_beam": 2, "label_smoothing": 0.1}
OPTIM = {"precision": "fp64", "ema_decay": 0.5, "schedule": "onecycle", "warmup_steps": 2}


def last_tensors(run: Path) -> dict[str, Tensor]:
    return checkpoint.load_tensors(checkpoint.committed(str(run / "checkpoints"))[-1])


def difference(one: Path, two: Path, prefix: str) -> float:
    """L2 over all tensors of one kind, relative to the first run's."""
    first, second = last_tensors(one), last_tensors(two)
    assert first.keys() == second.keys()
    names = [name for name in first if name.startswith(prefix) and not name.endswith("/step")]
    assert names
    apart = sum(float((first[n].double() - second[n].double()).square().sum()) for n in names)
    size = sum(float(first[n].double().square().sum()) for n in names)
    return float((apart / size) ** 0.5)


def assert_alike(one: Path, two: Path) -> None:
    apart = {prefix: difference(one, two, prefix) for prefix in ("model/", "ema/", "optimizer/")}
    print(two.name, apart)
    assert max(apart.values()) < 1e-12
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one, two)
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-6, atol=0)


def test_sampling_smoothing_and_risk_do_not_depend_on_the_number_of_ranks(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = make_config("run", model={**SAMPLING, **RISK}, optim=OPTIM)
    words = ["--config", config, "--run.steps", 2]
    for world_size in (1, 2):
        run = tmp_path / str(world_size)
        start("pipeline.train", *words, "--run.dir", run, world_size=world_size).succeed()
    assert_alike(tmp_path / "1", tmp_path / "2")


def test_sampling_and_averages_of_a_sharded_transformer(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """On one rank, against two of DDP that stop and go on as three of FSDP2."""
    model = {**SAMPLING, "decoder": "transformer", "num_layers": 2}
    config = make_config("run", model=model, optim=OPTIM)
    words = ["--config", config, "--run.steps", 6]
    start("pipeline.train", *words, "--run.dir", tmp_path / "1", world_size=1).succeed()
    words += ["--run.dir", tmp_path / "changing"]
    start("tests.distributed.stop_at", 4, *words, world_size=2).succeed()
    job = start("pipeline.train", *words, world_size=3, environment=FSDP2)
    job.succeed()
    assert "3 x cpu (FSDP2)" in job.output()
    assert_alike(tmp_path / "1", tmp_path / "changing")


def test_a_sharded_gru_warns_of_nothing(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    model = {"decoder": "gru", "memory": "vector", "max_tokens": 120}
    words = ["--config", make_config("run", model=model), "--run.steps", 1]
    words += ["--run.dir", tmp_path / "run"]
    job = start("pipeline.train", *words, world_size=2, environment=FSDP2)
    job.succeed()
    assert "Warning" not in job.output()


def test_minimum_risk_of_a_sharded_model_is_refused_once(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--config", make_config("run", model=RISK), "--run.dir", tmp_path / "run"]
    job = start("pipeline.train", *words, world_size=2, environment=FSDP2)
    assert job.wait(60) == [2, 2], job.output()
    lines = [line for log in job.logs for line in log.read_text().splitlines()]
    assert len(lines) == 1, lines
    assert "model.risk_weight: a sharded model cannot decode while it trains" in lines[0]
