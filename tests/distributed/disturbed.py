"""Trains as `pipeline.train` does, with one thing going wrong where no test could time it.

    python -m tests.distributed.disturbed WHAT --config FILE ...

restore: rank 1 alone cannot load the checkpoint
step:    rank 1 alone meets a user's error in its second step
signal:  SIGTERM reaches every rank while the last checkpoint is being written
"""

import os
import signal
import sys
from typing import Any

from pipeline import checkpoint, train
from shards.storage import UserError


def fail(*words: object, **more: object) -> Any:
    raise UserError("this rank alone is out of luck")


def signalled(*words: Any, **more: Any) -> Any:
    meta: checkpoint.Meta = words[2]
    if meta.state.step == 8:
        os.kill(os.getpid(), signal.SIGTERM)
    return save(*words, **more)


save, train_step = checkpoint.save, train.train_step


def second_step_fails(run: train.Run, *words: Any) -> bool:
    return fail() if run.state.step else train_step(run, *words)


if __name__ == "__main__":
    what, rank = sys.argv[1], os.environ["RANK"]
    if what == "restore" and rank == "1":
        checkpoint.restore = fail
    if what == "step" and rank == "1":
        train.train_step = second_step_fails
    if what == "signal":
        checkpoint.save = signalled
    sys.exit(train.main(sys.argv[2:]))
