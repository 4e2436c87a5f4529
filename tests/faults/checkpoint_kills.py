"""SIGKILLs at random moments over save, commit, prune and load; resumes on 1 to 4 processes.

    python tests/faults/checkpoint_kills.py --kills 300                     the world size changes
    python tests/faults/checkpoint_kills.py --kills 300 --same-world-size   two processes, always
    python tests/faults/checkpoint_kills.py --kills 300 --bucket            on S3, over a bad line

A run is killed and resumed until it is done; then the next run begins. After every kill each
committed checkpoint on disk must verify and load, the newest must equal the undisturbed run's
checkpoint of the same step, and the next life must resume from exactly that one. At a run's end
its parameters, its optimizer, its order and its log must be the undisturbed run's: bit for bit
where the world size stays. Another world size adds in another order: then the parameters and the
optimizer's moments must be within 1e-5 (relative L2), and in runs in fp64, which is every second
one, within 1e-10. What breaks this is a violation: it is printed with the seed, its files are kept,
and the exit status is 1. (In fp32, rounding may now and then carry a ReLU across its kink: then
the gradient of one step is 1e-3 apart, those before and after 1e-7. `--precisions fp64` is without
that.)

Half of the moments are drawn from a clock; the others wait for something to happen to the
checkpoints' files, so that short phases are hit. What phase a kill hit is read off the files
afterwards. `--json` prints one JSON object on stdout's last line.
"""

import argparse
import contextlib
import json
import os
import random
import re
import select
import shutil
import socket
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed pixloom

from checkpoint_watch import Event, FolderWatch, Listing, StoreWatch, Watch, clear, listing
from fork_server import ForkServer, Rank, start_fresh
from servers import FaultyProxy, s3_client, seaweedfs

from pipeline import checkpoint
from pipeline.state import TrainState
from shards import pack, synth

KEEP_LAST = 2
TOLERANCE = {"fp32": 1e-5, "fp64": 1e-10}
"""by precision: the most that another world size may change"""
MAX_RANKS = 4
PHASES = ("load", "save", "commit", "prune", "between")
AIMS = ("any", "load", "save", "commit", "prune")
SURVIVORS_S = 30.0
"""how long ranks may go on after another one was killed"""
RENDEZVOUS_S = 1.0
"""the same before all ranks have met: then only a launcher can know that one will never come"""
MAX_VIOLATIONS = 20
"""more say nothing new"""
FAULTS = {"unavailable": 0.03, "reset": 0.03, "lost_reply": 0.03, "cut_reply": 0.02, "stall": 0.003}
"""of the bad line to a bucket, and how many of all requests each strikes"""
LIFE_S = 240.0
"""how long a life may last that nobody kills"""

CONFIG = f"""\
[run]
seed = 12
log_every_steps = 1
[data]
window = 16
shift_px = 2
[batch]
global_size = 8
micro_size = 2
[model]
name = "seq2seq"
channels = [8, 16]
hidden_dim = 32
embed_dim = 16
[optim]
lr = 3e-4  # 1e-3 is chaotic: two undisturbed runs on 1 and 3 processes end up to 5e-3 apart
warmup_steps = 5
[validate]
every_steps = 7
batch_size = 2
[checkpoint]
keep_last = {KEEP_LAST}
"""


@dataclass(frozen=True)
class Checkpoints:
    """The committed checkpoints of a run: all that is asked of `pipeline.checkpoint`."""

    where: str

    def steps(self) -> list[int]:
        return sorted(self._by_step())

    def problems(self, step: int) -> list[str]:
        """What is wrong with one checkpoint; empty when it verifies and loads."""
        found = self._by_step()[step]
        problems = checkpoint.verify(found)
        if not problems:
            try:
                if not self.tensors(step):
                    problems = [f"{found}: has no tensors"]
                if (said := self.state(step).step) != step:
                    problems = [f"{found}: its state is of step {said}"]
            except Exception as error:
                problems = [f"{found}: does not load ({error!r})"]
        return problems

    def tensors(self, step: int) -> dict[str, Tensor]:
        return checkpoint.load_tensors(self._by_step()[step])

    def state(self, step: int) -> TrainState:
        return checkpoint.Meta.read(self._by_step()[step]).state

    def _by_step(self) -> dict[int, str]:
        return {checkpoint.step_of(found): found for found in checkpoint.committed(self.where)}


