"""Which checkpoint a run goes on from, and whether it may."""

import contextlib
from pathlib import Path

from pipeline import checkpoint
from pipeline.config import Config, differences, to_dict
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from shards.format import Manifest
from shards.storage import UserError


def check_resumable(config: Config, manifest: Manifest) -> None:
    """Refuses to go on with a run whose configuration or dataset is another one.

    Raises:
        UserError: says what differs.
    """
    found = checkpoint.committed(Path(config.run.dir) / "checkpoints")
    if config.run.resume == "never" and found:
        raise UserError(
            f"{config.run.dir}: has checkpoints, and run.resume = never; choose another run.dir, "
            "or run.resume = auto to go on"
        )
    if config.run.resume not in ("auto", "never"):
        found = [Path(config.run.resume)]
        problems = checkpoint.verify(found[0])
        if problems:
            raise UserError(f"run.resume: {problems[0]}")
    for path in reversed(found):
        with contextlib.suppress(UserError):  # a damaged state is passed over when loading, too
            meta = checkpoint.Meta.read(path)
            break
    else:
        return
    changed = differences(meta.config, to_dict(config))
    if changed:
        raise UserError(
            f"{path}: was saved under another configuration ({'; '.join(changed)}); "
            "set these back, or choose another run.dir"
        )
    if meta.data_digest != manifest.data_digest:
        raise UserError(
            f"{path}: was trained on another dataset (digest {meta.data_digest[:12]}, "
            f"{config.data.url} has {manifest.data_digest[:12]}); choose another run.dir"
        )


def find_checkpoint(config: Config, ranks: Ranks, log: RunLog) -> Path | None:
    """What to resume from. In this order:

    1. the checkpoint that run.resume names (it was verified before);
    2. the newest one of the run's folder that verifies: rank 0 hashes, the others follow;
    3. none: from scratch.
    """
    if config.run.resume not in ("auto", "never"):
        return Path(config.run.resume)
    directory = Path(config.run.dir) / "checkpoints"
    newest = checkpoint.newest_valid(directory, log.say) if ranks.is_main else None
    (step,) = ranks.sum_int(checkpoint.step_of(newest) if newest else 0)
    return checkpoint.path_of(directory, step) if step else None
