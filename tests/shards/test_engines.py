import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shards import engines
from shards.storage import UserError

# Workers import a task's module by name; this file, which pytest imports from its path, has none.
TASKS = """
import os, signal, sys, time
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

def refuse(task):
    raise UserError(f"task {task} is refused")

def divide(task):
    return 1 // task

class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(one)

def fail_unpicklably(task):
    raise Unpicklable(1, 2)

def report_and_wait(folder):
    (Path(folder) / f"{os.getpid()}.pid").touch()
    signal.pause()
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


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_task_is_run_once(tasks, workers: int) -> None:  # type: ignore[no-untyped-def]
    results = list(engines.run(tasks.square, iter(range(20)), workers))
    assert sorted(results) == [(task, task * task) for task in range(20)]
    assert list(engines.run(tasks.square, [], workers)) == []


def test_a_worker_killed_once_is_replaced(tasks, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    names = [str(tmp_path / f"marker{at}") for at in range(3)]
    results = dict(engines.run(tasks.die_once, names, 2))
    assert results == {name: Path(name).name for name in names}


def test_a_task_that_always_kills_its_worker_is_named(tasks) -> None:  # type: ignore[no-untyped-def]
    found = []

    def run_all() -> None:
        for task, _ in engines.run(tasks.die_at_three, range(8), 2, lambda task: f"shard {task}"):
            found.append(task)

    with pytest.raises(UserError, match=r"shard 3: .* died 3 times \(exit status 7\).* record 3"):
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
    environment = {**os.environ, "PYTHONPATH": paths}
    driver = subprocess.Popen([sys.executable, str(tmp_path / "driver.py")], env=environment)
    _wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    workers = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert all(map(_runs, workers))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _wait_until(lambda: not any(map(_runs, workers)))


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
