"""Where tasks run: one function that runs picklable tasks on local processes, Dask or Ray.

Each local worker has a pipe of its own and one task at a time, so a worker that dies takes down
exactly one known task: that task is run again on a fresh process, and named when it keeps killing
them, with the record that it was at. What a task does is its caller's subject.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field, replace
from multiprocessing import forkserver, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from shards.storage import UserError

if TYPE_CHECKING:
    from shards import clusters

Task = TypeVar("Task")
Result = TypeVar("Result")

MAX_ATTEMPTS = 3
PLAIN_PROGRESS_EVERY_S = 5.0
DEFAULT_TIMEOUT_S = 600.0
SLOTS_EVERY_S = 0.5
ENGINES = ("local", "dask", "ray")
NOTE_BYTES = 2**13
TUNABLES = (
    "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=67108864:"
    "glibc.malloc.hugetlb=1"
)
"""Of workers, for glibc: memory that was freed is kept for the next image, in huge pages; to get it
anew, page by page, takes a fifth of the time of packing screenshots."""
PRELOADED = ("shards.foreign", "shards.layouts", "shards.plan")
"""What workers import, once, in the process that they are forks of; but for modules that may be the
main one, of which Python would warn."""

_on_note: Callable[[str], None] | None = None


@dataclass
class Crew:
    """Processes, and a cluster, that a `run` has started and the next one finds."""

    idle: "list[_Worker]" = field(default_factory=list)
    cluster: "clusters.Cluster | None" = None
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    """Ends the cluster."""


@dataclass(frozen=True)
class Workers:
    """Who does the work, and within which limits."""

    count: int
    """Processes; 0: the calling one. Of a cluster at an address, its own are used instead."""
    engine: str = "local"
    address: str | None = None
    timeout_s: float | None = None
    """Between two notes of a task; a worker that stays silent for longer is killed."""
    memory_bytes: int | None = None
    """What a task may take in its worker, beside the program itself."""
    crew: Crew | None = field(default=None, compare=False, repr=False)
    """See `kept`."""


@contextlib.contextmanager
def kept(workers: Workers) -> Iterator[Workers]:
    """Within the block, each `run` with what this yields goes on with the processes of the one
    before it. They end with the block."""
    with contextlib.ExitStack() as stack:
        crew = Crew()
        stack.callback(_dismiss, crew.idle)
        if workers.engine == "local" and workers.count:
            _start_server()
        stack.enter_context(crew.stack)
        yield replace(workers, crew=crew)


def note(text: str) -> None:
    """Says which record a task is at: named, should it kill its worker or take too long.

    An empty text says that it is at none; the time until the next note is not limited then.
    """
    if _on_note is not None:
        _on_note(text)


def run(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: Workers | int,
    describe: Callable[[Task], str] = repr,
    without: Callable[[Task, str], Task | None] | None = None,
) -> Generator[tuple[Task, Result], None, None]:
    """Yields `(task, function(task))` as tasks complete, in any order.

    `function`, a module's, tasks and results must pickle. Processes, `workers` of them, share the
    work; with 0 it happens in this process. A task whose worker dies, stays silent for too long or
    runs out of memory is tried up to `MAX_ATTEMPTS` times. An exception inside `function` is raised
    here. When the iteration ends, for whatever reason, so do the workers, but for those that are at
    no task and are `kept`; who may leave it early closes it. When this process is killed, they end
    themselves. What a cluster at an address has begun is waited for.

    `without(task, record)` is the task without a record that it noted, or None where it cannot do
    without it: it takes the place of a task that failed at this record in every attempt.

    Raises `UserError` naming a task, and what it noted last, that failed in every attempt.
    """
    if isinstance(workers, int):
        workers = Workers(workers)
    if workers.count == 0:
        return ((task, function(task)) for task in tasks)
    return _run(function, tasks, workers, describe, without)


def _run(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: Workers,
    describe: Callable[[Task], str],
    without: Callable[[Task, str], Task | None] | None,
) -> Generator[tuple[Task, Result], None, None]:
    with kept(workers) if workers.crew is None else contextlib.nullcontext(workers) as now:
        crew = now.crew
        assert crew is not None
        if workers.engine != "local":
            failed: list[Task] = []
            yield from _run_on_cluster(function, tasks, now, crew, failed)
            # Nobody there can say at which record it was. A local worker can.
            tasks, now = failed, replace(now, count=1)
        yield from _run_locally(function, tasks, now, crew.idle, describe, without)


def _run_locally(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: Workers,
    idle: "list[_Worker]",
    describe: Callable[[Task], str],
    without: Callable[[Task, str], Task | None] | None,
) -> Generator[tuple[Task, Result], None, None]:
    waiting = iter(tasks)
    again: collections.deque[_Attempts[Task]] = collections.deque()
    busy: dict[Connection, tuple[_Worker, _Attempts[Task]]] = {}

    def next_task() -> _Attempts[Task] | None:
        if again:
            return again.popleft()
        return next((_Attempts(task) for task in waiting), None)

    try:
        while True:
            while len(busy) < workers.count and (attempts := next_task()) is not None:
                worker = idle.pop() if idle else _Worker.start(workers)
                busy[worker.connection] = worker, attempts
                worker.forget_note()
                # A worker that died while idle: its pipe reads as ended below.
                with contextlib.suppress(OSError):
                    worker.connection.send((function, attempts.task))
            if not busy:
                return
            for ready in wait(list(busy)):
                connection = cast(Connection, ready)
                worker, attempts = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    kind, value = "death", None
                del busy[connection]
                if kind in ("death", "out of memory"):
                    end = worker.end()
                    attempts.notes.append(worker.note)
                    attempts.ends.append(end if kind == "death" else kind)
                    again.append(attempts.next(describe, without))
                    continue
                idle.append(worker)
                if kind == "error":
                    raise value
                yield attempts.task, value
    finally:
        for worker, _ in busy.values():
            worker.end()


def _run_on_cluster(
    function: Callable[[Task], Result],
    tasks: Iterable[Task],
    workers: Workers,
    crew: Crew,
    failed: list[Task],
) -> Generator[tuple[Task, Result], None, None]:
    """Appends to `failed` what each worker died of that tried it."""
    waiting = iter(tasks)
    first = list(itertools.islice(waiting, 1))
    if not first:
        return
    waiting = itertools.chain(first, waiting)
    from shards import clusters  # here, for each local worker would pay for what it imports

    if crew.cluster is None:
        start = clusters.dask if workers.engine == "dask" else clusters.ray
        call = functools.partial(_call, workers.timeout_s)
        crew.cluster = crew.stack.enter_context(start(call, workers.count, workers.address))
    cluster = crew.cluster
    running: dict[futures.Future[tuple[str, Any]], Task] = {}
    try:
        while True:
            with clusters.lost_is_explained(workers.engine):
                num_free = max(1, cluster.slots()) - len(running)
                for task in itertools.islice(waiting, max(0, num_free)):
                    running[cluster.submit((function, task))] = task
            if not running:
                return
            # Now and then also to see whether there are more workers by now.
            done, _ = futures.wait(running, SLOTS_EVERY_S, futures.FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                try:
                    with clusters.lost_is_explained(workers.engine, cluster.died):
                        kind, value = future.result()
                except cluster.died:
                    failed.append(task)
                    continue
                if kind == "error":
                    raise value
                if kind == "out of memory":
                    failed.append(task)
                else:
                    yield task, value
    finally:
        if running:
            if workers.address is not None:
                futures.wait(running)
            else:
                # What runs there is ended with it, as a local worker's task is.
                crew.cluster = None
                crew.stack.close()


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


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--workers`, and where the processes are and what they may take: see `chosen`."""
    add_workers_option(parser)
    add = parser.add_argument
    add(
        "--engine",
        choices=ENGINES,
        default="local",
        help="who runs the processes; dask and ray start --workers of them on this machine, and "
        "end them again, unless they are given an address (default: %(default)s)",
    )
    add(
        "--engine-address",
        metavar="HOST:PORT",
        help="use all workers of a running cluster: tcp://HOST:PORT of a Dask scheduler (workers "
        "of one thread), HOST:PORT of a Ray head. pixloom must be installed there, and SOURCE and "
        "OUT be reachable by the same names from every worker",
    )
    add(
        "--task-timeout",
        type=_seconds,
        default=DEFAULT_TIMEOUT_S,
        metavar="SECONDS",
        help="a process that is busy with one sample for longer is killed (default: %(default)g)",
    )
    add(
        "--worker-memory",
        type=_megabytes,
        metavar="MB",
        help="most memory for the samples in a process, beside what the program takes; of local "
        "processes on Linux (default: no limit)",
    )


