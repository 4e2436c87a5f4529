"""Storage on real servers: what every service must do, and what S3 does under faults."""

import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from servers import FaultyProxy, Server, begin_uploads, give_little_time, uploads

from shards import remote, storage
from shards.storage import UserError

ROOT = Path(__file__).parents[2]
PART_BYTES = 5 << 20  # the least that S3 takes
BIG_BYTES = PART_BYTES + 12345

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def root(server: Server) -> str:
    return new_root(server)


def new_root(server: Server) -> str:
    return f"{server.url}/run-{uuid.uuid4().hex[:8]}"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts in little data, and short pauses."""
    monkeypatch.setattr(remote, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)


@pytest.fixture(scope="module")
def data() -> bytes:
    return random.Random(0).randbytes(BIG_BYTES)


def publish(data: bytes, url: str, folder: Path) -> None:
    scratch = folder / uuid.uuid4().hex
    scratch.write_bytes(data)
    storage.publish(scratch, url)
    assert not scratch.exists()


PROGRAM = f"""
import signal
import sys
from pathlib import Path
from shards import remote, storage
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
remote.PART_BYTES = {PART_BYTES}
def action():
    storage.publish(Path(sys.argv[1]), sys.argv[2])
    return 0
sys.exit(storage.command("test", action))
"""


def start_publishing(scratch: Path, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(scratch), url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# Every service.


def test_round_trip(root: str, data: bytes, tmp_path: Path) -> None:
    assert storage.is_remote(root)
    storage.publish_text("old", f"{root}/plan.json")
    storage.publish_text("new \u00fc", f"{root}/plan.json")
    publish(data, f"{root}/train/000000.tar", tmp_path)
    publish(b"", f"{root}/empty", tmp_path)
    assert storage.read_text(f"{root}/plan.json") == "new \u00fc"
    assert storage.read_bytes(f"{root}/train/000000.tar") == data
    assert storage.read_bytes(f"{root}/empty") == b""
    assert storage.size_bytes(f"{root}/train/000000.tar") == BIG_BYTES
    names = {"empty": 0, "plan.json": 6, "train/000000.tar": BIG_BYTES}
    assert storage.list_files(root) == names
    assert storage.list_files(f"{root}/") == names
    assert storage.list_files(f"{root}/train") == {"000000.tar": BIG_BYTES}
    assert storage.list_files(f"{root}/plan.json") == {}
    copy = tmp_path / "cache" / "000000.tar"
    for _ in range(2):
        storage.fetch(f"{root}/train/000000.tar", copy)
        assert copy.read_bytes() == data
    assert [path.name for path in copy.parent.iterdir()] == ["000000.tar"]
    for name in ("plan.json", "train", "train/000000.tar"):
        assert storage.exists(f"{root}/{name}")
    for _ in range(2):
        storage.remove(f"{root}/plan.json")
        assert not storage.exists(f"{root}/plan.json")


def test_a_tree_is_removed_and_nothing_beside_it(root: str) -> None:
    below = ["a", "b/c", "b/d e+f%20", "b/c.txt"]
    for name in (*below, "../" + root.rpartition("/")[2] + "-sibling"):
        storage.publish_text(name, f"{root}/{name}" if name in below else f"{root}-sibling/x")
    assert sorted(storage.list_files(root)) == sorted(below)
    for _ in range(2):
        storage.remove_tree(root)
        assert storage.list_files(root) == {}
        assert not storage.exists(root)
    assert list(storage.list_files(f"{root}-sibling")) == ["x"]


def test_what_is_missing_is_named(root: str, server: Server, tmp_path: Path) -> None:
    calls: list[Callable[[str], object]] = [
        storage.read_bytes,
        storage.size_bytes,
        lambda url: storage.fetch(url, tmp_path / "copy"),
    ]
    for call in calls:
        with pytest.raises(UserError, match=f"^{root}/gone: there is no such object$"):
            call(f"{root}/gone")
    assert list(tmp_path.iterdir()) == []
    assert not storage.exists(f"{root}/gone")
    assert storage.list_files(f"{root}/gone") == {}
    with pytest.raises(UserError, match="no such directory"):
        storage.load_manifest(root)
    for call in (storage.list_files, lambda url: storage.publish_text("x", f"{url}/y")):
        with pytest.raises(UserError, match="no such bucket or container"):
            call(f"{server.url}-other/x")
    with pytest.raises(UserError, match="whole bucket"):
        storage.remove_tree(server.url)
    with pytest.raises(UserError, match="supported so far: local"):
        storage.local_path(root)


def test_a_listing_shows_what_another_process_did(root: str, data: bytes, tmp_path: Path) -> None:
    assert storage.list_files(root) == {}
    assert not storage.exists(f"{root}/a/b")
    scratch = tmp_path / "scratch"
    scratch.write_bytes(data)
    process = start_publishing(scratch, f"{root}/a/b")
    assert process.communicate() == ("", "")
    assert process.returncode == 0
    assert storage.exists(f"{root}/a/b")
    assert storage.list_files(root) == {"a/b": BIG_BYTES}


def test_a_writer_killed_within_a_put_leaves_the_old_object(
    server: Server, root: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.publish_text("old", f"{root}/x")
    # The part that gcsfs sends to an address of the server's own does not pass the proxy.
    size = BIG_BYTES if not root.startswith("gs://") else 4 << 20
    with FaultyProxy(server.endpoint) as proxy, monkeypatch.context() as patch:
        proxy.inject("stall", on={"put", "part", "other"})
        server.through(proxy).use(patch)
        for name in ("x", "y"):
            (tmp_path / name).write_bytes(data[:size])
            stalled = proxy.stalled
            process = start_publishing(tmp_path / name, f"{root}/{name}")
            wait_for(lambda before=stalled: proxy.stalled > before, process)  # type: ignore[misc]
            process.kill()
            process.communicate()
    assert storage.list_files(root) == {"x": 3}
    assert storage.read_text(f"{root}/x") == "old"
    num_left = storage.abort_uploads(root)
    assert num_left == (2 if root.startswith("s3://") else 0)
    assert storage.abort_uploads(root) == 0


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_gets_its_own_client(root: str) -> None:
    storage.publish_text("x", f"{root}/x")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(storage.read_text, [f"{root}/x"] * 2) == ["x", "x"]
    assert storage.read_text(f"{root}/x") == "x"


def test_threads_share_a_client(root: str, tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            url = f"{root}/{number}"
            storage.publish_text(str(number), url)
            assert storage.read_text(url) == str(number)
            storage.fetch(f"{root}/{number}", tmp_path / "same")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(storage.list_files(root)) == 6
    assert (tmp_path / "same").read_text() in "012345"


# S3: many objects, other people's uploads.


@pytest.mark.parametrize("name", ["moto", "seaweedfs"])
def test_lists_longer_than_a_page(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = request.getfixturevalue(name)
    root = new_root(server)
    prefix = root.removeprefix(f"{server.url}/")
    monkeypatch.setattr(remote, "MAX_PAGE_KEYS", 2)
    names = [f"{folder}/{number}" for folder in "ab" for number in range(4)]
    for name in names:
        storage.publish_text("x", f"{root}/{name}")
    begin_uploads(server, [f"{prefix}/{name}" for name in [*names, names[0]]])  # two of one key
    begin_uploads(server, [f"{prefix}-sibling/a"])
    assert list(storage.list_files(root)) == names
    assert storage.abort_uploads(f"{root}/b") == 4
    assert storage.abort_uploads(root) == 5
    assert storage.abort_uploads(server.url) == 0
    assert uploads(server, prefix) == [f"{prefix}-sibling/a"]
    storage.remove_tree(root)
    assert storage.list_files(root) == {}
    assert storage.abort_uploads(f"{root}-sibling") == 1


# S3 under faults.


PUT_FAULTS = [
    ("unavailable", {"put"}),
    ("unavailable", {"create"}),
    ("unavailable", {"part"}),
    ("unavailable", {"complete"}),
    ("unavailable", {"head"}),
    ("reset", {"put"}),
    ("reset", {"part"}),
    ("lost_reply", {"put"}),
    ("lost_reply", {"create"}),
    ("lost_reply", {"part"}),
    ("lost_reply", {"complete"}),
    ("stall", {"put"}),
    ("stall", {"part"}),
    ("stall", {"complete"}),
]


@pytest.mark.parametrize(("kind", "on"), PUT_FAULTS)
def test_a_put_gets_through_a_passing_fault(
    kind: str,
    on: set[str],
    proxy: FaultyProxy,
    seaweedfs: Server,
    data: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = new_root(seaweedfs)
    content = data[:100_000] if on == {"put"} else data
    proxy.inject(kind, on=on, at_most=1 if kind == "stall" else 2)
    if kind == "stall":
        give_little_time(monkeypatch, deadline_s=20)
    publish(content, f"{root}/x", tmp_path)
    assert proxy.counts[kind] > 0
    proxy.clear()
    assert storage.read_bytes(f"{root}/x") == content
    assert storage.list_files(root) == {"x": len(content)}
    assert uploads(seaweedfs, root.removeprefix(f"{seaweedfs.url}/")) == []


@pytest.mark.parametrize(("kind", "on"), PUT_FAULTS)
def test_a_put_under_a_lasting_fault_ends_with_the_object_whole_or_absent(
    kind: str,
    on: set[str],
    proxy: FaultyProxy,
    seaweedfs: Server,
    data: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = new_root(seaweedfs)
    content = data[:100_000] if on == {"put"} else data
    proxy.inject(kind, on=on)
    if kind == "stall":
        give_little_time(monkeypatch, deadline_s=2)
        monkeypatch.setattr(remote, "MIN_BYTES_PER_S", 1 << 30)
    scratch = tmp_path / "scratch"
    scratch.write_bytes(content)
    with pytest.raises(UserError) as error:
        storage.publish(scratch, f"{root}/x")
    assert str(error.value).startswith(f"{root}/x: ")
    assert "\n" not in str(error.value)
    assert scratch.read_bytes() == content
    # Two parts, in each of the puts; and each attempt may be two for aiohttp.
    assert proxy.counts[kind] <= 2 * 2 * remote.NUM_ATTEMPTS * remote.NUM_PUTS
    proxy.clear()
    if storage.list_files(root):
        assert storage.read_bytes(f"{root}/x") == content
        assert kind == "lost_reply" or on == {"head"}
    # The server could be reached: nothing is left for anybody to clean.
    assert uploads(seaweedfs, root.removeprefix(f"{seaweedfs.url}/")) == []
    assert storage.abort_uploads(root) == 0


def test_a_put_that_cannot_clean_up_leaves_it_to_abort_uploads(
    proxy: FaultyProxy, seaweedfs: Server, data: bytes, tmp_path: Path
) -> None:
    root = new_root(seaweedfs)
    proxy.inject("unavailable", on={"complete", "abort"})
    with pytest.raises(UserError):
        publish(data, f"{root}/x", tmp_path)
    proxy.clear()
    prefix = root.removeprefix(f"{seaweedfs.url}/")
    assert set(uploads(seaweedfs, prefix)) == {f"{prefix}/x"}
    assert storage.abort_uploads(f"{root}/x") == 0  # below it, not at it
    assert storage.abort_uploads(root) == remote.NUM_PUTS
    assert uploads(seaweedfs, prefix) == []
    assert storage.list_files(root) == {}


def test_an_interrupted_put_aborts_its_upload(
    proxy: FaultyProxy, seaweedfs: Server, data: bytes, tmp_path: Path
) -> None:
    root = new_root(seaweedfs)
    proxy.inject("stall", on={"part"}, at_most=1)
    (tmp_path / "x").write_bytes(data)
    process = start_publishing(tmp_path / "x", f"{root}/x")
    wait_for(lambda: proxy.stalled > 0, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "pixloom test: interrupted\n")
    assert process.returncode == 130
    assert storage.list_files(root) == {}
    assert uploads(seaweedfs, root.removeprefix(f"{seaweedfs.url}/")) == []


READS: dict[str, Callable[[str, Path], object]] = {
    "exists": lambda root, _: storage.exists(f"{root}/x"),
    "size": lambda root, _: storage.size_bytes(f"{root}/x"),
    "read": lambda root, _: storage.read_bytes(f"{root}/x"),
    "list": lambda root, _: storage.list_files(root),
    "fetch": lambda root, folder: storage.fetch(f"{root}/x", folder / "x"),
    "remove": lambda root, _: storage.remove(f"{root}/x"),
    "remove_tree": lambda root, _: storage.remove_tree(root),
    "abort": lambda root, _: storage.abort_uploads(root),
}


@pytest.mark.parametrize("call", READS.values(), ids=READS)
def test_a_store_without_good_answers_is_no_missing_object(
    call: Callable[[str, Path], Any],
    proxy: FaultyProxy,
    seaweedfs: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = new_root(seaweedfs)
    storage.publish_text("content", f"{root}/x")
    for kind in ("unavailable", "lost_reply", "stall"):
        proxy.inject(kind)
        if kind == "stall":
            give_little_time(monkeypatch, deadline_s=1.5)
        with pytest.raises(UserError, match=rf"^{root}(/x)?: ") as error:
            call(root, tmp_path)
        assert "no such" not in str(error.value)
        assert "\n" not in str(error.value)
        assert proxy.counts[kind] <= 2 * remote.NUM_ATTEMPTS**2
        proxy.clear()
    proxy.inject("unavailable", at_most=3)
    call(root, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["x"])


def test_a_download_that_breaks_off_is_done_again(
    proxy: FaultyProxy, seaweedfs: Server, data: bytes, tmp_path: Path
) -> None:
    root = new_root(seaweedfs)
    publish(data, f"{root}/x", tmp_path)
    copy = tmp_path / "copies" / "x"
    proxy.inject("cut_reply", on={"get"}, at_most=2)
    storage.fetch(f"{root}/x", copy)
    assert copy.read_bytes() == data
    proxy.inject("cut_reply", on={"get"}, at_most=2)
    assert storage.read_bytes(f"{root}/x") == data
    assert proxy.counts["cut_reply"] == 4
    proxy.inject("cut_reply", on={"get"})
    copy.write_bytes(b"old")
    with pytest.raises(UserError):
        storage.fetch(f"{root}/x", copy)
    assert copy.read_bytes() == b"old"
    assert [path.name for path in copy.parent.iterdir()] == ["x"]


def test_objects_are_whole_under_mixed_faults(
    proxy: FaultyProxy, seaweedfs: Server, data: bytes, tmp_path: Path
) -> None:
    root = new_root(seaweedfs)
    for kind in ("unavailable", "reset", "lost_reply"):
        proxy.inject(kind, rate=0.15)
    proxy.inject("cut_reply", rate=0.4)
    versions = [data[number:] for number in range(4)]
    published: dict[str, set[bytes]] = {"a": set(), "b": set()}
    for version in versions:
        for name, possible in published.items():
            content = version if name == "a" else version[:50_000]
            try:
                publish(content, f"{root}/{name}", tmp_path)
                possible.clear()
            except UserError:
                pass
            possible.add(content)
            try:
                storage.fetch(f"{root}/{name}", tmp_path / "copy")
                assert (tmp_path / "copy").read_bytes() in possible
            except UserError:
                pass
    assert proxy.counts.total() > 4
    proxy.clear()
    for name, possible in published.items():
        assert storage.read_bytes(f"{root}/{name}") in possible
    storage.abort_uploads(root)
    assert uploads(seaweedfs, root.removeprefix(f"{seaweedfs.url}/")) == []


def test_an_operation_ends_at_its_deadline(
    proxy: FaultyProxy,
    seaweedfs: Server,
    data: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = new_root(seaweedfs)
    monkeypatch.setattr(remote, "MIN_BYTES_PER_S", 1 << 40)
    monkeypatch.setenv("PIXLOOM_STORAGE_READ_S", "600")
    monkeypatch.setenv("PIXLOOM_STORAGE_DEADLINE_S", "2")
    proxy.inject("stall", on={"part"})
    with pytest.raises(UserError, match="no answer in time"):
        publish(data, f"{root}/x", tmp_path)
    assert proxy.operations["part"] == 2
    assert uploads(seaweedfs, root.removeprefix(f"{seaweedfs.url}/")) == []


# Configuration and credentials.


def test_a_store_out_of_reach_is_no_missing_object(
    server: Server, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value.replace(server.endpoint, "http://127.0.0.1:9"))
    give_little_time(monkeypatch, deadline_s=1.5)
    for call in (storage.exists, lambda url: storage.publish_text("x", url)):
        with pytest.raises(UserError, match=f"^{root}: (the storage|no answer)") as error:
            call(root)
        assert "no such" not in str(error.value)


def test_denied_access_is_said_and_the_secret_is_not(
    seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAC4N4RY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "c4n4ry-secret")
    for call in (storage.exists, storage.list_files, storage.read_bytes):
        with pytest.raises(UserError, match="access denied") as error:
            call(f"{seaweedfs.url}/x")
        assert "c4n4ry" not in str(error.value).lower()
        assert error.value.__suppress_context__


def test_missing_credentials_are_said(seaweedfs: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(UserError, match="no usable credentials in the environment"):
        storage.exists(f"{seaweedfs.url}/x")


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:c4n4ry@bucket/x",
        "s3://AKIA:c4n4ry/more@bucket/x",
        "gs://c4n4ry:x@bucket/x",
        "abfs://c4n4ry:c4n4ry@account.dfs.core.windows.net/x",
        "az://container/x?sig=c4n4ry",
        "s3://bucket/x?X-Amz-Signature=c4n4ry",
        "s3://bucket/x?token=c4n4ry",
        "s3://c4n4ry@bucket/x",
    ],
)
def test_a_url_with_credentials_is_refused_without_them(url: str) -> None:
    for call in (storage.exists, storage.list_files, storage.local_path):
        with pytest.raises(UserError) as error:
            call(url)
        assert "c4n4ry" not in str(error.value)


@pytest.mark.parametrize("url", ["s3://", "gs:///x", "s3:///"])
def test_a_url_without_a_bucket_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="no bucket"):
        storage.exists(url)


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [("s3://b/x", "s3fs", "s3"), ("gs://b/x", "gcsfs", "gs"), ("az://b/x", "adlfs", "azure")],
)
def test_a_missing_package_is_named_by_its_extra(
    url: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_stores", {})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf'pip install "pixloom\[{extra}\]"'):
        storage.exists(url)


@pytest.mark.parametrize("value", ["0", "-1", "soon", "inf", "nan"])
def test_a_bad_time_budget_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXLOOM_STORAGE_READ_S", value)
    with pytest.raises(UserError, match="PIXLOOM_STORAGE_READ_S"):
        storage.exists("s3://bucket/x")
