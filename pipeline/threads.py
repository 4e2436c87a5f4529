"""Threads that go through the values of an iterator: a few together, or some ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from threading import Lock
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Threads:
    """`number` of them, with the caller of `map`; the others are started when they are needed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._others: ThreadPoolExecutor | None = None

    def map(self, function: Callable[[int, T], R], values: Iterable[T]) -> list[R]:
        """`function` of every value's place and the value, in their order.

        Each thread takes the next value as soon as it has done one; one at a time asks `values`,
        which may take a while to come. What either raises is raised, but not before all threads
        have come to rest.
        """
        if self.number == 1:
            return [function(place, value) for place, value in enumerate(values)]
        places: Iterator[tuple[int, T]] = enumerate(values)
        lock = Lock()
        done: list[tuple[int, R]] = []

        def work() -> None:
            nonlocal places
            try:
                while True:
                    with lock:
                        found = next(places, None)
                    if found is None:
                        return
                    done.append((found[0], function(*found)))
            except BaseException:
                places = iter(())  # the others need not go on
                raise

        pool = self._pool()
        others = [pool.submit(work) for _ in range(self.number - 1)]
        try:
            work()
        finally:
            wait(others)
        for other in others:
            other.result()
        return [result for _, result in sorted(done, key=lambda pair: pair[0])]

    def one_ahead(self, values: Iterator[T], finish: Callable[[T], R]) -> Iterator[R]:
        """As `some_ahead`, by one of the others, if there are: a further thread would have memory
        of its own, and a value would be used far from where it was made."""
        if self.number == 1:
            return map(finish, values)
        return some_ahead(self._pool(), values, finish)

    def _pool(self) -> ThreadPoolExecutor:
        if self._others is None:
            self._others = ThreadPoolExecutor(self.number - 1, "pixloom-decode")
        return self._others

    def close(self) -> None:
        """Ends the others."""
        if self._others is not None:
            self._others.shutdown()
            self._others = None


def some_ahead(
    thread: Executor, values: Iterator[T], finish: Callable[[T], R], *, number: int = 1
) -> Iterator[R]:
    """`finish` of every value, in this thread. While a finished one is in use, the other one takes
    the next `number` values. (Not while one is finished: it may have a part in that.)

    No value is None.
    """
    coming = deque(thread.submit(next, values, None) for _ in range(number))
    while (value := coming.popleft().result()) is not None:
        finished = [finish(value)]
        del value  # here nobody holds on to what was given away
        coming.append(thread.submit(next, values, None))
        yield finished.pop()
