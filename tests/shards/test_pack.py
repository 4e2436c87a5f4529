import collections
import contextlib
import gc
import io
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shards import engines, pack, storage, tokens
from shards.format import Manifest, parse_index

REPOSITORY = Path(__file__).resolve().parents[2]

MakePairs = Callable[..., Path]
HashTree = Callable[[Path], dict[str, str]]


def run(*arguments: object) -> int:
    return pack.main([str(argument) for argument in (*arguments, "--workers", 0)])


def packed_samples(out: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes of every sample of a dataset, through the indexes."""
    samples = {}
    for entries in storage.load_manifest(str(out)).splits.values():
        for entry in entries:
            tar = (out / entry.name).read_bytes()
            spans = parse_index((out / entry.index_name).read_text(), entry.index_name)
            assert len(spans) == entry.samples
            for span in spans:
                assert span.key not in samples
                samples[span.key] = {
                    one.extension: tar[one.offset : one.offset + one.size] for one in span.members
                }
    return samples


def source_names(out: Path) -> list[str]:
    return [json.loads(members["json"])["source"] for members in packed_samples(out).values()]


def test_what_is_packed_is_what_was_there(make_pairs: MakePairs, tmp_path: Path) -> None:
    raw, out = make_pairs(20), tmp_path / "out"
    assert run(raw, out, "--shard-samples", 6) == 0
    manifest = storage.load_manifest(str(out))
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {
        "train": 16, "val": 2, "test": 2,
    }  # fmt: skip
    assert [entry.samples for entry in manifest.splits["train"]] == [5, 5, 6]
    assert (manifest.image.width, manifest.image.height) == (40, 24)
    assert manifest.tokenizer is not None
    tokenizer = tokens.load_tokenizer((out / "tokenizer.json").read_text(), "here")
    for key, members in packed_samples(out).items():
        about = json.loads(members["json"])
        assert "." not in key
        assert members["png"] == (raw / about["source"]).read_bytes()
        assert members["txt"] == (raw / about["source"]).with_suffix(".gui").read_bytes()
        ids = np.load(io.BytesIO(members["tokens.npy"]))
        assert ids.tolist() == tokens.encode(tokenizer, members["txt"].decode())
        assert (about["width"], about["height"]) == (40, 24)
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "plan.json", "test", "tokenizer.json", "train", "val",
    ]  # fmt: skip


# webdataset leaves its tar files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_every_shard(make_pairs: MakePairs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(make_pairs(12), out, "--shard-samples", 4, "--size", "20x12") == 0
    expected = packed_samples(out)
    urls = sorted(str(path) for path in out.glob("*/*.tar"))
    found = {
        sample["__key__"]: {
            name: data for name, data in sample.items() if not name.startswith("__")
        }
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    }
    gc.collect()
    assert found == expected
    for members in found.values():
        with Image.open(io.BytesIO(members["png"])) as image:
            assert (image.size, image.mode) == ((20, 12), "RGB")


def test_images_alone(make_pairs: MakePairs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(make_pairs(10), out, "--kind", "images", "--split", "train=rest,test=3") == 0
    manifest = storage.load_manifest(str(out))
    assert manifest.kind == "images"
    assert manifest.tokenizer is None
    assert manifest.num_samples("test") == 3
    assert all(set(members) == {"json", "png"} for members in packed_samples(out).values())


def start(*arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-W", "error", "-m", "shards.pack", *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=sys.stderr)


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree
) -> None:
    raw = make_pairs(30)
    options = ("--shard-samples", 4, "--size", "20x12", "--encode", "webp")
    assert run(raw, tmp_path / "0", *options) == 0
    expected = hash_tree(tmp_path / "0")
    assert len(expected) == 3 + 3 * (6 + 1 + 1)
    for workers in (1, 2, 4):
        out = tmp_path / str(workers)
        assert start(raw, out, *options, "--workers", workers).wait() == 0
        assert hash_tree(out) == expected


def test_a_killed_pack_goes_on_to_the_same_bytes(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree
) -> None:
    raw = make_pairs(40, size=(320, 200))
    options = ("--shard-samples", 4, "--encode", "webp", "--workers", 2)
    assert run(raw, tmp_path / "whole", *options[:-2]) == 0
    expected = hash_tree(tmp_path / "whole")

    def exists(out: Path, name: str) -> bool:
        return (out / name).exists()

    def count(out: Path, pattern: str) -> int:
        return len(list(out.glob(pattern)))

    moments: list[Callable[[Path], bool]] = [
        lambda out: out.exists(),
        lambda out: exists(out, "plan.json"),
        lambda out: count(out, ".pixloom-tmp/*") > 0,
        lambda out: count(out, "*/*.tar") > 0,
        lambda out: count(out, "*/*.json") >= 3,
        lambda out: count(out, "*/*.json") >= 8,
    ]
    num_unfinished = 0
    for number, reached in enumerate(moments):
        out = tmp_path / f"killed{number}"
        process = start(raw, out, *options)
        while not reached(out):
            assert process.poll() is None
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        num_unfinished += not (out / "manifest.json").exists()
        kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
        assert run(raw, out, *options[:-2]) == 0
        assert hash_tree(out) == expected
        for path, written_ns in kept.items():
            assert path.stat().st_mtime_ns == written_ns, "a finished shard was made again"
    assert num_unfinished >= 4


def test_a_second_call_finds_nothing_to_do(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(10), tmp_path / "out"
    assert run(raw, out, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.*")}
    assert run(raw, out, "--json") == 0
    second = json.loads(capsys.readouterr().out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.*")} == written
    assert (first["nothing_to_do"], second["nothing_to_do"]) == (False, True)
    assert first["data_digest"] == second["data_digest"]
    assert first["samples"] == {"train": 8, "val": 1, "test": 1}


def test_a_dry_run_says_what_a_pack_does_and_writes_nothing(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(10), tmp_path / "out"
    (raw / "copy.png").write_bytes((raw / "a" / "0001.png").read_bytes())
    (raw / "copy.gui").write_text("another program")
    (raw / "zero.png").touch()
    assert run(raw, out, "--shard-samples", 4, "--dry-run", "--json") == 0
    planned = json.loads(capsys.readouterr().out)
    assert not out.exists()
    assert run(raw, out, "--shard-samples", 4, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("; nothing was written")
    assert "duplicates: 1 samples beyond one a group" in lines
    assert run(raw, out, "--shard-samples", 4, "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert planned["dry_run"]
    same = ("kind", "samples", "groups", "duplicates", "shards", "skips", "image", "plan_hash")
    assert [planned[name] for name in same] == [done[name] for name in same]
    assert 0.5 < planned["estimated_bytes"] / done["bytes"] < 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    assert run(raw, tmp_path / "mine", "--dry-run") == 2


def test_a_damaged_dataset_is_repaired(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree
) -> None:
    raw, out = make_pairs(10), tmp_path / "out"
    assert run(raw, out, "--shard-samples", 2) == 0
    expected = hash_tree(out)
    (out / "train" / "000000.tar").write_bytes(b"junk")
    (out / "train" / "000001.idx").unlink()
    (out / "train" / "000002.json").write_text("{")
    (out / "tokenizer.json").unlink()
    receipt = json.loads((out / "train" / "000003.json").read_text())
    receipt["crc32"][1] ^= 1
    (out / "train" / "000003.json").write_text(json.dumps(receipt))
    assert run(raw, out, "--shard-samples", 2) == 0
    assert hash_tree(out) == expected


@pytest.mark.parametrize("damage", ["missing", "cut", "junk", "not text"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_a_lost_plan_is_written_again_beside_what_was_made_from_it(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree, damage: str, is_finished: bool
) -> None:
    raw, out = make_pairs(10), tmp_path / "out"
    assert run(raw, out, "--shard-samples", 2) == 0
    expected = hash_tree(out)
    plan_path, text = out / "plan.json", (out / "plan.json").read_text()
    if damage == "missing":
        plan_path.unlink()
    else:
        damaged = {"cut": text[: len(text) // 2].encode(), "junk": b"{}", "not text": b"\xff"}
        plan_path.write_bytes(damaged[damage])
    if not is_finished:
        (out / "manifest.json").unlink()
    written = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    assert run(raw, out, "--shard-samples", 3) == 2  # Another plan's: not ours to repair.
    assert run(raw, out, "--shard-samples", 2) == 0
    assert hash_tree(out) == expected
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*")} == written


@pytest.mark.parametrize("is_readable", [True, False])
def test_overwriting_removes_the_old_pack_and_nothing_else(
    make_pairs: MakePairs,
    tmp_path: Path,
    hash_tree: HashTree,
    monkeypatch: pytest.MonkeyPatch,
    is_readable: bool,
) -> None:
    raw, out = make_pairs(20), tmp_path / "out"
    assert run(raw, out, "--shard-samples", 2) == 0
    notes = ["notes/000001.json", "train/000099.tar", "train/mine.txt"]
    for name in notes:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    if not is_readable:
        text = (out / "plan.json").read_text()
        (out / "plan.json").write_text(text[: len(text) // 2])
    removed = []
    remove = storage.remove

    def remove_beside_a_plan(url: str) -> None:
        removed.append(url)
        assert (out / "plan.json").exists()
        remove(url)

    monkeypatch.setattr(storage, "remove", remove_beside_a_plan)
    arguments = ("--shard-samples", 20, "--split", "train=.5,test=.5", "--overwrite")
    assert run(raw, out, *arguments) == 0
    assert removed
    assert not (out / "val").exists()
    for name in notes:
        assert (out / name).read_text() == "mine"
        (out / name).unlink()
    assert run(raw, tmp_path / "fresh", *arguments) == 0
    assert hash_tree(out) == hash_tree(tmp_path / "fresh")


def test_a_change_is_named_and_overwritten_only_when_asked(
    make_pairs: MakePairs,
    tmp_path: Path,
    hash_tree: HashTree,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, out = make_pairs(10), tmp_path / "out"
    assert run(raw, out, "--shard-samples", 2) == 0
    before = hash_tree(out)
    assert run(raw, out, "--shard-samples", 2, "--size", "8x8") == 2
    assert "--size was None, now 8x8" in capsys.readouterr().err
    (raw / "a" / "0001.gui").write_text("changed")
    assert run(raw, out, "--shard-samples", 2) == 2
    error = capsys.readouterr().err
    assert "changed: 'a/0001.gui'" in error
    assert "--overwrite" in error
    assert hash_tree(out) == before
    assert run(raw, out, "--shard-samples", 20, "--overwrite") == 0
    assert run(raw, tmp_path / "fresh", "--shard-samples", 20) == 0
    assert hash_tree(out) == hash_tree(tmp_path / "fresh")


def test_what_is_not_a_pack_is_not_touched(
    make_pairs: MakePairs,
    tmp_path: Path,
    hash_tree: HashTree,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, other, empty = make_pairs(10), tmp_path / "other", tmp_path / "empty"
    other.mkdir()
    empty.mkdir()
    (other / "thesis.txt").write_text("years of work")
    planned = tmp_path / "planned"
    (planned / "train").mkdir(parents=True)
    (planned / "plan.json").write_text('{"version": 1, "weekend": "hike"}')
    (planned / "train" / "000000.json").write_text("{}")
    before = hash_tree(tmp_path)
    for arguments, named in [
        ((raw, other), "not empty"),
        ((raw, other, "--overwrite"), "not empty"),
        ((raw, planned), "not empty"),
        ((raw, planned, "--overwrite"), "not empty"),
        ((raw, other / "thesis.txt"), "not a folder"),
        ((raw, raw / "out"), "OUT lies in SOURCE"),
        ((raw, "ftp://host/out"), "supported so far"),
        ((empty, tmp_path / "out"), "no images"),
        ((tmp_path / "missing", tmp_path / "out"), "no such folder"),
        ((raw, tmp_path / "out", "--split", "train=rest,test=10"), "'train'"),
        ((raw, tmp_path / "out", "--split", "test=1"), "--tokenizer FILE"),
        ((raw, tmp_path / "out", "--tokenizer", tmp_path / "none.json"), "none.json"),
        ((raw, tmp_path / "out", "--kind", "images", "--tokenizer", raw / "x"), "no code"),
        ((raw, tmp_path / "out", "--kind", "images", "--vocab-size", 9), "no code"),
        ((raw, tmp_path / "out", "--tokenizer", raw / "x", "--vocab-size", 9), "--vocab-size 9"),
        ((raw, tmp_path / "out", "--tokenizer", "bpe", "--vocab-size", 259), "260 tokens"),
        ((raw, tmp_path / "out", "--tokenizer", "char", "--vocab-size", 4), "5 tokens"),
        ((raw, tmp_path / "out", "--quality", 101), "--quality"),
        ((raw, tmp_path / "out", "--split", "Train=1"), "'Train'"),
        ((raw, tmp_path / "out", "--kind", "images", "--code-suffix", ".gui"), "--code-suffix"),
        ((raw, tmp_path / "out", "--size", "16384x8", "--encode", "webp"), "16383"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.startswith("pixloom pack: error: ")
        assert error.count("\n") == 1
    assert hash_tree(tmp_path) == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--size", "8"), ("--channels", "65"), ("--workers", "-1")])
def test_usage_errors_exit_2(option: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stopped:
        pack.main([str(tmp_path), str(tmp_path / "out"), *option])
    assert stopped.value.code == 2


def test_bad_files_are_skipped_counted_and_named(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(16), tmp_path / "out"
    good = (raw / "a" / "0001.png").read_bytes()
    for name, image, code in [
        ("cut", good[:-200], b"a"),
        ("zero", b"", b"a"),
        ("text", b"not an image", b"a"),
        ("latin", good, b"\xe9"),
        ("blank", good, b" \n"),
        ("no code", good, None),
        ("no\nimage", None, b"a"),
    ]:
        if image is not None:
            (raw / f"{name}.png").write_bytes(image)
        if code is not None:
            (raw / f"{name}.gui").write_bytes(code)
    (raw / "link.png").symlink_to(raw / "a" / "0001.png")
    expected = {
        "truncated": 1, "empty": 1, "unsupported_format": 1, "code_not_utf8": 1, "code_empty": 1,
        "image_without_code": 1, "code_without_image": 1, "not_a_file": 1,
    }  # fmt: skip
    assert run(raw, out) == 0
    manifest = storage.load_manifest(str(out))
    assert manifest.skips == dict(sorted(expected.items()))
    assert len(packed_samples(out)) == 16
    error = capsys.readouterr().err
    assert "skipped 8: " in error
    assert r"1 code_without_image: 'no\nimage.gui'" in error
    assert "1 truncated: 'cut.png'" in error
    assert run(raw, tmp_path / "strict", "--max-bad", 7) == 1
    assert "--max-bad allows 7" in capsys.readouterr().err
    assert not (tmp_path / "strict" / "manifest.json").exists()
    assert run(raw, tmp_path / "strict", "--max-bad", 8) == 0


def test_max_bad_counts_what_earlier_calls_skipped(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    good = (raw / "a" / "0001.png").read_bytes()
    for number in range(2):  # Their headers are whole: only writing a shard finds them out.
        (raw / f"cut{number}.png").write_bytes(good[: len(good) // 2 + number])
        (raw / f"cut{number}.gui").write_text(f"cut {number}")
    (raw / "zero.png").touch()
    (raw / "zero.gui").write_text("zero")
    arguments = (raw, out, "--shard-samples", 1, "--split", "train=1")
    for _ in range(4):  # The skips of the calls before are in receipts.
        assert run(*arguments, "--max-bad", 2) == 1
        assert "3 files skipped, --max-bad allows 2: 1 empty" in capsys.readouterr().err
        assert not (out / "manifest.json").exists()
    assert run(*arguments, "--max-bad", 3) == 0
    capsys.readouterr()
    assert run(*arguments) == 0
    assert capsys.readouterr().err == "skipped 3: 1 empty: 'zero.png'; 2 truncated\n"
    assert run(*arguments, "--max-bad", 2) == 1


def test_the_lock_is_held_until_no_worker_runs(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    good = (raw / "a" / "0001.png").read_bytes()
    (raw / "cut.png").write_bytes(good[: len(good) // 2])
    (raw / "cut.gui").write_text("cut")
    events = []
    engine, exclusive = engines.run, storage.exclusive

    def run_and_note(function: Any, *arguments: Any) -> Iterator[Any]:
        try:
            yield from engine(function, *arguments)
        finally:
            if function is pack.write_shard:
                events.append("workers ended")

    @contextlib.contextmanager
    def hold_and_note(root: str) -> Iterator[Path]:
        with exclusive(root) as scratch:
            try:
                yield scratch
            finally:
                events.append("lock released")

    monkeypatch.setattr(engines, "run", run_and_note)
    monkeypatch.setattr(storage, "exclusive", hold_and_note)
    arguments = (raw, out, "--shard-samples", 1, "--split", "train=1", "--max-bad", 0)
    assert run(*arguments) == 1
    assert events == ["workers ended", "lock released"]


def test_want_of_memory_stops_the_pack_and_names_the_image(
    make_pairs: MakePairs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    for place in ("PIL.Image.open", "PIL.ImageFile.ImageFile.load"):
        with monkeypatch.context() as patch:
            patch.setattr(place, fail_for_want_of_memory)
            assert run(raw, out) == 2
        error = capsys.readouterr().err
        assert re.search(r"raw/\S+\.png': not enough memory", error)
        assert error.count("\n") == 1
        assert not (out / "manifest.json").exists()
    assert run(raw, out) == 0
    assert storage.load_manifest(str(out)).skips == {}


def test_an_image_that_needs_too_much_memory_is_left_out_and_the_rest_packed(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    Image.new("RGB", (6000, 5000)).save(raw / "huge.png")  # 120 MB of pixels in 90 kB
    (raw / "huge.gui").write_text("huge")
    (raw / "long.png").write_bytes((raw / "a" / "0001.png").read_bytes())
    os.truncate(raw / "long.png", 200 * 2**20)
    (raw / "long.gui").write_text("long")
    options = ["--shard-samples", "3", "--split", "train=1", "--size", "20x12"]
    arguments = [str(raw), str(out), *options, "--workers", "2", "--worker-memory", "60"]
    assert pack.main([*arguments, "--max-bad", "1"]) == 1
    scanned, written, stopped = capsys.readouterr().err.splitlines()
    assert re.match(r"scan from .* died 3 times \(out of memory\), .* 'long.png'; left", scanned)
    assert re.match(r"train/\d+.tar: .* 3 times \(out of memory\), .* 'huge.png'; left", written)
    assert "--max-bad allows 1: 2 poison: 'long.png', 'huge.png'" in stopped
    assert pack.main(arguments) == 0
    # The receipt says how many.
    assert capsys.readouterr().err.endswith("skipped 2: 2 poison: 'long.png', ...\n")
    manifest = storage.load_manifest(str(out))
    assert manifest.skips == {"poison": 2}
    assert manifest.num_samples("train") == 8


def test_poison_is_a_skip_like_others(make_pairs: MakePairs, tmp_path: Path) -> None:
    """At the level of a task: who finds it out is the engine, see its tests."""
    raw, out = make_pairs(6), tmp_path / "out"
    tasks = []
    engine = engines.run

    def run_poisoned(function: Any, work: Any, *arguments: Any) -> Iterator[Any]:
        if function is not pack.write_shard:
            yield from engine(function, work, *arguments)
            return
        for task in work:
            without = arguments[-1]
            assert without(task, "a/9999.png") is None
            first, second = (sample.image for sample in task.shard.samples[:2])
            tasks.append(without(without(task, first), second))
            assert tasks[-1].poison == {first, second}
            yield tasks[-1], function(tasks[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "run", run_poisoned)
        assert run(raw, out, "--split", "train=1", "--shard-samples", 3) == 0
    assert len(tasks) == 2
    assert storage.load_manifest(str(out)).skips == {"poison": 4}
    assert not set(source_names(out)) & (tasks[0].poison | tasks[1].poison)
    assert len(packed_samples(out)) == 2
    assert run(raw, out, "--split", "train=1", "--shard-samples", 3, "--max-bad", 3) == 1
    receipts = list(out.glob("train/*.json"))
    receipts[0].unlink()  # As the README has it: the shard is tried again.
    assert run(raw, out, "--split", "train=1", "--shard-samples", 3) == 0
    assert storage.load_manifest(str(out)).skips == {"poison": 2}


def fail_for_want_of_memory(*arguments: object, **options: object) -> None:
    raise MemoryError


def test_a_bomb_and_names_that_collide_are_skipped(make_pairs: MakePairs, tmp_path: Path) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    png = (raw / "a" / "0001.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + png[24:29]
    bomb = png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]
    (raw / "bomb.png").write_bytes(bomb)
    (raw / "bomb.gui").write_text("bomb")
    for name in ("X", "x"):
        (raw / "a" / f"{name}.png").write_bytes(png)
        (raw / "a" / f"{name}.gui").write_text(f"program {name}")
    assert run(raw, out) == 0
    assert storage.load_manifest(str(out)).skips == {"case_collision": 1, "too_large": 1}
    names = source_names(out)
    assert "a/X.png" in names
    assert not {"a/x.png", "bomb.png"} & set(names)


def test_the_order_in_which_a_folder_is_listed_changes_nothing(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = make_pairs(20)
    for name in ("A.png", "a.PNG", "B.png", "b.webp"):
        (raw / name).write_bytes((raw / "a" / "0001.png").read_bytes())
        (raw / name).with_suffix(".gui").write_text(name)
    (raw / "zero.png").touch()
    assert run(raw, tmp_path / "sorted", "--shard-samples", 4) == 0
    scandir, listdir = os.scandir, os.listdir
    rng = random.Random(3)

    class Shuffled:
        def __init__(self, path: Any) -> None:
            with scandir(path) as entries:
                found = sorted(entries, key=lambda entry: str(entry.name))
            rng.shuffle(found)
            self._found = iter(found)

        def __enter__(self) -> Iterator[Any]:
            return self._found

        def __exit__(self, *error: object) -> None:
            pass

        def __next__(self) -> Any:
            return next(self._found)

    def shuffled_listdir(path: Any) -> list[str]:
        return rng.sample(found := listdir(path), len(found))

    for number in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(os, "scandir", Shuffled)
            patch.setattr(os, "listdir", shuffled_listdir)
            assert run(raw, tmp_path / str(number), "--shard-samples", 4) == 0
        assert hash_tree(tmp_path / str(number)) == hash_tree(tmp_path / "sorted")


def test_nothing_but_bad_files_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "zero.png").touch()
    assert run(raw, tmp_path / "out") == 2
    assert "nothing to pack there (1 empty: 'zero.png')" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_shard_of_refused_samples_alone_is_left_out(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    good = (raw / "a" / "0001.png").read_bytes()
    (raw / "x.png").write_bytes(good[: len(good) // 2])
    (raw / "x.gui").write_text("cut")
    arguments = (raw, out, "--shard-samples", 1, "--split", "train=1")
    assert run(*arguments) == 0
    manifest = storage.load_manifest(str(out))
    assert [entry.samples for entry in manifest.splits["train"]] == [1] * 8
    assert run(*arguments) == 0


def test_long_programs_are_skipped_when_asked(make_pairs: MakePairs, tmp_path: Path) -> None:
    raw, out = make_pairs(6), tmp_path / "out"
    (raw / "a" / "0001.gui").write_text("word " * 100)
    assert run(raw, out, "--max-tokens", 60, "--split", "train=1") == 0
    manifest = storage.load_manifest(str(out))
    assert manifest.skips == {"too_many_tokens": 1}
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.longest <= 60


def test_the_vocabulary_is_that_of_the_training_split(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    raw, out = make_pairs(12), tmp_path / "out"
    for path in raw.rglob("*.gui"):
        path.write_text(f"common only-{path.stem}")
    assert run(raw, out) == 0
    tokenizer = tokens.load_tokenizer((out / "tokenizer.json").read_text(), "here")
    for key, members in packed_samples(out).items():
        known = tokenizer.token_to_id(members["txt"].decode().split()[1]) is not None
        assert known == key.startswith("train-")
        ids = tokens.from_npy(members["tokens.npy"], key).tolist()
        assert (3 in ids) == (not known)


def test_the_vocabulary_has_no_word_of_samples_left_out(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    raw, out = make_pairs(6), tmp_path / "out"
    paths = sorted(raw.rglob("*.png"))
    for number, path in enumerate(paths):
        new = raw / ("test" if number < 2 else "train") / path.name
        new.parent.mkdir(exist_ok=True)
        path.rename(new)
        new.with_suffix(".gui").write_text(f"common word-{number} {'rare' if number < 4 else ''}")
        path.with_suffix(".gui").unlink()
    # The image of a test sample: dropped from the training split, with its words.
    twin = raw / "train" / "twin.png"
    twin.write_bytes((raw / "test" / paths[0].name).read_bytes())
    twin.with_suffix(".gui").write_text("common dropped rare")
    assert run(raw, out, "--split", "folders", "--min-frequency", 2) == 0
    assert storage.load_manifest(str(out)).skips == {"duplicate_across_splits": 1}
    tokenizer = tokens.load_tokenizer((out / "tokenizer.json").read_text(), "here")
    assert [tokenizer.id_to_token(at) for at in range(4, tokenizer.get_vocab_size())] == [
        "common", "rare",
    ]  # fmt: skip
    assert run(raw, out, "--split", "folders", "--overwrite") == 0
    tokenizer = tokens.load_tokenizer((out / "tokenizer.json").read_text(), "here")
    assert set(tokenizer.get_vocab()) - {"common", "rare"} == {
        *tokens.SPECIAL_TOKENS, "word-2", "word-3", "word-4", "word-5",
    }  # fmt: skip


@pytest.mark.parametrize("options", [("char",), ("bpe", "--vocab-size", 300)])
def test_tokens_that_keep_the_code_as_it_was(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree, options: tuple[object, ...]
) -> None:
    raw = make_pairs(140, size=(8, 8))
    for path in raw.rglob("*.gui"):
        path.write_text(f"row {{\n\t<eos>  {path.stem}\r\n}}\n" * 2)
    arguments = ("--split", "train=rest,test=10", "--tokenizer", *options)
    assert run(raw, tmp_path / "0", *arguments) == 0
    tokenizer = tokens.load_tokenizer((tmp_path / "0" / "tokenizer.json").read_text(), "here")
    for key, members in packed_samples(tmp_path / "0").items():
        ids = tokens.from_npy(members["tokens.npy"], key).tolist()
        code = members["txt"].decode()
        assert ids == tokens.encode(tokenizer, code)
        assert tokens.decode(tokenizer, ids[1:-1]) == code
    manifest = storage.load_manifest(str(tmp_path / "0"))
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.vocab_size == tokenizer.get_vocab_size() <= 300
    out = tmp_path / "2"
    assert start(raw, out, *arguments, "--workers", 2).wait() == 0
    assert hash_tree(out) == hash_tree(tmp_path / "0")


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_characters_and_byte_pairs_are_those_of_the_training_split(
    make_pairs: MakePairs, tmp_path: Path, tokenizer: str
) -> None:
    raw, out = make_pairs(12), tmp_path / "out"
    for path in raw.rglob("*.gui"):
        path.write_text(chr(0x3042 + int(path.stem)) * 4)
    assert run(raw, out, "--tokenizer", tokenizer) == 0
    found = tokens.load_tokenizer((out / "tokenizer.json").read_text(), "here")
    for key, members in packed_samples(out).items():
        ids = tokens.encode(found, members["txt"].decode())
        assert (3 in ids) == (tokenizer == "char" and not key.startswith("train-"))
        if tokenizer == "bpe":
            assert (len(ids) <= 4) == key.startswith("train-")


@given(sizes=st.lists(st.integers(0, pack.BUNCH_BYTES // 3), max_size=3 * pack.BUNCH_SAMPLES))
def test_bunches_keep_the_order_and_their_limits(sizes: list[int]) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for size in sizes:
            made.append(size)
            yield size

    passed = 0
    for size in pack._in_bunches(items(), lambda size: size):
        ahead = made[passed:]
        assert size == ahead[0]
        assert len(ahead) <= pack.BUNCH_SAMPLES
        assert sum(ahead[:-1]) < pack.BUNCH_BYTES
        passed += 1
    assert made == sizes
    assert passed == len(sizes)


def test_a_change_of_the_tokenizer_is_named(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    assert run(raw, out, "--tokenizer", "bpe", "--vocab-size", 270) == 0
    assert run(raw, out, "--tokenizer", "char", "--vocab-size", 10) == 2
    error = capsys.readouterr().err
    assert "--tokenizer was bpe, now char" in error
    assert "--vocab-size was 270, now 10" in error
    assert run(raw, out, "--tokenizer", "char", "--vocab-size", 10, "--overwrite") == 0
    assert storage.load_manifest(str(out)).tokenizer.vocab_size == 10  # type: ignore[union-attr]


def test_another_dataset_with_the_same_tokenizer(make_pairs: MakePairs, tmp_path: Path) -> None:
    assert run(make_pairs(10), tmp_path / "out") == 0
    tokenizer = tmp_path / "out" / "tokenizer.json"
    raw = make_pairs(5, name="more")
    assert run(raw, tmp_path / "test", "--tokenizer", tokenizer, "--split", "test=1") == 0
    first, second = (storage.load_manifest(str(tmp_path / name)) for name in ("out", "test"))
    assert first.tokenizer is not None
    assert second.tokenizer is not None
    assert first.tokenizer.sha256 == second.tokenizer.sha256
    assert second.num_samples("test") == 5


def test_duplicates_stay_in_one_split(make_pairs: MakePairs, tmp_path: Path) -> None:
    raw, out = make_pairs(24), tmp_path / "out"
    for path in sorted(raw.rglob("*.gui"))[:12]:
        path.write_text(f"program  {int(path.stem) % 3}\n\n")
        path.with_name("again" + path.name).write_text(f"program {int(path.stem) % 3}")
        path.with_name("again" + path.stem + ".png").write_bytes(
            path.with_suffix(".png").read_bytes()
        )
    assert run(raw, out, "--split", "train=rest,val=4,test=4") == 0
    splits: dict[str, set[str]] = collections.defaultdict(set)
    for key, members in packed_samples(out).items():
        split = key.partition("-")[0]
        splits[" ".join(members["txt"].decode().split())].add(split)
        splits[members["png"].hex()].add(split)
    assert all(len(found) == 1 for found in splits.values())
    manifest = storage.load_manifest(str(out))
    assert sum(manifest.num_samples(split) for split in manifest.splits) == 36


kinds_of_files = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "A", "x/a", "x/b", "c d", "e.f"]),
        st.sampled_from([".png", ".jpg", ".gui", ".txt", ".md"]),
        st.sampled_from(["good", "good", "good", "cut", "zero", "junk"]),
    ),
    max_size=14,
    unique_by=lambda row: row[:2],
)


@given(files=kinds_of_files)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_file_is_packed_once_or_skipped_once(
    files: list[tuple[str, str, str]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = tmp_path_factory.mktemp("raw")
    images, codes = set(), set()
    for at, (stem, suffix, state) in enumerate(files):
        path = raw / f"{stem}{suffix}"
        path.parent.mkdir(exist_ok=True)
        if suffix in (".png", ".jpg"):
            images.add(f"{stem}{suffix}")
            out = io.BytesIO()
            kind = "PNG" if suffix == ".png" else "JPEG"
            Image.effect_noise((12, 12), at + 1).convert("RGB").save(out, kind)
            data = out.getvalue()
            path.write_bytes(
                {"good": data, "cut": data[: len(data) // 2], "zero": b"", "junk": b"x"}[state]
            )
        else:
            if suffix == ".gui":
                codes.add(f"{stem}{suffix}")
            texts = {"good": f"code {at}".encode(), "cut": b"\xc3", "zero": b"", "junk": b"x"}
            path.write_bytes(texts[state])
    out_folder = tmp_path_factory.mktemp("out")
    arguments = (raw, out_folder, "--code-suffix", ".gui", "--split", "train=1")
    status = run(*arguments)
    # Of images, and of names, that go by one name the first in the order of bytes is taken.
    states = {f"{stem}{suffix}": state for stem, suffix, state in files}
    pairs = {}
    for stem in sorted({stem for stem, _, _ in files}):
        found = [states[name] for name in (f"{stem}.jpg", f"{stem}.png") if name in states]
        if found and f"{stem}.gui" in states:
            pairs.setdefault(stem.lower(), (found[0], states[f"{stem}.gui"]))
    has_good = any(image == "good" and code in ("good", "junk") for image, code in pairs.values())
    assert status == (0 if has_good else 2)
    if status != 0:
        assert not (out_folder / "manifest.json").exists()
        return
    manifest = storage.load_manifest(str(out_folder))
    sources = source_names(out_folder)
    assert len(set(sources)) == len(sources) == manifest.num_samples("train")
    # A packed sample takes an image and a code. A skip takes the file it names, and where that
    # was half of a pair, the other half with it.
    plan = json.loads((out_folder / "plan.json").read_text())
    planned = [sample[1] for samples in plan["shards"].values() for sample in samples]
    skipped_names = [name for _, name in plan["skips"]]
    assert len(set(skipped_names)) == len(skipped_names)
    num_late = sum(manifest.skips.values()) - len(skipped_names)
    assert len(planned) == len(sources) + num_late
    stems = collections.Counter(
        os.path.splitext(name)[0]  # noqa: PTH122
        for name in (*skipped_names, *planned)
    )
    for name in images | codes:
        assert stems[os.path.splitext(name)[0]] >= 1, f"{name} is unaccounted for"  # noqa: PTH122


def test_real_screens_pack(screens: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for path in sorted(screens.iterdir())[:24]:
        (raw / path.name).symlink_to(path)
    assert run(raw, out) == 2  # Links are not followed.
    for path in list(raw.iterdir()):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    assert run(raw, out, "--size", "160x96", "--split", "train=1") == 0
    manifest = Manifest.from_json((out / "manifest.json").read_text(), "here")
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.vocab_size <= 20
    tokenizer = tokens.load_tokenizer((out / "tokenizer.json").read_text(), "here")
    members = next(iter(packed_samples(out).values()))
    ids = tokens.from_npy(members["tokens.npy"], "here").tolist()
    code = members["txt"].decode()
    assert tokenizer.decode(ids).replace(" ,", ",").split() == code.split()
