"""A pack that is killed, or whose disk fails, at each of its system calls, and at random moments.

    python tests/faults/pack_kills.py --kills 200           everything
    python tests/faults/pack_kills.py --kills 0 --every 7   a seventh of the calls alone

Calls: a small pack is traced (by `strace`, of the Debian package of that name) to list each call
that opens, writes, forces, renames, makes or removes a file below OUT. It is then done again and
again, and at one of these calls the process is killed; or the call fails, with ENOSPC and with EIO,
which must end the pack with exit status 2 and one line that names a file of OUT. After each, a
second call must leave what a pack leaves that nothing disturbed, byte for byte.

Kills: a larger pack on two processes is killed, and started again, until it is done: the driver,
one of its workers, or all at once. A killed worker must not end the pack. The end must be byte for
byte that of an undisturbed pack, no shard that had its receipt may be written again, and a kill may
cost the shards that were being written, one a worker.

What breaks this is a violation: it is printed with the seed, its files are kept, and the exit
status is 1. `--json` prints one JSON object on stdout's last line.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # numpy would start threads, which a fork loses
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # this checkout, not an installed pixloom

import psutil  # noqa: E402
from PIL import Image  # noqa: E402

from shards import pack  # noqa: E402
from shards.storage import SCRATCH_NAME  # noqa: E402

FAILING = ("openat", "write", "fsync", "rename")
CALLS = (*FAILING, "mkdir", "unlink", "unlinkat", "rmdir")
ERRORS = ("ENOSPC", "EIO")
NUM_WORKERS = 2
MAX_VIOLATIONS = 20
"""more say nothing new"""
LIFE_S = 120.0
SURVIVORS_S = 10.0
"""how long workers may go on after their driver was killed"""


@dataclass(frozen=True)
class Call:
    """The `number`-th call of `name` that the pack makes, counted from 1, of which `text` tells."""

    name: str
    number: int
    text: str


@dataclass
class Totals:
    """What a campaign reports."""

    seed: int
    calls_of_a_pack: dict[str, int] = field(default_factory=dict)
    """below OUT, by name"""
    kills_at_calls: int = 0
    failed_calls: int = 0
    failures_without_effect: int = 0
    """of calls whose failure changes nothing: the pack went on, and ended well"""
    kills: dict[str, int] = field(default_factory=lambda: {"driver": 0, "worker": 0, "group": 0})
    packs_completed: int = 0
    shards_begun_at_kills: int = 0
    """that had to be written again, at all kills of drivers and groups"""
    most_begun_at_a_kill: int = 0
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """Packs in one folder that are disturbed until all of it is done."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.totals = Totals(arguments.seed)
        self.rng = random.Random(arguments.seed)
        self.num_kept = 0

    def go(self) -> None:
        start_s = time.monotonic()
        with contextlib.suppress(KeyboardInterrupt):
            if self.arguments.every:
                self.disturb_calls()
            if self.arguments.kills:
                self.kill_at_random()
        self.totals.seconds = round(time.monotonic() - start_s, 1)

    def violation(self, what: str, out: Path, said: str = "") -> None:
        kept = self.folder / f"violation-{self.num_kept}"
        self.num_kept += 1
        if out.exists():
            shutil.copytree(out, kept)
        text = f"{what}; seed {self.arguments.seed}; files: {kept}" + (f"; {said}" if said else "")
        print(f"VIOLATION {text}", file=sys.stderr, flush=True)
        self.totals.violations.append(text)

    # Calls

    def disturb_calls(self) -> None:
        raw, out = self.folder / "few", self.folder / "out"
        make_pairs(raw, 12, (32, 32), random.Random(5))
        words = [str(raw), str(out), "--shard-samples", "4", "--split", "train=1"]
        words += ["--workers", "0"]
        calls = self.calls_of(words, out)
        expected = tree(out)
        self.totals.calls_of_a_pack = dict(Counter(call.name for call in calls))
        first = self.rng.randrange(self.arguments.every)
        for call in calls[first :: self.arguments.every]:
            for fault in ("SIGKILL", *(ERRORS if call.name in FAILING else ())):
                shutil.rmtree(out, ignore_errors=True)
                self.disturb(call, fault, words, out, expected)
                if len(self.totals.violations) >= MAX_VIOLATIONS:
                    return

    def calls_of(self, words: list[str], out: Path) -> list[Call]:
        """Every call that touches OUT, in order, of a pack that is only watched."""
        status, said, trace = self.traced(words)
        if status != 0:
            raise SystemExit(f"the undisturbed pack failed: {said}")
        numbers: Counter[str] = Counter()
        calls = []
        for line in trace.splitlines():
            found = re.match(r"\d+ +(\w+)\(", line)
            if found and found[1] in CALLS:
                numbers[found[1]] += 1
                if str(out) in line:
                    calls.append(Call(found[1], numbers[found[1]], line))
        return calls

    def disturb(
        self, call: Call, fault: str, words: list[str], out: Path, expected: dict[str, str]
    ) -> None:
        """One pack in which `fault` comes at `call`, and the pack after it."""
        what = f"{fault} at {call.name} number {call.number} ({call.text.partition(' ')[2][:160]})"
        action = "signal=SIGKILL" if fault == "SIGKILL" else f"error={fault}"
        inject = ["-e", f"inject={call.name}:{action}:when={call.number}"]
        status, said, trace = self.traced(words, *inject)
        hit = [line for line in trace.splitlines() if "(INJECTED)" in line]
        if fault == "SIGKILL":
            self.totals.kills_at_calls += 1
            # Of the last call not all of the arguments may be told.
            if status != -signal.SIGKILL or trace.count(f" {call.name}(") != call.number:
                self.violation(f"{what}: missed, the pack ended with {status}", out, said)
        else:
            self.totals.failed_calls += 1
            lines = said.splitlines()
            if not hit or str(out) not in hit[0]:
                self.violation(f"{what}: missed", out, said)
            elif status == 0 and tree(out) == expected:
                self.totals.failures_without_effect += 1
                print(f"without effect: {what}", file=sys.stderr, flush=True)
            elif status != 2 or len(lines) != 1 or str(out) not in said or "Traceback" in said:
                self.violation(f"{what}: exit status {status}", out, said)
        status, said = self.plain(words)
        if status != 0:
            self.violation(f"{what}: the next pack ended with {status}", out, said)
        elif tree(out) != expected:
            self.violation(f"{what}: the next pack left {differences(expected, tree(out))}", out)

    def traced(self, words: list[str], *options: str) -> tuple[int, str, str]:
        """A pack under `strace`: its exit status, what it said, and the calls."""
        trace = self.folder / "trace"
        pid, release = self.forked(words)
        command = ["strace", "-f", "-y", "-p", str(pid), "-o", str(trace)]
        command += ["-e", f"trace={','.join(CALLS)}", *options]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert tracer.stderr is not None
        # Said once the process is stopped. /proc names the tracer before: calls between are missed.
        line = tracer.stderr.readline()
        if "attached" not in line:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise SystemExit(f"strace ended with {line}{tracer.stderr.read()}")
        os.write(release, b"x")
        os.close(release)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        tracer.communicate()
        return status, self.said(), trace.read_text(errors="replace")

    def plain(self, words: list[str]) -> tuple[int, str]:
        pid, release = self.forked(words)
        os.write(release, b"x")
        os.close(release)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), self.said()

    def said(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def forked(self, words: list[str]) -> tuple[int, int]:
        """A process that packs once it is written to. Forked: a new one imports for a second."""
        assert len(list(Path("/proc/self/task").iterdir())) == 1, "a fork would lose threads"
        wait, release = os.pipe()
        pid = os.fork()
        if pid:
            os.close(wait)
            return pid, release
        status = 99
        try:
            os.close(release)
            for number, name in ((1, "stdout"), (2, "stderr")):
                file = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, number)
                os.close(file)
            if os.read(wait, 1):
                status = pack.main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    # Kills

    def kill_at_random(self) -> None:
        raw, whole = self.folder / "many", self.folder / "whole"
        make_pairs(raw, 64, (320, 200), random.Random(6))
        options = ["--shard-samples", "2", "--split", "train=1", "--encode", "webp"]
        start_s = time.monotonic()
        if self.start([str(raw), str(whole), *options], "whole").wait() != 0:
            raise SystemExit("the undisturbed pack failed")
        life_s = time.monotonic() - start_s
        expected = tree(whole)
        targets = ("driver", "worker", "group")
        number = 0
        while sum(self.totals.kills.values()) < self.arguments.kills:
            number += 1
            out = self.folder / f"pack-{number:03d}"
            words = [str(raw), str(out), *options]
            while True:
                left = self.arguments.kills - sum(self.totals.kills.values())
                target = self.rng.choice(targets) if left > 0 else ""
                # By the clock, or once so many more shards are there.
                at_s, at_receipts = life_s, len(expected)
                if self.rng.random() < 0.3:
                    at_s = self.rng.uniform(0.3, life_s)
                else:
                    at_receipts = len(receipts(out)) + self.rng.randrange(16)
                if self.live(words, out, target, at_s, at_receipts):
                    break
                if len(self.totals.violations) >= MAX_VIOLATIONS:
                    return
            if tree(out) != expected:
                self.violation(f"a pack left {differences(expected, tree(out))}", out)
            self.totals.packs_completed += 1
            shutil.rmtree(out)

    def live(self, words: list[str], out: Path, target: str, at_s: float, at_receipts: int) -> bool:
        """One start of a pack, with one kill at most. Whether it completed."""
        deadline_s = time.monotonic() + at_s
        before = receipts(out)
        process = self.start(words, out.name)
        victim = process.pid
        group = []
        if target:
            while process.poll() is None and time.monotonic() < deadline_s:
                if len(receipts(out)) > at_receipts:
                    time.sleep(self.rng.uniform(0, 0.05))
                    break
                time.sleep(0.002)
            if process.poll() is not None:
                target = ""  # it was done before
        if target:
            group = workers_of(process.pid)
            if target == "worker":
                if not group:
                    target = "driver"
                else:
                    victim = self.rng.choice(group)
            with contextlib.suppress(ProcessLookupError):
                if target == "group":
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    os.kill(victim, signal.SIGKILL)
            self.totals.kills[target] += 1
        try:
            status = process.wait(LIFE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.violation(f"a pack hangs after a kill of its {target or 'nothing'}", out)
            return True
        said = (self.folder / f"{out.name}.log").read_text()
        if target in ("driver", "group") and status == -signal.SIGKILL:
            self.check_death(out, before, group)
            print(f"killed {target} at {len(receipts(out))} receipts", file=sys.stderr, flush=True)
            return False
        if status != 0:
            self.violation(f"exit status {status} after a kill of its {target}", out, said)
        self.check_kept(out, before)
        return True

    def check_death(self, out: Path, before: dict[str, int], group: Sequence[int]) -> None:
        """What a killed driver may leave."""
        deadline_s = time.monotonic() + SURVIVORS_S
        while any(map(runs, group)):
            if time.monotonic() > deadline_s:
                self.violation("workers still run after their driver was killed", out)
                return
            time.sleep(0.01)
        self.check_kept(out, before)
        done = {name.removesuffix(".json") for name in receipts(out)}
        begun = {
            f"train/{path.stem.removeprefix('train-')}"
            for path in (*out.glob("train/*.tar"), *out.glob(f"{SCRATCH_NAME}/train-*.tar"))
        }
        begun = {name for name in begun if name not in done}
        self.totals.shards_begun_at_kills += len(begun)
        self.totals.most_begun_at_a_kill = max(self.totals.most_begun_at_a_kill, len(begun))
        if len(begun) > NUM_WORKERS:
            self.violation(f"{len(begun)} shards were begun by {NUM_WORKERS} workers", out)

    def check_kept(self, out: Path, before: dict[str, int]) -> None:
        now = receipts(out)
        if wrong := [name for name in before if now.get(name) != before[name]]:
            self.violation(f"{wrong}: was written again, or is gone", out)

    def start(self, words: list[str], name: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-W", "error", "-m", "shards.pack", *words]
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(
                [*command, "--workers", str(NUM_WORKERS)],
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )


def make_pairs(folder: Path, count: int, size: tuple[int, int], rng: random.Random) -> None:
    folder.mkdir()
    for number in range(count):
        noise = Image.frombytes("RGB", (16, 10), rng.randbytes(16 * 10 * 3))
        noise.resize(size).save(folder / f"{number:03d}.png")
        words = " ".join(rng.choices(["row", "btn", "text"], k=6))
        (folder / f"{number:03d}.gui").write_text(f"{words} {number}")


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones too, by relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(expected.keys() | found.keys())
    return ", ".join(name for name in names if expected.get(name) != found.get(name))


def receipts(out: Path) -> dict[str, int]:
    """When each receipt was written, in nanoseconds, by name."""
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("train/0*.json")
    }


def workers_of(pid: int) -> list[int]:
    """They are children of the one process that forks them."""
    with contextlib.suppress(psutil.Error):
        servers = psutil.Process(pid).children()
        return [child.pid for server in servers for child in server.children()]
    return []


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when there was a violation."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="at random moments [200]")
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="N-th call; 0: no calls [1]"
    )
    parser.add_argument("--seed", type=int, default=0, help="of calls and moments [0]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    if arguments.every and shutil.which("strace") is None:
        parser.error("strace is not installed: `apt-get install strace`, or give --every 0")
    folder = Path(tempfile.mkdtemp(prefix="pack-kills-")).resolve()
    campaign = Campaign(arguments, folder)
    campaign.go()
    totals = asdict(campaign.totals)
    if not totals["violations"]:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(totals))
    else:
        for name, value in totals.items():
            print(f"{name:24} {len(value) if isinstance(value, list) else value}")
    return 1 if totals["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
