"""The node's cache: what it evicts, what it trusts, and what it never exceeds."""

import functools
import hashlib
import itertools
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import FaultyProxy, Server, put, put_tree

from pipeline.batch import SampleError
from pipeline.cache import (
    IDLE_S,
    MAX_RECHECKS,
    TOUCH_S,
    CachedFile,
    LookAhead,
    Need,
    NodeCache,
    Outlook,
    Schedule,
    Timeline,
    choose_victims,
    node_cache,
    reads_of,
)
from pipeline.order import Order, ShardUse, validation_batches, validation_uses
from pipeline.stream import BatchDataset, SampleReader, Shard, TrainPlans, make_loader
from shards import storage
from shards.format import FormatError, ShardEntry
from shards.storage import StorageError, UserError, load_manifest

ROOT = Path(__file__).parents[2]


def entry_of(number: int, num_bytes: int = 1) -> ShardEntry:
    return ShardEntry(f"train/{number:06}.tar", 1, num_bytes, f"{number:064x}")


def shards_of(sizes: Sequence[int]) -> list[Shard]:
    return [Shard("s3://b/d", entry_of(number, size)) for number, size in enumerate(sizes)]


# ---- when which shard is needed


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda c: sum(c) >= 6))
    lanes = draw(st.sampled_from([1, 2, 3, 6]))
    window = draw(st.integers(1, 12))
    return Order(counts, seed=draw(st.integers(0, 9)), global_size=6, micro_size=1, lanes=lanes,
                 window=window)  # fmt: skip


@given(order=orders(), start=st.integers(0, 9), data=st.data())
def test_uses_are_the_windows_that_the_places_touch(
    order: Order, start: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, 5))
    places = range(first, data.draw(st.integers(first, 5)) + 1)
    stop = start + 2 * order.steps_per_epoch + 1
    uses = list(itertools.takewhile(lambda u: u.first_step < stop, order.uses(start, places)))
    assert uses == sorted(uses, key=lambda use: use.first_step)
    assert all(use.last_step >= max(start, use.first_step) for use in uses)
    for step in range(start, stop):
        read = set(order.samples_of(step)[places.start : places.stop].shard_G.tolist())
        assert read <= {n for u in uses if u.first_step <= step <= u.last_step for n in u.shards}
    # Not more than whole windows: every shard of a use lies in a window of a touched lane.
    whole = list(itertools.takewhile(lambda u: u.first_step < stop, order.uses(0, places)))
    for use in uses:
        assert any(
            use.first_step == max(start, one.first_step)
            and use.last_step == one.last_step
            and set(use.shards) <= set(one.shards)
            for one in whole
        )
    per_lane = order.global_size // order.lanes
    for use in uses:
        steps = use.last_step - use.first_step + 1
        assert steps <= -(-order.window // per_lane) + 1


@given(order=orders())
def test_an_order_can_be_pickled(order: Order) -> None:
    other = pickle.loads(pickle.dumps(order))
    assert other.samples_of(1).index_G.tolist() == order.samples_of(1).index_G.tolist()
    assert next(other.uses(1, range(6))) == next(order.uses(1, range(6)))


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    size=st.integers(1, 7),
    world_size=st.integers(1, 4),
    step=st.integers(0, 5),
)
def test_uses_of_a_validation_are_its_batches(
    counts: list[int], size: int, world_size: int, step: int
) -> None:
    ranks = range(world_size // 2, world_size)
    uses = {use.first_step: use for use in validation_uses(counts, size, step, ranks, world_size)}
    for number, ids in enumerate(validation_batches(counts, size)):
        if number >= step and number % world_size in ranks:
            assert uses.pop(number) == ShardUse(number, number, tuple(sorted({*ids.shard_G})))
    assert not uses


@st.composite
def use_lists(draw: st.DrawFn) -> list[ShardUse]:
    uses = []
    for _ in range(draw(st.integers(1, 12))):
        first = draw(st.integers(0, 15))
        shards = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3, unique=True))
        uses.append(ShardUse(first, first + draw(st.integers(0, 4)), tuple(shards)))
    return sorted(uses, key=lambda use: use.first_step)


