"""A variational autoencoder draws the same noise, and weighs it alike, on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint


def test_one_and_two_ranks_train_the_same_model(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """In float64, where only a mistake is larger than rounding. 3 ranks share 4 microbatches."""
    model = {"loss": "ssim", "variational": True, "kl_weight": 0.5, "kl_warmup": 0.5}
    config = make_config("run", "autoencoder", model=model, optim={"precision": "fp64"})
    weights, losses = [], []
    for world_size in (1, 3):
        run = tmp_path / f"ranks-{world_size}"
        words = ["--config", config, "--run.dir", run, "--run.steps", 8]
        start("pipeline.train", *words, world_size=world_size).succeed()
        weights.append(checkpoint.load_tensors(checkpoint.committed(str(run / "checkpoints"))[-1]))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
        assert {"kl", "reconstruction_error", "negative_elbo", "ssim"} <= rows[-1].keys()
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-9, atol=1e-12, msg=name)
    assert max(abs(one - two) for one, two in zip(*losses, strict=True)) < 1e-12
