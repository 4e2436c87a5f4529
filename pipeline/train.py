"""The run, top to bottom: setup -> fit -> train_step -> validate -> save.

    python -m pipeline.train --config launch/configs/demo.toml                  one process
    torchrun --nproc-per-node 2 -m pipeline.train --config FILE                 two, on one machine
    accelerate launch --config_file launch/accelerate/node.yaml -m pipeline.train --config FILE
    ... --optim.lr 3e-4 --run.dir runs/second                                   flags win

A run is a pure function of (configuration, data digest, step): order, augmentation, dropout and
learning rate follow from the step. So a checkpoint holds tensors and one step, and a killed run
goes on as if it had not been killed, on any number of processes.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pipeline import __version__, build, checkpoint, resume
from pipeline.batch import Batch
from pipeline.config import Config, add_config_flags, config_from, parse_flags, to_dict
from pipeline.datasets import Datasets
from pipeline.ema import Ema
from pipeline.optim import build_optimizer, set_learning_rate
from pipeline.order import Order, fold_digest
from pipeline.parallel import Parallel, Sharded, check_launcher, share_model
from pipeline.ranks import Ranks, said_once
from pipeline.rng import torch_seed
from pipeline.runlog import RunLog
from pipeline.saver import GROUP_TIMEOUT, Saver
from pipeline.state import TrainState
from pipeline.stop import EXIT_REQUEUE, StopRequest
from pipeline.stream import BatchDataset, TrainPlans, check_reads, grouped, make_loader
from pipeline.tasks import Task, build_task
from pipeline.validate import BadSamplesError, evaluate
from pipeline.warm_start import begin_from
from shards import storage


@dataclass
class Run:
    """What the steps share."""

    config: Config
    order: Order
    total_steps: int
    train_data: BatchDataset
    val_data: BatchDataset | None
    accelerator: Accelerator
    ranks: Ranks
    parallel: Parallel
    task: Task
    model: nn.Module
    """the bare model, under FSDP2 in parts; `wrapped` is the same one inside DDP"""
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    """the bare optimizer; `wrapped_optimizer` scales gradients in fp16"""
    wrapped_optimizer: Any
    ema: Ema
    state: TrainState
    log: RunLog
    stop: StopRequest
    saver: Saver
    data_digest: str
    lock: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom train`."""
    parser = argparse.ArgumentParser(
        prog="pixloom train",
        description="Train, or go on with, a run. Start it under accelerate launch or torchrun.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout at the end")
    add_config_flags(parser)

    def action() -> int:
        arguments = parse_flags(parser, argv)
        return train(config_from(arguments), as_json=arguments.json)

    return storage.command("train", action)


def train(config: Config, *, as_json: bool = False) -> int:
    """One run from its configuration; returns the exit status."""
    stop = StopRequest(config.run.max_time_s)
    with stop.listening():
        run = setup(config, stop)
        with build.ending(run.accelerator), run.saver:
            stopped = fit(run)
            with said_once():
                run.saver.finish()
    done = f"done; pixloom report {config.run.dir} shows it"
    run.log.say(f"stopped after step {run.state.step}, saved; start again" if stopped else done)
    if run.ranks.is_main and as_json:
        print(json.dumps({**asdict(run.state), "stopped": stopped}))
    return EXIT_REQUEUE if stopped else 0


