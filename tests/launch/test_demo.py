"""The README's first command, from nothing to a result, with a real kill in the middle."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import checkpoint
from pipeline.build import load_model, open_split
from pipeline.config import config_of, read_toml
from pipeline.datasets import Datasets
from pipeline.models import Seq2Seq, Seq2SeqConfig
from pipeline.order import validation_batches
from pipeline.stream import BatchPlan
from pipeline.tasks import Seq2SeqTask
from shards.storage import load_manifest

ROOT = Path(__file__).parents[2]


def run_demo(folder: Path) -> str:
    done = subprocess.run(
        ["bash", "launch/demo.sh", "--dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(folder)


@pytest.mark.timeout(1200)
def test_the_demo_survives_its_kill_and_learns(demo: tuple[Path, str]) -> None:
    folder, output = demo
    assert "*** SIGKILL to" in output
    assert "resumed from step-" in output
    result = json.loads((folder / "run" / "validate-test.json").read_text())
    print(f"exact match {result['exact_match']:.3f} on {result['samples']:.0f} programs")
    assert result["exact_match"] > 0.9
    assert result["samples"] == load_manifest(str(folder / "shards")).num_samples("test")
    for name, start in (("report.html", b"<!DOCTYPE html>"), ("sheet.png", b"\x89PNG")):
        assert f"{folder / name}" in output
        assert (folder / name).read_bytes().startswith(start)


@pytest.mark.timeout(1200)
def test_a_second_call_re_uses_what_is_there(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    before = {
        path: path.stat().st_mtime_ns
        for part in ("screens", "shards", "run/checkpoints")
        for path in (folder / part).rglob("*")
        if path.is_file()
    }
    output = run_demo(folder)
    assert "nothing to train" in output
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.timeout(1200)
def test_the_decoder_looks(demo: tuple[Path, str]) -> None:
    """Codes under teacher forcing, but beside each other's images, must become less likely: a
    decoder that ignores the image would not notice."""
    folder, _ = demo
    model, batch = model_and_batch(folder)
    task = Seq2SeqTask(Seq2SeqConfig())
    with torch.inference_mode():
        own = float(task.loss_sum(model, batch)) / task.weight(batch)
        turned = torch.roll(torch.arange(len(batch.keys)), random.randint(1, len(batch.keys) - 1))
        shuffled = type(batch)(**{**vars(batch), "image_BCHW": batch.image_BCHW[turned]})
        others = float(task.loss_sum(model, shuffled)) / task.weight(batch)
    print(f"loss a token: {own:.4f} with its own image, {others:.4f} with another's")
    assert others > 10 * own


def model_and_batch(folder: Path) -> tuple[Seq2Seq, Any]:
    path = folder / "run" / "config.toml"
    config = config_of(read_toml(str(path)), str(path))
    root = str(folder / "shards")
    data = Datasets.open([root])
    model = load_model(config, data, checkpoint.choose(folder / "run", "best")).eval()
    assert isinstance(model, Seq2Seq)
    dataset = open_split(config, data, "test")
    ids = next(validation_batches(dataset.reader.shard_samples, 64))
    return model, dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)]
