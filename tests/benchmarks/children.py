"""Processes that measure on request, so that each loader or packer has one of its own.

Runs under any Python: only the standard library is needed.
"""

import json
import mmap
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, CEILING = "pixloom", "ceiling"
SLICE_S = 0.3
WARM_UP = 8
"""Batches before a measurement by slices begins."""
_MAX_PROCESSES = 63


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """A JSON object a line in, one out, until stdin ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(reply), file=replies, flush=True)


class Child:
    """A process that measures on request, with variables `added`; one thread in all libraries, or
    as many as they choose."""

    def __init__(
        self, *words: str, added: Mapping[str, str] | None = None, one_thread: bool = True
    ) -> None:
        self.words = words
        numbers = [f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS")]
        others = {name: value for name, value in os.environ.items() if name not in numbers}
        one = dict.fromkeys(numbers, "1") if one_thread else {}
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        self.process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**others, **one, **offline, **(added or {})},
            process_group=0,
        )
        self.name: object = None
        """which loader or packer it was asked for"""

    def ask(self, **request: Any) -> dict[str, Any]:
        self.send(**request)
        return self.reply()

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.name = request.get("name")
        print(json.dumps(request), file=self.process.stdin, flush=True)

    def reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in reply:
            raise SystemExit(f"{self.name}: {reply['error']}")
        return reply

    def has_replied(self, timeout_s: float) -> bool:
        return bool(select.select([self.process.stdout], [], [], timeout_s)[0])

    def signal(self, number: signal.Signals) -> None:
        """To it and its own children."""
        os.killpg(self.process.pid, number)

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


class Counts:
    """How many batches each process of a child has made; in a file, which all of them map."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._numbers = memoryview(mmap.mmap(file.fileno(), 0)).cast("q")

    @classmethod
    def new(cls, path: Path) -> "Counts":
        path.write_bytes(bytes(8 * (1 + _MAX_PROCESSES)))
        return cls(path)

    def add(self, process: int) -> bool:
        """One more. False once nobody wants any."""
        self._numbers[1 + process] += 1
        return not self._numbers[0]

    def end(self) -> None:
        self._numbers[0] = 1

    @property
    def total(self) -> int:
        return sum(self._numbers[1:])


def in_slices(
    children: Mapping[str, Child], request: Mapping[str, Any], *, seconds: float, folder: Path
) -> dict[str, dict[str, float]]:
    """What the children reply, and `batches_per_s` of each while it ran: never two of them at once,
    but in turn for `SLICE_S`, while the others are stopped with all their processes.

    So what makes the machine slower or faster for a second is in all of them; and nothing is lost
    at the edges, because each goes on with what it was at.
    """
    counts = {name: Counts.new(folder / f"{name}.counts") for name in children}
    ran_s = dict.fromkeys(children, 0.0)
    try:
        for name, child in children.items():
            child.send(**request, name=name, counts=str(folder / f"{name}.counts"))
            while counts[name].total < WARM_UP:
                if child.has_replied(timeout_s=0.01):  # too early: with an error
                    child.reply()
            child.signal(signal.SIGSTOP)
        before = {name: count.total for name, count in counts.items()}
        order = list(children.items())
        while min(ran_s.values()) < seconds:
            for name, child in order:
                start_s = time.perf_counter()
                child.signal(signal.SIGCONT)
                time.sleep(SLICE_S)
                child.signal(signal.SIGSTOP)
                ran_s[name] += time.perf_counter() - start_s
            order.reverse()
        made = {name: count.total - before[name] for name, count in counts.items()}
    finally:
        for name, child in children.items():
            counts[name].end()
            child.signal(signal.SIGCONT)
    return {
        name: {**child.reply(), "batches_per_s": made[name] / ran_s[name]}
        for name, child in children.items()
    }


def rotated(names: Sequence[str], turn: int) -> list[str]:
    """Another order each `turn`."""
    first = turn % max(1, len(names))
    return [*names[first:], *names[:first]]


def one_round(
    names: Iterable[str], turn: int, ask: Callable[[str], dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """The figures that `ask` finds for each name, with another order each `turn`.

    Ours and the ceiling are asked twice, one right after the other and back again, and their means
    taken: so what makes the machine slower or faster meanwhile is in both.
    """
    others = rotated([name for name in names if name not in (OURS, CEILING)], turn)
    pair = [OURS, CEILING, CEILING, OURS] if turn % 2 == 0 else [CEILING, OURS, OURS, CEILING]
    found: dict[str, list[dict[str, float]]] = {}
    for name in pair + others if turn % 2 == 0 else others + pair:
        found.setdefault(name, []).append(ask(name))
    return means(found)


def means(found: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each name's figures, one by one."""
    return {
        name: {key: statistics.mean(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }


def summary(
    who: str, unit: str, speeds: Mapping[tuple[str, int], Sequence[float]], peers: Sequence[str]
) -> dict[str, Any]:
    """Medians of the ratios, and a row for each name and number of workers in `speeds`.

    A ratio is of two figures of one round: the machine's own pace differs more between rounds.
    """

    def ratio(name: str, number: int) -> float:
        pairs = zip(speeds[OURS, number], speeds[name, number], strict=True)
        return statistics.median(ours / other for ours, other in pairs)

    workers = sorted({number for _, number in speeds})
    over = {n: min((ratio(peer, n) for peer in peers), default=None) for n in workers}
    of = {n: ratio(CEILING, n) for n in workers}
    return {
        "over_fastest_peer": round(min(over.values()), 3) if peers else None,
        "of_ceiling": round(min(of.values()), 3),
        "over_fastest_peer_by_workers": {n: x and round(x, 3) for n, x in over.items()},
        "of_ceiling_by_workers": {n: round(x, 3) for n, x in of.items()},
        "rows": [
            {
                who: name,
                "workers": number,
                unit: round(statistics.median(found), 1),
                "lowest": round(min(found), 1),
                "highest": round(max(found), 1),
            }
            for (name, number), found in sorted(speeds.items(), key=lambda row: row[0][1])
        ],
    }
