"""Packing from and to object stores, on real servers: the bytes are those of a local pack, and a
fault or a kill at any moment leaves nothing that the next call does not put right."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from servers import (
    S3_SECRET,
    FaultyProxy,
    Server,
    begin_uploads,
    give_little_time,
    put,
    put_tree,
    uploads,
)

from shards import pack, remote, sources, storage, synth, verify
from shards.engines import Workers
from shards.storage import UserError

ROOT = Path(__file__).parents[2]
PART_BYTES = 5 << 20  # the least that S3 takes
OPTIONS = ("--shard-samples", 4, "--split", "train=rest,val=2")

MakePairs = Callable[..., Path]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _scratch(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """A folder for temporary files of each test, in which nothing is left."""
    callspec = getattr(request.node, "callspec", None)
    named = [*request.fixturenames, *(callspec.params.values() if callspec else ())]
    for name in ("moto", "seaweedfs", "fake_gcs", "azurite"):
        if name in named:
            request.getfixturevalue(f"{name}_server")  # It has a folder of its own elsewhere.
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.01)
    yield
    assert list(folder.glob("pixloom*")) == []


def new_root(server: Server) -> str:
    return f"{server.url}/pack-{uuid.uuid4().hex[:8]}"


def key_of(server: Server, url: str) -> str:
    return url.removeprefix(f"{server.url}/")


def tree(root: object) -> dict[str, str]:
    """SHA-256 of every file below a root, by name."""
    names = list(storage.list_files(str(root)))

    def hashed(name: str) -> str:
        return hashlib.sha256(storage.read_bytes(f"{root}/{name}")).hexdigest()

    return dict(zip(names, storage.each(str(root), hashed, names), strict=True))


def run(*arguments: object) -> int:
    return pack.main([str(argument) for argument in (*arguments, "--workers", 0)])


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    words = [sys.executable, "-W", "error", "-m", "shards.pack", *map(str, arguments)]
    return subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=sys.stderr)


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.01)


# Every service.


def test_the_bytes_on_a_store_are_those_on_disk(
    server: Server,
    make_pairs: MakePairs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw = make_pairs(12)
    for number, name in enumerate(["a b+c%20&d=e", "caf\u00e9 [x]*", "x.v2", "C:@~'"]):
        (raw / f"{name}.png").write_bytes((raw / "a/0001.png").read_bytes() + bytes(number))
        (raw / f"{name}.gui").write_text(name)
    (raw / "cut.png").write_bytes((raw / "a/0001.png").read_bytes()[:-200])
    (raw / "cut.gui").write_text("cut")
    (raw / "alone.png").write_bytes(b"alone")
    (raw / ".hidden").mkdir()
    (raw / ".hidden" / "1.png").write_bytes(b"hidden")
    source, out = new_root(server), new_root(server)
    put_tree(raw, source)
    assert run(raw, tmp_path / "out", *OPTIONS) == 0
    expected = tree(tmp_path / "out")
    assert run(source, out, *OPTIONS, "--json") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["skips"] == {"image_without_code": 1, "truncated": 1}
    assert tree(out) == expected
    assert run(source, tmp_path / "from-store", *OPTIONS) == 0
    assert tree(tmp_path / "from-store") == expected
    assert verify.main([out, "--deep", "--workers", "0"]) == 0
    written = capsys.readouterr()
    assert "garbage" not in written.err
    assert run(raw, f"{out}/", *OPTIONS, "--json") == 0  # from disk to the store, and again
    assert json.loads(capsys.readouterr().out)["nothing_to_do"]
    storage.publish_text("mine", f"{out}/train/notes.txt")
    changed = ("--shard-samples", 20, "--split", "train=1")
    assert run(source, out, *changed) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(source, out, *changed, "--overwrite") == 0
    assert run(raw, tmp_path / "changed", *changed) == 0
    found = tree(out)
    assert found.pop("train/notes.txt")
    assert found == tree(tmp_path / "changed")


def test_places_that_will_not_do_are_named(
    server: Server, make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, source, other = make_pairs(4), new_root(server), new_root(server)
    put_tree(raw, source)
    put(f"{other}/thesis.txt", b"mine")
    before = tree(source), tree(other)
    for arguments, named in [
        ((source, f"{source}/out"), "OUT lies in SOURCE"),
        ((source, f"{source}/"), "OUT lies in SOURCE"),
        ((source, other), f"{other}: not empty"),
        ((source, other, "--overwrite"), f"{other}: not empty"),
        ((f"{source}-gone", other), f"{source}-gone: no such folder"),
        ((f"{other}/thesis.txt", other), "thesis.txt: not a folder"),
        ((other, source), "no images there"),
    ]:
        assert run(*arguments, "--split", "train=1") == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1
    assert (tree(source), tree(other)) == before


def test_a_source_that_changes_while_it_is_packed_is_named(
    server: Server, make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = new_root(server), new_root(server)
    put_tree(make_pairs(6), source)
    image, code = f"{source}/a/0001.png", f"{source}/a/0003.gui"
    kept = {url: storage.read_bytes(url) for url in (image, code)}
    args = pack._parser().parse_args([source, out, "--workers", "0", "--split", "train=1"])
    listing, options, _ = pack._prepare(args, Workers(0))
    made = pack.draft(source, listing, options, None, 0)
    put(image, b"another")
    with pytest.raises(UserError, match=r"a/0001\.png: changed while it was packed; pack again"):
        pack.pack(source, out, made, 0)
    put(image, kept[image])
    storage.remove(code)
    with pytest.raises(UserError, match=r"a/0003\.gui: No such file or directory; pack again"):
        pack.pack(source, out, made, 0)
    # Gone between the listing and the scan: as on disk, one file that cannot be read.
    assert pack.draft(source, listing, options, None, 0).plan.skips == (
        sources.Skip("unreadable", "a/0003.gui"),
    )
    put(code, kept[code])
    assert not storage.exists(f"{out}/manifest.json")
    pack.pack(source, out, made, 0)
    assert verify.main([out, "--workers", "0"]) == 0
    assert "train 6" in capsys.readouterr().out


class Trained(NamedTuple):
    rows: list[dict[str, Any]]
    """of each step, and of the validation: loss, order digest and all that takes no time"""
    tars: set[str]
    """SHA-256 of what is in the node's cache then"""


