"""Processes that answer requests, each over a pipe of its own, and hold no state.

PyTorch's DataLoader has queues that all workers share, with locks and threads, and asks them in
fixed turns. Here no worker waits for another, and the end of its pipe says at once that one died.
"""

import atexit
import contextlib
import itertools
import multiprocessing
import os
import select
import signal
import socket
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar, cast

import torch

from shards.storage import UserError

Q = TypeVar("Q")
A = TypeVar("A")

_LOOK_S = 5.0
"""how often a worker that nobody asks looks whether its parent still lives"""
_END_S = 5.0
"""what a worker has to end what it was asked for before it is killed"""

_IGNORED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Workers(Generic[Q, A]):
    """So many processes, which call `prepare` once, and `answer` for every request."""

    def __init__(
        self, answer: Callable[[Q], A], number: int, *, prepare: Callable[[], object]
    ) -> None:
        self._team: list[_Worker[Q, A]] = []
        self._poll = select.poll()
        try:
            for _ in range(number):
                self._team.append(_Worker(answer, prepare))
                self._poll.register(self._team[-1].pipe, select.POLLIN)
        except BaseException:
            self.close()
            raise
        self._by_descriptor = {worker.pipe.fileno(): worker for worker in self._team}

    def hang_up(self) -> None:
        """Takes and asks no more, in whatever thread: who waits for an answer gets an error. Each
        worker ends after what it is at."""
        for worker in self._team:
            worker.hang_up()

    def close(self) -> None:
        """Ends them; kills those that take seconds for what they are at."""
        self.hang_up()  # all of them before the first is waited for
        for worker in self._team:
            worker.end()

    def in_turn(self, requests: Iterator[Q], *, ahead: int) -> Iterator[A]:
        """Answers to all requests, in their order; `ahead` times the number of workers are asked
        for before the first of them is taken.

        Requests have to be small, some numbers: those that a worker has not come to yet lie in its
        pipe. So do answers that nobody has taken yet; with larger ones than about 100 kB a worker
        waits before it goes on.

        Raises:
            UserError: a worker was killed, or ended.
            RuntimeError: `answer` raised an error, and the message is its traceback; or no more
                files can be opened, which tensors in shared memory arrive as.
        """
        numbered = enumerate(requests)
        found: dict[int, A] = {}
        self._ask(itertools.islice(numbered, ahead * len(self._team)))
        for number in itertools.count():
            if not found and not any(worker.asked for worker in self._team):
                return
            found.update(self._answers(0 if number in found else None))
            while number not in found:
                found.update(self._answers(None))
            self._ask(itertools.islice(numbered, 1))
            yield found.pop(number)

    def _ask(self, numbered: Iterable[tuple[int, Q]]) -> None:
        """Asks whoever has least to do, the quickest of them: not in turns, because a worker whose
        core others use too would hold up the rest."""
        for number, request in numbered:
            min(self._team, key=lambda one: (len(one.asked), -one.answered)).ask(number, request)

    def _answers(self, timeout_ms: int | None) -> Iterator[tuple[int, A]]:
        """Those that have come, with their requests' numbers; waits for one."""
        for descriptor, _ in self._poll.poll(timeout_ms):
            yield self._by_descriptor[descriptor].answer()


@dataclass(frozen=True)
class _Failure:
    """An answer: there is none."""

    trace: str


class _Worker(Generic[Q, A]):
    def __init__(self, answer: Callable[[Q], A], prepare: Callable[[], object]) -> None:
        self.asked: deque[int] = deque()
        """numbers of the requests that it has not answered"""
        self.answered = 0
        self.pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=_serve, args=(theirs, self.pipe, answer, prepare), daemon=True
        )
        # A signal to the whole job may come before the worker has learnt to ignore it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # so that the pipe ends with the worker
        # Workers ignore the signal that ends other processes when this one's program does.
        atexit.register(self._process.kill)

    def ask(self, number: int, request: Q) -> None:
        self.asked.append(number)
        with contextlib.suppress(OSError):  # it died: `answer` says so
            self.pipe.send(request)

    def answer(self) -> tuple[int, A]:
        try:
            data = self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise UserError(self._died()) from None
        try:
            found = ForkingPickler.loads(data)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"a batch of a loader worker cannot be received ({error}): each that is kept takes "
                "an open file, of which `ulimit -n` allows so many; keep copies of what you need"
            ) from error
        if isinstance(found, _Failure):
            raise RuntimeError(f"in a loader worker:\n{found.trace}")
        self.answered += 1
        return self.asked.popleft(), cast(A, found)

    def _died(self) -> str:
        self._process.join(_END_S)
        status = self._process.exitcode
        if status is None or status >= 0:
            return f"a loader worker ended (exit status {status})"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"{-status}"
        hint = ", as happens when memory runs out: fewer workers need less of it"
        return f"a loader worker was killed ({name}){hint if name == 'SIGKILL' else ''}"

    def hang_up(self) -> None:
        # Not only closed: the pipe would go on where another process has inherited this end of it.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self.pipe.close()
        self._process.join(_END_S)
        self._process.kill()
        self._process.join()
        atexit.unregister(self._process.kill)


def _serve(
    pipe: Connection,
    other_end: Connection,
    answer: Callable[[Any], Any],
    prepare: Callable[[], object],
) -> None:
    other_end.close()
    # SIGTERM to a whole job must reach the step's end: the parent stops, and its workers with it.
    # Else a worker dies of the signal, and the run with it, before anything is saved.
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    torch.set_num_threads(1)  # of one operation: all cores have a worker
    prepare()
    with contextlib.suppress(EOFError, OSError):  # the parent wants no more, or is gone
        for request in _received(pipe):
            try:
                data = ForkingPickler.dumps(answer(request))
            except Exception:
                data = ForkingPickler.dumps(_Failure(traceback.format_exc()))
            pipe.send_bytes(data)


def _received(pipe: Connection) -> Iterator[Any]:
    """Requests, until there is nobody to make one."""
    parent = os.getppid()
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    while os.getppid() == parent:
        if poll.poll(_LOOK_S * 1000):
            yield pipe.recv()