def setup(config: Config, stop: StopRequest) -> Run:
    """Everything a step needs, from the newest checkpoint that verifies or from scratch.

    What the user can have got wrong is checked before a process group exists, or together: an
    error on one rank alone would leave the others waiting.
    """
    with said_once():
        data = Datasets.of(config.data)
        order = build.order_of(config, data, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        train_data = build.open_split(config, data, "train")
        check_reads(order, train_data)
        val_data = build.open_split(config, data, "val") if "val" in data.splits else None
        model = build.new_model(config, data)
        task = build_task(config.model, build.dtype_of(config), build.decoding_of(config, data))
        build.check_model(config, task)
        check_launcher(config.optim.precision, decodes=task.decodes)

    accelerator = build.new_accelerator(config)
    ranks, saver_ranks = Ranks.of_run(), Ranks.of_run(GROUP_TIMEOUT)
    log = RunLog(Path(config.run.dir), ranks)
    lock = resume.lock_run(config, ranks, log)
    found = resume.find(config, data, ranks)
    if config.run.init and not found:
        log.say(begin_from(config.run.init, config.model, model, ranks, data.tokenizer).line)
    parallel = share_model(model, accelerator)
    optimizer = build_optimizer(model, config.optim)
    wrapped, wrapped_optimizer = parallel.prepare(optimizer)
    ema = Ema(model, config.optim.ema_decay)
    state, damaged = resume.restore_newest(found, config, ranks, log, model, optimizer, ema)
    if accelerator.scaler is not None and state.loss_scale:
        accelerator.scaler.load_state_dict(state.loss_scale)
    room = checkpoint.tensors_of(model, optimizer, ema, to_come=True)
    saver = Saver(config, saver_ranks, log, stop, damaged, room)
    total_steps = config.run.steps or config.run.epochs * order.steps_per_epoch
    run = Run(
        config=config, data_digest=data.data_digest, order=order, total_steps=total_steps,
        train_data=train_data, val_data=val_data, accelerator=accelerator, ranks=ranks, task=task,
        model=model, wrapped=wrapped, optimizer=optimizer, wrapped_optimizer=wrapped_optimizer,
        ema=ema, state=state, log=log, stop=stop, saver=saver, lock=lock, parallel=parallel,
    )  # fmt: skip
    log.start(config, state)
    log.say(
        f"{config.model.name}, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters"
        f", {ranks.world_size} x {accelerator.device.type}{parallel.label}; "
        f"{order.summary}; steps {state.step} to {total_steps}"
    )
    return run


def fit(run: Run) -> bool:
    """Trains to the last step, whose save it begins; True when it was stopped before that."""
    config, state, order = run.config, run.state, run.order
    if has_converged(run):
        return False
    micros = order.micros_of(run.ranks.rank, run.ranks.world_size)
    plans = TrainPlans(order, micros, state.step, run.total_steps)
    pin = run.accelerator.device.type == "cuda"
    loader = make_loader(run.train_data, plans, workers=config.data.workers, pin=pin)
    settle_buckets(run)
    validate_every = config.validate.every_steps or order.steps_per_epoch
    save_every = config.checkpoint.every_steps or order.steps_per_epoch
    run.wrapped.train()
    with contextlib.closing(grouped(loader, len(micros))) as steps:
        for batches, wait_s in steps:
            stopping = train_step(run, batches, wait_s)
            last = state.step == run.total_steps
            improved = False
            if run.val_data is not None and (last or state.step % validate_every == 0):
                improved = validate(run, run.val_data)
            converged = has_converged(run)
            if last or improved or stopping or converged or state.step % save_every == 0:
                save(run)
            if converged or last or stopping:
                return stopping and not (converged or last)
    return False


def train_step(run: Run, batches: Sequence[Batch], wait_s: float) -> bool:
    """One optimizer step over this rank's microbatches; True when some rank was asked to stop."""
    config, state, accelerator = run.config, run.state, run.accelerator
    # The step's one exchange besides the gradients: the weight that the loss is divided by, the
    # hash of what was consumed, what could not be read, and whether anyone wants to stop.
    weight, order_hash, num_bad, stopping = run.ranks.sum_int(
        sum(run.task.weight(batch) for batch in batches),
        sum(batch.order_hash for batch in batches),
        sum(len(batch.bad) for batch in batches),
        int(run.stop.requested),
    )
    bad = {name: line for b in batches for name, line in zip(b.bad_names, b.bad, strict=True)}
    run.log.account_for_bad(state, bad, num_bad, config.data.max_bad)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    for batch, share, sync in run.parallel.rounds(batches, run.order.num_micro):
        # Dropout depends on the microbatch, never on the process that computes it.
        torch.manual_seed(torch_seed(config.run.seed, "dropout", state.step, batch.micro))
        with sync:
            micro_loss_sum = loss_of(run, batch)
            # Gradients are averaged over ranks: times W, the average is the sum.
            accelerator.backward(micro_loss_sum * (share * run.ranks.world_size / max(weight, 1)))
        if share:
            loss_sum += micro_loss_sum.detach()
    grad_norm = run.parallel.clip_grad_norm(config.optim.clip_norm or math.inf)
    lr = set_learning_rate(run.optimizer, state.step, config.optim, run.total_steps)
    finite = bool(torch.isfinite(grad_norm))
    if finite or accelerator.scaler is not None:  # fp16's scaler must see overflows itself
        run.wrapped_optimizer.step()
    run.wrapped_optimizer.zero_grad()

    state.step += 1
    state.skipped_steps += int(not finite)
    if finite:
        run.ema.update(state.step - state.skipped_steps)
    state.order_digest = fold_digest(state.order_digest, order_hash)
    run.log.count(run.order.global_size, wait_s)
    if state.step % config.run.log_every_steps == 0 or state.step == run.total_steps:
        loss = float(run.ranks.sum(loss_sum.cpu())) / max(weight, 1)
        run.log.row(
            {"step": state.step, **run.order.epochs_after(state.step), "loss": loss, "lr": lr,
             "grad_norm": float(grad_norm), **run.log.speed(), "order_digest": state.order_digest,
             "skipped_steps": state.skipped_steps, "bad_samples": len(state.damaged)},
            of=run.total_steps,
        )  # fmt: skip
    return stopping > 0


def loss_of(run: Run, batch: Batch) -> Tensor:
    """The loss of a microbatch, on the device, to be divided by the weight of the step."""
    batch, progress = batch.to(run.accelerator.device), run.state.step / run.total_steps
    shift_px = run.config.data.shift_px
    with run.accelerator.autocast():  # also for what decodes with the bare model
        return run.task.loss_sum(
            run.wrapped, batch, bare=run.model, progress=progress, shift_px=shift_px
        )


def validate(run: Run, data: BatchDataset) -> bool:
    """Logs all metrics of the validation split; True when they are the best so far."""
    state = run.state
    try:
        with run.ema.applied():
            metrics = evaluate(
                run.parallel.whole_model(), run.task, data, run.ranks, run.accelerator,
                batch_size=run.config.validate.batch_size, workers=run.config.data.workers,
            )  # fmt: skip
    except BadSamplesError:
        save(run)  # what was trained is not lost
        with said_once():
            raise
    row = {"step": state.step, **run.order.epochs_after(state.step), "split": "val", **metrics}
    run.log.row(row, of=run.total_steps)
    metric = run.config.validate.metric or run.task.metric
    return state.judge(metric, metrics[metric])


def has_converged(run: Run) -> bool:
    """Whether validate.patience is at its end. A run that is resumed then stops again."""
    patience = run.config.validate.patience
    if not 0 < patience <= run.state.stale_validations:
        return False
    run.log.say(f"no better metric in {patience} validations: stopping early")
    return True


def save(run: Run) -> None:
    """Begins a checkpoint of the finished step; it is committed while training goes on."""
    scaler = run.accelerator.scaler
    run.state.loss_scale = scaler.state_dict() if scaler is not None else {}
    meta = checkpoint.Meta(
        state=run.state, config=to_dict(run.config), data_digest=run.data_digest,
        versions={"pixloom": __version__, "torch": str(torch.__version__)},
    )  # fmt: skip
    run.saver.save(checkpoint.tensors_of(run.model, run.optimizer, run.ema), meta)


def settle_buckets(run: Run) -> None:
    """One backward pass that changes nothing, before the first step.

    DDP lays its gradient buckets out anew after the first backward pass, and with three ranks or
    more the layout decides the order of sums: without this, a resumed run would round differently.
    """
    replicas = 1 if isinstance(run.parallel, Sharded) else run.ranks.world_size
    if replicas == 1 or run.state.step >= run.total_steps:
        return
    micros = run.order.micros_of(run.ranks.rank, run.ranks.world_size)
    plans = TrainPlans(run.order, micros, run.state.step, run.state.step + 1)
    run.accelerator.backward(loss_of(run, run.train_data[next(iter(plans))]) * 0)
    run.wrapped_optimizer.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
