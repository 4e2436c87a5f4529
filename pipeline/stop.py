"""Asking a run to stop: a signal, or its time budget. The step is finished and saved first."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from types import FrameType

EXIT_REQUEUE = 75
"""Exit status after stopping on request: start the run again to go on (EX_TEMPFAIL)."""


class StopRequest:
    """Whether this process was asked to stop: by SIGTERM, SIGUSR1, run.max_time_s or `ask`."""

    def __init__(self, max_time_s: float) -> None:
        self._asked = False
        self._deadline_s = time.monotonic() + max_time_s if max_time_s else math.inf

    @property
    def requested(self) -> bool:
        return self._asked or time.monotonic() > self._deadline_s

    def ask(self) -> None:
        """Asks this process to stop; from any thread."""
        self._asked = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signals set the flag inside, and do what they did before outside."""
        before = {
            number: signal.signal(number, self._receive)
            for number in (signal.SIGTERM, signal.SIGUSR1)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
