"""The model in parts (FSDP2) trains as the whole one (DDP) does, when the launcher says so."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pipeline import checkpoint

ROOT = Path(__file__).parents[2]
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STEPS = 12


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def loss_difference(one: Path, two: Path) -> float:
    """The largest, relative, of all logged rows: of training and of validation."""
    first, second = rows(one), rows(two)
    assert [row["step"] for row in first] == [row["step"] for row in second]
    pairs = [(a["loss"], b["loss"]) for a, b in zip(first, second, strict=True)]
    return max(abs(a - b) / a for a, b in pairs)


def last_tensors(run: Path) -> dict[str, Tensor]:
    return checkpoint.load_tensors(checkpoint.committed(str(run / "checkpoints"))[-1])


def relative_difference(one: Path, two: Path, prefix: str) -> float:
    """L2 over all tensors of one kind, relative to the first run's; counts of steps are equal."""
    first, second = last_tensors(one), last_tensors(two)
    assert first.keys() == second.keys()
    assert all(first[n] == second[n] for n in first if n.endswith("/step"))
    names = [n for n in first if n.startswith(prefix) and not n.endswith("/step")]
    apart = sum(float((first[n].double() - second[n].double()).square().sum()) for n in names)
    size = sum(float(first[n].double().square().sum()) for n in names)
    return float((apart / size) ** 0.5)


def parts_of(run: Path) -> list[dict[str, int]]:
    """Rows of each tensor in the file of each rank that has any."""
    last = Path(checkpoint.committed(str(run / "checkpoints"))[-1])
    found = []
    for path in sorted(last.glob("tensors-*")):
        with safe_open(path, framework="pt") as file:
            sizes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        found.append({name: size[0] for name, size in sizes.items() if size})
    return found


