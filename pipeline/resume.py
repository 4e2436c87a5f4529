"""Which checkpoint a run goes on from, and whether it may."""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.config import Config, config_of, differences, to_dict
from pipeline.datasets import Datasets
from pipeline.ema import Ema
from pipeline.ranks import Ranks, said_once
from pipeline.runlog import RunLog
from pipeline.saver import clear_scratch, scratch_of
from pipeline.state import TrainState
from shards import storage
from shards.format import FormatError
from shards.storage import UserError

_LOCK_WAIT_S = 5.0


def find(config: Config, data: Datasets, ranks: Ranks) -> list[str]:
    """The checkpoints that the run may go on from, newest first: those of the run, or the one
    that run.resume names for a run without any. None when it begins.

    Rank 0 alone looks, and all take its word: in a bucket another rank may be shown other ones.

    Raises:
        UserError: the run may not go on, and what to do about it; or checkpoints cannot be
            written.
    """
    with together(ranks):
        found = _allowed(config, data) if ranks.is_main else []
    named = _named(config)
    num_found, is_named = ranks.sum_int(len(found), int(found == [named]))
    if is_named or not num_found:
        return [named] if is_named else []
    steps = [checkpoint.step_of(path) for path in found] or [0] * num_found
    directory = directory_of(config)
    return [checkpoint.path_of(directory, step) for step in ranks.sum_int(*steps)]


def _allowed(config: Config, data: Datasets) -> list[str]:
    """As `find`, of one process. Refuses another configuration or dataset."""
    directory = directory_of(config)
    found = checkpoint.committed(directory)[::-1]
    if config.run.resume == "never" and found:
        raise UserError(
            f"{directory}: has checkpoints, and run.resume = never; choose another run.dir, "
            "or run.resume = auto to go on"
        )
    named = _named(config)
    before = checkpoint.directory_of(Path(config.run.dir))
    if not found and not named and before != directory and checkpoint.committed(before):
        raise UserError(
            f"{config.run.dir}: its checkpoints are in {before}, and checkpoint.url is now "
            f"{directory}, which has none; set it back, copy them there, or choose another run.dir"
        )
    if not found and named:
        found = [named]
        problems = checkpoint.verify(named)
        if problems:
            raise UserError(f"run.resume: {problems[0]}")
    intact = (path for path in found if not checkpoint.verify(path, [checkpoint.STATE_NAME]))
    newest = next(intact, None)
    if newest is not None:
        _check_same(config, data, newest)
    # Better now than after the first hours.
    probe = storage.join(directory, f"probe{storage.SCRATCH_NAME}")
    storage.publish_text("", probe)
    storage.remove(probe)
    return found


def _check_same(config: Config, data: Datasets, newest: str) -> None:
    """Raises `UserError` when the checkpoint is of another configuration or dataset."""
    meta = checkpoint.Meta.read(newest)
    # Through `config_of`, so that keys younger than the checkpoint have their default.
    saved = to_dict(config_of(meta.config, newest))
    changed = differences(saved, to_dict(config))
    if changed:
        raise UserError(
            f"{newest}: was saved under another configuration ({'; '.join(changed)}); "
            "set these back, or choose another run.dir"
        )
    if meta.data_digest != data.data_digest:
        raise UserError(
            f"{newest}: was trained on another dataset (digest {meta.data_digest[:12]}, "
            f"{data.label} has {data.data_digest[:12]}); choose another run.dir"
        )


def directory_of(config: Config) -> str:
    """Where the run's checkpoints go."""
    return checkpoint.directory_in(Path(config.run.dir), config.checkpoint.url)


def _named(config: Config) -> str:
    """The checkpoint that run.resume names, or nothing."""
    return "" if config.run.resume in ("auto", "never") else config.run.resume.rstrip("/")


