"""Dask and Ray behind one interface: tasks are sent, futures come back.

A cluster is used at an address, or started on this machine and ended again. Either way it is kept
quiet: its warnings and logs would reach a user who did not write the code they speak of. What is
done with the futures, and with tasks whose workers died, is the subject of `shards.engines`.
"""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import psutil

from shards import engines
from shards.errors import UserError, redact

CONNECT_S = 60
ATTEMPTS = 2
"""How often a task is tried whose worker dies each time."""
OBJECT_STORE_BYTES = 100 * 2**20
"""Of a Ray of our own, which would take a third of the machine's memory."""
RAY_TOKEN = secrets.token_hex(32)
"""What the processes of a Ray of our own show each other. It remembers the first of a process."""


@dataclass(frozen=True)
class Cluster:
    """A place where tasks are done."""

    submit: Callable[[Any], "Future[Any]"]
    slots: Callable[[], int]
    """How many tasks it can do at a time."""
    died: tuple[type[Exception], ...]
    """What the future of a task raises whose worker died in each of the `ATTEMPTS`."""


@contextlib.contextmanager
def dask(call: Callable[[Any], Any], num_workers: int, address: str | None) -> Iterator[Cluster]:
    """Tasks are done by Dask, as `call(task)`.

    Without an address, by `num_workers` processes of one thread that end with the block. Raises
    `UserError`.
    """
    with _explained("dask", "distributed", address), _no_warnings(), _no_interrupts():
        import dask as library
        import distributed
    settings = {
        "distributed.scheduler.allowed-failures": ATTEMPTS - 1,
        "distributed.scheduler.worker-saturation": 1.0,
        "distributed.admin.large-graph-warning-threshold": "1 TB",
    }
    stack = contextlib.ExitStack()
    with _quiet("distributed"), library.config.set(settings):
        try:
            with _explained("dask", "distributed", address), _no_warnings(), _no_interrupts():
                where: Any = address
                if address is None:
                    folder = tempfile.TemporaryDirectory(
                        prefix="pixloom-dask-", ignore_cleanup_errors=True
                    )
                    where = stack.enter_context(
                        distributed.LocalCluster(
                            n_workers=num_workers,
                            threads_per_worker=1,
                            dashboard_address=None,
                            local_directory=stack.enter_context(folder),
                            # It would stop to give tasks to workers that are above their part.
                            memory_limit=0,
                            silence_logs=logging.CRITICAL,
                        )
                    )
                client = stack.enter_context(
                    distributed.Client(where, timeout=CONNECT_S, set_as_default=False)
                )
                client.wait_for_workers(1, timeout=CONNECT_S)
            executor = client.get_executor(pure=False)
            yield Cluster(
                submit=lambda task: executor.submit(call, task),
                slots=lambda: sum(client.nthreads().values()),
                died=(distributed.KilledWorker,),
            )
        finally:
            with _no_warnings():
                stack.close()


@contextlib.contextmanager
def ray(call: Callable[[Any], Any], num_workers: int, address: str | None) -> Iterator[Cluster]:
    """Tasks are done by Ray, as `call(task)`.

    Without an address, by `num_workers` processes that end with the block. Raises `UserError`.
    """
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # noqa: PTH100
    environment = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": path,
    }
    if address is None:
        # It listens on all of this machine's addresses.
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": RAY_TOKEN}
    with _explained("ray", "ray", address), _no_warnings(), engines.environment(environment):
        import ray as library

    def work(task: Any) -> Any:
        return call(task)

    local: dict[str, Any] = {"address": address}
    before, started = _descendants(), set[psutil.Process]()
    stack = contextlib.ExitStack()
    try:
        with _explained("ray", "ray", address), _no_warnings(), engines.environment(environment):
            if address is None:
                folder = tempfile.TemporaryDirectory(
                    # Paths of sockets below it must be short.
                    prefix="pixloom-ray-", dir="/tmp", ignore_cleanup_errors=True
                )  # fmt: skip
                local = {
                    "address": "local",
                    "num_cpus": num_workers,
                    "num_gpus": 0,
                    "include_dashboard": False,
                    "object_store_memory": OBJECT_STORE_BYTES,
                    "_temp_dir": stack.enter_context(folder),
                }
            else:
                _check_answers(address)
            stack.enter_context(_quiet("ray"))
            stack.enter_context(_no_news_of_workers(library))
            stack.enter_context(_kept_signal_handler(signal.SIGTERM))
            stack.callback(_kill, started)
            stack.callback(library.shutdown, wait_for_processes=True)
            # Ray waits for its servers, but not for their workers.
            stack.callback(lambda: started.update(_descendants() - before))
            library.init(**local, log_to_driver=False, configure_logging=False)
            remote = library.remote(num_cpus=1, max_retries=ATTEMPTS - 1)(work)
        yield Cluster(
            submit=lambda task: remote.remote(task).future(),
            slots=lambda: int(library.cluster_resources().get("CPU", 0)),
            died=(
                library.exceptions.WorkerCrashedError,
                library.exceptions.OutOfMemoryError,
                library.exceptions.NodeDiedError,
            ),
        )
    finally:
        with _no_warnings():
            stack.close()


@contextlib.contextmanager
def _explained(engine: str, package: str, address: str | None) -> Iterator[None]:
    """Turns what goes wrong while a cluster is started into a `UserError`."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"--engine {engine}: the package {package} is not installed; "
            f'pip install "pixloom[{engine}]"'
        ) from error
    except Exception as error:
        where = f"--engine-address {address}" if address else f"--engine {engine}"
        raise UserError(redact(f"{where}: {engine} does not start: {_say(error)}")) from error


@contextlib.contextmanager
def lost_is_explained(engine: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns errors of a cluster, such as one that is gone, into a `UserError`."""
    try:
        yield
    except but:
        raise
    except Exception as error:
        raise UserError(redact(f"--engine {engine}: {_say(error)}")) from error


def _check_answers(address: str) -> None:
    """Raises OSError where there is nobody: Ray would try for many minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    with socket.create_connection((host.strip("[]"), int(port)), CONNECT_S):
        pass


def _say(error: BaseException) -> str:
    """The last lines of an error and of its first cause, for the lines above tell where it was."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    texts = [(str(one).strip() or repr(one)).splitlines()[-1][:300] for one in (error, first)]
    return " because: ".join(dict.fromkeys(texts))


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Ctrl-C is for this thread: threads started in the block never get it, nor their processes."""
    resource_tracker.ensure_running()  # which would let it through again in the first such thread
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _quiet(package: str) -> Iterator[None]:
    """Silences the loggers of an imported package."""
    names = [name for name in logging.root.manager.loggerDict if name.split(".")[0] == package]
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


@contextlib.contextmanager
def _no_news_of_workers(ray_library: Any) -> Iterator[None]:
    """Ray prints on stdout that a worker died, whatever it is told of logging."""
    module = ray_library._private.worker
    module._worker_logs_enabled, was = False, module._worker_logs_enabled
    try:
        yield
    finally:
        module._worker_logs_enabled = was


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


@contextlib.contextmanager
def _kept_signal_handler(number: int) -> Iterator[None]:
    """The handler at the block's end is the one at its beginning; not in other threads."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(number)
    try:
        yield
    finally:
        signal.signal(number, handler)
