"""From a configuration to the parts it names: order, splits, model, accelerator.

Everything that does not fit together (sizes, splits, a model without a vocabulary) is refused
here, in one line, before a process group exists.
"""

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from tokenizers import Tokenizer
from torch import nn

from pipeline import checkpoint
from pipeline.cache import Node
from pipeline.config import Config, DataConfig, parse_size
from pipeline.datasets import Datasets
from pipeline.decode import Decoding
from pipeline.fit import Fit
from pipeline.grammar import Grammar, TokenGrammar
from pipeline.models import Seq2SeqConfig, build_model
from pipeline.order import Order
from pipeline.parallel import unsharded_accelerate
from pipeline.rng import torch_seed
from pipeline.stream import BatchDataset, SampleReader
from pipeline.tasks import Task
from shards.format import FormatError, ImagePolicy
from shards.storage import UserError
from shards.tokens import TokenizerFile


def order_of(config: Config, data: Datasets, world_size: int = 1) -> Order:
    """The training order. Raises `UserError` when sizes do not fit the datasets or the ranks."""
    order = data.order(
        "train",
        config.data.weights,
        seed=config.run.seed,
        global_size=config.batch.global_size,
        micro_size=config.batch.micro_size,
        lanes=config.data.lanes,
        window=config.data.window,
    )
    try:
        order.micros_of(0, world_size)
    except ValueError as error:
        raise UserError(f"{data.label}: {error}") from error
    return order


def open_split(config: Config, data: Datasets, split: str) -> BatchDataset:
    """The samples of one split, of every dataset that has it.

    Raises:
        UserError: there is no such split, or its images differ in size and `data.size` is empty.
    """
    if split not in data.splits:
        raise UserError(f"{data.label}: no split {split!r}; it has {', '.join(data.splits)}")
    shape = image_shape(config.data, data.image, data.label)
    open_shards = data.open_shards(split, lanes=config.data.lanes, window=config.data.window)
    cache = data.cache(config.data.cache_dir, config.data.cache_bytes)
    return BatchDataset(
        SampleReader(data.shards(split), open_shards=open_shards, cache=cache),
        image_CHW=shape,
        with_tokens=data.kind == "pairs",
        tokenizer=TokenizerFile.of(data.roots[0], data.manifests[0]),
        seed=config.run.seed,
        fit=fit_of(config.data, data.image),
    )


def image_shape(data: DataConfig, image: ImagePolicy, root: str = "") -> tuple[int, int, int]:
    """Channels, height and width of the images that the model is shown: `data.size`, or the size
    that all images of the dataset share.

    Raises:
        UserError: they share none, and `data.size` is empty.
    """
    fit = fit_of(data, image)
    if fit is not None:
        return image.channels, fit.height, fit.width
    if image.width is None or image.height is None:
        raise UserError(
            f"{root or data.url}: images differ in size; set data.size = WxH to scale them as they "
            "are read, or pack the dataset with --size WxH"
        )
    return image.channels, image.height, image.width


def fit_of(data: DataConfig, image: ImagePolicy) -> Fit | None:
    """How images are scaled when they are read; None when they stay as they were packed."""
    if not data.size:
        return None
    width, height = parse_size(data.size)
    return Fit(height, width, data.fit, image.background)


def new_model(config: Config, data: Datasets) -> nn.Module:
    """The model of a configuration, sized for its datasets, with the weights of the run's seed.

    Raises:
        UserError: the model cannot be trained on this dataset.
    """
    tokenizer = data.tokenizer
    channels, height, width = image_shape(config.data, data.image)
    if isinstance(config.model, Seq2SeqConfig) and tokenizer is not None:
        longest = tokenizer.longest - 2  # <bos> and <eos>
        if longest > config.model.max_tokens:
            raise UserError(
                f"{data.label}: has codes of {longest} tokens, and model.max_tokens = "
                f"{config.model.max_tokens} would cut them short; raise it"
            )
    torch.manual_seed(torch_seed(config.run.seed, "weights"))
    try:
        model = build_model(
            config.model,
            image_channels=channels,
            image_height=height,
            image_width=width,
            vocab_size=tokenizer.vocab_size if tokenizer else None,
        )
    except ValueError as error:
        raise UserError(f"{data.label}: {error}") from error
    return model.to(dtype=dtype_of(config)).to(memory_format=torch.channels_last)


