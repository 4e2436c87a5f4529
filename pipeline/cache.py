"""A node's cache of shards that lie on an object store: bounded, shared, filled ahead of need.

The folder is all the state there is. Every process of the node, and of other jobs, works on it
alone, and may be killed at any moment:

    SHA256.tar              a shard whose size and hash were checked
    SHA256.damaged          what the storage has in its place, after two attempts; never trusted
    SHA256-URLHASH.meta     an index or a receipt, after a line with its own hash
    *.part                  a download; whoever holds its `flock` is making it, and its size is
                            reserved from the beginning
    .lock                   held (`flock`) to make room or to rename: nothing else appears, grows
                            or is evicted then. It says how much the folder holds at most

The mtime of a shard says when a job last read it, or still wanted it (within TOUCH_S). Nothing is
forced to the disk: it can be fetched again, and samples carry a CRC-32. Which shard is needed when
comes from the order (`Schedule`); what the bytes mean is `pipeline.stream`'s business.
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import re
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pipeline.order import ShardUse
from shards import storage
from shards.errors import tell
from shards.format import FormatError, ShardEntry
from shards.storage import MissingError, UserError, redact

T = TypeVar("T")

PART_BYTES = 16 << 20
"""Of one request; a download holds as much in memory."""
NUM_ATTEMPTS = 2
"""Of a download that arrives damaged; each request in it has the storage's own attempts."""
MAX_RECHECKS = 3
"""Of a shard, by one process: a disk may spoil whatever is written to it."""
NUM_DOWNLOADS = 6
"""Of the look-ahead, side by side."""
IDLE_S = 60.0
"""A file unknown to this job and neither read nor wanted for so long is taken for nobody's."""
TOUCH_S = 10.0
"""How old the mark (mtime) of a file that is read or wanted may be."""
POLL_S = 0.02
MAX_COUNTED_USES = 4096
"""Before a run begins: an epoch of a billion samples has 100,000 and more."""
MANY_FILES = 1000
"""Listing more takes so long that a fiftieth of the bound is made free at once."""

logger = logging.getLogger(__name__)

_LOCK_NAME = ".lock"
_HELD_BYTES = 20
"""Of what `.lock` says."""
_FILE = re.compile(r"([0-9a-f]{64})(?:-[0-9a-f]{16})?\.(tar|damaged|meta|part)")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Uses = Callable[[int], Iterator[ShardUse]]
"""From a step: which shards are needed when, in order of `first_step`."""


class Shard(NamedTuple):
    """A shard of the dataset at `root`, the `dataset`-th of those that a run reads."""

    root: str
    entry: ShardEntry
    dataset: int = 0

    @property
    def url(self) -> str:
        return storage.join(self.root, self.entry.name)

    @property
    def is_remote(self) -> bool:
        return storage.is_remote(self.root)


class Need(NamedTuple):
    """When something is needed; the smaller, the sooner. `depth` 0 is what runs now (a validation
    within training), `depth` 1 what waits for it. An infinite `step` is later than was looked."""

    depth: int
    step: float


@dataclass(frozen=True)
class CachedFile:
    """What eviction knows of a file. `need` is None where no schedule has a use for it."""

    name: str
    bytes: int
    used_s: float
    """when it was last read, wanted or made"""
    need: Need | None
    is_lingering: bool
    """its last use is over, but for a process that lags behind"""
    is_own: bool
    """of this job's datasets"""


