"""SIGKILLs of loader workers, ranks and whole jobs that stream shards from S3 over a bad line.

    python tests/faults/stream_kills.py --kills 60

Three ranks with two loader workers each share one node cache, too small for two windows. A run is
killed and started again until it is done; then the next run begins, with the cache as it was left.
At every step that any life logs, its order_digest must be the undisturbed run's, which read a
local copy in one process; the cache must never hold more bytes than it may; and no sample may be
called damaged. What breaks this is a violation: it is printed with the seed, and the exit status
is 1. `--json` prints one JSON object on stdout's last line.

A shard is downloaded once unless it is evicted: in every life, GETs of shards <= shards that the
cache has more than before + evictions (counted through inotify) + replies that the line spoilt.
So a download that two processes make shows in each life that nobody kills, exactly; a kill may
cost as many more as can run at once. Before all that come two lives without faults and kills, for
which there are bounds without evictions too: from a cache large enough each shard is downloaded
once, and from the small one no more often than a window of the order begins to read one.
"""

import argparse
import contextlib
import ctypes
import fcntl
import itertools
import json
import os
import random
import shutil
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed pixloom

from checkpoint_kills import ended, free_port, rows_of
from fork_server import ForkServer, Rank
from servers import FaultyProxy, Server, put_tree, seaweedfs

from pipeline.cache import NUM_DOWNLOADS
from pipeline.order import Order
from shards import pack, storage, synth
from shards.format import Manifest

RANKS, WORKERS = 3, 2
SEED, GLOBAL_SIZE, MICRO_SIZE = 12, 12, 2
LANES, WINDOW, SHARD_SAMPLES = 4, 24, 8
FAULTS = {"unavailable": 0.04, "cut_reply": 0.03, "lost_reply": 0.03, "stall": 0.01}
"""of the bad line, and how many of all requests each strikes"""
SPOILT = ("cut_reply", "lost_reply", "stall")
"""faults after which a shard is asked for again, although the storage sent it"""
MOST_AT_ONCE = NUM_DOWNLOADS + RANKS * WORKERS
"""downloads that a kill can interrupt: the look-ahead's, and one of each worker"""
SURVIVORS_S = 45.0
LIFE_S = 300.0
MAX_VIOLATIONS = 10

CONFIG = f"""\
[run]
seed = {SEED}
log_every_steps = 1
[data]
window = {WINDOW}
lanes = {LANES}
[batch]
global_size = {GLOBAL_SIZE}
micro_size = {MICRO_SIZE}
[model]
name = "seq2seq"
channels = [8, 16]
hidden_dim = 32
embed_dim = 16
[optim]
lr = 1e-3
[validate]
every_steps = 25
batch_size = 2
[checkpoint]
every_steps = 3
"""