def load_model(config: Config, data: Datasets, chosen: str) -> nn.Module:
    """The model with the weights of a checkpoint, on the CPU."""
    model = new_model(config, data)
    with checkpoint.opened(chosen) as folder:
        checkpoint.restore(folder, model, None)
    return model


def dtype_of(config: Config) -> torch.dtype:
    """Of the weights and of the images given to the model; autocast is another matter."""
    return torch.float64 if config.optim.precision == "fp64" else torch.float32


def for_reading(config: Config) -> Config:
    """What a trained model is used with: fp16, which needs a GPU, is fp32 without one, and a line
    says so."""
    if config.optim.precision != "fp16" or torch.cuda.is_available():
        return config
    if Node.of_environment().is_first:
        text = "pixloom: optim.precision = fp16 needs a GPU; there is none, so this is in fp32"
        print(text, file=sys.stderr, flush=True)
    return dataclasses.replace(config, optim=dataclasses.replace(config.optim, precision="fp32"))


def autocast_of(config: Config, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What a trained model is called under, as `new_accelerator`'s validation does it."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.optim.precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def new_accelerator(config: Config) -> Accelerator:
    """Joins the process group, if the launcher made one.

    Raises:
        UserError: fp16 without a GPU; see `for_reading`.
    """
    precision = config.optim.precision
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("optim.precision = fp16 needs a GPU; use bf16 or fp32 on a CPU")
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for
        torch.use_deterministic_algorithms(True)
    # Models have no buffers that change, so there is nothing to send before a forward pass; the
    # argument's successor has another name and does not exist in every supported torch.
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    with unsharded_accelerate():
        return Accelerator(
            mixed_precision=precision if precision in ("bf16", "fp16") else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )


@contextlib.contextmanager
def ending(accelerator: Accelerator) -> Iterator[None]:
    """Leaves the process group at the end, and after errors that all processes know of. After any
    other, the others may be waiting in it, and leaving could wait for them."""
    try:
        yield
    except (UserError, FormatError, SystemExit):
        accelerator.end_training()
        raise
    accelerator.end_training()


def decoding_of(config: Config, data: Datasets) -> Decoding:
    """How `[validate]` says that codes are decoded. Raises `UserError` as `new_decoding`."""
    file = TokenizerFile.of(data.roots[0], data.manifests[0])
    tokenizer = file.load() if file is not None and config.validate.grammar else None
    return new_decoding(config, tokenizer)


def new_decoding(
    config: Config, tokenizer: Tokenizer | None, grammar: Grammar | None = None
) -> Decoding:
    """The same with this tokenizer, and with this grammar in place of the one that is named.

    Raises:
        UserError: the model writes no code; the grammar cannot be read, or its code not be written
            with the tokenizer.
    """
    wanted, model = config.validate, config.model
    if not isinstance(model, Seq2SeqConfig):
        for key, given in (("beam", wanted.beam > 1), ("grammar", bool(wanted.grammar))):
            if given:
                raise UserError(f"validate.{key}: model.name = {model.name} writes no code")
        return Decoding()
    known = None
    if wanted.grammar and tokenizer is not None:
        known = TokenGrammar(grammar or Grammar.open(wanted.grammar), tokenizer, model.max_tokens)
    return Decoding(wanted.beam, wanted.length_penalty, known, wanted.mask)


def check_model(config: Config, task: Task) -> None:
    """Raises `UserError` when validate.metric is none of the task's metrics, or the encoder sees
    nothing before it has weights."""
    blind = isinstance(config.model, Seq2SeqConfig) and config.model.encoder == "efficientnet_b0"
    if blind and not config.run.init:
        raise UserError(
            "model.encoder = efficientnet_b0: its normalisation is frozen, and with random weights "
            "it sees nothing; set run.init = torchvision, or to a file of its weights"
        )
    names = task.metrics([1.0] * len(task.columns))
    if config.validate.metric and config.validate.metric not in names:
        raise UserError(
            f"validate.metric = {config.validate.metric}: choose one of {', '.join(names)}"
        )
