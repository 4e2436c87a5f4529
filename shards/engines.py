"""Where tasks run: one function that runs picklable tasks on local processes.

Each worker has a pipe of its own and one task at a time, so a worker that dies takes down exactly
one known task: that task is run again on a fresh process, and named when it keeps killing them.
What a task does is its caller's subject.
"""

import argparse
import collections
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from typing import Any, Generic, TypeVar, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shards.storage import UserError

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_ATTEMPTS = 3
PLAIN_PROGRESS_EVERY_S = 5.0

_report_note: Callable[[str], None] | None = None


def note(text: str) -> None:
    """Says what a task is working on, for the error message should it kill its worker."""
    if _report_note is not None:
        _report_note(text)


def run(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: int,
    describe: Callable[[Task], str] = repr,
) -> Generator[tuple[Task, Result], None, None]:
    """Yields `(task, function(task))` as tasks complete, in any order.

    `function`, tasks and results must pickle. `workers` spawned processes share the work; with 0
    it happens in this process. A task whose worker dies is tried up to `MAX_ATTEMPTS` times. An
    exception inside `function` is raised here. When the iteration ends, for whatever reason, so
    do the workers; who may leave it early closes it. When this process is killed, they end
    themselves.

    Raises `UserError` naming a task, and what it noted last, that killed every worker it had.
    """
    if workers == 0:
        for task in tasks:
            yield task, function(task)
        return
    waiting = iter(tasks)
    again: collections.deque[_Attempt[Task]] = collections.deque()
    busy: dict[Connection, tuple[_Worker, _Attempt[Task]]] = {}
    idle: list[_Worker] = []

    def next_attempt() -> _Attempt[Task] | None:
        if again:
            return again.popleft()
        return next((_Attempt(task) for task in waiting), None)

    try:
        while True:
            while len(busy) < workers and (attempt := next_attempt()) is not None:
                worker = idle.pop() if idle else _Worker.start(function)
                busy[worker.connection] = worker, attempt
                # A worker that died while idle: its pipe reads as ended below.
                with contextlib.suppress(OSError):
                    worker.connection.send(attempt.task)
            if not busy:
                return
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                worker, attempt = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    del busy[connection]
                    attempt.deaths.append(worker.end())
                    if len(attempt.deaths) >= MAX_ATTEMPTS:
                        raise UserError(attempt.epitaph(describe)) from None
                    again.append(attempt)
                    continue
                if kind == "note":
                    attempt.note = value
                    continue
                del busy[connection]
                idle.append(worker)
                if kind == "error":
                    raise value
                yield attempt.task, value
    finally:
        for worker in (*idle, *(worker for worker, _ in busy.values())):
            worker.end()


def progress(
    results: Iterable[Result],
    total: int,
    unit: str,
    count: Callable[[Result], int],
    cost: Callable[[Result], tuple[int, int]] | None = None,
) -> Generator[Result, None, None]:
    """Passes `results` through and shows on stderr how many of `total` units are done, how fast,
    and how much time the others will take.

    A bar on a terminal; elsewhere a line every few seconds, and none for quick work. `cost` tells
    the bytes of a result, and how many files it skipped.
    """
    with _progress_bar(total, unit) if sys.stderr.isatty() else contextlib.nullcontext() as bar:
        start = shown = time.monotonic()
        done = num_bytes = num_skips = 0
        for result in results:
            done += count(result)
            if cost is not None:
                more_bytes, more_skips = cost(result)
                num_bytes += more_bytes
                num_skips += more_skips
            now = time.monotonic()
            rate = done / max(now - start, 1e-9)
            facts = [f"{rate:.0f} a second"]
            if cost is not None:
                facts.append(f"{num_bytes / max(now - start, 1e-9) / 1e6:.1f} MB/s")
            if num_skips:
                facts.append(f"{num_skips} skipped")
            if bar is not None:
                bar(done, ", ".join(facts))
            elif now - shown >= PLAIN_PROGRESS_EVERY_S:
                shown = now
                if done:
                    facts.append(f"{(total - done) / rate:.0f} s left")
                print(f"{unit}: {done} of {total}, {', '.join(facts)}", file=sys.stderr, flush=True)
            yield result


def add_workers_option(parser: argparse.ArgumentParser) -> None:
    """Adds `--workers`, with the number of processors this process may use as its default."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    parser.add_argument(
        "--workers",
        type=_num_workers,
        default=available or os.cpu_count() or 1,
        metavar="N",
        help="processes to work with; 0 works in this one; never changes a byte of the result "
        "(default here: %(default)s)",
    )


def _num_workers(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r}: choose 0 to 1024 processes")
    return int(text)


@dataclass
class _Attempt(Generic[Task]):
    """A task on its way through workers, and how the ones it had so far ended."""

    task: Task
    deaths: list[str] = field(default_factory=list)
    note: str = ""

    def epitaph(self, describe: Callable[[Task], str]) -> str:
        at = f", the last time at {self.note}" if self.note else ""
        return (
            f"{describe(self.task)}: its worker process died {len(self.deaths)} times "
            f"({self.deaths[-1]}){at}; remove what it was working on, or give it more memory"
        )


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection

    @classmethod
    def start(cls, function: Callable[[Any], Any]) -> "_Worker":
        # Spawned, not forked: a fork copies locks that other threads hold.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        return cls(process, ours)

    def end(self) -> str:
        """Stops the process where it still runs; returns how it ended."""
        self.connection.close()
        self.process.join(timeout=0.2)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _serve(function: Callable[[Any], Any], connection: Connection) -> None:
    """A worker's whole life: one task after another until the pipe ends."""
    global _report_note
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends us.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _report_note = lambda text: connection.send(("note", text))  # noqa: E731
    with contextlib.suppress(EOFError, OSError):
        while True:
            task = connection.recv()
            try:
                reply = ("result", function(task))
            except Exception as error:
                reply = ("error", _portable(error))
            connection.send(reply)


def _end_with_parent() -> None:
    # A driver that is killed cannot end its workers, and a worker in the middle of a task would
    # go on to publish files beside those of the next run.
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def _portable(error: Exception) -> Exception:
    """The error, with the worker's traceback as a note, in a form that survives pickling."""
    if not isinstance(error, UserError):
        error.add_note("In the worker process:\n" + traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (our own bytes)
    except Exception:
        return RuntimeError(traceback.format_exc())
    return error


@contextlib.contextmanager
def _progress_bar(total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(unit, total=total, facts="")
        yield lambda done, facts: bar.update(task, completed=done, facts=facts)
