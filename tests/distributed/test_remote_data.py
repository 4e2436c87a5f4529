"""Training from an object store, through a cache of each node, on real processes."""

import contextlib
import fcntl
import json
import re
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import FaultyProxy, Server, put, put_tree

from pipeline.cache import Node, reads_of
from pipeline.order import Order
from pipeline.stream import Shard, node_places
from shards import pack, storage, synth
from shards.format import TAR_BLOCK_BYTES, SampleSpan, parse_index
from shards.storage import load_manifest

LANES, WINDOW, STEPS = 2, 12, 24
"""Two epochs of 12 steps."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 training shards of 6 samples."""
    folder = tmp_path_factory.mktemp("packed")
    assert synth.main([str(folder / "raw"), "--samples", "110", "--seed", "5"]) == 0
    words = "--size 80x48 --split train=rest,val=12 --shard-samples 6 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"


@pytest.fixture(scope="module")
def proxy(seaweedfs_server: Server) -> Iterator[FaultyProxy]:
    with FaultyProxy(seaweedfs_server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def url(
    seaweedfs: Server, proxy: FaultyProxy, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The dataset on S3; jobs see it through the proxy."""
    proxy.reset()
    root = f"{seaweedfs.url}/{uuid.uuid4().hex[:8]}"
    put_tree(packed, root)
    seaweedfs.through(proxy).use(monkeypatch)
    return root


@pytest.fixture
def config(make_config: Callable[..., Path]) -> Callable[[str], Path]:
    def write(url: str) -> Path:
        return make_config(
            "remote",
            run={"steps": STEPS},
            data={"url": url, "window": WINDOW, "lanes": LANES, "shift_px": 0},
            validate={"every_steps": 12},
            checkpoint={"every_steps": 100},
        )

    return write


@pytest.fixture(scope="module")
def digest(packed: Path) -> Callable[[], str]:
    """What a run from local shards has: computed from the order."""
    from pipeline.order import DIGEST_START, fold_digest, sample_hash
    from pipeline.stream import SampleReader

    shards = [Shard(str(packed), entry) for entry in load_manifest(str(packed)).splits["train"]]
    reader = SampleReader(shards)
    order = order_of(packed)
    found = DIGEST_START
    for step in range(STEPS):
        ids = order.samples_of(step)
        keys = [reader.key(*at) for at in zip(ids.shard_G, ids.index_G, strict=True)]
        found = fold_digest(found, sum(sample_hash(*at) for at in enumerate(keys)))
    return lambda: found


def order_of(packed: Path) -> Order:
    entries = load_manifest(str(packed)).splits["train"]
    samples = [entry.samples for entry in entries]
    return Order(samples, seed=11, global_size=8, micro_size=2, lanes=LANES, window=WINDOW)


def window_bytes(packed: Path) -> int:
    shards = [Shard("s3://b/d", entry) for entry in load_manifest(str(packed)).splits["train"]]
    order = order_of(packed)
    places = node_places(order, Node(range(1), 1, 0))
    return reads_of(shards, order.uses(0, places), order.steps_per_epoch).working_bytes


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def digest_of(run: Path) -> str:
    return str([row for row in rows(run) if "order_digest" in row][-1]["order_digest"])


def tars(proxy: FaultyProxy, split: str = "train") -> Counter[str]:
    return Counter(
        {
            path.rpartition("/")[2]: count
            for path, count in proxy.gets.items()
            if path.endswith(".tar") and f"/{split}/" in path
        }
    )


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[list[int]]:
    """The most bytes that a cache ever had."""
    most = [0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set():
            # Under its lock: a sum over a folder that changes meanwhile is of no moment.
            with contextlib.suppress(FileNotFoundError), (folder / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                most[0] = max(most[0], sum(storage.list_files(str(folder)).values()))
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def test_two_ranks_fetch_each_shard_once(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    proxy: FaultyProxy,
    packed: Path,
    digest: Callable[[], str],
    tmp_path: Path,
) -> None:
    words = ["--config", config(url), "--data.workers", 2, "--data.cache_dir", tmp_path / "cache"]
    job = start("pipeline.train", *words, "--run.dir", tmp_path / "run", world_size=2)
    job.succeed()
    assert digest_of(tmp_path / "run") == digest()
    splits = load_manifest(str(packed)).splits
    assert tars(proxy) == {Path(entry.name).name: 1 for entry in splits["train"]}
    assert tars(proxy, "val") == {Path(entry.name).name: 1 for entry in splits["val"]}
    small = [n for path, n in proxy.gets.items() if path.endswith((".idx", ".json"))]
    assert small.count(1) >= 2 * len(splits["train"])
    assert not list((tmp_path / "cache").glob("*.part"))
    output = job.output()
    assert output.count("reads lanes 0 to 1 of 2") == 1
    assert f"cache {tmp_path / 'cache'}" in output
    assert "Traceback" not in output
    # All is there: the next run needs nothing.
    proxy.reset()
    again = ["--run.dir", tmp_path / "again", "--run.steps", 4, "--validate.every_steps", 100]
    start("pipeline.train", *words, *again, world_size=1).succeed()
    assert not tars(proxy)


def test_a_cache_too_small_for_two_windows(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    packed: Path,
    digest: Callable[[], str],
    tmp_path: Path,
    proxy: FaultyProxy,
) -> None:
    bound = window_bytes(packed) + 20  # what the lock file says
    words = ["--config", config(url), "--data.workers", 2, "--data.cache_dir", tmp_path / "cache"]
    refused = start(
        "pipeline.train", *words, "--run.dir", tmp_path / "no", "--data.cache_bytes", bound - 1,
        world_size=1,
    )  # fmt: skip
    assert refused.wait() == [2]
    (line,) = [line for line in refused.output().splitlines() if "error" in line]
    assert f"data.cache_bytes = {bound - 1}, room for {bound - 21} bytes" in line
    assert re.search(rf"one window of this node's lanes needs \d+ shards, {bound - 20} bytes", line)
    assert not tars(proxy)

    with watched(tmp_path / "cache") as most:
        job = start(
            "pipeline.train", *words, "--run.dir", tmp_path / "run", "--data.cache_bytes", bound,
            world_size=2,
        )  # fmt: skip
        job.succeed()
    assert digest_of(tmp_path / "run") == digest()
    assert 0 < most[0] <= bound
    assert rows(tmp_path / "run")[-1].get("bad_samples", 0) == 0
    fetched = sum(tars(proxy).values())
    assert fetched <= 3 * 2 * len(load_manifest(str(packed)).splits["train"]), "it thrashes"


def test_two_nodes_read_disjoint_shards(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    digest: Callable[[], str],
    tmp_path: Path,
    packed: Path,
) -> None:
    """As torchrun starts them on two machines, each with a disk of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    jobs = []
    for node in range(2):
        launch = ["--nnodes", 2, "--nproc-per-node", 1, "--node-rank", node]
        launch += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "pipeline.train"]
        words = ["--config", config(url), "--run.dir", tmp_path / "run", "--run.steps", 12]
        words += ["--data.cache_dir", tmp_path / f"cache-{node}", "--validate.every_steps", 100]
        jobs.append(start("torch.distributed.run", *launch, *words, world_size=1))
    for job in jobs:
        job.succeed()
    assert "\n".join(job.output() for job in jobs).count(" reads lanes ") == 2
    assert "pixloom: node 1 reads lanes 1 to 1 of 2: " in jobs[0].output()
    shas = {entry.sha256: entry for entry in load_manifest(str(packed)).splits["train"]}
    found = [
        {path.stem for path in (tmp_path / f"cache-{node}").glob("*.tar")} & shas.keys()
        for node in range(2)
    ]
    assert len(found[0] & found[1]) <= 1  # a lane may begin inside a shard
    assert len(found[0] | found[1]) >= len(shas) - 1  # a few samples are left over
    start(
        "pipeline.train", "--config", config(str(packed)), "--run.dir", tmp_path / "local",
        "--run.steps", 12, world_size=1,
    ).succeed()  # fmt: skip
    assert digest_of(tmp_path / "run") == digest_of(tmp_path / "local")


def test_two_jobs_share_one_folder(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    packed: Path,
    digest: Callable[[], str],
    tmp_path: Path,
    proxy: FaultyProxy,
) -> None:
    num_bytes = sum(entry.bytes for entry in load_manifest(str(packed)).splits["train"])
    bound = num_bytes * 3 // 4
    cache = tmp_path / "cache"
    words = ["--config", config(url), "--data.cache_dir", cache, "--data.cache_bytes", bound]
    with watched(cache) as most:
        jobs = [
            start(
                "pipeline.train", *words, "--run.dir", tmp_path / f"run-{number}",
                "--data.workers", number, "--run.seed", 11 + number, world_size=1,
            )
            for number in range(2)
        ]  # fmt: skip
        for job in jobs:
            job.succeed()
    assert 0 < most[0] <= bound
    assert digest_of(tmp_path / "run-0") == digest()
    assert rows(tmp_path / "run-1")[-1]["step"] == STEPS
    assert not list(cache.glob("*.part"))


def test_a_job_killed_within_downloads_goes_on(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    digest: Callable[[], str],
    tmp_path: Path,
    proxy: FaultyProxy,
) -> None:
    cache = tmp_path / "cache"
    words = ["--config", config(url), "--data.cache_dir", cache, "--run.dir", tmp_path / "run"]
    words += ["--data.workers", 1, "--checkpoint.every_steps", 4]
    job = start("pipeline.train", *words, world_size=2)
    while len(list(cache.glob("*.tar"))) < 2:
        assert job.alive(), job.output()
        time.sleep(0.005)
    proxy.inject("stall", on={"get"})
    while not proxy.stalled:
        if not job.alive():
            pytest.fail("all was fetched before a download could be stopped")
        time.sleep(0.005)
    job.kill()
    proxy.clear()
    assert list(cache.glob("*.part"))
    start("pipeline.train", *words, world_size=1).succeed()
    assert digest_of(tmp_path / "run") == digest()
    assert not list(cache.glob("*.part"))


DAMAGES: dict[str, tuple[Callable[[bytes, SampleSpan, bytes], bytes | None], slice, str]] = {
    "a bit flipped": (
        lambda tar, span, _: flipped(tar, span.members[1].offset + 99),
        slice(3, 4),
        "its SHA-256 is not the manifest's",
    ),
    # In front of a header: to `tarfile` that is a shorter archive in order.
    "cut inside a sample": (
        lambda tar, span, _: tar[: span.members[1].offset - TAR_BLOCK_BYTES],
        slice(3, None),
        "bytes, the manifest says",
    ),
    "missing": (lambda *_: None, slice(None), "there is no such object"),
    "replaced by one as long": (
        lambda tar, _, other: other.ljust(len(tar), b"\0"),
        slice(None),
        "its SHA-256 is not the manifest's",
    ),
}
"""What becomes of a shard, given its fourth sample and another shard; which samples are lost; and
the cause."""


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_shards_keep_their_place(
    how: str,
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    packed: Path,
    digest: Callable[[], str],
    tmp_path: Path,
) -> None:
    change, lost_samples, cause = DAMAGES[how]
    entries = load_manifest(str(packed)).splits["train"]
    number, entry = max(enumerate(entries), key=lambda each: each[1].bytes)
    spans = parse_index((packed / entry.index_name).read_text(), entry.index_name)
    tar, other = ((packed / entries[place].name).read_bytes() for place in (number, 0))
    left = change(tar, spans[3], other)
    if left is None:
        storage.remove(f"{url}/{entry.name}")
    else:
        put(f"{url}/{entry.name}", left)
    places = {(number, place) for place in range(entry.samples)[lost_samples]}
    lost = [f"{url}/{entry.name} {spans[place].key}" for _, place in sorted(places & seen(packed))]
    assert lost

    words = ["--config", config(url), "--data.cache_dir", tmp_path / "cache", "--data.workers", 1]
    words += ["--run.dir", tmp_path / "run", "--checkpoint.every_steps", 4]
    stopped = start("pipeline.train", *words, "--data.max_bad", len(lost) - 1, world_size=2)
    assert stopped.wait() == [2, 2]
    said = stopped.output()
    (error,) = [line for line in said.splitlines() if "error: " in line]
    told = f"{len(lost)} damaged samples (named above), data.max_bad allows {len(lost) - 1}"
    assert told in error
    assert said.count(f"warning: {url}/{entry.name}: damaged (") == 1
    assert cause in said
    assert "Traceback" not in said
    assert all(said.count(f"warning: {sample}: ") == 1 for sample in lost)

    # It goes on from its last checkpoint, and counts what that knows no second time.
    start("pipeline.train", *words, "--data.max_bad", len(lost), world_size=1).succeed()
    assert digest_of(tmp_path / "run") == digest()
    steps = [row for row in rows(tmp_path / "run") if "order_digest" in row]
    assert [row["step"] for row in steps] == list(range(1, STEPS + 1))
    assert steps[-1]["bad_samples"] == len(lost)
    ledger = (tmp_path / "run" / "damaged.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in ledger) == lost


def seen(packed: Path) -> set[tuple[int, int]]:
    """(shard, index) of what the steps of a run read: an epoch leaves a few samples over."""
    steps = map(order_of(packed).samples_of, range(STEPS))
    return {
        at for ids in steps for at in zip(ids.shard_G.tolist(), ids.index_G.tolist(), strict=True)
    }


@pytest.mark.parametrize("replaced", ["manifest alone", "dataset"])
def test_a_dataset_replaced_under_a_running_job(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    packed: Path,
    digest: Callable[[], str],
    tmp_path: Path,
    replaced: str,
) -> None:
    """It goes on with what its own manifest lists, or ends with a line: never with others."""
    assert synth.main([str(tmp_path / "raw"), "--samples", "90", "--seed", "6"]) == 0
    words = "--size 80x48 --split train=rest,val=12 --shard-samples 6 --workers 0"
    other = tmp_path / "other"
    assert pack.main([str(tmp_path / "raw"), str(other), *words.split()]) == 0
    # A cache that must fetch again in the second epoch.
    run = ["--config", config(url), "--run.dir", tmp_path / "run", "--checkpoint.every_steps", 4]
    run += ["--data.cache_dir", tmp_path / "cache", "--data.cache_bytes", window_bytes(packed) + 20]
    steps = STEPS if replaced == "manifest alone" else 3 * STEPS
    run += ["--run.steps", steps, "--data.workers", 1]
    job = start("pipeline.train", *run, world_size=2)
    while not list((tmp_path / "run").glob("checkpoints/*/COMMIT.json")):
        assert job.alive(), job.output()
        time.sleep(0.005)
    for name in storage.list_files(str(other)):
        if replaced == "dataset" or name == "manifest.json":
            put(f"{url}/{name}", (other / name).read_bytes())
    if replaced == "manifest alone":
        job.succeed()
        assert digest_of(tmp_path / "run") == digest()
    else:
        assert 2 in job.wait()
        assert "the dataset was replaced after this run had begun" in job.output()
    reached = [row["step"] for row in rows(tmp_path / "run") if "order_digest" in row]
    assert not (tmp_path / "run" / "damaged.txt").exists()
    again = start("pipeline.train", *run, world_size=1)
    assert again.wait() == [2], again.output()
    (line,) = [line for line in again.output().splitlines() if "error" in line]
    assert url in line
    assert "order" in line or "another dataset" in line, line
    assert [row["step"] for row in rows(tmp_path / "run") if "order_digest" in row] == reached


def test_a_store_lost_under_way_ends_the_run_in_one_line(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    seaweedfs_server: Server,
    url: str,
    packed: Path,
    tmp_path: Path,
) -> None:
    with FaultyProxy(seaweedfs_server.endpoint) as lost:
        environment = {
            **seaweedfs_server.through(lost).environment,
            "PIXLOOM_STORAGE_CONNECT_S": "1",
            "PIXLOOM_STORAGE_DEADLINE_S": "3",
        }
        words = ["--config", config(url), "--data.cache_dir", tmp_path / "cache"]
        words += ["--run.dir", tmp_path / "run", "--data.cache_bytes", window_bytes(packed) + 20]
        job = start("pipeline.train", *words, world_size=2, environment=environment)
        while not (tmp_path / "run" / "metrics.jsonl").exists() or not rows(tmp_path / "run"):
            assert job.alive(), job.output()
            time.sleep(0.005)
    assert 2 in job.wait()
    said = [log.read_text() for log in job.logs]
    met = [text for text in said if f"error: {url}/train/" in text]
    # The other rank may be waiting for this one, and then loses it.
    assert met
    assert "Traceback" not in "".join(met)


def test_order_reads_no_shard(
    start: Callable[..., Any],
    config: Callable[[str], Path],
    url: str,
    digest: Callable[[], str],
    tmp_path: Path,
    proxy: FaultyProxy,
) -> None:
    words = ["--config", config(url), "--run.dir", ".", "--data.cache_dir", tmp_path / "cache"]
    job = start("pipeline.order", *words, "--step", STEPS - 1, "--digest", world_size=1)
    job.succeed()
    assert f"order_digest {digest()}" in job.output()
    assert not tars(proxy)