def choose_victims(
    files: Iterable[CachedFile], num_bytes: int, need: Need, *, now_s: float, speculative: bool
) -> list[str] | None:
    """The names of files to remove so that `num_bytes` come free for what is needed at `need`.

    In this order: what nobody is known to need (of this job, or not wanted by another one for
    `IDLE_S`), the least recently used first; what is needed later than `need`, the latest first
    (Belady, 1966); what lingers; what others want; what is needed sooner. The last three only for
    a reader that waits: a `speculative` download never does such harm. So jobs that share a folder
    leave each other the shards that they have fetched ahead, whether or not all sets fit.

    None when there is not so much to remove.
    """

    def rank(file: CachedFile) -> tuple[float, ...]:
        if file.need is None:
            if file.is_own or now_s - file.used_s >= IDLE_S:
                return (0, file.used_s)
            return (3, file.used_s)
        # By size too: of those that are just late, the same ones stay, and some until needed.
        latest_first = (-file.need.depth, -file.need.step, -file.bytes)
        if file.is_lingering:
            return (2, *latest_first)
        return (1 if file.need > need else 4, *latest_first)

    chosen: list[CachedFile] = []
    freed_bytes = 0
    for file in sorted(files, key=rank):
        if freed_bytes >= num_bytes or (speculative and rank(file)[0] > 1):
            break
        chosen.append(file)
        freed_bytes += file.bytes
    if freed_bytes < num_bytes:
        return None
    for file in reversed(chosen):  # those whose room a later, larger one made unnecessary
        if freed_bytes - file.bytes >= num_bytes:
            chosen.remove(file)
            freed_bytes -= file.bytes
    return [file.name for file in chosen]


class Schedule:
    """What one reader will read: `uses` of `shards`, from `step` on, which its reader moves.

    Processes of a node are not at one step: uses that ended up to `slack_steps` ago count as
    needed still. Can be pickled where `uses` can.
    """

    def __init__(self, shards: Sequence[Shard], uses: Uses, *, step: int, slack_steps: int) -> None:
        self.shards = shards
        self.uses = uses
        self.step = step
        self.slack_steps = slack_steps
        self.numbers: dict[str, list[int]] = defaultdict(list)
        for number, shard in enumerate(shards):
            self.numbers[shard.entry.sha256].append(number)


class Timeline:
    """When each shard of one schedule is needed next. Reads its uses lazily, and forgets those
    that are over; asking with growing steps costs O(1) each in the mean.

    It reads on until shards of four times `room_bytes` are needed. What comes after them is just
    late, in no order: a cache of that room has been filled anew by then.
    """

    def __init__(self, schedule: Schedule, room_bytes: int) -> None:
        self._schedule = schedule
        self._most_bytes = 4 * room_bytes
        # A node may not see a shard for some epochs, and some never.
        self._most_uses = 64 + 4 * len(schedule.shards)
        self._begin(schedule.step - schedule.slack_steps)

    def _begin(self, step: int) -> None:
        self._asked = max(0, step)
        self._source = self._schedule.uses(self._asked)
        self._ahead: dict[int, list[ShardUse]] = {}
        self._num_uses = 0
        self._num_bytes = 0
        self._middle_step: float = float("inf")
        self._is_full = False

    def next_use(self, shard: int) -> tuple[float | None, bool]:
        """(first step at which it is needed, whether it lingers); None for never, infinity for
        late."""
        step = self._schedule.step
        since = max(0, step - self._schedule.slack_steps)
        if since < self._asked or (self._is_full and since > self._middle_step):
            self._begin(since)
        self._asked = since
        while not self._is_needed(shard, step) and self._read_more(since):
            pass
        uses = self._ahead.get(shard, [])
        while uses and uses[0].last_step < since:
            del uses[0]
        lingers = bool(uses) and uses[0].last_step < step
        unknown = float("inf") if self._is_full else None
        return next(
            (max(u.first_step, step) for u in uses if u.last_step >= step), unknown
        ), lingers

    def _is_needed(self, shard: int, step: int) -> bool:
        uses = self._ahead.get(shard, [])
        return bool(uses) and uses[-1].last_step >= step

    def _read_more(self, since: int) -> bool:
        use = None if self._is_full else next(self._source, None)
        if use is None:
            return False
        if use.last_step >= since:
            for number in use.shards:
                if number not in self._ahead:
                    self._ahead[number] = []
                    shard = self._schedule.shards[number]
                    self._num_bytes += shard.entry.bytes if shard.is_remote else 0
                self._ahead[number].append(use)
            self._num_uses += len(use.shards)
            part = max(self._num_uses / self._most_uses, self._num_bytes / self._most_bytes)
            if part >= 0.5:
                self._middle_step = min(self._middle_step, use.first_step)
            self._is_full = part >= 1
        return True


