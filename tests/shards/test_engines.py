"""One contract for all engines, and what only local processes do."""

import argparse
import importlib.util
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from shards import clusters, engines, pack
from shards.engines import Workers
from shards.storage import UserError

REPOSITORY = Path(__file__).resolve().parents[2]

# Workers import a task's module by name; this file, which pytest imports from its path, has none.
TASKS = """
import os, signal, sys, time
import psutil
from pathlib import Path
from shards import engines
from shards.storage import UserError

def square(task):
    return task * task

def die_once(task):
    marker = Path(task)
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name

def die_at_three(task):
    engines.note(f"record {task}")
    if task == 3:
        os._exit(7)
    return task

def work_through(records):
    # Each of them may be poison: its name says of which kind.
    done = []
    for record in records:
        engines.note(record)
        if record == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if record == "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
            while True:
                signal.pause()
        if record == "eat":
            engines.eaten = [bytes(2**20) for _ in range(2**20)]
        done.append(record)
    engines.note("")
    time.sleep(0.5)
    return done

def sleep_and_touch(path):
    time.sleep(0.1)
    Path(path).touch()

def refuse(task):
    raise UserError(f"task {task} is refused")

def divide(task):
    return 1 // task

class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def fail_unpicklably(task):
    raise Unpicklable(1, 2)

def report_environment(name):
    return os.environ.get(name)

def kill_server(task):
    parent = psutil.Process().parent()
    if "forkserver" not in " ".join(parent.cmdline()):
        return "no server"
    parent.kill()
    while os.getppid() == parent.pid:
        time.sleep(0.01)
    return task

def report_and_wait(folder):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    signal.pause()

def do(task):
    folder, what = task
    if what == "refuse":
        while not list(Path(folder).glob("*.pid")):
            time.sleep(0.01)
        raise UserError(f"{what!r} is refused")
    if what == "die once" and not (Path(folder) / "died").exists():
        (Path(folder) / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "wait":
        report_and_wait(folder)
    return len(what) ** 2 if what == "square" else len(what)
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    name = f"engine_tasks_{os.getpid()}"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{name}.py").write_text(TASKS)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    sys.modules.pop(name, None)
    yield __import__(name)
    sys.modules.pop(name, None)


def need(engine: str) -> None:
    """Where an engine is not installed, its tests are skipped; never in continuous integration."""
    # Not by the name `distributed`: a folder of tests has it too.
    if engine != "local" and importlib.util.find_spec(engine) is None and not os.environ.get("CI"):
        pytest.skip(f"{engine} is not installed")


@pytest.fixture(params=engines.ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    need(request.param)
    return str(request.param)


def test_a_killed_worker_is_replaced_and_an_error_ends_all_of_them(  # type: ignore[no-untyped-def]
    tasks, engine: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _descendants()
    work = [(str(tmp_path), what) for what in ("square", "square", "die once", "wait", "refuse")]
    done = []

    def run_all() -> None:
        for task, result in engines.run(tasks.do, work, Workers(2, engine)):
            done.append((task[1], result))

    with pytest.raises(UserError, match=r"^'refuse' is refused$"):
        run_all()
    assert sorted(done) == [("die once", 8), ("square", 36), ("square", 36)]
    assert (tmp_path / "died").exists()
    waiting = {int(path.stem) for path in tmp_path.glob("*.pid")}
    assert waiting
    _wait_until(lambda: not any(map(_runs, waiting)), limit_s=1)
    assert _descendants() == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert capfd.readouterr() == ("", "")


def test_a_record_that_always_ends_its_worker_is_named(  # type: ignore[no-untyped-def]
    tasks, engine: str, capfd: pytest.CaptureFixture[str]
) -> None:
    poison, cause = ("hang", "silent for 0.4 s") if engine == "dask" else ("kill", ".* SIGKILL")
    work = [["b", poison, "c"]]
    with pytest.raises(UserError, match=rf"^shard \['b'.* 3 times \({cause}\).* at '{poison}'"):
        list(
            engines.run(
                tasks.work_through,
                work,
                Workers(1, engine, timeout_s=0.4),
                lambda task: f"shard {task}",
            )
        )
    assert capfd.readouterr() == ("", "")


def test_the_bytes_do_not_depend_on_the_engine(
    engine: str,
    make_pairs: Callable[..., Path],
    hash_tree: Callable[[Path], dict[str, str]],
    tmp_path: Path,
) -> None:
    raw = make_pairs(12)
    options = ["--shard-samples", "4", "--size", "20x12", "--encode", "webp", "--kind", "images"]
    assert pack.main([str(raw), str(tmp_path / "0"), *options, "--workers", "0"]) == 0
    expected = hash_tree(tmp_path / "0")
    # Names that hold where this process is mean nothing elsewhere.
    words = [raw.name, "out", *options, "--engine", engine, "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "shards.pack", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    noise = [line for line in done.stderr.splitlines() if not re.match(r"(scanned|packed): ", line)]
    assert (done.returncode, noise) == (0, [])
    assert done.stdout.splitlines()[0].startswith("train: ")
    assert hash_tree(tmp_path / "out") == expected


def test_poisonous_records_are_left_out_and_the_rest_is_done(  # type: ignore[no-untyped-def]
    tasks, capfd: pytest.CaptureFixture[str]
) -> None:
    def without(task: list[str], record: str) -> list[str] | None:
        return [one for one in task if one != record] if record in task else None

    work = [["a", "kill", "b"], ["c", "d"], ["hang"], ["e", "eat", "kill"]]
    # The last pause of a task is longer than the time that a record has.
    workers = Workers(2, timeout_s=0.4, memory_bytes=50 * 2**20)
    run = engines.run(tasks.work_through, work, workers, lambda task: f"shard {task}", without)
    assert sorted(result for _, result in run) == [[], ["a", "b"], ["c", "d"], ["e"]]
    error = capfd.readouterr().err
    for poison, cause, count in [
        ("kill", "killed by SIGKILL", 2),
        ("hang", "silent for 0.4 s", 1),
        ("eat", "out of memory", 1),
    ]:
        said = f"died 3 times ({cause}), the last time at '{poison}'; left out\n"
        assert error.count(said) == count


def test_who_leaves_early_closes(tasks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    before = _descendants()
    work = [(str(tmp_path), what) for what in ("wait", "square", "square")]
    with closing(engines.run(tasks.do, work, 2)) as results:
        assert next(results)[1] == 36
    assert _descendants() == before


def test_a_cluster_that_is_there_already(tasks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    need("dask")
    import distributed

    before = _descendants()
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
    ) as cluster:
        workers = Workers(1, "dask", cluster.scheduler_address)
        assert dict(engines.run(tasks.square, range(9), workers)) == {n: n * n for n in range(9)}
        with closing(engines.run(tasks.sleep_and_touch, _paths(tmp_path), workers)) as results:
            next(results)
        # No worker does anything in our name any more.
        found = set(tmp_path.glob("touched*"))
        assert found
        assert len(cluster.scheduler_info["workers"]) == 2
        time.sleep(0.5)
        assert set(tmp_path.glob("touched*")) == found
    assert _descendants() == before


@pytest.mark.parametrize("cluster", ["dask", "ray"])
def test_an_address_where_nothing_answers_is_one_line(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(cluster)
    monkeypatch.setattr(clusters, "CONNECT_S", 1)
    address = f"{'tcp://' if cluster == 'dask' else ''}127.0.0.1:9"
    with pytest.raises(UserError, match=f"--engine-address {address}: {cluster} does") as caught:
        list(engines.run(str, [1], Workers(1, cluster, address)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--engine dask --workers 0", "--workers 0: --engine dask needs"),
        ("--engine-address tcp://a:1", "--engine-address tcp://a:1: add --engine"),
        ("--worker-memory 100 --workers 0", "--worker-memory limits"),
        ("--worker-memory 100 --engine ray", "--worker-memory limits"),
    ],
)
def test_options_that_do_not_go_together(words: str, named: str) -> None:
    parser = argparse.ArgumentParser()
    engines.add_engine_options(parser)
    with pytest.raises(UserError, match=named):
        engines.chosen(parser.parse_args(words.split()))


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dask", "ray"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(UserError, match=rf'pip install "pixloom\[{name}\]"') as caught:
            list(engines.run(str, [1], Workers(1, name)))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_run_once(tasks, workers: int) -> None:  # type: ignore[no-untyped-def]
    results = list(engines.run(tasks.square, iter(range(20)), workers))
    assert sorted(results) == [(task, task * task) for task in range(20)]
    assert list(engines.run(tasks.square, [], workers)) == []


def test_a_task_that_always_kills_its_worker_is_named(tasks) -> None:  # type: ignore[no-untyped-def]
    found = []

    def run_all() -> None:
        for task, _ in engines.run(tasks.die_at_three, range(8), 2, lambda task: f"shard {task}"):
            found.append(task)

    with pytest.raises(UserError, match=r"shard 3: .* died 3 times \(exit status 7\).* 'record 3'"):
        run_all()
    assert 3 not in found


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_tasks_are_raised(tasks, workers: int) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="task 5 is refused"):
        list(engines.run(tasks.refuse, [5], workers))
    with pytest.raises(ZeroDivisionError):
        list(engines.run(tasks.divide, [0], workers))


def test_an_error_that_does_not_pickle_is_raised_with_its_traceback(tasks) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(RuntimeError, match="in fail_unpicklably"):
        list(engines.run(tasks.fail_unpicklably, [0], 1))


def test_workers_end_with_their_killed_driver(tasks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = (
        f"from shards import engines; from {tasks.__name__} import report_and_wait\n"
        "if __name__ == '__main__':\n"
        f"    list(engines.run(report_and_wait, [{str(tmp_path)!r}] * 2, 2))\n"
    )
    (tmp_path / "driver.py").write_text(script)
    paths = os.pathsep.join([str(tmp_path / "modules"), str(Path(__file__).parents[2])])
    with tempfile.TemporaryDirectory() as temporary:  # a short name, for sockets
        environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": temporary}
        driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], env=environment)
        _wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
        workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
        assert all(map(_runs, workers))
        assert list(Path(temporary).iterdir())
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        _wait_until(lambda: not any(map(_runs, workers)))
        assert not list(Path(temporary).iterdir())


def test_workers_have_the_environment_of_their_start(  # type: ignore[no-untyped-def]
    tasks, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "PIXLOOM_TEST_OF_ENGINES"
    for value in ("first", "second", None):
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
        assert list(engines.run(tasks.report_environment, [name], 1)) == [(name, value)]


def test_workers_run_the_code_that_their_driver_runs(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "shards", tmp_path / "shards")
    # And nothing of the folder that they are started in.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "numpy.py").write_text("raise SystemExit('not this one')")
    program = (
        f"import pkgutil, sys; sys.path[0] = {str(tmp_path)!r}; from shards import engines;"
        "found = engines.run(pkgutil.resolve_name, ['shards.plan:__file__'], 1);"
        "print(*[path for _, path in found])"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=elsewhere, check=True, capture_output=True, text=True
    ).stdout
    assert said == f"{tmp_path}/shards/plan.py\n"


def test_work_goes_on_without_the_process_that_workers_are_forks_of(tasks) -> None:  # type: ignore[no-untyped-def]
    for _ in range(2):
        assert dict(engines.run(tasks.kill_server, [1, 2], 1)) == {1: 1, 2: "no server"}
    assert list(engines.run(tasks.square, [3], 1)) == [(3, 9)]


def test_workers_start_where_paths_are_too_long_for_sockets(tasks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    script = (
        f"from shards import engines; from {tasks.__name__} import square\n"
        "if __name__ == '__main__':\n"
        "    assert list(engines.run(square, [3], 1)) == [(3, 9)]\n"
    )
    (tmp_path / "driver.py").write_text(script)
    long = tmp_path / ("long" * 30)
    long.mkdir()
    paths = os.pathsep.join([str(tmp_path / "modules"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": paths, "TMPDIR": str(long)}
    words = [sys.executable, "-W", "error", str(tmp_path / "driver.py")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(long.iterdir())


def _paths(folder: Path) -> list[str]:
    return [str(folder / f"touched{at}") for at in range(20)]


def _descendants() -> set[psutil.Process]:
    """But for two processes of Python's own that end with us: the one that counts semaphores, and
    the one that workers are forks of, and so children of."""
    ours = psutil.Process()
    helpers = {
        one
        for one in ours.children()
        if {"resource_tracker", "forkserver"} & set(re.findall(r"\w+", " ".join(one.cmdline())))
    }
    return set(ours.children(recursive=True)) - helpers


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until(condition, limit_s: float = 60.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_line_says_how_far_how_fast_and_what_was_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "PLAIN_PROGRESS_EVERY_S", 0.0)
    results = iter([1, 0, 2])
    shown = engines.progress(results, 3, "packed", lambda n: n, lambda n: (10**6 * n, n == 2))
    assert list(shown) == [1, 0, 2]
    lines = capsys.readouterr().err.splitlines()
    speed = r"\d+ a second, \d+\.\d MB/s"
    assert re.fullmatch(rf"packed: 1 of 3, {speed}, \d+ s left", lines[0])
    assert re.fullmatch(rf"packed: 3 of 3, {speed}, 1 skipped, 0 s left", lines[2])
