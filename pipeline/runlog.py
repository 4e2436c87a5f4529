"""What a run tells people: lines on stderr, rows in RUN/metrics.jsonl. Rank 0 alone writes."""

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.config import CONFIG_NAME, GRAMMAR_NAME, Config, names_file, to_toml
from pipeline.grammar import Grammar
from pipeline.ranks import Ranks, said_once
from pipeline.state import TrainState
from shards import storage
from shards.errors import tell
from shards.storage import UserError

METRICS_NAME = "metrics.jsonl"
LEDGER_NAME = "damaged.txt"
"""in a run's folder: the samples that could not be read, a line each"""


def read_rows(run: Path) -> Iterator[dict[str, Any]]:
    """The rows of a run's log, oldest first; none where there is none. A line that a kill cut
    short is passed over.

    Raises `UserError` when the log cannot be read.
    """
    path = run / METRICS_NAME
    if not path.exists():
        return
    with storage.explained(str(path)), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            row = _row_of(line)
            if row is not None:
                yield row


class RunLog:
    """Lines and rows of one run folder."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self.path = folder / METRICS_NAME
        self.ranks = ranks
        self._since_s = time.perf_counter()
        self._samples = 0
        self._wait_s = 0.0
        self._failing = False

    def start(self, config: Config, state: TrainState) -> None:
        """Writes config.toml and the text of a grammar's FILE, and takes back what is told of later
        steps: it will come again."""
        self._since_s = time.perf_counter()
        if not self.ranks.is_main:
            return
        path = self.path.with_name(CONFIG_NAME)
        try:
            if names_file(config.validate.grammar):
                self._keep_grammar(config.validate.grammar, state)
            storage.publish_text(to_toml(config), str(path))
            text = self.path.read_text("utf-8", errors="replace") if self.path.exists() else ""
            kept = [line for line in text.splitlines() if _step_of(line) <= state.step]
            storage.publish_text("".join(line + "\n" for line in kept), str(self.path))
        except (UserError, OSError) as error:
            if not path.exists():
                raise
            self.warn(f"the run's log could not be brought up to date: {error}")
        if state.damaged or self.path.with_name(LEDGER_NAME).exists():
            self._write_ledger(state)

    def say(self, line: str) -> None:
        if self.ranks.is_main:
            tell(f"pixloom: {line}")

    def warn(self, line: str) -> None:
        """A line from whichever rank has something to tell."""
        tell(f"pixloom: warning: {line}")

    def account_for_bad(
        self, state: TrainState, own: Mapping[str, str], num_bad: int, max_bad: int
    ) -> None:
        """Adds this step's damaged samples, `own` of them this rank's (lines by `bad_names`), to
        the ledger in `state`, and shows the lines of those that are new.

        Raises:
            UserError: the ledger has more than `max_bad`; on all ranks alike.
        """
        if not num_bad:
            return
        text = self.ranks.join_text("".join(f"{json.dumps(pair)}\n" for pair in own.items()))
        met = dict(json.loads(line) for line in text.splitlines())
        new = {name: line for name, line in met.items() if name not in state.damaged}
        # Another dictionary: a checkpoint that is being saved has the one of its step.
        state.damaged = {**state.damaged, **new}
        if self.ranks.is_main and new:
            for line in new.values():
                self.warn(f"{line}; its place has weight 0, from step {state.step} on")
            self._write_ledger(state)
        if len(state.damaged) > max_bad:
            with said_once():
                raise UserError(
                    f"{len(state.damaged)} damaged samples (named above), data.max_bad allows "
                    f"{max_bad}; run `pixloom verify --deep` on the dataset: it is damaged, or the "
                    "dataset was replaced after this run had begun"
                )

    def count(self, samples: int, wait_s: float) -> None:
        """Adds a step's samples and the seconds spent waiting for them."""
        self._samples += samples
        self._wait_s += wait_s

    def speed(self) -> dict[str, float]:
        """Samples a second and the share of time spent waiting for data, since the last call or the
        last validation."""
        elapsed_s = max(time.perf_counter() - self._since_s, 1e-9)
        speed = {
            "samples_per_s": round(self._samples / elapsed_s, 2),
            "data_wait": round(self._wait_s / elapsed_s, 4),
        }
        self._restart_clock()
        return speed

    def _restart_clock(self) -> None:
        self._since_s, self._samples, self._wait_s = time.perf_counter(), 0, 0.0

    def row(self, row: dict[str, Any], of: int) -> None:
        """Appends one JSON object to metrics.jsonl and shows it; `of` is the last step."""
        if "split" in row:
            self._restart_clock()  # validation is no part of the speed of training
        if not self.ranks.is_main:
            return
        self._append(json.dumps(row))
        quiet = {name for name in ("epoch", "skipped_steps", "bad_samples") if not row.get(name)}
        cells = [
            f"{name} {_shown(value)}"
            for name, value in row.items()
            if name not in quiet | {"step", "order_digest"}
        ]
        self.say(f"step {row['step']}/{of}  {'  '.join(cells)}")

    def _keep_grammar(self, file: str, state: TrainState) -> None:
        kept, text = self.path.with_name(GRAMMAR_NAME), Grammar.open(file).text
        if kept.exists() and kept.read_text("utf-8", errors="replace") != text:
            self.warn(f"{file}: another grammar than before; from step {state.step} on the run's")
        storage.publish_text(text, str(kept))

    def _write_ledger(self, state: TrainState) -> None:
        try:
            text = "".join(f"{line}\n" for line in state.damaged.values())
            storage.publish_text(text, str(self.path.with_name(LEDGER_NAME)))
        except UserError as error:
            self.warn(f"the list of damaged samples could not be written: {error}")

    def _append(self, line: str) -> None:
        """A log that cannot be written is no reason to end a run."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                # After a failed write the last line may be torn: it must not tear this one.
                file.write(("\n" if self._failing else "") + line + "\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                self.warn(
                    f"{self.path}: {error.strerror}; rows are missing until it can be written"
                )
            self._failing = True


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _step_of(line: str) -> float:
    """The step of a row; a line that a kill cut short is after every step."""
    row = _row_of(line)
    return math.inf if row is None else row["step"]


def _row_of(line: str) -> dict[str, Any] | None:
    """A row, or None for a line that is none."""
    try:
        row: dict[str, Any] = json.loads(line)
        row["step"] = int(row["step"])
    except (ValueError, KeyError, TypeError, OverflowError):  # OverflowError: of an infinite step
        return None
    return row