@dataclass
class Totals:
    """What a campaign reports."""

    seed: int
    kills: dict[str, int] = field(default_factory=lambda: {"worker": 0, "rank": 0, "job": 0})
    lives: int = 0
    runs_completed: int = 0
    steps_compared: int = 0
    shards: int = 0
    shard_bytes: int = 0
    cache_bytes: int = 0
    most_cached_bytes: int = 0
    downloads_undisturbed: int = 0
    """of shards, by one life with room for all of them"""
    epochs_undisturbed: float = 0.0
    downloads_small_cache: int = 0
    """the same with the small cache, no faults and no kills"""
    evictions_small_cache: int = 0
    needs_small_cache: int = 0
    """shards that the windows of its steps begin to read, counting repetitions"""
    downloads_disturbed: int = 0
    evictions_disturbed: int = 0
    steps_disturbed: int = 0
    """that were trained in all lives, some of them more than once"""
    faults: dict[str, int] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Campaign:
    """Runs that are killed until they are done, in one folder."""

    def __init__(
        self, arguments: argparse.Namespace, folder: Path, server: ForkServer, bucket: Server,
        proxy: FaultyProxy,
    ) -> None:  # fmt: skip
        self.arguments, self.folder, self.server, self.bucket = arguments, folder, server, bucket
        self.proxy, self.through = proxy, bucket.through(proxy)
        self.totals = Totals(arguments.seed)
        self.config = folder / "config.toml"
        self.data, self.url = folder / "data", f"{bucket.url}/screens"
        self.digests: dict[int, str] = {}
        self.shas: set[str] = set()
        """of the training shards"""
        self.life_s = 5.0
        """how long a life of a whole run takes; learnt"""

    def prepare(self) -> None:
        """Packs a dataset and copies it to the bucket; runs the undisturbed run."""
        raw = self.folder / "raw"
        with contextlib.redirect_stdout(sys.stderr):
            synth.main([str(raw), "--samples", "250", "--seed", "5"])
            words = f"--size 80x48 --split train=rest,val=6 --shard-samples {SHARD_SAMPLES}"
            assert pack.main([str(raw), str(self.data), *words.split(), "--workers", "0"]) == 0
        put_tree(self.data, self.url)
        manifest: Manifest = storage.load_manifest(str(self.data))
        sizes = [entry.bytes for entry in manifest.splits["train"]]
        self.totals.shards, self.totals.shard_bytes = len(sizes), sum(sizes)
        self.shas = {entry.sha256 for entry in manifest.splits["train"]}
        # A lane's window touches one shard more than it fills; two windows would be twice this.
        files_of_window = LANES * (WINDOW // SHARD_SAMPLES + 1)
        self.totals.cache_bytes = int(1.4 * files_of_window * (max(sizes) + 2000))
        self.config.write_text(CONFIG)
        log = self.folder / "whole"
        ranks = self.start(self.folder / "whole-run", log, str(self.data), {}, ranks=1)
        with ended(ranks):
            assert ranks[0].wait() == 0, f"the undisturbed run failed; see {log}"
        self.digests = self.digests_of(self.folder / "whole-run")

    def digests_of(self, run: Path) -> dict[int, str]:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return {r["step"]: r["order_digest"] for r in rows_of(run) if "order_digest" in r}
        return {}

    def start(
        self, run: Path, logs: Path, url: str, environment: Mapping[str, str], *, ranks: int,
        words: Sequence[str] = (),
    ) -> list[Rank]:  # fmt: skip
        logs.mkdir(parents=True, exist_ok=True)
        flags = {
            "--config": self.config, "--run.dir": run, "--run.steps": self.arguments.steps,
            "--data.url": url, "--data.workers": WORKERS if ranks > 1 else 0,
        }  # fmt: skip
        shared = {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "ACCELERATE_USE_CPU": "true",
            **environment,
        }
        texts = [str(word) for pair in flags.items() for word in pair] + list(words)
        return [
            self.server.start(
                texts, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, logs / f"rank-{r}.log"
            )
            for r in range(ranks)
        ]

    def stream(
        self, run: Path, logs: Path, cache: Path, cache_bytes: int, server: Server
    ) -> list[Rank]:
        words = ["--data.cache_dir", str(cache), "--data.cache_bytes", str(cache_bytes)]
        environment = server.environment | {"PIXLOOM_STORAGE_READ_S": "2"}
        return self.start(run, logs, self.url, environment, ranks=RANKS, words=words)

    def count_downloads(self, name: str, cache_bytes: int) -> tuple[int, int]:
        """One life that nobody disturbs; shards that it downloaded and that it evicted, counting
        repetitions."""
        self.proxy.reset()
        logs, cache = self.folder / name, self.folder / f"{name}-cache"
        with Traffic(cache, self.proxy, self.shas) as traffic:
            start_s = time.monotonic()
            ranks = self.stream(self.folder / f"{name}-run", logs, cache, cache_bytes, self.through)
            with ended(ranks), Bound(cache) as bound:
                if any(rank.wait() for rank in ranks):
                    self.violate(f"a run that nobody disturbed failed; see {logs}")
            self.life_s = time.monotonic() - start_s
            self.check(name, self.folder / f"{name}-run", logs, bound, cache_bytes)
            self.check_downloads(name, traffic, killed=False)
            return traffic.num_gets, traffic.num_evicted

    def check_downloads(self, name: str, traffic: "Traffic", *, killed: bool) -> None:
        """Every download of the last life must have brought a shard, or been spoilt."""
        num_gets, num_explained = traffic.end_life()
        most = num_explained + (MOST_AT_ONCE if killed else 0)
        if num_gets > most:
            self.violate(f"{name}: {num_gets} downloads of shards, {most} explain themselves")

    def num_needs(self) -> int:
        """How often a window of a run's steps begins to read a shard."""
        entries = storage.load_manifest(str(self.data)).splits["train"]
        order = Order(
            [entry.samples for entry in entries], seed=SEED, global_size=GLOBAL_SIZE,
            micro_size=MICRO_SIZE, lanes=LANES, window=WINDOW,
        )  # fmt: skip
        uses = order.uses(0, range(GLOBAL_SIZE))
        begun = itertools.takewhile(lambda use: use.first_step < self.arguments.steps, uses)
        return sum(len(use.shards) for use in begun)

    def go_on(self) -> None:
        """Runs, one after another, until enough kills are done."""
        start_s = time.monotonic()
        totals = self.totals
        totals.downloads_undisturbed, _ = self.count_downloads("plenty", 10 * totals.shard_bytes)
        num_samples = storage.load_manifest(str(self.data)).num_samples("train")
        totals.epochs_undisturbed = round(self.arguments.steps / (num_samples // GLOBAL_SIZE), 2)
        if totals.downloads_undisturbed > totals.shards:
            self.violate(
                f"{totals.downloads_undisturbed} downloads of {totals.shards} shards, by one life "
                "with room for all"
            )
        totals.downloads_small_cache, totals.evictions_small_cache = self.count_downloads(
            "small", totals.cache_bytes
        )
        totals.needs_small_cache = self.num_needs()
        if totals.downloads_small_cache > totals.needs_small_cache:
            self.violate(
                f"{totals.downloads_small_cache} downloads to the small cache, which windows begin "
                f"to need {totals.needs_small_cache} times"
            )
        self.proxy.reset()
        for kind, rate in FAULTS.items():
            self.proxy.inject(kind, rate)
        with Traffic(self.folder / "cache", self.proxy, self.shas) as traffic:
            number = 0
            while sum(totals.kills.values()) < self.arguments.kills:
                number += 1
                self.one_run(number, traffic)
                if len(totals.violations) >= MAX_VIOLATIONS:
                    break
            totals.downloads_disturbed = traffic.num_gets
            totals.evictions_disturbed = traffic.num_evicted
        totals.faults = dict(self.proxy.counts)
        totals.seconds = round(time.monotonic() - start_s, 1)

    def one_run(self, number: int, traffic: "Traffic") -> None:
        """One run from its first life to its end, or to its first violation."""
        rng = random.Random(f"{self.arguments.seed} {number}")
        run, totals = self.folder / f"run-{number:03d}", self.totals
        cache = traffic.folder
        life = 0
        while True:
            totals.lives += 1
            logs = self.folder / f"run-{number:03d}-logs" / f"life-{life:03d}"
            enough = sum(totals.kills.values()) >= self.arguments.kills
            whom = rng.choice(["worker", "rank", "job"])
            at_s = rng.uniform(0.5, self.life_s)
            begin = max(self.digests_of(run), default=0)
            traffic.begin_life()
            ranks = self.stream(run, logs, cache, totals.cache_bytes, self.through)
            killed = False
            with ended(ranks), Bound(cache) as bound:
                if not enough and not self.all_end_within(ranks, at_s):
                    killed = self.kill(whom, ranks, rng)
                limit_s = LIFE_S
                if killed:
                    met = "; steps " in (logs / "rank-0.log").read_text(errors="replace")
                    # Before all have met only a launcher can know that one will never come.
                    limit_s = SURVIVORS_S if met or whom == "job" else 1.0
                over = self.all_end_within(ranks, limit_s)
                if not over and limit_s > 1.0:
                    self.violate(f"ranks still ran {limit_s:.0f} s later ({whom}); see {logs}")
                for rank in ranks:
                    rank.kill()
                statuses = [rank.wait() for rank in ranks]
            totals.kills[whom] += killed
            if not killed and any(statuses):
                self.violate(f"exit statuses {statuses} of a life that nobody killed; see {logs}")
            name = f"run {number} life {life}"
            self.check(name, run, logs, bound, totals.cache_bytes)
            self.check_downloads(f"{name}; see {logs}", traffic, killed=killed)
            reached = max(self.digests_of(run), default=0)
            totals.steps_disturbed += max(0, reached - begin)
            print(
                f"{sum(totals.kills.values())}/{self.arguments.kills}  run {number} life {life}: "
                f"steps {begin} to {reached}, {f'killed a {whom}' if killed else 'done'}",
                file=sys.stderr,
                flush=True,
            )
            if len(totals.violations) >= MAX_VIOLATIONS:
                return
            if not killed:
                if reached != self.arguments.steps:
                    self.violate(f"ended at step {reached} of {self.arguments.steps}; see {logs}")
                totals.runs_completed += 1
                return
            life += 1

    def all_end_within(self, ranks: Sequence[Rank], seconds: float) -> bool:
        deadline_s = time.monotonic() + seconds
        return all(rank.ends_within(max(0.0, deadline_s - time.monotonic())) for rank in ranks)

    def kill(self, whom: str, ranks: Sequence[Rank], rng: random.Random) -> bool:
        """SIGKILL; False when there was nobody left to kill."""
        if whom == "job":
            for rank in ranks:
                rank.kill()
            return True
        if whom == "rank":
            rng.choice(ranks).kill()
            return True
        workers: list[psutil.Process] = []
        for rank in ranks:
            with contextlib.suppress(psutil.Error):
                workers += psutil.Process(rank.pid).children()
        if not workers:
            rng.choice(ranks).kill()  # none has been started yet
            return True
        with contextlib.suppress(psutil.Error):
            rng.choice(workers).kill()
        return True

    def check(self, name: str, run: Path, logs: Path, bound: "Bound", cache_bytes: int) -> None:
        """Order, bound and ledger after a life."""
        self.totals.most_cached_bytes = max(
            self.totals.most_cached_bytes,
            bound.most_bytes if cache_bytes == self.totals.cache_bytes else 0,
        )
        if bound.most_bytes > cache_bytes:
            self.violate(f"{name}: the cache held {bound.most_bytes} bytes, not {cache_bytes}")
        for step, digest in self.digests_of(run).items():
            self.totals.steps_compared += 1
            if digest != self.digests[step]:
                self.violate(f"{name}: another order_digest at step {step}; see {logs}")
                break
        if (run / "damaged.txt").exists():
            self.violate(f"{name}: samples were called damaged; see {run / 'damaged.txt'}")

    def violate(self, text: str) -> None:
        print(f"VIOLATION {text}", file=sys.stderr, flush=True)
        self.totals.violations.append(text)


class Bound:
    """Watches how many bytes a cache holds, at moments when none is evicted or reserved."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.most_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Bound":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            sizes: dict[int, int] = {}  # by inode: a file may be renamed while we look
            with contextlib.suppress(FileNotFoundError), locked(self.folder):
                for path in self.folder.iterdir():
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        sizes[stat.st_ino] = stat.st_size
            self.most_bytes = max(self.most_bytes, sum(sizes.values()))


# From linux/inotify.h
IN_MOVED_TO, IN_DELETE, IN_Q_OVERFLOW = 0x80, 0x200, 0x4000
INOTIFY_EVENT = struct.Struct("iIII")


class Traffic:
    """Shards that come to a new cache over `proxy`, and those that leave it.

    Who survived a life's kills may still download when the next one begins. That counts where it
    explains more: the start looks at the cache before it looks at the line, the end after it.
    """

    def __init__(self, folder: Path, proxy: FaultyProxy, shas: set[str]) -> None:
        self.folder, self.proxy = folder, proxy
        self.num_evicted = 0
        self._names = {f"{sha256}.tar" for sha256 in shas}
        folder.mkdir()
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        # Equal events that follow each other are told as one: so arrivals are watched as well.
        mask = IN_MOVED_TO | IN_DELETE
        added = libc.inotify_add_watch(self._fd, os.fsencode(folder), mask)
        assert added >= 0, os.strerror(ctypes.get_errno())
        self.begin_life()

    def __enter__(self) -> "Traffic":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    @property
    def num_gets(self) -> int:
        """Requests for shards that were answered, whether or not all of the answer arrived."""
        gets = self.proxy.gets.items()
        return sum(n for path, n in gets if "/train/" in path and path.endswith(".tar"))

    def begin_life(self) -> None:
        self._spoilt_before = self._count_spoilt()
        self._arrived_before = self._count_arrived()
        self._gets_before = self.num_gets

    def end_life(self) -> tuple[int, int]:
        """Of this life: answered requests for shards; shards that arrived, evicted since or not,
        and spoilt answers."""
        num_gets = self.num_gets - self._gets_before
        num_arrived = self._count_arrived() - self._arrived_before
        return num_gets, num_arrived + self._count_spoilt() - self._spoilt_before

    def _count_spoilt(self) -> int:
        return sum(self.proxy.counts[kind] for kind in SPOILT)

    def _count_arrived(self) -> int:
        with contextlib.suppress(FileNotFoundError), locked(self.folder):
            self._count_evicted()
            return self.num_evicted + sum(p.name in self._names for p in self.folder.iterdir())
        return 0

    def _count_evicted(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                buffer, offset = os.read(self._fd, 65536), 0
                while offset < len(buffer):
                    _, mask, _, size = INOTIFY_EVENT.unpack_from(buffer, offset)
                    offset += INOTIFY_EVENT.size + size
                    assert not mask & IN_Q_OVERFLOW, "events were lost"
                    name = os.fsdecode(buffer[offset - size : offset].rstrip(b"\0"))
                    self.num_evicted += bool(mask & IN_DELETE) and name in self._names


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within the block, no file of the cache appears, grows or is evicted.

    Raises `FileNotFoundError`: the folder is no cache yet.
    """
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when there was a violation."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60, help="how many [60]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [0]")
    parser.add_argument("--steps", type=int, default=60, help="length of a run [60]")
    parser.add_argument("--out", type=Path, help="folder to work in, kept [a temporary one]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    folder = arguments.out or Path(tempfile.mkdtemp(prefix="stream-kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"--out {folder}: is not empty")
    with contextlib.ExitStack() as stack:
        bucket = stack.enter_context(seaweedfs())
        os.environ.update(bucket.environment)
        proxy = stack.enter_context(FaultyProxy(bucket.endpoint, arguments.seed))
        server = stack.enter_context(ForkServer())
        campaign = Campaign(arguments, folder.resolve(), server, bucket, proxy)
        campaign.prepare()
        campaign.go_on()
    totals: dict[str, Any] = asdict(campaign.totals)
    if arguments.out is None and not totals["violations"]:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(totals))
    else:
        print("\n".join(f"{name:24} {value}" for name, value in totals.items()))
    return 1 if totals["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
