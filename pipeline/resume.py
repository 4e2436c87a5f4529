"""Which checkpoint a run goes on from, and whether it may."""

import fcntl
import os
import time
from pathlib import Path

from pipeline import checkpoint
from pipeline.config import Config, config_of, differences, to_dict
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from shards import storage
from shards.format import Manifest
from shards.storage import UserError

_LOCK_WAIT_S = 5.0


def check_resumable(config: Config, manifest: Manifest) -> None:
    """Refuses to go on with a run whose configuration or dataset is another one.

    Raises:
        UserError: says what differs.
    """
    run = Path(config.run.dir)
    with storage.explained(str(run)):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    if not os.access(run, os.W_OK):
        raise UserError(f"{run}: cannot be written to; choose another run.dir")
    found = checkpoint.committed(run / "checkpoints")
    if config.run.resume == "never" and found:
        raise UserError(
            f"{run}: has checkpoints, and run.resume = never; choose another run.dir, "
            "or run.resume = auto to go on"
        )
    if not found and config.run.resume not in ("auto", "never"):
        found = [Path(config.run.resume)]
        problems = checkpoint.verify(found[0])
        if problems:
            raise UserError(f"run.resume: {problems[0]}")
    intact = [path for path in found if not checkpoint.verify(path, [checkpoint.STATE_NAME])]
    if not intact:
        return
    meta = checkpoint.Meta.read(intact[-1])
    # Through `config_of`, so that keys younger than the checkpoint have their default.
    saved = to_dict(config_of(meta.config, str(intact[-1])))
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


def find_checkpoint(config: Config, ranks: Ranks, log: RunLog) -> Path | None:
    """What to resume from. In this order:

    1. the newest checkpoint of the run's folder that verifies: rank 0 hashes, the others follow;
    2. the one that run.resume names (it was verified before), for a folder without any;
    3. none: from scratch.

    Raises:
        UserError: there are checkpoints, and none verifies.
    """
    directory = Path(config.run.dir) / "checkpoints"
    found = len(checkpoint.committed(directory)) if ranks.is_main else 0
    newest = checkpoint.newest_valid(directory, log.say) if ranks.is_main else None
    step, found = ranks.sum_int(checkpoint.step_of(newest) if newest else 0, found)
    if step:
        return checkpoint.path_of(directory, step)
    if found:
        raise UserError(
            f"{directory}: none of its {found} checkpoints verifies; "
            "move them away to start from scratch"
        )
    return None if config.run.resume in ("auto", "never") else Path(config.run.resume)


def lock_run(folder: Path, ranks: Ranks) -> int | None:
    """Makes this job the folder's only one, until its first process ends; returns the lock.

    A POSIX record lock: gone with the process, however it ends, and not handed on to loader
    workers that outlive it. Waits a while for a job that is being killed.

    Raises:
        UserError: another job trains in this folder.
    """
    descriptor = None
    held = 0
    if ranks.is_main:
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        deadline_s = time.monotonic() + _LOCK_WAIT_S
        while not held:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = 1
            except OSError:
                if time.monotonic() > deadline_s:
                    break
                time.sleep(0.2)
    if not ranks.sum_int(held)[0]:
        raise UserError(f"{folder}: another job trains in this folder; end it, or choose another")
    return descriptor