@dataclass(frozen=True)
class Progress:
    """How far a life has come, as its first rank says."""

    started: bool = False
    """all ranks have met, and it is known where they go on from"""
    resumed_from: int = 0
    last_step: int | None = None

    @classmethod
    def read(cls, log: Path) -> "Progress":
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        start = re.search(r"; steps (\d+) to \d+(?:; resumed from \S*step-(\d+))?\n", text)
        if start is None:
            return cls()
        steps = re.findall(r"^pixloom: step (\d+)/", text, re.MULTILINE)
        return cls(True, int(start[2] or start[1]), int(steps[-1]) if steps else None)


@dataclass
class Moment:
    """When to kill, and whom."""

    aim: str
    lone: int | None = None
    """the one rank that is killed; None: all of them"""
    at_s: float | None = None
    """seconds from the start; None: at an event"""
    count: int = 0
    """how many events of the aimed phase to let pass"""
    delay_s: float = 0.0
    """how long to wait after the last of them"""
    _passed: int = field(default=0, repr=False)
    _done: dict[int, set[str]] = field(default_factory=dict, repr=False)

    @classmethod
    def draw(
        cls, aim: str, rng: random.Random, world_size: int, resumes: bool, start_s: float
    ) -> "Moment":
        """`start_s`: how long a start takes, up to the first step's beginning."""
        lone = rng.randrange(world_size) if world_size > 1 and rng.random() < 1 / 3 else None
        if aim == "any":
            return cls(aim, lone, at_s=rng.uniform(0, start_s + 1.5))
        if aim == "load" and (not resumes or rng.random() < 0.5):
            return cls(aim, lone, at_s=rng.uniform(0, 1.1 * start_s))
        # Over the opening of every file; the writing of one a rank, at three saves or so; what
        # happens between the last tensor and the commit; the removal of two folders.
        most = {"load": 6 + 2 * world_size, "save": 12 * world_size, "commit": 8, "prune": 12}[aim]
        delay_s = 0.0 if rng.random() < 0.5 else 10 ** rng.uniform(-4, -2)
        return cls(aim, lone, count=rng.randrange(most), delay_s=delay_s)

    def is_due(self, event: Event, world_size: int) -> bool:
        """Whether to kill now that this has happened."""
        if self.at_s is not None or not self._is_aimed_at(event, world_size):
            return False
        self._passed += 1
        return self._passed > self.count

    def _is_aimed_at(self, event: Event, world_size: int) -> bool:
        done = self._done.setdefault(event.step, set())
        if event.name.startswith("tensors-"):
            if event.kind == "removed":
                done.discard(event.name)
            elif event.kind == "done":
                done.add(event.name)
        if self.aim == "load":
            return event.kind == "opened"
        if self.aim == "prune":
            return event.kind == "removed"
        writing = event.kind in ("written", "done") and event.name != checkpoint.COMMIT_NAME
        return writing and (self.aim == "commit") == (len(done) == world_size)


@dataclass
class Life:
    """What became of one start of a run."""

    world_size: int
    fresh: bool
    moment: Moment | None
    killed: bool = False
    phase: str = ""
    progress: Progress = field(default_factory=Progress)
    committed: set[int] = field(default_factory=set)
    """steps whose commit was seen to appear"""
    statuses: list[int] = field(default_factory=list)
    """exit statuses by rank"""
    survivor_statuses: list[int] = field(default_factory=list)
    """of the ranks that a lone kill left, and that ended by themselves"""
    ended_by_launcher: bool = False
    """survivors still waited for a killed rank to join them, and were ended, as torchrun does"""
    problems: list[str] = field(default_factory=list)
    start_s: float | None = None