def restore_newest(
    found: Sequence[str],
    config: Config,
    ranks: Ranks,
    log: RunLog,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
) -> tuple[TrainState, set[int]]:
    """Puts model, optimizer and averages where the run goes on from.

    That is the first of `found` that verifies: others are passed over aloud. Without any, a new
    state, and everything as it is.

    Returns:
        The state of the run, and the steps of the checkpoints that were passed over.

    Raises:
        UserError: there are checkpoints, and none verifies; or a bucket does not answer.
    """
    damaged: set[int] = set()
    for candidate in found:
        with _verified(candidate, Path(config.run.dir), ranks, log) as folder:
            if folder is not None:
                with together(ranks):
                    state = checkpoint.Meta.read(str(folder)).state
                    checkpoint.restore(folder, model, optimizer, ema)
                log.say(f"resumed from {checkpoint.name_of(candidate)}")
                return state, damaged
        damaged.add(checkpoint.step_of(candidate))
    if not found:
        return TrainState(), damaged
    with said_once():
        raise UserError(
            f"{found[0].rpartition('/')[0]}: none of its {len(found)} checkpoints verifies; "
            "move them away to start from scratch"
        )


@contextlib.contextmanager
def together(ranks: Ranks) -> Iterator[None]:
    """Ends all ranks when the block fails on one of them, which says why; all must come here."""
    failed: UserError | FormatError | None = None
    try:
        yield
    except (UserError, FormatError) as error:
        failed = error
    (num_failed,) = ranks.sum_int(int(failed is not None))
    if failed is not None:
        raise failed
    if num_failed:
        sys.exit(2)


@contextlib.contextmanager
def _verified(candidate: str, run: Path, ranks: Ranks, log: RunLog) -> Iterator[Path | None]:
    """The checkpoint as a local folder, for all ranks, or None for all when it does not verify.

    On local storage rank 0 hashes it. One in a bucket is downloaded once a node.
    """
    remote = storage.is_remote(candidate)
    folder = (
        scratch_of(run) / checkpoint.name_of(candidate) if remote else storage.local_path(candidate)
    )
    problems: list[str] = []
    with together(ranks):
        if remote and os.environ.get("LOCAL_RANK", "0") == "0":
            problems = checkpoint.fetch(candidate, folder)
        elif not remote and ranks.is_main:
            problems = checkpoint.verify(candidate)
    if problems:
        log.warn(f"{checkpoint.name_of(candidate)} does not verify ({problems[0]}); going back")
    (num_problems,) = ranks.sum_int(len(problems))
    try:
        yield None if num_problems else folder
    finally:
        if remote:
            ranks.barrier()
            shutil.rmtree(folder, ignore_errors=True)


def lock_run(config: Config, ranks: Ranks, log: RunLog) -> int | None:
    """Makes this job the run folder's only one, until its first process ends; returns the lock.

    A POSIX record lock: gone with the process, however it ends, and not handed on to loader
    workers that outlive it. Waits a while for a job that is being killed, and removes what such a
    one left unfinished.

    Raises:
        UserError: another job trains in this folder, or it cannot be written.
    """
    folder = Path(config.run.dir)
    descriptor = None
    held = 0
    with together(ranks):
        with storage.explained(str(folder)):
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: cannot be written to; choose another run.dir")
        if ranks.is_main:
            path = folder / ".lock"
            with storage.explained(str(path)):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            deadline_s = time.monotonic() + _LOCK_WAIT_S
            while not held and time.monotonic() < deadline_s:
                held = int(_try_lock(descriptor, log))
                if not held:
                    time.sleep(0.2)
    if not ranks.sum_int(held)[0]:
        with said_once():
            raise UserError(
                f"{folder}: another job trains in this folder; end it, or choose another"
            )
    clear_scratch(folder)
    return descriptor


def _try_lock(descriptor: int, log: RunLog) -> bool:
    """Whether nobody else holds it. A file system without locks cannot tell, which is said."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        log.warn(f"run.dir cannot be locked ({error.strerror}): see that no other job trains there")
    return True
