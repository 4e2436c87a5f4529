"""Processes that answer requests: their order, their errors, their ends."""

import collections
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.loader import Loader
from pipeline.workers import Workers
from shards.storage import UserError

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def work(number: int) -> tuple[int, int]:
    """The number and who answers; every third takes longer."""
    time.sleep(0.003 if number % 3 == 0 else 0)
    return number, os.getpid()


def nothing() -> None:
    pass


Children = Callable[[], list[psutil.Process]]


@pytest.fixture(name="children")
def children_of_test() -> Children:
    """Those that the test has started."""
    others = set(psutil.Process().children())
    return lambda: [one for one in psutil.Process().children() if one not in others]


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    workers=st.integers(1, 4),
    ahead=st.integers(1, 3),
    requests=st.lists(st.integers(0, 99), max_size=20),
)
def test_answers_come_in_the_order_of_requests(
    children: Children, workers: int, ahead: int, requests: list[int]
) -> None:
    with closing(Workers(work, workers, prepare=nothing)) as team:
        answers = team.in_turn(iter(requests), ahead=ahead)
        assert [number for number, _ in answers] == requests
    assert not children()


def test_no_more_is_asked_than_was_said() -> None:
    asked = []

    def requests() -> Iterator[int]:
        for number in range(50):
            asked.append(number)
            yield number

    with closing(Workers(work, 2, prepare=nothing)) as team:
        for number, _ in team.in_turn(requests(), ahead=3):
            assert len(asked) <= number + 1 + 2 * 3


class Slow:
    """Answers with who did; one worker is slow: the one that makes the file first."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_slow = path, False

    def choose(self) -> None:
        try:
            self.path.touch(exist_ok=False)
        except FileExistsError:
            return
        self.is_slow = True

    def __call__(self, number: int) -> bool:
        time.sleep(0.05 if self.is_slow else 0.001)
        return self.is_slow


def test_a_slow_worker_is_asked_less(tmp_path: Path) -> None:
    slow = Slow(tmp_path / "slow")
    with closing(Workers(slow, 2, prepare=slow.choose)) as team:
        by_slow = list(team.in_turn(iter(range(60)), ahead=2))
    assert 0 < sum(by_slow) < 20


def refuse(number: int) -> int:
    if number == 3:
        raise ZeroDivisionError("the third")
    return number


def test_an_error_comes_with_its_traceback(children: Children) -> None:
    with closing(Workers(refuse, 2, prepare=nothing)) as team:
        answers = team.in_turn(iter(range(9)), ahead=2)
        with pytest.raises(RuntimeError, match=r"(?s)in refuse.*ZeroDivisionError: the third"):
            list(answers)
    assert not children()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGXCPU])
def test_a_worker_that_dies_is_named_at_once(children: Children, number: int) -> None:
    with closing(Workers(time.sleep, 2, prepare=nothing)) as team:
        answers = team.in_turn(iter([0.0, 0.0, 600.0, 600.0]), ahead=2)
        next(answers)
        next(answers)
        children()[1].send_signal(number)
        with pytest.raises(UserError, match=rf"was killed \({signal.Signals(number).name}\)"):
            next(answers)
        for worker in children():
            worker.kill()  # it sleeps
    assert not children()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_to_the_whole_job_leave_workers_alone(children: Children, number: int) -> None:
    with closing(Workers(work, 2, prepare=nothing)) as team:
        answers = team.in_turn(iter(range(40)), ahead=2)
        next(answers)
        for worker in children():
            worker.send_signal(number)
        assert [one for one, _ in answers] == list(range(1, 40))


def many_bytes(size: int) -> bytes:
    return bytes(size)


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_team_ends_by_itself_while_a_later_one_goes_on(children: Children, size: int) -> None:
    """Processes that were forked later hold on to the ends of its pipes; and answers of this size
    are not handed over before somebody takes them."""
    with closing(Workers(many_bytes, 3, prepare=nothing)) as first:
        next(first.in_turn(iter([size] * 9), ahead=3))
        with closing(Workers(work, 2, prepare=nothing)) as second:
            answers = second.in_turn(iter(range(30)), ahead=2)
            next(answers)
            theirs = len(children())
            first.close()
            # None had to be killed, which would have taken five seconds each.
            assert [worker._process.exitcode for worker in first._team] == [0, 0, 0]
            assert len(children()) == theirs - 3
            assert [one for one, _ in answers] == list(range(1, 30))


def unpicklable(number: int) -> object:
    return iter(number for _ in ())


def test_an_answer_that_cannot_be_sent_is_an_error_too() -> None:
    with closing(Workers(unpicklable, 1, prepare=nothing)) as team:
        answers = team.in_turn(iter(range(3)), ahead=1)
        with pytest.raises(RuntimeError, match=r"(?s)in a loader worker.*cannot pickle"):
            next(answers)


SCRIPT = """
import time
from pipeline.workers import Workers
team = Workers(abs, 2, prepare=int)
answers = team.in_turn(iter(range(100)), ahead=2)
next(answers)
print("begun", flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["raise SystemExit('over')", "time.sleep(600)"])
def test_workers_end_with_their_parent(end: str) -> None:
    """Whether it is killed, or runs to its end with answers to come."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(end=end)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"begun\n"
    workers = psutil.Process(parent.pid).children() if "sleep" in end else []
    if "sleep" in end:
        assert len(workers) == 2
        parent.kill()
    parent.wait(30)
    parent.stdout.close()
    assert not psutil.wait_procs(workers, timeout=60)[1]


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_every_way_to_start_them_gives_the_same_batches(
    method: str, screens: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing
from pipeline.loader import Loader
if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    for batch in Loader({str(screens)!r}, batch_size=4, epochs=1, workers=2):
        print(batch.order_hash)
""")
    result = subprocess.run(
        [sys.executable, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    expected = [batch.order_hash for batch in Loader(screens, batch_size=4, epochs=1)]
    assert [int(line) for line in result.stdout.split()] == expected


def test_a_loader_names_a_killed_worker(children: Children, screens: Path) -> None:
    batches = iter(Loader(screens, batch_size=4, workers=1))
    next(batches)
    children()[0].kill()
    with pytest.raises(UserError, match=r"loader worker was killed \(SIGKILL\).*fewer workers"):
        collections.deque(batches, maxlen=0)
    assert not children()
