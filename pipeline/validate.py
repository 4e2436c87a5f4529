"""Exact validation: every sample of a split once, on any number of processes.

Batches are fixed; batch b is rank (b mod W)'s; nothing is exchanged until the end, when the rows
of per-batch sums meet. The number of samples must equal the manifest's.

    python -m pipeline.validate RUN --split test                    one process
    torchrun --nproc-per-node 2 -m pipeline.validate RUN --split test
    python -m pipeline.validate RUN --split test --beam 5 --grammar web
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from pipeline import checkpoint
from pipeline.build import (
    decoding_of,
    dtype_of,
    for_reading,
    load_model,
    new_accelerator,
    open_split,
)
from pipeline.config import Config, add_decoding_flags, config_of_run, with_decoding
from pipeline.datasets import Datasets
from pipeline.metrics import merge
from pipeline.models import Seq2SeqConfig
from pipeline.ranks import Ranks, said_once
from pipeline.stream import BatchDataset, ValidationPlans, make_loader
from pipeline.tasks import Task, build_task
from shards import storage
from shards.format import TOKENIZER_NAME
from shards.storage import UserError


class BadSamplesError(UserError):
    """Samples of a validation split cannot be read. Raised on every rank alike."""


def evaluate(
    model: nn.Module,
    task: Task,
    dataset: BatchDataset,
    ranks: Ranks,
    accelerator: Accelerator,
    *,
    batch_size: int,
    workers: int = 0,
) -> dict[str, float]:
    """Metrics of the bare `model` over all samples behind `dataset`; the same on every rank.

    Raises:
        BadSamplesError: samples that cannot be read; each is named on stderr by its rank.
    """
    counts = dataset.reader.shard_samples
    plans = ValidationPlans(counts, batch_size, ranks.rank, ranks.world_size)
    rows = torch.zeros(plans.num_batches, len(task.columns), dtype=torch.float64)
    was_training = model.training
    model.eval()
    with torch.inference_mode(), accelerator.autocast():
        loader = make_loader(dataset, plans, workers=workers, pin=accelerator.device.type == "cuda")
        for batch in loader:
            for line in batch.bad:
                print(f"pixloom: warning: {line}", file=sys.stderr, flush=True)
            sums = task.metric_sums(model, batch.to(accelerator.device))
            rows[batch.micro] = torch.tensor(sums, dtype=torch.float64)
    model.train(was_training)
    ranks.sum(rows)
    totals = merge(rows.tolist())
    if totals[0] != sum(counts):
        roots = dict.fromkeys(shard.root for shard in dataset.reader.shards)
        raise BadSamplesError(
            f"{', '.join(roots)}: validation counted {totals[0]:.0f} samples, the "
            f"manifest says {sum(counts)}; the others are named above"
        )
    return {"samples": totals[0], **task.metrics(totals)}


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom validate`."""
    parser = argparse.ArgumentParser(
        prog="pixloom validate", description="All metrics of a checkpoint on one split, exactly."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--split", default="val", help="split of the dataset [val]")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or a step's number [best]"
    )
    parser.add_argument("--data.url", dest="url", help="validate on another packed dataset")
    parser.add_argument("--workers", type=int, default=0, help="loader processes a rank [0]")
    add_decoding_flags(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return storage.command("validate", lambda: _validate(parser.parse_args(argv)))


def _validate(arguments: argparse.Namespace) -> int:
    run: Path = arguments.run
    with said_once():
        if arguments.workers < 0:
            raise UserError(f"--workers {arguments.workers}: 0 for none, or a number of them")
        config = for_reading(with_decoding(config_of_run(run), arguments))
        chosen = checkpoint.choose(run, arguments.checkpoint)
        trained_on = Datasets.of(config.data)
        data = Datasets.open([arguments.url]) if arguments.url else trained_on
        if isinstance(config.model, Seq2SeqConfig):
            _check_tokenizer(data, trained_on)
        dataset = open_split(config, data, arguments.split)
        if dataset.image_CHW != open_split(config, trained_on, "train").image_CHW:
            raise UserError(
                f"{data.label}: images of CxHxW {dataset.image_CHW}, the run was trained on "
                f"another size ({trained_on.label}); pack them alike"
            )
        task = build_task(config.model, dtype_of(config), decoding_of(config, trained_on))
        model = load_model(config, trained_on, chosen)
    accelerator = new_accelerator(config)
    ranks = Ranks.of_run()
    model.to(accelerator.device)
    metrics = evaluate(
        model,
        task,
        dataset,
        ranks,
        accelerator,
        batch_size=config.validate.batch_size,
        workers=arguments.workers,
    )
    if ranks.is_main:
        row: dict[str, Any] = {
            "split": arguments.split,
            "data_digest": data.data_digest,
            "checkpoint": checkpoint.name_of(chosen),
            **_decoding_of(config),
            **metrics,
        }
        name = f"validate-{arguments.split}"
        if data.data_digest != trained_on.data_digest:
            name += f"-{data.data_digest[:12]}"
        storage.publish_text(json.dumps(row, indent=1) + "\n", str(run / f"{name}.json"))
        if arguments.json:
            print(json.dumps(row))
        else:
            print("\n".join(f"{name:18} {_shown(value)}" for name, value in row.items()))
    accelerator.end_training()
    return 0


def _decoding_of(config: Config) -> dict[str, Any]:
    """What of `[validate]` is not the default, and so changes the metrics."""
    wanted = config.validate
    found: dict[str, Any] = {}
    if wanted.beam > 1:
        found = {"beam": wanted.beam, "length_penalty": wanted.length_penalty}
    return found | ({"grammar": wanted.grammar, "mask": wanted.mask} if wanted.grammar else {})


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _check_tokenizer(data: Datasets, trained_on: Datasets) -> None:
    """Raises `UserError` when codes of `data` have not the ids that the model was trained on."""
    wanted, found = trained_on.tokenizer, data.tokenizer
    if wanted is not None and (found is None or found.sha256 != wanted.sha256):
        other = f"packed with another tokenizer than {trained_on.label}"
        raise UserError(
            f"{data.label}: {other if found else 'no tokenizer'}; pack images and code with "
            f"--tokenizer {storage.join(trained_on.roots[0], TOKENIZER_NAME)}"
        )


if __name__ == "__main__":
    sys.exit(main())
