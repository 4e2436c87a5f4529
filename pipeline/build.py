"""From a configuration to the parts it names: order, splits, model, accelerator.

Everything that does not fit together (sizes, splits, a model without a vocabulary) is refused
here, in one line, before a process group exists.
"""

from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn

from pipeline import checkpoint
from pipeline.config import Config
from pipeline.models import build_model
from pipeline.order import Order
from pipeline.rng import torch_seed
from pipeline.stream import BatchDataset, SampleReader
from shards.format import Manifest
from shards.storage import UserError


def order_of(config: Config, manifest: Manifest) -> Order:
    """The training order. Raises `UserError` when the sizes do not fit the dataset."""
    if "train" not in manifest.splits:
        raise UserError(f"{config.data.url}: has no split `train`; pack with --split train=...")
    try:
        return Order(
            [shard.samples for shard in manifest.splits["train"]],
            seed=config.run.seed,
            global_size=config.batch.global_size,
            micro_size=config.batch.micro_size,
            lanes=config.data.lanes,
            window=config.data.window,
        )
    except ValueError as error:
        raise UserError(f"{config.data.url}: {error}") from error


def open_split(root: str, manifest: Manifest, split: str, *, seed: int = 0) -> BatchDataset:
    """The samples of one split. Raises `UserError` when there is none or sizes vary."""
    if split not in manifest.splits:
        raise UserError(f"{root}: no split {split!r}; it has {', '.join(sorted(manifest.splits))}")
    image = manifest.image
    if image.width is None or image.height is None:
        raise UserError(f"{root}: images differ in size; pack the dataset with --size WxH to train")
    return BatchDataset(
        SampleReader(root, manifest.splits[split]),
        image_CHW=(image.channels, image.height, image.width),
        with_tokens=manifest.kind == "pairs",
        seed=seed,
    )


def new_model(config: Config, manifest: Manifest) -> nn.Module:
    """The model of a configuration, sized for a dataset, with the weights of the run's seed.

    Raises:
        UserError: the model cannot be trained on this dataset.
    """
    image = manifest.image
    assert image.height is not None
    assert image.width is not None
    torch.manual_seed(torch_seed(config.run.seed, "weights"))
    try:
        model = build_model(
            config.model,
            image_channels=image.channels,
            image_height=image.height,
            image_width=image.width,
            vocab_size=manifest.tokenizer.vocab_size if manifest.tokenizer else None,
        )
    except ValueError as error:
        raise UserError(f"{config.data.url}: {error}") from error
    return model.to(dtype=dtype_of(config)).to(memory_format=torch.channels_last)


def load_model(config: Config, manifest: Manifest, path: Path) -> nn.Module:
    """The model with the weights of a checkpoint, on the CPU."""
    model = new_model(config, manifest)
    checkpoint.restore(model, None, checkpoint.load_tensors(path))
    return model


def dtype_of(config: Config) -> torch.dtype:
    """Of the weights and of the images given to the model; autocast is another matter."""
    return torch.float64 if config.optim.precision == "fp64" else torch.float32


def new_accelerator(config: Config) -> Accelerator:
    """Joins the process group, if the launcher made one."""
    precision = config.optim.precision
    return Accelerator(
        mixed_precision=precision if precision in ("bf16", "fp16") else "no",
        # Models have no buffers that change, so there is nothing to send before a forward pass.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