@given(
    uses=use_lists(),
    slack=st.integers(0, 3),
    asked=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=20),
)
def test_a_timeline_knows_the_next_use(
    uses: list[ShardUse], slack: int, asked: list[tuple[int, int]]
) -> None:
    def uses_from(step: int) -> Iterator[ShardUse]:
        return (use for use in uses if use.last_step >= step)

    schedule = Schedule(shards_of([1] * 6), uses_from, step=0, slack_steps=slack)
    timeline = Timeline(schedule, room_bytes=6)
    for step, shard in asked:  # also backwards
        schedule.step = step
        ahead = [u for u in uses if shard in u.shards and u.last_step >= step]
        expected = min((max(u.first_step, step) for u in ahead), default=None)
        found, lingers = timeline.next_use(shard)
        assert found == expected
        late = [u for u in uses if shard in u.shards and step - slack <= u.last_step < step]
        if lingers:
            assert late


def test_a_timeline_without_end_stays_small() -> None:
    def uses_from(step: int) -> Iterator[ShardUse]:
        return (ShardUse(at, at, (at % 3,)) for at in itertools.count(step))

    schedule = Schedule(shards_of([1] * 4), uses_from, step=0, slack_steps=1)
    timeline = Timeline(schedule, room_bytes=4)
    for step in range(5000):
        schedule.step = step
        assert timeline.next_use(step % 3)[0] == step
        assert timeline.next_use((step + 2) % 3)[0] == step + 2
        assert timeline.next_use(3)[0] == float("inf")
        assert sum(map(len, timeline._ahead.values())) < 300


def test_a_timeline_reads_no_further_than_a_cache_of_its_room_cares() -> None:
    num_read = 0

    def uses_from(step: int) -> Iterator[ShardUse]:
        nonlocal num_read
        for at in range(step, 10_000):
            num_read += 1
            yield ShardUse(at, at, (at % 5000,))

    schedule = Schedule(shards_of([10] * 5001), uses_from, step=0, slack_steps=1)
    timeline = Timeline(schedule, room_bytes=100)
    for step in range(200):
        schedule.step = step
        num_read_before = num_read
        assert timeline.next_use(4000) == (float("inf"), False)  # late
        assert timeline.next_use(step + 10) == (step + 10, False)
        assert num_read - num_read_before <= 42
    assert num_read < 3 * 200
    schedule.step = 9990
    assert timeline.next_use(0) == (None, False)  # never
    assert timeline.next_use(4999) == (9999, False)


# ---- what is evicted


def misses(sequence: Sequence[int], room: int) -> int:
    """Of a cache of `room` shards of one byte that evicts by `choose_victims`."""

    def uses_from(step: int) -> Iterator[ShardUse]:
        return (ShardUse(at, at, (sequence[at],)) for at in range(step, len(sequence)))

    shards = shards_of([1] * 5)
    schedule = Schedule(shards, uses_from, step=0, slack_steps=0)
    outlook = Outlook()
    outlook.follow([schedule], room)
    cached: list[int] = []
    num_misses = 0
    for step, wanted in enumerate(sequence):
        schedule.step = step
        if wanted in cached:
            continue
        num_misses += 1
        if len(cached) == room:
            files = []
            for number in cached:
                need, lingers = outlook.of(shards[number].entry.sha256)
                files.append(CachedFile(str(number), 1, 0, need, lingers, True))
            victims = choose_victims(files, 1, Need(0, step), now_s=0, speculative=False)
            assert victims is not None
            assert len(victims) == 1
            cached.remove(int(victims[0]))
        cached.append(wanted)
    return num_misses