@dataclass
class Totals:
    """What a campaign reports."""

    seed: int
    same_world_size: bool
    kills: int = 0
    lives: int = 0
    fresh_lives: int = 0
    lone_kills: int = 0
    ended_by_launcher: int = 0
    runs_completed: int = 0
    kills_by_phase: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    kills_by_world_size: dict[int, int] = field(default_factory=dict)
    survivor_statuses: dict[int, int] = field(default_factory=dict)
    compared_checkpoints: int = 0
    worst_difference: dict[str, float] = field(default_factory=dict)
    """by precision and kind of tensor; relative, L2"""
    temporary_files_left: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    """of the line to the bucket, by kind"""
    violations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """Runs that are killed until they are done, in one folder."""

    def __init__(self, arguments: argparse.Namespace, folder: Path, server: ForkServer) -> None:
        self.arguments, self.folder, self.server = arguments, folder, server
        self.totals = Totals(arguments.seed, arguments.same_world_size)
        self.config = folder / "config.toml"
        self.environment: dict[str, str] = {}
        """what ranks have besides this process's own"""
        self.aims: list[str] = []
        self.start_s = {False: 0.7, True: 8.0}
        """seconds from start to the first step's beginning, forked and fresh; learnt"""

    def prepare(self) -> None:
        """Packs the dataset and writes the configuration of all runs."""
        raw, data = self.folder / "raw", self.folder / "data"
        with contextlib.redirect_stdout(sys.stderr):
            synth.main([str(raw), "--samples", "40", "--seed", "5"])
            words = "--size 80x48 --split train=rest,val=.05 --shard-samples 29 --workers 0"
            assert pack.main([str(raw), str(data), *words.split()]) == 0
        self.config.write_text(CONFIG.replace("[data]", f"[data]\nurl = {json.dumps(str(data))}"))

    def undisturbed(self, precision: str) -> Path:
        """The run that nobody kills: two processes, every checkpoint kept. Made once."""
        run, logs = self.folder / f"whole-{precision}", self.folder / f"whole-{precision}-logs"
        if not run.exists():
            words = f"--checkpoint.every_steps 1 --checkpoint.keep_last {self.arguments.steps}"
            words += f" --optim.precision {precision}"
            ranks, _ = self.start(run, "", logs, 2, words.split(), fresh=self.arguments.fresh > 0)
            with ended(ranks):
                statuses = [rank.wait() for rank in ranks]
            steps = Checkpoints(str(run / "checkpoints")).steps()
            if statuses != [0, 0] or steps != list(range(1, self.arguments.steps + 1)):
                raise SystemExit(f"the undisturbed run failed or lacks checkpoints; see {logs}")
        return run

    def start(
        self, run: Path, url: str, logs: Path, world_size: int, words: Sequence[str], *, fresh: bool
    ) -> tuple[list[Rank], Path]:
        """One process a rank; returns them and the first one's log."""
        logs.mkdir(parents=True, exist_ok=True)
        words = ["--config", str(self.config), "--run.dir", str(run), *words]
        words += ["--run.steps", str(self.arguments.steps)]
        if url:
            words += ["--checkpoint.url", url]
        launch = start_fresh if fresh else self.server.start
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "ACCELERATE_USE_CPU": "true",
            **self.environment,
        }
        ranks = []
        for rank in range(world_size):
            environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(launch(words, environment, logs / f"rank-{rank}.log"))
        return ranks, logs / "rank-0.log"

    def go_on(self) -> None:
        """Runs, one after another, until enough kills are done."""
        start_s = time.monotonic()
        number = 0
        totals = self.totals
        while totals.kills < self.arguments.kills and len(totals.violations) < MAX_VIOLATIONS:
            number += 1
            try:
                self.one_run(number)
            except KeyboardInterrupt:
                break
        totals.seconds = round(time.monotonic() - start_s, 1)

    def one_run(self, number: int) -> None:
        """One run from its first life to its comparison, or to its first violation."""
        name = f"run-{number:04d}"
        run, totals = self.folder / name, self.totals
        rng = random.Random(f"{self.arguments.seed} {number}")
        precisions = self.arguments.precisions.split(",")
        precision = precisions[(number - 1) % len(precisions)]
        whole = self.undisturbed(precision)
        url = f"{self.arguments.url.rstrip('/')}/{name}" if self.arguments.url else ""
        found = Checkpoints(url or str(run / "checkpoints"))
        (run / "checkpoints").mkdir(parents=True)
        newest, world_size, life_number = 0, 0, 0
        while True:
            world_size = self.next_world_size(rng, world_size)
            before = listing(found.where)
            enough = totals.kills >= self.arguments.kills
            totals.lives += 1
            fresh = self.arguments.fresh > 0 and totals.lives % self.arguments.fresh == 0
            totals.fresh_lives += fresh
            moment = Moment.draw(
                self.next_aim(rng), rng, world_size, newest > 0, self.start_s[fresh]
            )
            life = Life(world_size, fresh, None if enough else moment)
            words = ["--checkpoint.every_steps", str(rng.choice([1, 1, 2, 3]))]
            words += ["--optim.precision", precision]
            logs = self.folder / f"{name}-logs" / f"life-{life_number:03d}"
            after = self.live(life, run, url, found.where, logs, words)
            life.phase = phase_of(life, before, after) if life.killed else ""
            problems = [*life.problems, *self.check_resume_point(life, newest, found, whole)]
            newest = max(found.steps(), default=0)
            done = not life.killed and not problems
            if done:
                problems = self.check_end(run, found, life, whole)
            self.count(life)
            self.report(number, life_number, life, newest)
            for problem in problems:
                violation = {
                    "what": problem, "seed": self.arguments.seed, "run": number,
                    "life": life_number, "phase": life.phase, "world_size": world_size,
                    "moment": str(moment), "files": str(run),
                }  # fmt: skip
                print(f"VIOLATION {json.dumps(violation)}", file=sys.stderr, flush=True)
                totals.violations.append(violation)
            if problems:
                return
            if done:
                totals.runs_completed += 1
                if not self.arguments.keep:
                    clear(found.where)
                    shutil.rmtree(run)
                    shutil.rmtree(logs.parent)
                return
            life_number += 1

    def next_aim(self, rng: random.Random) -> str:
        """Each as often as the others, in an order that changes."""
        if not self.aims:
            self.aims = rng.sample(AIMS, len(AIMS))
        return self.aims.pop()

    def next_world_size(self, rng: random.Random, last: int) -> int:
        if self.arguments.same_world_size:
            return 2
        return rng.choice([size for size in range(1, MAX_RANKS + 1) if size != last])

    def live(
        self, life: Life, run: Path, url: str, where: str, logs: Path, words: Sequence[str]
    ) -> Listing:
        """Starts, watches and kills; fills in `life`. Returns the files as the kill left them."""
        watch: Watch = StoreWatch(where) if url else FolderWatch(Path(where))
        start_s = time.monotonic()
        with watch:
            ranks, log = self.start(run, url, logs, life.world_size, words, fresh=life.fresh)
            with ended(ranks):
                if self.wait_for_moment(life, ranks, watch, log, start_s):
                    after = self.kill(life, ranks, where, log)
                else:
                    after = {}
                for rank in ranks:
                    rank.kill()  # no more than a formality, unless one crashed or hangs
                life.statuses = [rank.wait() for rank in ranks]
            seen = watch.events()
        life.committed |= {e.step for e in seen if is_commit(e)}
        life.progress = Progress.read(log)
        victims = range(life.world_size)
        if life.moment is not None and life.moment.lone is not None:
            victims = range(life.moment.lone, life.moment.lone + 1)
        if not life.problems:
            life.killed = any(life.statuses[victim] == -9 for victim in victims)
            others = [s for rank, s in enumerate(life.statuses) if rank not in victims]
            wrong = [s for s in others if life.killed and s == 0 and not self.is_done(where)]
            if wrong or (not life.killed and any(life.statuses)):
                life.problems.append(f"exit statuses {life.statuses}; see {logs}")
            if life.killed and not life.ended_by_launcher:
                life.survivor_statuses = others
        return after or listing(where)

    def is_done(self, where: str) -> bool:
        return self.arguments.steps in Checkpoints(where).steps()

    def wait_for_moment(
        self, life: Life, ranks: list[Rank], watch: Watch, log: Path, start_s: float
    ) -> bool:
        """True at the moment of the kill, False when every rank has ended before, or must."""
        moment = life.moment
        poller = select.poll()
        if watch.fd is not None:
            poller.register(watch.fd, select.POLLIN)
        running = {rank.pidfd: rank for rank in ranks}
        for pidfd in running:
            poller.register(pidfd, select.POLLIN)
        while True:
            now_s = time.monotonic() - start_s
            left_s = LIFE_S - now_s
            if moment is not None and moment.at_s is not None:
                left_s = moment.at_s - now_s
            if left_s <= 0:
                if moment is None or moment.at_s is None:
                    life.problems.append(f"ranks still run after {LIFE_S:.0f} s; see {log.parent}")
                    return False
                return True
            pause_s = 0.003 if watch.fd is None else 0.02 if life.start_s is None else 1.0
            for descriptor, _ in poller.poll(min(left_s, pause_s) * 1000):
                if descriptor in running:
                    poller.unregister(descriptor)
                    status = running.pop(descriptor).wait()
                    if status != 0:
                        life.problems.append(f"a rank ended with {status}; see {log.parent}")
                        return False
            if not running:
                return False
            for event in watch.events():
                if is_commit(event):
                    life.committed.add(event.step)
                if moment is not None and moment.is_due(event, life.world_size):
                    time.sleep(moment.delay_s)
                    return True
            if life.start_s is None and Progress.read(log).started:
                life.start_s = time.monotonic() - start_s
                self.start_s[life.fresh] = (3 * self.start_s[life.fresh] + life.start_s) / 4

    def kill(self, life: Life, ranks: list[Rank], where: str, log: Path) -> Listing:
        """SIGKILL. Returns the files when all ranks are dead, or when the lone victim is."""
        moment = life.moment
        assert moment is not None
        if moment.lone is None:
            for rank in ranks:
                rank.kill()
            for rank in ranks:
                rank.wait()
            return listing(where)
        ranks[moment.lone].kill()
        after = listing(where)
        started = Progress.read(log).started
        deadline_s = time.monotonic() + (SURVIVORS_S if started else RENDEZVOUS_S)
        for number, rank in enumerate(ranks):
            if rank.ends_within(max(0.0, deadline_s - time.monotonic())):
                continue
            if started:
                life.problems.append(
                    f"rank {moment.lone} was killed, and rank {number} still ran "
                    f"{SURVIVORS_S:.0f} s later; see {log.parent}"
                )
            else:
                life.ended_by_launcher = True
            break
        return after

    def check_resume_point(
        self, life: Life, newest: int, found: Checkpoints, whole: Path
    ) -> list[str]:
        """What is wrong with where a life came from and with what it left."""
        problems, steps = [], found.steps()
        resumed_from = life.progress.resumed_from
        # What a killed process sent may reach a bucket after we looked.
        late = bool(self.arguments.url) and resumed_from > newest
        if life.progress.started and resumed_from != newest and not late:
            problems.append(f"resumed from step {resumed_from}, the newest commit is of {newest}")
        for step in steps:
            problems += found.problems(step)
        last = max(steps, default=0)
        committed = max(newest, *life.committed, 0)
        if last < committed:
            problems.append(f"step {committed} was committed; now the newest commit is of {last}")
        if problems or not steps:
            return problems
        best = found.state(last).best_step
        if best is not None and best not in steps:
            problems.append(f"step {last} calls step {best} the best, which is gone; has {steps}")
        return problems + self.differences(found, last, whole)

    def differences(self, found: Checkpoints, step: int, whole: Path) -> list[str]:
        """How one checkpoint differs from the undisturbed run's of the same step."""
        expected = Checkpoints(str(whole / "checkpoints"))
        if found.state(step).order_digest != expected.state(step).order_digest:
            return [f"step {step}: another order_digest than the undisturbed run's"]
        one, two = expected.tensors(step), found.tensors(step)
        if one.keys() != two.keys():
            return [f"step {step}: other tensors than the undisturbed run's"]
        problems = []
        self.totals.compared_checkpoints += 1
        precision = whole.name.removeprefix("whole-")
        for kind, difference in relative_differences(one, two).items():
            worst, key = self.totals.worst_difference, f"{precision} {kind}"
            worst[key] = max(worst.get(key, 0.0), difference)
            if not difference <= (0.0 if self.arguments.same_world_size else TOLERANCE[precision]):
                problems.append(f"step {step}: {kind} differs by {difference:.1e} (relative, L2)")
        return problems

    def check_end(self, run: Path, found: Checkpoints, life: Life, whole: Path) -> list[str]:
        """What a finished run has that the undisturbed one has not; its tensors are compared."""
        problems, steps = [], found.steps()
        if not life.progress.started:
            return ["ended without an error, and never said where it goes on from"]
        if not steps or steps[-1] != self.arguments.steps:
            return [f"ended without an error before its last step was committed; has {steps}"]
        left = listing(found.where)
        if life.progress.last_step is not None and not (
            list(left) == steps and len(steps) <= KEEP_LAST + 1
        ):
            problems.append(f"checkpoints {sorted(left)} are left, of which {steps} are committed")
        mine, theirs = rows_of(run), rows_of(whole)
        if not self.arguments.same_world_size:  # sums in another order round otherwise
            exact = ("step", "epoch", "split", "samples", "lr", "order_digest", "bad_samples")
            mine, theirs = (
                [{k: v for k, v in row.items() if k in exact} for row in rows]
                for rows in (mine, theirs)
            )
        if mine != theirs:
            problems.append(f"{run / 'metrics.jsonl'}: other rows than the undisturbed run's")
        self.totals.temporary_files_left += sum(1 for _ in run.rglob("*pixloom-tmp"))
        return problems

    def count(self, life: Life) -> None:
        totals = self.totals
        totals.ended_by_launcher += life.ended_by_launcher
        if life.killed:
            assert life.moment is not None
            totals.kills += 1
            totals.lone_kills += life.moment.lone is not None
            totals.kills_by_phase[life.phase] += 1
            by_size = totals.kills_by_world_size
            by_size[life.world_size] = by_size.get(life.world_size, 0) + 1
            for status in life.survivor_statuses:
                by_status = totals.survivor_statuses
                by_status[status] = by_status.get(status, 0) + 1

    def report(self, number: int, life_number: int, life: Life, newest: int) -> None:
        moment, progress = life.moment, life.progress
        if life.killed:
            assert moment is not None
            whom = "all ranks" if moment.lone is None else f"rank {moment.lone}"
            end = f"killed {whom} in {life.phase} (aimed at {moment.aim})"
        else:
            end = "FAILED" if life.problems else "done"
            end += f" (missed {moment.aim})" if moment is not None else ""
        reached = progress.resumed_from if progress.last_step is None else progress.last_step
        print(
            f"{self.totals.kills}/{self.arguments.kills}  run {number} life {life_number}: "
            f"{life.world_size} ranks{' (fresh)' if life.fresh else ''}, steps "
            f"{progress.resumed_from if progress.started else '?'} to {reached}, {end}; "
            f"next from {newest}",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def ended(ranks: Sequence[Rank]) -> Iterator[None]:
    """However the block ends, no rank outlives it."""
    try:
        yield
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def is_commit(event: Event) -> bool:
    return event.kind == "done" and event.name == checkpoint.COMMIT_NAME


def phase_of(life: Life, before: Listing, after: Listing) -> str:
    """What a killed life was doing, from the files before it and after."""
    if life.progress.last_step is None:
        return "load"
    changed = {
        step: files
        for step, files in after.items()
        if checkpoint.COMMIT_NAME not in files and files != before.get(step)
    }
    newest = max((s for s, files in after.items() if checkpoint.COMMIT_NAME in files), default=0)
    written = [step for step in changed if step > newest]
    if written:
        files = changed[max(written)]
        whole = [name for name in files if name.startswith("tensors-") and files[name].whole]
        return "commit" if len(whole) == life.world_size else "save"
    return "prune" if changed else "between"


def relative_differences(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, float]:
    """L2 of the parameters, and of each of the optimizer's moments, relative to the first's."""
    apart: defaultdict[str, float] = defaultdict(float)
    size: defaultdict[str, float] = defaultdict(float)
    for name, tensor in one.items():
        kind = "model" if name.startswith("model/") else name.rsplit("/")[-1]
        apart[kind] += float((tensor.double() - two[name].double()).square().sum())
        size[kind] += float(tensor.double().square().sum())
    return {kind: (apart[kind] / size[kind]) ** 0.5 for kind in apart if size[kind]}


def rows_of(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without the speeds."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in row.items() if k not in ("samples_per_s", "data_wait")} for row in rows
    ]


def free_port() -> int:
    """Below those that the system gives to outgoing connections: nobody takes it in between."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when there was a violation."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=300, help="how many [300]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and world sizes [0]")
    parser.add_argument("--steps", type=int, default=48, help="length of a run [48]")
    parser.add_argument(
        "--same-world-size", action="store_true", help="two ranks in every life: bit for bit [fp32]"
    )
    parser.add_argument(
        "--fresh", type=int, default=15, metavar="N",
        help="every N-th life and the undisturbed run are new processes, not forks; 0: none [15]",
    )  # fmt: skip
    parser.add_argument("--precisions", default="", help="of runs, in turn [fp32,fp64]")
    parser.add_argument("--url", default="", help="checkpoints go below this URL")
    parser.add_argument(
        "--bucket", action="store_true", help="or to an S3 server of our own, through a bad line"
    )
    parser.add_argument("--out", type=Path, help="folder to work in, kept [a temporary one]")
    parser.add_argument("--keep", action="store_true", help="keep the files of good runs as well")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    arguments.precisions = arguments.precisions or (
        "fp32" if arguments.same_world_size else "fp32,fp64"
    )
    torch.set_num_threads(1)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="checkpoint-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--out {folder}: is not empty")
    with contextlib.ExitStack() as stack:
        environment: dict[str, str] = {}
        if arguments.bucket:
            bucket = stack.enter_context(seaweedfs())
            proxy = stack.enter_context(FaultyProxy(bucket.endpoint, arguments.seed))
            for fault, rate in FAULTS.items():
                proxy.inject(fault, rate)
            environment = bucket.through(proxy).environment | {"PIXLOOM_STORAGE_READ_S": "2"}
            os.environ.update(bucket.environment)  # we look at the bucket itself
            arguments.url = f"{bucket.url}/kills"
        campaign = Campaign(arguments, folder.resolve(), stack.enter_context(ForkServer()))
        campaign.environment = environment
        campaign.prepare()
        campaign.go_on()
        if arguments.bucket:
            campaign.totals.faults = dict(proxy.counts)
            uploads = s3_client(bucket).list_multipart_uploads(Bucket=bucket.url.split("/")[2])
            if uploads.get("Uploads"):
                campaign.totals.violations.append({"problems": ["uploads left unfinished"]})
    totals = asdict(campaign.totals)
    if arguments.out is None and not totals["violations"] and not arguments.keep:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(totals))
    else:
        for name, value in totals.items():
            if isinstance(value, dict):
                value = ", ".join(f"{key}: {each}" for key, each in value.items())
            elif isinstance(value, list):
                value = len(value)
            print(f"{name:22} {value}")
    return 1 if totals["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
