"""Processes that measure on request, so that each loader or packer has one of its own.

Runs under any Python: only the standard library is needed.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

OURS, CEILING = "pixloom", "ceiling"


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
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": "it ended"}
        if "error" in reply:
            raise SystemExit(f"{request.get('name')}: {reply['error']}")
        return reply

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def one_round(
    names: Iterable[str], turn: int, ask: Callable[[str], dict[str, Any]], *, pairs: int = 2
) -> dict[str, dict[str, float]]:
    """The figures that `ask` finds for each name, with another order each `turn`.

    Ours and the ceiling are asked `pairs` times, an even number, one right after the other and back
    again, and their means taken: so what makes the machine slower or faster meanwhile is in both.
    """
    others = [name for name in names if name not in (OURS, CEILING)]
    others = others[turn % max(1, len(others)) :] + others[: turn % max(1, len(others))]
    pair = [OURS, CEILING, CEILING, OURS] if turn % 2 == 0 else [CEILING, OURS, OURS, CEILING]
    pair *= pairs // 2
    found: dict[str, list[dict[str, float]]] = {}
    for name in pair + others if turn % 2 == 0 else others + pair:
        found.setdefault(name, []).append(ask(name))
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