class Outlook:
    """One thread's view of all schedules: the thread that evicts has its own, because a fork may
    come while another thread is inside an iterator."""

    def __init__(self) -> None:
        self._timelines: dict[Schedule, Timeline] = {}

    def follow(self, schedules: Sequence[Schedule], room_bytes: int) -> None:
        """Looks at these schedules from now on, for a cache of `room_bytes`."""
        self._timelines = {
            schedule: self._timelines.get(schedule) or Timeline(schedule, room_bytes)
            for schedule in schedules
        }

    def of(self, sha256: str) -> tuple[Need | None, bool]:
        """When a shard is needed next, and whether it lingers."""
        best: Need | None = None
        lingers = False
        for depth, (schedule, timeline) in enumerate(reversed(self._timelines.items())):
            for number in schedule.numbers.get(sha256, ()):
                step, lingers_there = timeline.next_use(number)
                lingers = lingers or lingers_there
                if step is not None and (best is None or Need(depth, step) < best):
                    best = Need(depth, step)
        if best is None and lingers:
            best = Need(len(self._timelines), float("inf"))
        return best, lingers


class _StoppedError(Exception):
    """A speculative download that is not wanted any more."""


class NodeCache:
    """The cache in `folder`, whose files together never have more than `bound_bytes`.

    May be used after a fork and pickled; it holds no descriptor and no client.
    """

    def __init__(self, folder: Path, bound_bytes: int) -> None:
        self.folder = folder
        self.bound_bytes = bound_bytes
        self.schedules: tuple[Schedule, ...] = ()
        """of readers at work; the last one is what the others wait for"""
        self._own: set[str] = set()
        self._outlook = Outlook()
        self._num_rechecks: dict[str, int] = defaultdict(int)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_outlook": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._outlook = Outlook()

    def adopt(self, shard: Shard) -> None:
        """Takes a shard for this job's own. Raises `FormatError`: its hash cannot be a name."""
        if not _SHA256.fullmatch(shard.entry.sha256):
            raise FormatError(f"{shard.url}: {shard.entry.sha256!r} is no SHA-256")
        self._own.add(shard.entry.sha256)

    def look_again(self) -> None:
        """Forgets what earlier jobs found: a shard that was damaged may be in order by now, and
        files may have been put here or removed."""
        with storage.explained(str(self.folder)), self._locked() as lock:
            os.ftruncate(lock, 0)
            for path in self.folder.glob("*.damaged"):
                path.unlink(missing_ok=True)

    @property
    def room_bytes(self) -> int:
        """For shards; the lock file takes its part."""
        return self.bound_bytes - _HELD_BYTES

    def keeps(self, entry: ShardEntry) -> bool:
        """Whether there is a file to read the shard from, which is marked as wanted then."""
        for path in self._places(entry):
            with contextlib.suppress(FileNotFoundError):
                _mark(path, path.stat())
                return True
        return False

    def held_bytes(self) -> int:
        """The size of all files in the folder."""
        return sum(stat.st_size for _, stat in self._scan())

    def open(self, shard: Shard, schedule: Schedule | None = None) -> int:
        """A descriptor of the shard's file, fetched when it is not there: open, so that no eviction
        can take it; the reader closes it.

        Raises:
            UserError: the storage does not answer, or the cache can hold nothing.
        """
        need = Need(-1, 0) if schedule is None else self._need(schedule, schedule.step)
        while True:
            opened = self._look_or_fetch(shard, need, self._outlook)
            if opened is not None:
                return opened

    def prefetch(
        self, shard: Shard, need: Need, outlook: Outlook, stopped: threading.Event
    ) -> bool | None:
        """Fetches a shard ahead of `need` and costs nobody anything for it.

        True when it is there now, None when another process is fetching it, False without room.
        """
        try:
            opened = self._look_or_fetch(shard, need, outlook, stopped)
        except _StoppedError:
            return False
        except _NoRoomError:
            return False
        if opened is None:
            return None
        _close(opened)
        return True

    def text(
        self,
        shard: Shard,
        name: str,
        parse: Callable[[str, str], T],
        outlook: Outlook | None = None,
    ) -> T:
        """`parse(text, url)` of a small file beside the shard; fetched once a node. `outlook` is
        that of a thread that goes on while this process forks; none for who reads samples.

        Raises what `parse` raises of the file as it is on the storage; UserError when there is
        none or the storage does not answer.
        """
        url = storage.join(shard.root, name)
        path = self.folder / f"{_meta_stem(shard.entry, url)}.meta"
        text = _read_meta(path)
        if text is not None:
            try:
                return parse(text, url)
            except (UserError, FormatError):  # of another manifest's time
                path.unlink(missing_ok=True)
        with self._part(path.stem, wait=True) as part:
            assert part is not None
            text = _read_meta(path)
            if text is None:
                text = storage.read_text(url)
                parsed = parse(text, url)
                body = text.encode()
                body = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
                outlook = outlook or self._outlook
                with contextlib.suppress(_NoRoomError), storage.explained(str(self.folder)):
                    self._reserve(part, len(body), Need(-1, 0), outlook, speculative=True)
                    _write(part, body, 0)
                    self._rename(path.with_suffix(".part"), path)
                return parsed
        return parse(text, url)

    def recheck(self, shard: Shard) -> bool:
        """After a sample failed: whether to read it again.

        The copy on this disk may have gone bad, or a small file beside it, or the dataset has been
        replaced, which the small files tell when they are fetched anew: all are dropped then, but
        not a copy that is in order: a sample of it that fails again is the dataset's.
        """
        entry = shard.entry
        if self._num_rechecks[entry.sha256] >= MAX_RECHECKS:
            return False
        self._num_rechecks[entry.sha256] += 1
        for name in (entry.index_name, entry.receipt_name):
            stem = _meta_stem(entry, storage.join(shard.root, name))
            (self.folder / f"{stem}.meta").unlink(missing_ok=True)
        good, damaged = self._places(entry)
        with self._part(entry.sha256, wait=True), storage.explained(str(good)):
            if self._is_in_order(good, entry.sha256) or damaged.exists():
                self._num_rechecks[entry.sha256] = MAX_RECHECKS
        return True

    def _is_in_order(self, path: Path, sha256: str) -> bool:
        """Whether a copy is there and good; a bad one is removed."""
        try:
            descriptor = _open(path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            if _sha256(descriptor) == sha256:
                return True
            if _is_at(path, descriptor):
                path.unlink()
                _warn(f"{path}: went bad on this disk; it is fetched again")
        except OSError:  # a bad sector
            path.unlink(missing_ok=True)
        finally:
            _close(descriptor)
        return False

    def follow(self, schedule: Schedule) -> None:
        self.schedules = (*self.schedules, schedule)

    def unfollow(self, schedule: Schedule) -> None:
        self.schedules = tuple(other for other in self.schedules if other is not schedule)

    def _need(self, schedule: Schedule, step: float) -> Need:
        behind = [other is schedule for other in reversed(self.schedules)]
        return Need(behind.index(True) if True in behind else -1, step)

    def _places(self, entry: ShardEntry) -> tuple[Path, Path]:
        return self.folder / f"{entry.sha256}.tar", self.folder / f"{entry.sha256}.damaged"

    def _look(self, entry: ShardEntry) -> int | None:
        for path in self._places(entry):
            with storage.explained(str(path)), contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                _mark(descriptor, os.fstat(descriptor))
                return descriptor
        return None

    def _look_or_fetch(
        self,
        shard: Shard,
        need: Need,
        outlook: Outlook,
        stopped: threading.Event | None = None,
    ) -> int | None:
        """Opens a shard, downloaded where it is not there; `stopped` makes that speculative. None
        when another process does it."""
        entry = shard.entry
        opened = self._look(entry)
        if opened is not None:
            return opened
        speculative = stopped is not None
        if entry.bytes > self.room_bytes:
            raise UserError(
                f"{shard.url}: {entry.bytes} bytes, data.cache_bytes = {self.bound_bytes} cannot "
                "hold it; raise it"
            )
        with self._part(entry.sha256, wait=not speculative) as part:
            if part is None:
                return None
            opened = self._look(entry)
            if opened is not None:
                return opened
            with storage.explained(str(self.folder)):
                while not self._reserve(part, entry.bytes, need, outlook, speculative=speculative):
                    time.sleep(POLL_S)  # until downloads of others are done, and can be evicted
            good, damaged = self._places(entry)
            cause, num_bytes = "", 0
            for _ in range(NUM_ATTEMPTS):
                cause, num_bytes = self._download(shard, part, stopped)
                if not cause:
                    self._rename(good.with_suffix(".part"), good)
                    return os.dup(part)
            os.ftruncate(part, num_bytes)
            self._rename(good.with_suffix(".part"), damaged)
            _warn(
                f"{shard.url}: damaged ({cause}; {NUM_ATTEMPTS} attempts); its samples are judged "
                "one by one"
            )
            return os.dup(part)

    def _download(
        self, shard: Shard, part: int, stopped: threading.Event | None
    ) -> tuple[str, int]:
        """(what is wrong with it, bytes that arrived)."""
        entry, num_bytes = shard.entry, 0
        while num_bytes < entry.bytes:
            if stopped is not None and stopped.is_set():
                raise _StoppedError
            stop = min(num_bytes + PART_BYTES, entry.bytes)
            try:
                data = storage.read_range(shard.url, num_bytes, stop)
            except MissingError:
                return "there is no such object", 0
            with storage.explained(str(self.folder)):
                _write(part, data, num_bytes)
            num_bytes += len(data)
            if num_bytes < stop:
                return f"{num_bytes} bytes, the manifest says {entry.bytes}", num_bytes
        with storage.explained(str(self.folder)):
            found = _sha256(part)
        return "" if found == entry.sha256 else "its SHA-256 is not the manifest's", num_bytes

    def _reserve(
        self, part: int, num_bytes: int, need: Need, outlook: Outlook, *, speculative: bool
    ) -> bool:
        """Makes `part` a file of `num_bytes` for which there is room; False: not yet.

        Raises:
            _NoRoomError: not without harm to others, for what is speculative.
            UserError: not ever.
        """
        with self._locked() as lock:
            grown_bytes = num_bytes - os.fstat(part).st_size
            held_bytes = _read_held(lock)
            if held_bytes is None or held_bytes + grown_bytes > self.bound_bytes:
                found = self._make_room(part, grown_bytes, need, outlook, speculative=speculative)
                if found is None:
                    return False
                held_bytes = found
            # Before the file grows, and after others went: a kill in between leaves too much.
            _write(lock, b"%020d" % (held_bytes + grown_bytes), 0)
            os.ftruncate(part, num_bytes)
            return True

    def _make_room(
        self, part: int, num_bytes: int, need: Need, outlook: Outlook, *, speculative: bool
    ) -> int | None:
        """Counts the folder and evicts until `num_bytes` are free. What it holds then; None where
        there will be room later. Raises as `_reserve`."""
        files: list[tuple[str, str, os.stat_result]] = []
        held_bytes, others_bytes = _HELD_BYTES, 0
        for name, stat in self._scan():
            held_bytes += stat.st_size if name != _LOCK_NAME else 0
            found = _FILE.fullmatch(name)
            if found is None:
                continue
            if found[2] != "part":
                files.append((name, found[1], stat))
            elif stat.st_size and stat.st_ino != os.fstat(part).st_ino:
                freed_bytes = self._remove_dead(name)
                held_bytes -= freed_bytes
                others_bytes += stat.st_size - freed_bytes
        short_bytes = held_bytes + num_bytes - self.bound_bytes
        if short_bytes <= 0:
            return held_bytes
        outlook.follow(self.schedules, self.bound_bytes)
        known = [
            CachedFile(name, stat.st_size, stat.st_mtime, *outlook.of(sha256), sha256 in self._own)
            for name, sha256, stat in files
        ]
        choose = functools.partial(choose_victims, known, need=need, now_s=time.time())
        victims = None
        if len(files) > MANY_FILES:
            victims = choose(short_bytes + self.bound_bytes // 50, speculative=True)
        if victims is None:
            victims = choose(short_bytes, speculative=speculative)
        if victims is None:
            if speculative:
                raise _NoRoomError
            if not others_bytes:
                raise UserError(
                    f"{self.folder}: no room for {num_bytes} bytes, data.cache_bytes = "
                    f"{self.bound_bytes}; remove what is not pixloom's, or raise it"
                )
            return None
        sizes = {name: stat.st_size for name, _, stat in files}
        for name in victims:
            (self.folder / name).unlink(missing_ok=True)
            held_bytes -= sizes[name]
        return held_bytes

    def _remove_dead(self, name: str) -> int:
        """Removes a download whose process is gone; returns its size, 0 for a living one."""
        path = self.folder / name
        try:
            descriptor = _open(path, os.O_RDWR)
        except FileNotFoundError:
            return 0
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            num_bytes = os.fstat(descriptor).st_size
            if not _is_at(path, descriptor):
                return 0
            path.unlink()
            return num_bytes
        except BlockingIOError:
            return 0
        finally:
            _unlock(descriptor)

    def _rename(self, part: Path, path: Path) -> None:
        # Locked: who lists a folder may miss a file that is renamed meanwhile.
        with storage.explained(str(path)), self._locked():
            part.replace(path)

    def _scan(self) -> list[tuple[str, os.stat_result]]:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
        return found

    @contextlib.contextmanager
    def _part(self, stem: str, *, wait: bool) -> Iterator[int | None]:
        """Holds the download of `stem`; yields its file, or None when another process has it.

        The file is gone afterwards, unless it was renamed.
        """
        path = self.folder / f"{stem}.part"
        with storage.explained(str(self.folder)):
            while True:
                descriptor = _open(path, os.O_RDWR | os.O_CREAT)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    _close(descriptor)
                    descriptor = -1
                    break
                except BaseException:
                    _close(descriptor)
                    raise
                if _is_at(path, descriptor):
                    break
                _unlock(descriptor)  # renamed or removed while we waited
        if descriptor < 0:
            yield None
            return
        try:
            yield descriptor
        finally:
            if _is_at(path, descriptor):
                path.unlink(missing_ok=True)
            _unlock(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = _open(self.folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            _unlock(descriptor)


class _NoRoomError(Exception):
    """There is no room that can be had without harm."""


@functools.lru_cache
def node_cache(folder: str, bound_bytes: int) -> NodeCache:
    """The cache of `data.cache_dir` and `data.cache_bytes`; one object a process.

    Raises:
        UserError: the folder cannot be made, or is another user's.
    """
    default = Path(tempfile.gettempdir(), f"pixloom-cache-{os.getuid()}")
    path = storage.local_path(folder) if folder else default
    with storage.explained(f"data.cache_dir = {path}"):
        path.mkdir(mode=0o777 if folder else 0o700, parents=True, exist_ok=True)
        if not folder and path.stat().st_uid != os.getuid():
            raise UserError(f"{path}: is another user's; name a folder by data.cache_dir")
        cache = NodeCache(path, bound_bytes)
        if not bound_bytes:
            disk = os.statvfs(path)
            cache.bound_bytes = (disk.f_bavail * disk.f_frsize + cache.held_bytes()) * 9 // 10
    if Node.of_environment().is_first:
        cache.look_again()
    return cache


class LookAhead:
    """Daemon threads that fetch what a schedule needs next, in its order, as far as there is room,
    but no more than half of the cache ahead: another job may share it.

    What fails here fails again where it is needed, and is reported there.
    """

    def __init__(
        self,
        cache: NodeCache,
        schedule: Schedule,
        prepare: Callable[[int, Outlook], object],
        num_threads: int = NUM_DOWNLOADS,
    ) -> None:
        self.num_fetched = 0
        self.fetched_bytes = 0
        self._cache = cache
        self._schedule = schedule
        self._prepare = prepare
        self._outlook = Outlook()  # used under the folder's lock alone
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._missing: list[tuple[int, Need]] = []
        self._in_flight: set[int] = set()
        self._next_s = 0.0
        self._threads = [threading.Thread(target=self._look, name="look-ahead", daemon=True)]
        self._threads += [
            threading.Thread(target=self._fetch, name=f"look-ahead-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def line(self) -> str:
        """What was done, for people."""
        return (
            f"fetched {self.num_fetched} shards ahead, {self.fetched_bytes / 1e6:.1f} MB, to "
            f"{self._cache.folder}"
        )

    def close(self) -> None:
        """Ends the threads, each after the request that it waits for; not for long."""
        self._stopped.set()
        deadline_s = time.monotonic() + 2.0
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _look(self) -> None:
        """Looks all the time, also while downloads take long, there is no room, or training waits:
        other jobs take what nobody marks."""
        while not self._stopped.is_set():
            begin_s = time.monotonic()
            try:
                missing = self._find_missing()
            except Exception as error:
                logger.debug("look-ahead: %s", redact(repr(error)))
                missing = []
            with self._lock:
                self._missing = missing
            self._stopped.wait(_pause_s(time.monotonic() - begin_s))

    def _find_missing(self) -> list[tuple[int, Need]]:
        """Shards that are not in the cache, the latest first; marks those that are."""
        schedule, cache = self._schedule, self._cache
        # The soonest is marked last: others that cannot wait take the oldest mark.
        return [
            (number, cache._need(schedule, max(step, schedule.step)))
            for number, step in reversed(self._find_wanted())
            if not cache.keeps(schedule.shards[number].entry)
        ]

    def _find_wanted(self) -> list[tuple[int, int]]:
        """Shards in the order in which they are needed, and when: what is in use now, as much as
        the cache can hold, and half of the cache ahead of it."""
        schedule, bound_bytes = self._schedule, self._cache.bound_bytes
        wanted: dict[int, int] = {}
        wanted_bytes = ahead_bytes = 0
        num_uses, most_uses = 0, 64 + 4 * len(schedule.shards)
        now = schedule.step
        for use in schedule.uses(now):
            for number in use.shards:
                num_uses += 1
                shard = schedule.shards[number]
                if number in wanted or not shard.is_remote:
                    continue
                wanted_bytes += shard.entry.bytes
                ahead_bytes += shard.entry.bytes if use.first_step > now else 0
                if wanted_bytes > bound_bytes or ahead_bytes > bound_bytes // 2:
                    return list(wanted.items())
                wanted[number] = use.first_step
            if num_uses > most_uses:
                break
        return list(wanted.items())

    def _fetch(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._lock:
                    found = self._take()
                if found is None:
                    self._stopped.wait(0.1)
                    continue
                number, need = found
                try:
                    self._fetch_one(number, need)
                finally:
                    with self._lock:
                        self._in_flight.discard(number)
            except Exception as error:
                logger.debug("look-ahead: %s", redact(repr(error)))
                self._stopped.wait(2.0)

    def _take(self) -> tuple[int, Need] | None:
        """The next one that nobody has fetched since it was found missing."""
        while self._missing and time.monotonic() >= self._next_s:
            number, need = self._missing.pop()
            entry = self._schedule.shards[number].entry
            if number not in self._in_flight and not self._cache.keeps(entry):
                self._in_flight.add(number)
                return number, need
        return None

    def _fetch_one(self, number: int, need: Need) -> None:
        shard = self._schedule.shards[number]
        begin_s = time.monotonic()
        done = self._cache.prefetch(shard, need, self._outlook, self._stopped)
        if done:
            with self._lock:
                self.num_fetched += 1
                self.fetched_bytes += shard.entry.bytes
            self._prepare(number, self._outlook)
        elif done is False:
            end_s = time.monotonic()
            with self._lock:
                self._missing = []  # what comes later has no room either
                self._next_s = end_s + _pause_s(end_s - begin_s)


def _pause_s(spent_s: float) -> float:
    """Looking takes a system call a shard: it shall be little beside the training."""
    return min(5.0, max(0.1, 50 * spent_s))


@dataclass(frozen=True)
class Node:
    """The processes of one machine, as the launcher's environment tells them."""

    ranks: range
    world_size: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> "Node":
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        first, num_local = rank - local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(range(first, first + max(num_local, local_rank + 1)), world_size, local_rank)

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that works for all of the node."""
        return self.local_rank == 0

    @property
    def number(self) -> int:
        return self.ranks.start // len(self.ranks)

    @property
    def all(self) -> list["Node"]:
        """Every node where ranks are evenly spread, else this one alone."""
        size = len(self.ranks)
        if self.world_size % size or self.ranks.start % size:
            return [self]
        return [
            Node(range(first, first + size), self.world_size, 0)
            for first in range(0, self.world_size, size)
        ]


@dataclass(frozen=True)
class Reads:
    """What a node reads in steps [0, num_steps)."""

    num_steps: int
    num_shards: int
    bytes: int
    num_working: int
    working_bytes: int
    """of remote shards that are needed at one step, at most"""


def reads_of(shards: Sequence[Shard], uses: Iterable[ShardUse], stop: int) -> Reads:
    """Sums up uses that begin before step `stop`; or fewer of them, as far as tells enough."""
    seen: set[int] = set()
    num_steps = stop
    active: deque[ShardUse] = deque()
    most = (0, 0)
    for place, use in enumerate(uses):
        if use.first_step >= stop:
            break
        if place >= MAX_COUNTED_USES:
            num_steps = use.first_step
            break
        seen.update(use.shards)
        active.append(use)
        while active[0].last_step < use.first_step:
            active.popleft()
        working = {
            shards[number].entry.sha256: shards[number].entry.bytes
            for one in active
            if one.last_step >= use.first_step
            for number in one.shards
            if shards[number].is_remote
        }
        most = max(most, (sum(working.values()), len(working)))
    return Reads(num_steps, len(seen), sum(shards[n].entry.bytes for n in seen), most[1], most[0])


_held_descriptors: set[int] = set()


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _held_descriptors.add(descriptor)
    return descriptor


def _close(descriptor: int) -> None:
    _held_descriptors.discard(descriptor)
    os.close(descriptor)


def _unlock(descriptor: int) -> None:
    """Lets the lock go at once: a child that was forked meanwhile may hold the descriptor too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    _close(descriptor)


def _close_after_fork() -> None:
    """What other threads had open: it would keep evicted files on the disk as long as we live."""
    for descriptor in list(_held_descriptors):
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held_descriptors.clear()


os.register_at_fork(after_in_child=_close_after_fork)


def _mark(file: Path | int, stat: os.stat_result) -> None:
    """Tells other jobs that a file is read, or wanted."""
    if time.time() - stat.st_mtime > TOUCH_S:
        with contextlib.suppress(OSError):  # another user's, or evicted just now
            os.utime(file)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view, offset = view[done:], offset + done


def _read_held(lock: int) -> int | None:
    """How much the folder holds at most, by its lock file; None before anybody counted."""
    text = os.pread(lock, _HELD_BYTES + 1, 0)
    return int(text) if len(text) == _HELD_BYTES and text.isdigit() else None


def _sha256(descriptor: int) -> str:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _meta_stem(entry: ShardEntry, url: str) -> str:
    return f"{entry.sha256}-{hashlib.blake2b(url.encode(), digest_size=8).hexdigest()}"


def _read_meta(path: Path) -> str | None:
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        path.unlink(missing_ok=True)
        return None
    return body.decode()


def _warn(line: str) -> None:
    tell(redact(f"pixloom: warning: {line}"))
