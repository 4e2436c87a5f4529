"""A variational autoencoder draws the same noise, and weighs it alike, on any number of ranks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline import checkpoint

SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def test_any_ranks_train_the_same_model(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path
) -> None:
    """In float64, where only a mistake is larger than rounding. 3 ranks share 4 microbatches; 2
    ranks share the model's parts too."""
    model = {"loss": "ssim", "variational": True, "kl_weight": 0.5, "kl_warmup": 0.5}
    config = make_config("run", "autoencoder", model=model, optim={"precision": "fp64"})
    weights, losses = [], []
    for world_size, environment in ((1, {}), (3, {}), (2, SHARDED)):
        run = tmp_path / f"ranks-{world_size}"
        words = ["--config", config, "--run.dir", run, "--run.steps", 8]
        job = start("pipeline.train", *words, world_size=world_size, environment=environment)
        job.succeed()
        assert ("FSDP2" in job.output()) == bool(environment)
        assert "Warning" not in job.output()
        weights.append(checkpoint.load_tensors(checkpoint.committed(str(run / "checkpoints"))[-1]))
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
        assert {"kl", "reconstruction_error", "negative_elbo", "ssim"} <= rows[-1].keys()
    for others, other_losses in zip(weights[1:], losses[1:], strict=True):
        assert weights[0].keys() == others.keys()
        for name, tensor in weights[0].items():
            torch.testing.assert_close(others[name], tensor, rtol=1e-9, atol=1e-12, msg=name)
        assert max(abs(one - two) for one, two in zip(losses[0], other_losses, strict=True)) < 1e-12
