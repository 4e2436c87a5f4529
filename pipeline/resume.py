"""Which checkpoint a run goes on from, and whether it may."""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from pipeline import checkpoint
from pipeline.config import Config, config_of, differences, to_dict
from pipeline.ranks import Ranks, said_once
from pipeline.runlog import RunLog
from pipeline.saver import clear_scratch, scratch_of
from pipeline.state import TrainState
from shards import storage
from shards.format import FormatError, Manifest
from shards.storage import UserError

_LOCK_WAIT_S = 5.0


def check_resumable(config: Config, manifest: Manifest) -> None:
    """Refuses to go on with a run whose configuration or dataset is another one.

    Raises:
        UserError: says what differs.
    """
    run = Path(config.run.dir)
    with storage.explained(str(run)):
        run.mkdir(parents=True, exist_ok=True)
    if not os.access(run, os.W_OK):
        raise UserError(f"{run}: cannot be written to; choose another run.dir")
    directory = directory_of(config)
    found = checkpoint.committed(directory)
    if config.run.resume == "never" and found:
        raise UserError(
            f"{directory}: has checkpoints, and run.resume = never; choose another run.dir, "
            "or run.resume = auto to go on"
        )
    named = _named(config)
    before = checkpoint.directory_of(run)
    if not found and not named and before != directory and checkpoint.committed(before):
        raise UserError(
            f"{run}: its checkpoints are in {before}, and checkpoint.url is now {directory}, which "
            "has none; set it back, copy them there, or choose another run.dir"
        )
    if not found and named:
        found = [named]
        problems = checkpoint.verify(named)
        if problems:
            raise UserError(f"run.resume: {problems[0]}")
    intact = [path for path in found if not checkpoint.verify(path, [checkpoint.STATE_NAME])]
    if not intact:
        return
    meta = checkpoint.Meta.read(intact[-1])
    # Through `config_of`, so that keys younger than the checkpoint have their default.
    saved = to_dict(config_of(meta.config, intact[-1]))
    changed = differences(saved, to_dict(config))
    if changed:
        raise UserError(
            f"{intact[-1]}: was saved under another configuration ({'; '.join(changed)}); "
            "set these back, or choose another run.dir"
        )
    if meta.data_digest != manifest.data_digest:
        raise UserError(
            f"{intact[-1]}: was trained on another dataset (digest {meta.data_digest[:12]}, "
            f"{config.data.url} has {manifest.data_digest[:12]}); choose another run.dir"
        )


def directory_of(config: Config) -> str:
    """Where the run's checkpoints go."""
    return checkpoint.directory_in(Path(config.run.dir), config.checkpoint.url)


def _named(config: Config) -> str:
    """The checkpoint that run.resume names, or nothing."""
    return "" if config.run.resume in ("auto", "never") else config.run.resume.rstrip("/")


def is_new(config: Config, ranks: Ranks) -> bool:
    """Whether `restore_newest` will find nothing to go on from."""
    with together(ranks):
        found = checkpoint.committed(directory_of(config)) if ranks.is_main else []
    (num_found,) = ranks.sum_int(len(found))
    return not num_found and not _named(config)


def restore_newest(
    config: Config,
    ranks: Ranks,
    log: RunLog,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[TrainState, set[int]]:
    """Puts model and optimizer where the run goes on from.

    1. the newest checkpoint of the run that verifies: others are passed over aloud;
    2. the one that run.resume names, for a run without any;
    3. none: a new state, and everything as it is.

    Returns:
        The state of the run, and the steps of the checkpoints that were passed over.

    Raises:
        UserError: there are checkpoints, and none verifies; or a bucket does not answer.
    """
    directory = directory_of(config)
    with together(ranks):
        candidates = checkpoint.committed(directory)[::-1] if ranks.is_main else []
    (num_found,) = ranks.sum_int(len(candidates))
    named = _named(config)
    if not num_found and not named:
        return TrainState(), set()
    damaged: set[int] = set()
    for place in range(num_found or 1):
        # Rank 0's listing counts: in a bucket another rank may be shown another one.
        (step,) = ranks.sum_int(checkpoint.step_of(candidates[place]) if candidates else 0)
        candidate = checkpoint.path_of(directory, step) if num_found else named
        with _verified(candidate, Path(config.run.dir), ranks, log) as folder:
            if folder is not None:
                with together(ranks):
                    state = checkpoint.Meta.read(str(folder)).state
                    checkpoint.restore(folder, model, optimizer)
                log.say(f"resumed from {checkpoint.name_of(candidate)}")
                return state, damaged
        damaged.add(step)
    with said_once():
        raise UserError(
            f"{directory if num_found else named}: none of its {num_found or 1} checkpoints "
            "verifies; move them away to start from scratch"
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
        UserError: another job trains in this folder, or checkpoints cannot be written.
    """
    folder, directory = Path(config.run.dir), directory_of(config)
    descriptor = None
    held = 0
    with together(ranks):
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
    with together(ranks):
        if ranks.is_main:  # better now than after the first hours
            probe = storage.join(directory, f"probe{storage.SCRATCH_NAME}")
            storage.publish_text("", probe)
            storage.remove(probe)
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