def fewest_misses(sequence: Sequence[int], room: int) -> int:
    """Over all ways to evict."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for wanted in sequence:
        found: dict[frozenset[int], int] = {}
        for cached, count in states.items():
            if wanted in cached:
                options = [(cached, count)]
            elif len(cached) < room:
                options = [(cached | {wanted}, count + 1)]
            else:
                options = [(cached - {out} | {wanted}, count + 1) for out in cached]
            for state, number in options:
                found[state] = min(number, found.get(state, number))
        states = found
    return min(states.values())


@given(sequence=st.lists(st.integers(0, 4), max_size=14), room=st.integers(1, 4))
def test_no_other_choice_fetches_less(sequence: list[int], room: int) -> None:
    assert misses(sequence, room) == fewest_misses(sequence, room)


def file(name: str, need: float | None, **more: object) -> CachedFile:
    known = None if need is None else Need(0, need)
    whole = CachedFile(name, bytes=10, used_s=1000, need=known, is_lingering=False, is_own=True)
    return replace(whole, **more)  # type: ignore[arg-type]


FILES = [
    file("soon", 5),
    file("late", 90),
    file("later", 99),
    file("just-late", float("inf")),
    file("lingering", 95, is_lingering=True),
    file("done", None),
    file("done-before", None, used_s=900),
    file("others", None, is_own=False, used_s=1000),
    file("nobodys", None, is_own=False, used_s=1000 - IDLE_S),
]
ORDER = ["done-before", "nobodys", "done", "just-late", "later", "late"]
ORDER += ["lingering", "others", "soon"]


@pytest.mark.parametrize("number", range(1, 10))
def test_the_order_of_eviction(number: int) -> None:
    chosen = choose_victims(FILES, 10 * number, Need(0, 50), now_s=1000, speculative=False)
    assert chosen == ORDER[:number]
    ahead = choose_victims(FILES, 10 * number, Need(0, 50), now_s=1000, speculative=True)
    assert ahead == (ORDER[:number] if number <= 6 else None)
    assert choose_victims(FILES, 91, Need(0, 50), now_s=1000, speculative=False) is None


def test_no_more_is_evicted_than_needed() -> None:
    files = [file("small", 99, bytes=3), file("large", 98, bytes=20)]
    assert choose_victims(files, 15, Need(0, 1), now_s=0, speculative=True) == ["large"]


def test_what_waits_is_evicted_before_what_runs() -> None:
    files = [replace(file("train", 0), need=Need(1, 0)), file("val", 9)]
    assert choose_victims(files, 1, Need(0, 3), now_s=0, speculative=True) == ["train"]
    assert choose_victims(files[1:], 1, Need(1, 0), now_s=0, speculative=True) is None


def test_the_working_set_is_the_most_that_is_needed_at_once() -> None:
    uses = [
        ShardUse(0, 3, (0, 1)),
        ShardUse(0, 3, (2,)),
        ShardUse(3, 5, (1, 3)),
        ShardUse(9, 9, ()),
    ]
    reads = reads_of(shards_of([1, 20, 300, 4000, 50000]), uses, stop=9)
    assert (reads.num_shards, reads.bytes) == (4, 4321)
    assert (reads.num_working, reads.working_bytes) == (4, 4321)
    assert reads_of(shards_of([1, 20, 300]), uses, stop=3).working_bytes == 321


# ---- the folder, against a real store


@pytest.fixture(scope="module")
def proxy(moto_server: Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(moto_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def url(moto: Server, proxy: FaultyProxy, screens: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The dataset on S3, behind the proxy."""
    proxy.reset()
    moto.through(proxy).use(monkeypatch)
    root = f"{moto.url}/{uuid.uuid4().hex[:8]}"
    put_tree(screens, root)
    return root


def remote_shards(root: str) -> list[Shard]:
    return [Shard(root, entry) for entry in load_manifest(root).splits["train"]]


OpenReader = Callable[..., SampleReader]


@pytest.fixture
def open_reader(url: str, tmp_path: Path) -> OpenReader:
    """A reader of the dataset, with a cache of its own unless the test names its folder."""

    def make(bound_bytes: int = 1 << 30) -> SampleReader:
        folder = tmp_path / "cache"
        folder.mkdir(exist_ok=True)
        return SampleReader(remote_shards(url), cache=NodeCache(folder, bound_bytes))

    return make


