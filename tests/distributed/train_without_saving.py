"""Trains as `pipeline.train` does, but instead of checkpoints leaves RUN/weights.safetensors.

    python -m tests.distributed.train_without_saving --config FILE ...

The file holds the whole model and, as `optimizer/PARAMETER/NAME`, the whole optimizer state.
Its metadata is a JSON object, `held`: bytes of all that on each rank, while it trained.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from pipeline import checkpoint, train
from pipeline.config import add_config_flags, config_from, parse_flags
from shards import storage


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().cpu().contiguous()


def own_bytes(tensor: Tensor) -> int:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def main() -> int:
    parser = argparse.ArgumentParser()
    add_config_flags(parser)
    config = config_from(parse_flags(parser, sys.argv[1:]))
    train.save = lambda run: None
    run = train.setup(config)
    train.fit(run)
    tensors = checkpoint.tensors_of(run.model, run.optimizer)
    held = torch.zeros(run.ranks.world_size, dtype=torch.int64)
    held[run.ranks.rank] = sum(map(own_bytes, tensors.values()))
    run.ranks.sum(held)
    weights = {name: whole(tensor) for name, tensor in tensors.items()}
    if run.ranks.is_main:
        path = Path(config.run.dir) / "weights.safetensors"
        save_file(weights, path, metadata={"held": json.dumps(held.tolist())})
    run.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(storage.command("train", main))
