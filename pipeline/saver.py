"""Saving beside the training: a step waits while what its rank owns is copied, for nothing else.

One thread a rank writes, over a process group of its own, and one save at a time. A save that
comes before the last one is done waits for it, and says so.
"""

import dataclasses
import os
import platform
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

from torch import Tensor

from pipeline import checkpoint, dcp
from pipeline.checkpoint import Meta
from pipeline.config import Config
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from pipeline.stop import StopRequest
from shards import storage
from shards.storage import SCRATCH_NAME, UserError

# A rank that dies is noticed at once, by its closed connection. This is for slow uploads.
_GROUP_TIMEOUT = timedelta(hours=6)
_WORTH_SAYING_S = 1.0


class Saver:
    """Saves the checkpoints of a run in the background, and prunes after each.

    Args:
        directory: where checkpoints go.
        stop: asked to stop the run when a save fails and checkpoint.on_error is `stop`.
    """

    def __init__(self, directory: str, config: Config, log: RunLog, stop: StopRequest) -> None:
        self.directory, self.log, self.stop = directory, log, stop
        self.config = config.checkpoint
        self.ranks = Ranks.of_run(_GROUP_TIMEOUT)
        self.blocked_s = 0.0
        """seconds that the training waited, over all saves"""
        self._scratch = scratch_of(Path(config.run.dir)) / f"rank-{self.ranks.rank}"
        self._stage = dcp.Stage()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._error: UserError | None = None

    def save(self, tensors: Mapping[str, Tensor], meta: Meta) -> None:
        """Begins a save, on all ranks alike; what happens to `tensors` afterwards changes nothing.

        A save that fails is told by a warning; nothing is committed then, and what was committed
        before stays.
        """
        start_s = time.perf_counter()
        self._wait(f"the checkpoint of step {meta.state.step}")
        chunks = self._stage.copy(dcp.owned(tensors, self.ranks.rank, self.ranks.world_size))
        # `state` goes on changing.
        meta = dataclasses.replace(meta, state=dataclasses.replace(meta.state))
        self._pending = self._thread.submit(self._write, chunks, meta)
        self.blocked_s += time.perf_counter() - start_s

    def finish(self) -> None:
        """Waits until the last save is done.

        Raises:
            UserError: it failed; on all ranks alike.
        """
        start_s = time.perf_counter()
        self._wait()
        self.blocked_s += time.perf_counter() - start_s
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Ends the thread, after the save that it is at."""
        self._thread.shutdown()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _wait(self, what: str = "") -> None:
        if self._pending is None:
            return
        start_s = time.perf_counter()
        self._pending.result()
        waited_s = time.perf_counter() - start_s
        if what and waited_s > _WORTH_SAYING_S:
            self.log.say(
                f"{what} waited {waited_s:.1f} s for the one before it to be written; "
                "raise checkpoint.every_steps, or save to a faster place"
            )

    def _write(self, chunks: Mapping[str, dcp.Chunk], meta: Meta) -> None:
        step = meta.state.step
        try:
            if storage.is_remote(self.directory):
                self._scratch.mkdir(parents=True, exist_ok=True)
            checkpoint.save(self.directory, chunks, meta, self.ranks, self._scratch)
            self._error = None
        except UserError as error:
            self._error = UserError(f"the checkpoint of step {step} could not be saved: {error}")
            if self.config.on_error == "stop":
                self.stop.ask()
            if self.ranks.is_main:
                self.log.warn(f"{self._error}; what was saved before is as it was")
        if self.ranks.is_main:
            self._clear(meta, failed=self._error is not None)

    def _clear(self, meta: Meta, *, failed: bool) -> None:
        """Not worth a failed save, let alone a failed run: the next save clears again."""
        step = meta.state.step
        try:
            if failed:
                checkpoint.remove(checkpoint.path_of(self.directory, step))
            else:
                checkpoint.prune(
                    self.directory, step, keep_last=self.config.keep_last,
                    keep_every=self.config.keep_every_steps, best_step=meta.state.best_step,
                )  # fmt: skip
        except UserError as error:
            if not failed:
                self.log.warn(f"older checkpoints could not be cleared: {error}")


def scratch_of(run: Path) -> Path:
    """This node's folder for files on their way to or from a bucket."""
    return run / SCRATCH_NAME / platform.node()


def clear_scratch(run: Path) -> None:
    """Removes what a killed job left on this node; for its first rank, before any other writes."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        shutil.rmtree(scratch_of(run), ignore_errors=True)
    if os.environ.get("RANK", "0") == "0":
        for left in run.glob(f".*{SCRATCH_NAME}"):
            left.unlink(missing_ok=True)