def tar_gets(proxy: FaultyProxy) -> list[int]:
    """How often each shard that was fetched was."""
    return [count for path, count in sorted(proxy.gets.items()) if path.endswith(".tar")]


def read_all(reader: SampleReader, shard: int) -> list[bool]:
    """Which samples are good."""
    good = []
    for index in range(reader.shards[shard].entry.samples):
        try:
            reader.read(shard, index)
            good.append(True)
        except SampleError:
            good.append(False)
    return good


def cached(reader: SampleReader, shard: int, suffix: str = "tar") -> Path:
    assert reader.cache is not None
    return reader.cache.folder / f"{reader.shards[shard].entry.sha256}.{suffix}"


def test_samples_are_those_of_the_local_dataset(
    open_reader: OpenReader, screens: Path, proxy: FaultyProxy
) -> None:
    reader = open_reader()
    local = SampleReader(Shard(str(screens), shard.entry) for shard in reader.shards)
    for shard, entry in enumerate(reader.shard_samples):
        for index in range(entry):
            mine, theirs = reader.read(shard, index), local.read(shard, index)
            assert (mine.key, mine.members) == (theirs.key, theirs.members)
    assert tar_gets(proxy) == [1] * len(reader.shards)
    other = pickle.loads(pickle.dumps(reader))
    assert other.read(0, 0).members == local.read(0, 0).members
    assert sum(proxy.gets.values()) == 3 * len(reader.shards) + 1  # the manifest too
    assert not [path for path in Path("/proc/self/fd").iterdir() if str(path.parent) in str(path)
                and path.is_symlink() and str(reader.cache.folder) in str(path.readlink())]  # type: ignore[union-attr]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_and_threads_fetch_a_shard_once(
    open_reader: OpenReader, proxy: FaultyProxy
) -> None:
    reader = open_reader()
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(reader, 0)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert tar_gets(proxy) == [1]
    assert sum(proxy.gets.values()) == 4


