"""Saving beside the training: a step waits while what its rank owns is copied, for nothing else.

One thread a rank writes, over a process group of its own, and one save at a time. A save that
comes before the last one is done waits for it, and says so.
"""

import contextlib
import dataclasses
import os
import platform
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from torch import Tensor

from pipeline import checkpoint, dcp
from pipeline.checkpoint import Meta
from pipeline.config import Config
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from pipeline.stop import StopRequest
from shards.format import FormatError
from shards.storage import SCRATCH_NAME, UserError

GROUP_TIMEOUT = timedelta(hours=2)
"""Of the saver's process group: how long ranks may wait for the slowest one's upload."""

_WORTH_SAYING_S = 1.0


class Saver:
    """Saves the checkpoints of a run in the background, and prunes after each.

    A context manager: it ends when the last save has ended. When the block failed as a whole, by
    what is no `UserError`, other ranks may never answer, and it waits for nothing.

    Args:
        ranks: over a process group that nobody else uses.
        stop: asked to stop the run when a save fails and checkpoint.on_error is `stop`.
        damaged: steps whose checkpoints do not verify; they count for nothing when pruning.
        tensors: of the shapes that it will save; memory for them is made ready.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        log: RunLog,
        stop: StopRequest,
        damaged: set[int],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.ranks, self.log, self.stop = ranks, log, stop
        self.directory = checkpoint.directory_in(Path(config.run.dir), config.checkpoint.url)
        self.config, self.damaged = config.checkpoint, damaged
        self._scratch = scratch_of(Path(config.run.dir)) / f"rank-{ranks.rank}"
        self._stage = dcp.Stage()
        self._stage.reserve(self._owned(tensors).values())
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, tensors: Mapping[str, Tensor], meta: Meta) -> None:
        """Begins a save, on all ranks alike; what happens to `tensors` afterwards changes nothing.

        A save that fails is told by a warning; nothing is committed then, and what was committed
        before stays.
        """
        start_s = time.perf_counter()
        self._wait()
        waited_s = time.perf_counter() - start_s
        if waited_s > _WORTH_SAYING_S:
            self.log.say(
                f"the checkpoint of step {meta.state.step} waited {waited_s:.1f} s for the one "
                "before it; raise checkpoint.every_steps, or save to a faster place"
            )
        chunks = self._stage.copy(self._owned(tensors))
        # `state` goes on changing.
        meta = dataclasses.replace(meta, state=dataclasses.replace(meta.state))
        # A daemon: a thread that waits for a rank that is gone does not keep the process.
        self._thread = threading.Thread(target=self._write, args=(chunks, meta), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until the last save is done.

        Raises:
            UserError: it failed; on all ranks alike.
        """
        self._wait()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, UserError | FormatError | SystemExit):
            self._wait()
            with contextlib.suppress(OSError):  # other ranks may still be at it
                for folder in self._scratch.parents[:2]:
                    folder.rmdir()

    def _owned(self, tensors: Mapping[str, Tensor]) -> dict[str, dcp.Chunk]:
        return dcp.owned(tensors, self.ranks.rank, self.ranks.world_size)

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None and not isinstance(self._error, UserError):
            raise self._error

    def _write(self, chunks: Mapping[str, dcp.Chunk], meta: Meta) -> None:
        step = meta.state.step
        try:
            checkpoint.save(self.directory, chunks, meta, self.ranks, self._scratch)
            self._error = None
            self.damaged.discard(step)
        except UserError as error:
            self._error = UserError(f"the checkpoint of step {step} could not be saved: {error}")
            if self.config.on_error == "stop":
                self.stop.ask()
            if self.ranks.is_main:
                self.log.warn(f"{self._error}; what was saved before is as it was")
        except Exception as error:
            self._error = error  # a rank is gone: the training meets the same, or raises this
            return
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)
        if self.ranks.is_main:
            self._clear(step, failed=self._error is not None)

    def _clear(self, step: int, *, failed: bool) -> None:
        """Not worth a failed save, let alone a failed run: the next save clears again."""
        try:
            if failed:
                checkpoint.remove(checkpoint.path_of(self.directory, step))
            else:
                checkpoint.prune(
                    self.directory, step, keep_last=self.config.keep_last,
                    keep_every=self.config.keep_every_steps, damaged=self.damaged,
                )  # fmt: skip
        except (UserError, OSError) as error:
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