def train_two_steps(data: object, folder: Path) -> Trained:
    """`python -m pipeline.train`, from `data` as it is packed."""
    words = f"""
    -m pipeline.train --run.dir {folder}/run --data.url {data} --data.cache_dir {folder}/cache
    --data.workers 1 --run.steps 2 --run.log_every_steps 1 --batch.global_size 4
    --batch.micro_size 4 --model.channels 4,8 --model.hidden_dim 8 --model.embed_dim 4
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", *words.split()],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    timed = ("samples_per_s", "data_wait")
    return Trained(
        [{name: value for name, value in row.items() if name not in timed} for row in rows],
        {path.stem for path in (folder / "cache").glob("*.tar")},
    )


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], Trained]:
    """The demo dataset in small: raw, what is packed on disk, and two steps from there."""
    folder = tmp_path_factory.mktemp("synthetic")
    assert synth.main([str(folder / "raw"), "--samples", "16", "--seed", "5"]) == 0
    assert run(folder / "raw", folder / "out", *OPTIONS, "--size", "48x32") == 0
    return folder / "raw", tree(folder / "out"), train_two_steps(folder / "out", folder)


def test_two_steps_from_a_store_are_those_from_the_disk(
    server: Server,
    synthetic: tuple[Path, dict[str, str], Trained],
    tmp_path: Path,
) -> None:
    """The whole path: pack to the store, verify what is there, train from it."""
    raw, expected, from_disk = synthetic
    out = new_root(server)
    assert run(raw, out, *OPTIONS, "--size", "48x32") == 0
    assert verify.main([out, "--deep", "--workers", "0"]) == 0
    assert tree(out) == expected
    trained = train_two_steps(out, tmp_path)
    assert trained.rows == from_disk.rows
    assert [row["step"] for row in trained.rows if "order_digest" in row] == [1, 2]
    assert all(row["loss"] > 0 for row in trained.rows)
    splits = storage.load_manifest(out).splits
    assert trained.tars == {entry.sha256 for split in splits.values() for entry in split}
    assert not from_disk.tars


# S3.


def test_a_name_that_no_url_holds_is_skipped(seaweedfs: Server, make_pairs: MakePairs) -> None:
    raw, source = make_pairs(4), new_root(seaweedfs)
    put_tree(raw, source)
    listing = sources.list_folder(source)
    assert [pair.image_bytes for pair in listing.pairs] == [
        (raw / pair.image).stat().st_size for pair in listing.pairs
    ]
    assert listing.skips == ()
    put(f"{source}/b/why#.png", b"x")
    assert sources.list_folder(source).skips == (sources.Skip("unsupported_name", "b/why#.png"),)


def test_each_file_is_read_once_to_plan_and_once_to_pack(
    proxy: FaultyProxy, seaweedfs: Server, make_pairs: MakePairs, tmp_path: Path
) -> None:
    raw, source = make_pairs(10), new_root(seaweedfs)
    put_tree(raw, source)
    proxy.reset()
    assert run(source, tmp_path / "out", "--split", "train=rest,test=3") == 0
    gets = {url.rpartition(f"{key_of(seaweedfs, source)}/")[2]: n for url, n in proxy.gets.items()}
    assert gets.keys() == storage.list_files(str(raw)).keys()
    # Words were counted before it was known which programs are trained on.
    again = [name for name, count in gets.items() if count == 3]
    assert len(again) == 3
    assert all(name.endswith(".gui") for name in again)
    assert set(gets.values()) == {2, 3}
    proxy.reset()
    assert run(source, tmp_path / "dry", "--split", "train=1", "--kind", "images", "--dry-run") == 0
    assert set(proxy.gets.values()) == {1}
    assert proxy.operations["head"] == 0  # the listing told the sizes
    assert not (tmp_path / "dry").exists()


# S3 under faults and kills.


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 images, which make a shard of two parts, as small as parts may be."""
    folder = tmp_path_factory.mktemp("big")
    write_pictures(folder, 11)
    return folder