def chosen(args: argparse.Namespace) -> Workers:
    """What `add_engine_options` was given. Raises `UserError` for what does not go together."""
    if args.engine != "local" and args.workers == 0:
        raise UserError(f"--workers 0: --engine {args.engine} needs at least one process")
    if args.engine == "local" and args.engine_address is not None:
        raise UserError(f"--engine-address {args.engine_address}: add --engine dask or ray")
    if args.worker_memory is not None and (args.engine != "local" or args.workers == 0):
        raise UserError(
            "--worker-memory limits the processes of --engine local; "
            f"with --engine {args.engine} --workers {args.workers} there are none"
        )
    return Workers(
        args.workers,
        args.engine,
        args.engine_address,
        args.task_timeout,
        args.worker_memory * 10**6 if args.worker_memory is not None else None,
    )


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}: write seconds, as in 60")
    return value


def _megabytes(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 10**9:
        raise argparse.ArgumentTypeError(f"{text!r}: write a number of megabytes, as in 500")
    return int(text)


@dataclass
class _Attempts(Generic[Task]):
    """A task on its way through workers: what it noted last in each, and how that one ended."""

    task: Task
    notes: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def next(
        self,
        describe: Callable[[Task], str],
        without: Callable[[Task, str], Task | None] | None,
    ) -> "_Attempts[Task]":
        """What to try after a failure. Raises `UserError` when there is nothing left to try."""
        if len(self.ends) < MAX_ATTEMPTS:
            return self
        at = f", the last time at {self.notes[-1]!a}" if self.notes[-1] else ""
        text = (
            f"{describe(self.task)}: its worker process died {len(self.ends)} times "
            f"({self.ends[-1]}){at}"
        )
        if without is not None and len(set(self.notes)) == 1:
            rest = without(self.task, self.notes[-1])
            if rest is not None:
                print(f"{text}; left out", file=sys.stderr, flush=True)
                return _Attempts(rest)
        raise UserError(f"{text}; remove what it was working on, or give it more memory")


@dataclass(frozen=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    shared: Any
    """Memory where the process leaves its notes: a message each would keep this one busy."""
    timeout_s: float | None

    @classmethod
    def start(cls, limits: Workers) -> "_Worker":
        _start_server()
        try:
            return cls._start("forkserver", limits)
        except OSError:
            # There is no server: the path of its socket, in TMPDIR, may be too long for one.
            return cls._start("spawn", limits)

    @classmethod
    def _start(cls, method: str, limits: Workers) -> "_Worker":
        # No forks of this process: they would copy locks that other threads hold.
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        shared = context.RawArray("c", NOTE_BYTES)
        given = theirs, shared, replace(limits, crew=None), dict(os.environ)
        process = context.Process(target=_serve, args=given, daemon=True)
        with _tuned():
            process.start()
        theirs.close()
        return cls(process, ours, shared, limits.timeout_s)

    @property
    def note(self) -> str:
        """What the process noted last."""
        return os.fsdecode(self.shared.value)

    def forget_note(self) -> None:
        self.shared.value = b""

    def end(self) -> str:
        """Stops the process where it still runs; returns how it ended."""
        self.connection.close()
        self.process.join(timeout=0.2)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGALRM:
            return f"silent for {self.timeout_s:g} s"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _dismiss(idle: "list[_Worker]") -> None:
    for worker in idle:
        worker.process.kill()  # at no task, it has nothing to lose by it
        worker.end()


def _serve(
    connection: Connection, shared: Any, limits: Workers, environment: dict[str, str]
) -> None:
    """A worker's whole life: one task after another until the pipe ends."""
    global _on_note
    os.environ.clear()  # It is that of the server's start.
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, which ends us.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if limits.memory_bytes is not None:
        _limit_memory(limits.memory_bytes)

    def report(text: str) -> None:
        shared.value = os.fsencode(text)[: NOTE_BYTES - 1]
        _set_alarm(limits.timeout_s if text else None)

    _on_note = report
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(_reply(*connection.recv()))


def _call(timeout_s: float | None, work: tuple[Callable[[Task], Any], Task]) -> tuple[str, Any]:
    """Does one task in a worker of a cluster."""
    global _on_note
    _on_note = lambda text: _set_alarm(timeout_s if text else None)  # noqa: E731
    return _reply(*work)


def _reply(function: Callable[[Task], Any], task: Task) -> tuple[str, Any]:
    try:
        return "result", function(task)
    except Exception as error:
        # What has a record's name to say makes it its cause.
        if isinstance(error, MemoryError) or isinstance(error.__cause__, MemoryError):
            return "out of memory", None
        return "error", _portable(error)
    finally:
        _set_alarm(None)


def _set_alarm(seconds: float | None) -> None:
    # The kernel's, whose default is to end the process: a decoder in an endless loop may never
    # give Python's own threads and handlers a turn.
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)


def _start_server() -> None:
    """Starts the process that workers are forks of, if there is none: it is ready when they are
    needed. It ends with this one."""
    forkserver.set_forkserver_preload(list(PRELOADED))
    with _tuned(), contextlib.suppress(OSError):
        forkserver.ensure_running()


@contextlib.contextmanager
def environment(added: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started in the block have."""
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _tuned() -> contextlib.AbstractContextManager[None]:
    """Processes that are started within the block have `TUNABLES`, the user's own come after them,
    and so prevail; use one thread; and import this very package, and nothing from the folder they
    are started in."""
    users, path = os.environ.get("GLIBC_TUNABLES"), os.environ.get("PYTHONPATH")
    here = str(Path(__file__).absolute().parents[1])  # it may not be the one that is installed
    added = {
        "GLIBC_TUNABLES": f"{TUNABLES}:{users}" if users else TUNABLES,
        "PYTHONPATH": f"{here}{os.pathsep}{path}" if path else here,
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return environment(added)


def _limit_memory(num_bytes: int) -> None:
    """From here on this process may allocate so much more; where Linux counts it."""
    with contextlib.suppress(FileNotFoundError):
        status = Path("/proc/self/status").read_text()
        [used] = [line.split()[1] for line in status.splitlines() if line.startswith("VmData:")]
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (int(used) * 1024 + num_bytes, hard))


def _end_with_parent() -> None:
    # A driver that is killed cannot end its workers, and a worker in the middle of a task would
    # go on to publish files beside those of the next run.
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        # Where the socket of our own parent lies: who is killed leaves it behind.
        shutil.rmtree(util.get_temp_dir(), ignore_errors=True)
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
    # Imported here, for each worker process would pay for it.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )  # fmt: skip

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