@pytest.mark.parametrize(
    ("model", "precision", "world_size", "rounding"),
    [
        ("seq2seq", "fp32", 2, 1e-5),
        ("seq2seq", "fp64", 3, 1e-13),  # 4 microbatches: two ranks of three have one to repeat
        ("autoencoder", "fp32", 3, 1e-5),
    ],
)
def test_sharded_equals_replicated(
    model: str,
    precision: str,
    world_size: int,
    rounding: float,
    start: Callable[..., Any],
    make_config: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Same losses, order and weights as on two ranks of DDP, dropout, clipping and decay included;
    and each rank saves its part of every tensor."""
    config = make_config("run", model, validate={"every_steps": 6}, optim={"clip_norm": 0.05})
    words = ["--config", config, "--run.steps", STEPS, "--optim.precision", precision]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    module = "pipeline.train"
    start(module, *words, "--run.dir", whole, world_size=2).succeed()
    job = start(module, *words, "--run.dir", parts, world_size=world_size, environment=FSDP2)
    job.succeed()
    assert f"{world_size} x cpu (FSDP2)" in job.output()
    difference = {
        "loss": loss_difference(whole, parts),
        "model/": relative_difference(whole, parts, "model/"),
        "optimizer/": relative_difference(whole, parts, "optimizer/"),
    }
    print(f"{model}, {precision}, {world_size} ranks: {difference}")
    assert max(difference.values()) <= rounding
    digests = [[row.get("order_digest") for row in rows(run)] for run in (whole, parts)]
    assert digests[0] == digests[1]
    assert all(row["grad_norm"] > 0.05 for row in rows(whole) if "grad_norm" in row)
    tensors, shares = last_tensors(parts), parts_of(parts)
    assert len(shares) == world_size
    for name, tensor in tensors.items():
        if tensor.dim():
            most = -(-len(tensor) // world_size)
            assert max(share.get(name, 0) for share in shares) == most, name


def test_bf16_is_autocast_and_weights_stay_float32(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--config", make_config("run"), "--run.steps", 2]
    for precision in ("fp32", "bf16"):
        start(
            "pipeline.train",
            *words,
            *("--run.dir", tmp_path / precision, "--optim.precision", precision),
            world_size=2,
            environment=FSDP2,
        ).succeed()
    assert 1e-6 < loss_difference(tmp_path / "fp32", tmp_path / "bf16") < 1e-2
    weights = last_tensors(tmp_path / "bf16")
    assert {str(tensor.dtype) for tensor in weights.values()} == {"torch.float32"}
    assert relative_difference(tmp_path / "fp32", tmp_path / "bf16", "optimizer/") < 0.05


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """The first step, finite, throws the weights far away; the others change nothing."""
    optim = {"name": "sgd", "lr": 1e30, "schedule": "constant", "warmup_steps": 0}
    config = make_config("run", optim=optim | {"clip_norm": 0.0})
    run = tmp_path / "run"
    words = ["--config", config, "--run.dir", run, "--run.steps", 3]
    start("pipeline.train", *words, world_size=3, environment=FSDP2).succeed()
    training = [row for row in rows(run) if "skipped_steps" in row]
    assert [row["skipped_steps"] for row in training] == [0, 1, 2]
    weights = last_tensors(run)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())


def test_fp16_is_refused_once(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    words = ["--config", make_config("run", optim={"precision": "fp16"})]
    run = tmp_path / "run"
    job = start("pipeline.train", *words, "--run.dir", run, world_size=2, environment=FSDP2)
    assert job.wait(60) == [2, 2], job.output()
    lines = [line for log in job.logs for line in log.read_text().splitlines()]
    assert len(lines) == 1, lines
    assert "optim.precision = fp16: gradients of a sharded model are not scaled" in lines[0]


def test_the_launchers_file_shards(make_config: Callable[..., Path], tmp_path: Path) -> None:
    """`accelerate launch` with fsdp2.yaml, as the file says for CPUs."""
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", "launch/accelerate/fsdp2.yaml", "--main_process_port", "0"]
    words = ["--config", make_config("run"), "--run.dir", tmp_path / "run", "--run.steps", "2"]
    done = subprocess.run(
        [*launcher, "-m", "pipeline.train", *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "2 x cpu (FSDP2)" in done.stderr
    assert len(parts_of(tmp_path / "run")) == 2


def test_any_kind_and_number_of_processes_loads_what_another_saved(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """DDP(2) -> FSDP2(3) -> DDP(1) -> FSDP2(2): loaded, saved again, trained on."""
    words = [
        "--config",
        make_config("run", optim={"precision": "fp64"}),
        "--checkpoint.keep_last",
        1,
    ]
    start(
        "pipeline.train", *words, "--run.dir", tmp_path / "0", "--run.steps", 8, world_size=2
    ).succeed()
    chain = [(3, FSDP2), (1, {}), (2, FSDP2)]
    for number, (world_size, environment) in enumerate(chain, start=1):
        before = tmp_path / str(number - 1)
        job = start(
            "tests.distributed.save_again",
            *(*words, "--run.steps", 8, "--run.dir", tmp_path / str(number)),
            *("--run.resume", checkpoint.committed(str(before / "checkpoints"))[-1]),
            world_size=world_size,
            environment=environment,
        )
        job.succeed()
        assert ("(FSDP2)" in job.output()) == bool(environment)
        expected, found = last_tensors(before), last_tensors(tmp_path / str(number))
        assert expected.keys() == found.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
        assert len(parts_of(tmp_path / str(number))) == world_size
    # One run, trained on by each of them in turn, against the one that nobody disturbed.
    whole, mixed = tmp_path / "whole", tmp_path / "mixed"
    words += ["--checkpoint.every_steps", 4, "--run.steps", 16]
    start("pipeline.train", *words, "--run.dir", whole, world_size=2).succeed()
    for stop_at, (world_size, environment) in zip((4, 8, 12, 16), [(2, {}), *chain], strict=True):
        start(
            "tests.distributed.stop_at",
            *(stop_at, *words, "--run.dir", mixed),
            world_size=world_size,
            environment=environment,
        ).succeed()
    for prefix in ("model/", "optimizer/"):
        difference = relative_difference(whole, mixed, prefix)
        print(f"{prefix} {difference:.1e}")
        assert difference <= 1e-13