@pytest.fixture(scope="module")
def big_tree(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("packed") / "out"
    assert run(big, out, "--split", "train=1") == 0
    return tree(out)


def write_pictures(folder: Path, count: int) -> None:
    """Of 600 kB each, all distinct."""
    pixels = random.Random(0).randbytes(3 * 500 * 400)
    for number in range(count):
        turned = pixels[number:] + pixels[:number]
        path = folder / f"{number:02d}.png"
        Image.frombytes("RGB", (500, 400), turned).save(path, compress_level=0)


FAULTS: list[tuple[str, set[str]]] = [
    ("unavailable", {"put", "part", "head", "list", "get", "uploads"}),
    ("reset", {"part"}),
    ("reset", {"put"}),
    ("lost_reply", {"complete"}),
    ("lost_reply", {"put"}),
    ("cut_reply", {"get", "list"}),
    ("stall", {"part"}),
    ("stall", {"complete"}),
]


@pytest.mark.parametrize(("kind", "on"), FAULTS)
def test_a_fault_that_passes_changes_nothing(
    kind: str,
    on: set[str],
    proxy: FaultyProxy,
    seaweedfs: Server,
    big: Path,
    big_tree: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = new_root(seaweedfs)
    monkeypatch.setattr(remote, "PART_BYTES", PART_BYTES)
    if kind == "stall":
        give_little_time(monkeypatch, deadline_s=20)
        proxy.inject(kind, on=on, at_most=1)
    else:
        proxy.inject(kind, on=on, at_most=3)
    assert run(big, out, "--split", "train=1") == 0
    assert proxy.counts[kind] > 0
    proxy.clear()
    assert tree(out) == big_tree
    assert uploads(seaweedfs, key_of(seaweedfs, out)) == []


@pytest.mark.parametrize(
    ("kind", "on"),
    [("unavailable", {"part"}), ("lost_reply", {"complete"}), ("stall", {"put", "part"})],
)
def test_a_fault_that_stays_ends_the_pack_in_one_line(
    kind: str,
    on: set[str],
    proxy: FaultyProxy,
    seaweedfs: Server,
    big: Path,
    big_tree: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = new_root(seaweedfs)
    monkeypatch.setattr(remote, "PART_BYTES", PART_BYTES)
    if kind == "stall":
        give_little_time(monkeypatch, deadline_s=2)
        monkeypatch.setattr(remote, "MIN_BYTES_PER_S", 1 << 30)
    proxy.inject(kind, on=on)
    assert run(big, out, "--split", "train=1") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pixloom pack: error: {out}/")
    assert error.count("\n") == 1
    proxy.clear()
    for name, digest in tree(out).items():
        assert digest == big_tree[name], name
    assert not storage.exists(f"{out}/manifest.json")
    assert uploads(seaweedfs, key_of(seaweedfs, out)) == []
    assert run(big, out, "--split", "train=1") == 0
    assert tree(out) == big_tree


@pytest.mark.parametrize(("stalls", "num_receipts", "samples"), [("part", 0, 30), ("put", 3, 6)])
def test_a_killed_pack_goes_on_to_the_same_bytes(
    stalls: str,
    num_receipts: int,
    samples: int,
    proxy: FaultyProxy,
    seaweedfs: Server,
    tmp_path: Path,
) -> None:
    """Killed within an upload in parts, and after some of the shards."""
    raw, out = tmp_path / "raw", new_root(seaweedfs)
    raw.mkdir()
    write_pictures(raw, 30)
    options = ("--shard-samples", samples, "--split", "train=1")
    assert run(raw, tmp_path / "whole", *options) == 0

    def finished() -> set[str]:
        names = set(storage.list_files(out)) - {"plan.json", "manifest.json"}
        return {name for name in names if name.endswith(".json")}

    if num_receipts == 0:
        proxy.inject("stall", on={stalls})
    process = start(raw, out, *options, "--workers", 2)
    wait_for(lambda: len(finished()) >= num_receipts, process)
    proxy.inject("stall", on={stalls})
    wait_for(lambda: proxy.stalled > 0, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    proxy.clear()
    assert not storage.exists(f"{out}/manifest.json")
    assert len(uploads(seaweedfs, key_of(seaweedfs, out))) == (stalls == "part")
    kept, puts = finished(), proxy.operations["put"]
    assert run(raw, out, *options) == 0
    assert tree(out) == tree(tmp_path / "whole")
    assert uploads(seaweedfs, key_of(seaweedfs, out)) == []
    # What was finished is not sent again: three files a shard, and the manifest.
    assert proxy.operations["put"] - puts <= 3 * (30 // samples - len(kept)) + 1


def test_one_pack_at_a_time_from_this_machine(
    seaweedfs: Server, make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(4), new_root(seaweedfs)
    with storage.locked(out):
        assert run(raw, out, "--split", "train=1") == 2
        assert f"{out}: another pixloom is writing there" in capsys.readouterr().err
    assert run(raw, out, "--split", "train=1") == 0
    with storage.locked(f"{out}/"):
        assert verify.main([out, "--collect-garbage"]) == 2
        assert "another pixloom is writing there" in capsys.readouterr().err


# Garbage.


@pytest.fixture(params=["disk", "seaweedfs"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "out")
    return new_root(request.getfixturevalue("seaweedfs"))


def collect(root: str, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], int]:
    assert verify.main([root, "--collect-garbage", "--workers", "0", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["garbage"] == []
    return sorted(row["removed"]), row["ended_uploads"]


def test_garbage_is_told_from_what_others_put_there(
    place: str,
    seaweedfs: Server,
    make_pairs: MakePairs,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(make_pairs(12), place, *OPTIONS) == 0
    tar = storage.read_bytes(f"{place}/train/000000.tar")
    index = storage.read_bytes(f"{place}/train/000000.idx")
    garbage = {
        ".pixloom-tmp/train-000001.tar": b"half",
        ".plan.json.77.pixloom-tmp": b"half",
        "train/.000000.idx.77.pixloom-tmp": b"half",
        "train/000077.tar": tar,
        "train/000078.tar": tar[:700],
        "train/000078.idx": index,
        "val/000005.tar": bytes(1024),  # every sample was refused
    }
    garbage["val/000005.idx"] = b"v1.2 0\n"
    others = {
        "notes.txt": b"mine",
        "train/notes.pixloom-tmp.txt": b"mine",
        "train/000099.tar": b"mine, and no tar",
        "train/000098.tar": tar[1024 + 512 :] + tar,  # cut within a member
        "train/000097.tar": tar.replace(b"train-0", b"other-0", 1),
        "train/000096.idx": b"v1.2 1\njpg 512 9 holiday.jpg\n",
        "train/000095.json": b"{}",
        "train/000095.tar": tar,
        "train/page.tar": tar,
        "models/train/000001.tar": tar,
    }
    whole = tree(place)
    for name, data in {**garbage, **others}.items():
        put(f"{place}/{name}", data)
    expected = whole | {name: hashlib.sha256(data).hexdigest() for name, data in others.items()}
    is_remote = storage.is_remote(place)
    if is_remote:
        prefix = key_of(seaweedfs, place)
        ours = [f"{prefix}/train/000000.tar", f"{prefix}/val/000123.tar"]
        theirs = [f"{prefix}-2/train/000000.tar", f"{prefix}/notes.txt"]
        begin_uploads(seaweedfs, [*ours, *theirs])
    before = tree(place)
    assert verify.main([place, "--workers", "0"]) == 0
    assert f"{len(garbage)} files that nothing needs" in capsys.readouterr().err
    assert tree(place) == before
    assert collect(place, capsys) == (sorted(garbage), 2 if is_remote else 0)
    assert tree(place) == expected
    assert collect(place, capsys) == ([], 0)
    if is_remote:
        assert uploads(seaweedfs, prefix) == sorted(theirs)
    else:
        assert not (Path(place) / ".pixloom-tmp").exists()


def test_an_unfinished_pack_keeps_its_finished_shards(
    place: str, seaweedfs: Server, make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_pairs(12)
    assert run(raw, place, *OPTIONS) == 0
    whole = tree(place)
    for name in ("manifest.json", "train/000001.json", "train/000002.json", "train/000002.tar"):
        storage.remove(f"{place}/{name}")
    capsys.readouterr()
    assert verify.main([place, "--collect-garbage", "--workers", "0"]) == 2
    written = capsys.readouterr()
    assert "manifest.json is missing" in written.err
    removed = {"train/000001.tar", "train/000001.idx", "train/000002.idx"}
    assert set(written.out.splitlines()) == {f"removed {name!r}" for name in removed}
    assert set(tree(place)) == set(whole) - removed - {
        "manifest.json", "train/000001.json", "train/000002.json", "train/000002.tar",
    }  # fmt: skip
    assert run(raw, place, *OPTIONS) == 0
    assert tree(place) == whole


def test_nothing_is_collected_where_nobody_knows_what_is_wanted(
    place: str, seaweedfs: Server, make_pairs: MakePairs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(make_pairs(12), place, *OPTIONS) == 0
    storage.remove(f"{place}/train/000001.json")
    storage.publish_text("{", f"{place}/manifest.json")
    damaged = tree(place)
    assert verify.main([place, "--collect-garbage", "--workers", "0"]) == 2
    assert tree(place) == damaged
    for name in ("manifest.json", "plan.json"):
        storage.remove(f"{place}/{name}")
    left = tree(place)
    assert verify.main([place, "--collect-garbage", "--workers", "0"]) == 2
    assert "no packed dataset" in capsys.readouterr().err
    assert tree(place) == left
    assert verify.main([f"{place}-none", "--collect-garbage", "--workers", "0"]) == 2
    assert not storage.exists(f"{place}-none")


# Credentials.

CANARY = "c4n4ry"


def test_a_url_with_credentials_is_refused_without_them(
    seaweedfs: Server, make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_pairs(4)
    for url in (
        f"s3://AKIA:{CANARY}@bucket/x",
        f"s3://bucket/x?X-Amz-Signature={CANARY}",
        f"abfs://{CANARY}:{CANARY}@account.dfs.core.windows.net/x",
        f"https://user:{CANARY}@host/x",
    ):
        for words in ([url, tmp_path / "out"], [raw, url], [url, url], [raw, url, "--dry-run"]):
            assert run(*words) == 2
        assert verify.main([url, "--collect-garbage"]) == 2
    written = capsys.readouterr()
    assert CANARY not in written.out + written.err
    assert not (tmp_path / "out").exists()


PROGRAM = """
import sys
from shards import pack, storage
def fail(scratch, destination):
    raise RuntimeError(f"sent {scratch} with " + sys.argv.pop())
secret = sys.argv.pop()
sys.argv.append(secret)
storage.publish = fail
pack.main(sys.argv[1:-1])
"""


def test_no_secret_of_the_environment_is_shown_or_stored(
    seaweedfs: Server,
    make_pairs: MakePairs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, source, out = make_pairs(6), new_root(seaweedfs), new_root(seaweedfs)
    put_tree(raw, source)
    assert run(source, out, "--split", "train=1", "--json") == 0
    assert run(source, out, "--split", "train=.5,val=.5") == 2
    assert verify.main([out, "--workers", "0", "--json"]) == 0
    for name in storage.list_files(out):
        assert S3_SECRET.encode() not in storage.read_bytes(f"{out}/{name}"), name
    words = [source, new_root(seaweedfs), "--split", "train=1", "--workers", "0"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words, S3_SECRET],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" in done.stderr
    assert "RuntimeError: sent " in done.stderr
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-secret")
    assert run(source, out, "--split", "train=1") == 2
    written = capsys.readouterr()
    assert "access denied" in written.err
    for text in (written.out, written.err, done.stdout, done.stderr):
        assert S3_SECRET not in text
        assert CANARY not in text