def flip(data: bytes) -> bytes:
    at = data.rindex(b"tokens.npy") + 700
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGES = {
    "flipped": (flip, "its SHA-256 is not the manifest's"),
    "cut": (lambda data: data[: len(data) // 2], r"\d+ bytes, the manifest says \d+"),
    "empty": (lambda data: b"", "0 bytes, the manifest says"),
    "longer": (lambda data: flip(data) + b"more", "its SHA-256 is not the manifest's"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_fetched_twice_then_judged_by_sample(
    open_reader: OpenReader,
    proxy: FaultyProxy,
    screens: Path,
    url: str,
    damage: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import re

    change, cause = DAMAGES[damage]
    name = load_manifest(url).splits["train"][1].name
    put(f"{url}/{name}", change((screens / name).read_bytes()))
    reader = open_reader()
    good = read_all(reader, 1)
    assert read_all(open_reader(), 1) == good, "another process saw something else"
    assert good.count(False) == {"flipped": 1, "longer": 1, "empty": len(good)}.get(
        damage, good.count(False)
    )
    assert False in good
    assert tar_gets(proxy) == [2]
    warnings = capfd.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert re.fullmatch(
        rf"pixloom: warning: {url}/{name}: damaged \({cause}.*; 2 attempts\).*", warnings[0]
    )
    assert not cached(reader, 1).exists()

    put(f"{url}/{name}", (screens / name).read_bytes())  # repaired: the next run finds it
    reader.cache.look_again()  # type: ignore[union-attr]
    assert all(read_all(open_reader(), 1))


def test_a_missing_shard_costs_its_samples(
    open_reader: OpenReader, url: str, capfd: pytest.CaptureFixture[str]
) -> None:
    reader = open_reader()
    storage.remove(reader.shards[0].url)
    assert not any(read_all(reader, 0))
    assert "damaged (there is no such object; 2 attempts)" in capfd.readouterr().err


def test_a_missing_or_damaged_receipt_ends_the_run(
    open_reader: OpenReader, url: str, screens: Path
) -> None:
    reader = open_reader()
    entry = reader.shards[0].entry
    storage.remove(f"{url}/{entry.receipt_name}")
    with pytest.raises(UserError, match=rf"{url}/train/000000.json: there is no such object"):
        reader.read(0, 0)
    put(f"{url}/{entry.receipt_name}", b"{}")
    with pytest.raises(FormatError, match=r"train/000000.json: damaged receipt"):
        reader.read(0, 0)
    other = reader.shards[1].entry.receipt_name
    put(f"{url}/{entry.receipt_name}", (screens / other).read_bytes())
    with pytest.raises(UserError, match=r"train/000000.json: is of another shard"):
        reader.read(0, 0)
    put(f"{url}/{entry.receipt_name}", (screens / entry.receipt_name).read_bytes())
    assert reader.read(0, 0), "a bad receipt was kept"


def test_a_shard_replaced_with_all_its_files_is_never_taken(
    open_reader: OpenReader, url: str, screens: Path
) -> None:
    """As when the dataset is packed anew under a running job."""
    reader = open_reader()
    one, other = (shard.entry for shard in reader.shards[:2])
    reader.read(0, 0)
    for mine, its in ((other.name, one.name), (other.index_name, one.index_name)):
        put(f"{url}/{mine}", (screens / its).read_bytes())
    assert not any(read_all(reader, 1))
    put(f"{url}/{other.receipt_name}", (screens / one.receipt_name).read_bytes())
    reader = open_reader()
    for path in reader.cache.folder.iterdir():  # type: ignore[union-attr]
        path.unlink()
    with pytest.raises(UserError, match="is of another shard than the manifest's"):
        reader.read(1, 0)


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_copy_that_goes_bad_is_fetched_again(
    open_reader: OpenReader, proxy: FaultyProxy, how: str
) -> None:
    reader = open_reader()
    assert all(read_all(reader, 0))
    path = cached(reader, 0)
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[how][0](path.read_bytes()))
    assert all(read_all(reader, 0))
    assert tar_gets(proxy) == [2]


def test_a_copy_is_healed_again_and_again_but_not_for_ever(
    open_reader: OpenReader, proxy: FaultyProxy
) -> None:
    reader = open_reader()
    path = cached(reader, 0)
    for _ in range(MAX_RECHECKS):
        assert all(read_all(reader, 0))
        path.write_bytes(flip(path.read_bytes()))
    assert all(read_all(reader, 0))
    path.write_bytes(flip(path.read_bytes()))
    assert read_all(reader, 0).count(False) == 1
    assert tar_gets(proxy) == [1 + MAX_RECHECKS]


def test_an_index_that_goes_bad_is_fetched_again(open_reader: OpenReader) -> None:
    reader = open_reader()
    assert all(read_all(reader, 0))
    for path in reader.cache.folder.glob("*.meta"):  # type: ignore[union-attr]
        path.write_bytes(path.read_bytes().replace(b" 512 ", b" 513 ").replace(b"[", b"[1,", 1))
    assert all(read_all(open_reader(), 0))


def test_after_a_wrong_index_members_are_cut_by_the_right_one(
    open_reader: OpenReader, url: str, screens: Path
) -> None:
    entry = load_manifest(url).splits["train"][0]
    text = (screens / entry.index_name).read_text()
    head, first, *lines = text.splitlines()
    extension, offset, size, *words = first.split(" ")
    wrong = " ".join([extension, str(int(offset) + 1), size, *words])
    put(f"{url}/{entry.index_name}", "\n".join([head, wrong, *lines, ""]).encode())
    reader = open_reader()
    assert reader.key(0, 0)  # the index was read
    put(f"{url}/{entry.index_name}", text.encode())
    local = SampleReader([Shard(str(screens), entry)])
    assert reader.read(0, 0).members == local.read(0, 0).members


def test_a_sample_that_its_receipt_disowns_stays_bad(
    open_reader: OpenReader, proxy: FaultyProxy, url: str, screens: Path
) -> None:
    """The shard is looked at once, and not for each sample."""
    entry = load_manifest(url).splits["train"][0]
    text = (screens / entry.receipt_name).read_bytes()
    crc32 = text.partition(b'"crc32":[')[2].partition(b",")[0]
    put(f"{url}/{entry.receipt_name}", text.replace(crc32, b"1", 1))
    reader = open_reader()
    assert read_all(reader, 0) == [False] + [True] * (entry.samples - 1)
    assert read_all(reader, 0).count(False) == 1
    assert tar_gets(proxy) == [1]


def test_a_store_that_does_not_answer_ends_the_run(
    open_reader: OpenReader, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.remote.FIRST_PAUSE_S", 0.01)
    reader = open_reader()
    reader.key(0, 0)
    proxy.inject("unavailable", on={"get"})
    with pytest.raises(StorageError, match=r"000000\.\w+: the storage failed each time"):
        reader.read(0, 0)
    assert not list(reader.cache.folder.glob("*.part"))  # type: ignore[union-attr]
    proxy.clear()
    assert reader.read(0, 0)


def test_passing_faults_are_not_seen(
    open_reader: OpenReader, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.remote.FIRST_PAUSE_S", 0.01)
    reader = open_reader()
    for kind in ("unavailable", "cut_reply", "lost_reply"):
        proxy.inject(kind, rate=0.2, on={"get"})
    assert all(all(read_all(reader, shard)) for shard in range(len(reader.shards)))
    assert sum(proxy.counts.values()) > 0


def test_a_cache_of_one_shard_works_and_stays_in_its_bound(
    open_reader: OpenReader, proxy: FaultyProxy
) -> None:
    largest = max(shard.entry.bytes for shard in open_reader().shards) + 20
    reader = open_reader(largest)
    assert reader.cache is not None
    for index in range(3):
        for shard in range(len(reader.shards)):
            reader.read(shard, index)
            assert reader.cache.held_bytes() <= largest
    with pytest.raises(UserError, match=r"data\.cache_bytes = 99 cannot hold it"):
        open_reader(99).read(0, 0)


@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_a_folder_that_cannot_be_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"data\.cache_dir = {tmp_path}/{name}: \w+"):
        node_cache(str(tmp_path / name), 1000)


def test_a_folder_full_of_other_things_is_said(open_reader: OpenReader) -> None:
    reader = open_reader(200_000)
    assert reader.cache is not None
    (reader.cache.folder / "holiday.mp4").write_bytes(bytes(199_000))
    with pytest.raises(UserError, match="remove what is not pixloom's"):
        reader.read(0, 0)


def test_no_other_name_than_a_hash_becomes_a_path(tmp_path: Path) -> None:
    entry = entry_of(1)._replace(sha256="../../etc/passwd")
    with pytest.raises(FormatError, match="is no SHA-256"):
        SampleReader([Shard("s3://b/d", entry)], cache=NodeCache(tmp_path, 1))


_DOWNLOAD = """
import sys
from pathlib import Path
from pipeline.cache import NodeCache
from pipeline.stream import SampleReader, Shard
from shards.storage import load_manifest
root, folder = sys.argv[1:]
shards = [Shard(root, entry) for entry in load_manifest(root).splits["train"]]
reader = SampleReader(shards, cache=NodeCache(Path(folder), 1 << 30))
reader.key(0, 0), reader._receipt(0)
print("ready", flush=True)
sys.stdin.readline()
reader.read(0, 0)
"""


def kill_within_download(reader: SampleReader, proxy: FaultyProxy, root: str) -> Path:
    """Leaves shard 0's unfinished download behind."""
    assert reader.cache is not None
    words = [sys.executable, "-c", _DOWNLOAD, root, str(reader.cache.folder)]
    with subprocess.Popen(
        words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        proxy.inject("stall", on={"get"})
        process.stdin.write("\n")
        process.stdin.flush()
        while not proxy.stalled:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    proxy.clear()
    part = cached(reader, 0, "part")
    assert part.stat().st_size == reader.shards[0].entry.bytes, "its room was not reserved"
    return part


def test_a_killed_download_is_done_again(
    open_reader: OpenReader, proxy: FaultyProxy, url: str
) -> None:
    reader = open_reader()
    part = kill_within_download(reader, proxy, url)
    assert all(read_all(reader, 0))
    assert not part.exists()


def test_a_killed_download_makes_room_for_others(
    open_reader: OpenReader, proxy: FaultyProxy, url: str
) -> None:
    reader = open_reader(max(shard.entry.bytes for shard in open_reader().shards) + 20)
    part = kill_within_download(reader, proxy, url)
    assert all(read_all(reader, 1))
    assert not part.exists()


# ---- look-ahead


def loader_keys(
    reader: SampleReader, order: Order, steps: int, workers: int
) -> list[tuple[str, ...]]:
    dataset = BatchDataset(reader, image_CHW=(3, 32, 48), with_tokens=True)
    plans = TrainPlans(order, range(order.num_micro), 0, steps)
    return [batch.keys for batch in make_loader(dataset, plans, workers=workers, pin=False)]


def order_of(reader: SampleReader, lanes: int = 2, window: int = 4) -> Order:
    return Order(reader.shard_samples, seed=3, global_size=4, micro_size=2, lanes=lanes,
                 window=window)  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_fetch_each_shard_once(
    open_reader: OpenReader, proxy: FaultyProxy, screens: Path, workers: int
) -> None:
    reader = open_reader()
    order = order_of(reader)
    steps = 2 * order.steps_per_epoch
    local = SampleReader(Shard(str(screens), shard.entry) for shard in reader.shards)
    threads = threading.active_count()
    assert loader_keys(reader, order, steps, workers) == loader_keys(local, order, steps, 0)
    assert tar_gets(proxy) == [1] * len(reader.shards)
    assert set(proxy.gets.values()) == {1}
    assert threading.active_count() - threads <= 1, "look-ahead goes on"  # fsspec's own thread
    assert reader.cache is not None
    assert reader.cache.schedules == ()


def test_look_ahead_fetches_in_order_as_far_as_there_is_room(
    open_reader: OpenReader, proxy: FaultyProxy
) -> None:
    sizes = [shard.entry.bytes for shard in open_reader().shards]
    reader = open_reader(sum(sorted(sizes)[-3:]) + 40_000)  # with indexes and receipts
    assert reader.cache is not None
    sequence = [0, 1, 2, 3, 4, 0]

    def uses(step: int) -> Iterator[ShardUse]:
        return (ShardUse(at, at, (sequence[at],)) for at in range(step, len(sequence)))

    schedule = Schedule(reader.shards, uses, step=0, slack_steps=0)
    reader.cache.follow(schedule)
    ahead = LookAhead(reader.cache, schedule, reader.prefetch, num_threads=1)
    for step, wanted in enumerate(sequence):
        schedule.step = step
        while not cached(reader, wanted).exists():
            time.sleep(0.005)
        assert reader.cache.held_bytes() <= reader.cache.bound_bytes
    ahead.close()
    assert sum(tar_gets(proxy)) == ahead.num_fetched
    assert 5 <= ahead.num_fetched <= 6


def test_look_ahead_survives_a_store_that_fails(
    open_reader: OpenReader, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.remote.FIRST_PAUSE_S", 0.01)
    reader = open_reader()
    order = order_of(reader)
    proxy.inject("unavailable", on={"get"})
    with pytest.raises(StorageError):
        loader_keys(reader, order, 4, 0)
    proxy.clear()
    assert len(loader_keys(reader, order, 4, 0)) == 8


class FakeStore:
    """Shards of `num_bytes` each; every request waits until its gate is open."""

    def __init__(self, num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_bytes = num_bytes
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        monkeypatch.setattr(storage, "read_range", self._read_range)

    def shards(self, root: str, number: int) -> list[Shard]:
        urls = [f"{root}/{place}" for place in range(number)]
        return [
            Shard(root, ShardEntry(str(n), 1, self.num_bytes, hashlib.sha256(data).hexdigest()))
            for n, data in enumerate(map(self._bytes, urls))
        ]

    def _bytes(self, url: str) -> bytes:
        return url.encode().ljust(self.num_bytes)

    def _read_range(self, url: str, start: int, stop: int) -> bytes:
        self.requests.append(url)
        assert self.gate.wait(60)
        return self._bytes(url)[start:stop]


@pytest.fixture
def fake_store(monkeypatch: pytest.MonkeyPatch) -> FakeStore:
    return FakeStore(1000, monkeypatch)


def until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def look_ahead(
    cache: NodeCache, shards: Sequence[Shard], uses: Sequence[ShardUse], num_threads: int = 1
) -> tuple[LookAhead, Schedule]:
    """Of a job of its own, with shards alone."""

    def uses_from(step: int) -> Iterator[ShardUse]:
        return (use._replace(first_step=max(use.first_step, step)) for use in uses
                if use.last_step >= step)  # fmt: skip

    for shard in shards:
        cache.adopt(shard)
    schedule = Schedule(shards, uses_from, step=0, slack_steps=1)
    cache.follow(schedule)
    return LookAhead(cache, schedule, lambda number, outlook: None, num_threads), schedule


def test_jobs_that_stand_still_leave_each_other_what_they_fetched_ahead(
    fake_store: FakeStore, tmp_path: Path
) -> None:
    """Both sets do not fit; their readers read nothing, for many times IDLE_S."""
    room = 10

    def marks() -> list[float]:
        return [path.stat().st_mtime for path in tmp_path.glob("*.tar")]

    uses = [ShardUse(0, 9, tuple(range(4))), ShardUse(5, 9, tuple(range(4, 8)))]
    ahead = [
        look_ahead(NodeCache(tmp_path, room * 1000 + 20), fake_store.shards(root, 8), uses)[0]
        for root in ("s3://b/one", "s3://b/two")
    ]
    until(lambda: len(marks()) == room)
    for _ in range(20):
        for path in tmp_path.glob("*.tar"):  # as if time passed
            os.utime(path, (0, path.stat().st_mtime - IDLE_S / 2))
        until(lambda: min(marks()) > time.time() - TOUCH_S)
    for one in ahead:
        one.close()
    assert len(fake_store.requests) == room


def test_a_shard_is_marked_while_one_before_it_is_on_its_way(
    fake_store: FakeStore, tmp_path: Path
) -> None:
    cache = NodeCache(tmp_path, 10_000)
    shards = fake_store.shards("s3://b/d", 3)
    os.close(cache.open(shards[2]))
    path = tmp_path / f"{shards[2].entry.sha256}.tar"
    os.utime(path, (0, 0))
    fake_store.gate.clear()
    uses = [ShardUse(at, at, (at,)) for at in range(3)]
    ahead, _ = look_ahead(cache, shards, uses, num_threads=2)
    until(lambda: len(fake_store.requests) == 3)
    os.utime(path, (0, 0))
    until(lambda: path.stat().st_mtime > time.time() - TOUCH_S)
    assert len(list(tmp_path.glob("*.tar"))) == 1
    fake_store.gate.set()
    ahead.close()


def test_what_is_next_is_on_its_way_while_a_shard_is_in_use(
    fake_store: FakeStore, tmp_path: Path
) -> None:
    """A cold epoch: nothing was there before, and no reader waits but for the first shard."""
    num_shards = 6
    cache = NodeCache(tmp_path, 4 * 1000 + 20)
    shards = fake_store.shards("s3://b/d", num_shards)
    uses = [ShardUse(at, at, (at,)) for at in range(num_shards)]
    ahead, schedule = look_ahead(cache, shards, uses)
    for step in range(num_shards):
        schedule.step = step
        if step:
            assert shards[step].url in fake_store.requests, "it was not on its way"
        os.close(cache.open(shards[step], schedule))  # in use, until the next one is asked for
        if step + 1 < num_shards:
            until(functools.partial(fake_store.requests.__contains__, shards[step + 1].url))
    ahead.close()
    assert fake_store.requests == [shard.url for shard in shards], "not once each, in order"
