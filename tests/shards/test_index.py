"""Shards of other tools: what is adopted, what is left out and counted, what is refused."""

import gc
import hashlib
import io
import itertools
import json
import os
import random
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from servers import FaultyProxy, Server, put_tree

from pipeline import order, train
from pipeline.batch import read_tokens
from pipeline.loader import Loader
from pipeline.stream import SampleReader, Shard
from shards import foreign, images, index, pack, show, storage, tokens, verify
from shards.foreign import Adoption
from shards.format import FormatError, Manifest, Receipt, parse_index
from shards.storage import UserError

ROOT = Path(__file__).parents[2]
PNG_SIZE = (40, 24)

PAIRS = Adoption("pairs", ("png", "jpg"), "txt", "word", 3, {})
IMAGES = Adoption("images", ("png", "jpg"), None, None, 3, {})


def image(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = PNG_SIZE) -> bytes:
    out = io.BytesIO()
    noise = random.Random(seed).randbytes(size[0] * size[1] * 3)
    Image.frombytes("RGB", size, noise).save(out, kind)
    return out.getvalue()


def code(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join(rng.choice(["\\frac", "{", "}", "x", "y_1"]) for _ in range(rng.randint(3, 9)))


def write_with_webdataset(folder: Path, count: int = 14, **extra: bytes) -> Path:
    """Shards of five samples with a text and metadata, by WebDataset's own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, number in (("train", count), ("val", 4)):
        pattern = str(folder / f"{split}-%04d.tar")
        with webdataset.ShardWriter(pattern, maxcount=5, verbose=0) as writer:
            for at in range(number):
                sample = {"png": image(at), "tex": code(at), "json": {"at": at}, **extra}
                writer.write({"__key__": f"{split}/{at:05d}", **sample})
    return folder


def tar_bytes(*members: tuple[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def members_of(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()


def scan(data: bytes, adoption: Adoption = PAIRS) -> foreign.Scan:
    return foreign.scan(io.BytesIO(data), "here.tar", adoption)


def run(*words: object, workers: int = 0) -> int:
    return index.main([str(word) for word in words] + ["--workers", str(workers)])


def load(folder: Path) -> Manifest:
    return storage.load_manifest(str(folder))


def reader_of(folder: Path, split: str = "train") -> SampleReader:
    return SampleReader(Shard(str(folder), entry) for entry in load(folder).splits[split])


HashTree = Callable[[Path], dict[str, str]]


# webdataset leaves its tar files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_shards_of_webdataset_become_a_dataset(
    tmp_path: Path, hash_tree: HashTree, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_with_webdataset(tmp_path / "data")
    before = hash_tree(folder)
    assert run(folder, "--json") == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["samples"] == {"train": 14, "val": 4}
    assert row["image"]["width"], row["image"]["height"] == PNG_SIZE
    assert (row["code_extension"], row["skips"], row["nothing_to_do"]) == ("tex", {}, False)
    after = hash_tree(folder)
    assert {name: after[name] for name in before} == before
    manifest = load(folder)
    assert [shard.samples for shard in manifest.splits["train"]] == [5, 5, 4]
    assert manifest.splits["val"][0].sha256 == before["val-0000.tar"]
    # What WebDataset reads is what a reader reads.
    reader = reader_of(folder)
    urls = [str(folder / shard.name) for shard in manifest.splits["train"]]
    plain = list(webdataset.WebDataset(urls, shardshuffle=False))
    gc.collect()
    tokenizer = tokens.load_tokenizer((folder / "tokenizer.json").read_text(), "here")
    lazy = tokens.TokenizerFile.of(str(folder), manifest)
    counts = [
        count
        for shard in manifest.splits["train"]
        for count in Receipt.from_json((folder / shard.receipt_name).read_text(), "r").num_tokens
    ]
    places = [(shard, at) for shard, size in enumerate(reader.shard_samples) for at in range(size)]
    for place, sample, count in zip(places, plain, counts, strict=True):
        raw = reader.read(*place)  # checks the CRC-32
        assert raw.key == sample["__key__"]
        assert bytes(raw.members["png"]) == sample["png"]
        ids = read_tokens(raw, lazy).tolist()
        assert ids == tokens.encode(tokenizer, sample["tex"].decode())
        assert len(ids) == count
    assert tokenizer.token_to_id("\\frac") is not None
    assert verify.main([str(folder), "--deep", "--workers", "0"]) == 0
    assert show.main([str(folder), "--out", str(tmp_path / "sheet.png")]) == 0


def test_again_there_is_nothing_to_do_and_workers_change_no_byte(
    tmp_path: Path, hash_tree: HashTree, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = (write_with_webdataset(tmp_path / name) for name in "ab")
    for path in one.glob("*.tar"):  # the writer stamps the time
        (two / path.name).write_bytes(path.read_bytes())
    assert run(one) == run(two, workers=2) == 0
    done = hash_tree(one)
    assert hash_tree(two) == done
    capsys.readouterr()
    assert run(one) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert hash_tree(one) == done
    # As a kill leaves it: the last files are missing, one is half written elsewhere.
    for name in ("manifest.json", "tokenizer.json", "val-0000.json", "train-0001.idx"):
        (one / name).unlink()
    (one / ".val-0000.json.1.pixloom-tmp").write_text("half")
    assert run(one) == 0
    assert hash_tree(one) == done


def test_a_kill_costs_nothing_but_time(tmp_path: Path, hash_tree: HashTree) -> None:
    data = shard(40)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        for number in range(30):
            (tmp_path / name / f"{number:03d}.tar").write_bytes(data)
    assert run(tmp_path / "whole") == 0
    killed = tmp_path / "killed"
    words = [sys.executable, "-m", "shards.index", str(killed), "--workers", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (killed / "003.json").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").exists()
    with pytest.raises(UserError, match="is missing"):
        load(killed)
    assert run(killed) == 0
    assert hash_tree(killed) == hash_tree(tmp_path / "whole")


def test_training_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """End to end, in a loader's worker, on shards by GNU tar with folders in them."""
    for split, count in (("train", 16), ("val", 4)):
        for at in range(count):
            path = tmp_path / "raw" / split / f"sub/{at:04d}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image(at))
            path.with_suffix(".gui").write_text(code(at))
        (tmp_path / "data" / split).mkdir(parents=True)
        words = ["tar", "--sort=name", "-cf", tmp_path / "data" / split / "0.tar", "."]
        subprocess.run(words, cwd=tmp_path / "raw" / split, check=True)
    data = tmp_path / "data"
    assert run(data) == 0
    assert load(data).num_samples("val") == 4
    words = """--run.steps 3 --batch.global_size 8 --batch.micro_size 4 --data.workers 1
    --model.channels 8,16 --model.hidden_dim 16 --model.embed_dim 8 --validate.every_steps 3"""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # what another run set up
    places = ["--data.url", str(data), "--run.dir", str(tmp_path / "run")]
    assert train.main([*places, *words.split()]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows if "split" in row] == [4]
    assert [row["bad_samples"] for row in rows if "split" not in row][-1] == 0
    err = capfd.readouterr().err
    assert "forked" not in err
    step = ["--step", "1", "--batch.global_size", "8", "--batch.micro_size", "4"]
    assert order.main(["--data.url", str(data), *step]) == 0
    keys = capfd.readouterr().out.split()
    assert len(set(keys)) == 8
    assert set(keys) <= {f"./sub/{at:04d}" for at in range(16)}

    loader = Loader(data, batch_size=4, global_size=8, workers=1)
    loader.load_state_dict({**loader.state_dict(), "step": 1})
    batches = list(itertools.islice(loader, 2))
    assert [key for batch in batches for key in batch.keys] == keys, "what training has at step 1"
    assert all(batch.token_BT.shape[1] > 2 and batch.weight_B.all() for batch in batches)


@pytest.mark.parametrize("tar_format", ["gnu", "pax", "ustar", "v7"])
def test_headers_of_gnu_tar(tmp_path: Path, tar_format: str) -> None:
    long = "a" if tar_format in ("ustar", "v7") else "long-" * 40
    for name in ("first", long):
        (tmp_path / f"{name}.png").write_bytes(image(1))
        (tmp_path / f"{name}.txt").write_text("x y")
    if tar_format in ("gnu", "pax"):
        (tmp_path / "unlike ascii \u00fc.png").write_bytes(image(2))
        (tmp_path / "unlike ascii \u00fc.txt").write_text("x")
    (tmp_path / "deep").mkdir()
    words = ["tar", "--sort=name", f"--format={tar_format}", "-cf", "out.tar", "--exclude=out.tar"]
    subprocess.run([*words, "."], cwd=tmp_path, check=True)
    data = (tmp_path / "out.tar").read_bytes()
    found = scan(data)
    assert not found.skips
    assert f"./{long}" in {span.key for span in found.spans}
    assert len(found.spans) == (3 if tar_format in ("gnu", "pax") else 2)
    for span in found.spans:
        [png] = [member for member in span.members if member.extension == "png"]
        assert data[png.offset : png.offset + png.size].startswith(b"\x89PNG")
        assert data[span.offset + 257 :][:5] in (b"ustar", bytes(5))
    assert (found.num_bytes, found.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_size_in_a_pax_header_counts() -> None:
    """As of files above 8 GiB, whose own header cannot hold it."""
    png = image()
    info = tarfile.TarInfo("a.png")
    info.size = len(png)
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[124:135] = b"0" * 11
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    record = f"{len(str(len(png))) + 9} size={len(png)}\n".encode()
    extra = tarfile.TarInfo("pax")
    extra.type, extra.size = tarfile.XHDTYPE, len(record)
    data = extra.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0") + bytes(header)
    data += png + bytes(-len(png) % 512) + bytes(1024)
    assert members_of(data)[0].size == len(png)
    [span] = scan(data, IMAGES).spans
    assert span.members[0].size == len(png)
    assert span.offset == 1024


def shard(count: int = 3) -> bytes:
    members = []
    for at in range(count):
        members += [(f"{at:03d}.png", image(at)), (f"{at:03d}.txt", code(at).encode())]
    return tar_bytes(*members)


def boundaries(data: bytes) -> list[int]:
    """Where members begin."""
    return [member.offset for member in members_of(data)]


def test_a_cut_is_refused_wherever_it_is() -> None:
    data = shard()
    whole = scan(data)
    end = len(data.rstrip(b"\0"))
    end += -end % 512
    for at in [*boundaries(data), end, *range(0, end, 199)]:
        with pytest.raises(FormatError, match=rf"^here.tar: cut off at byte {at}\b"):
            scan(data[:at])
    # Behind the first zero block nothing is missing.
    assert scan(data[: end + 512]).spans == whole.spans
    assert scan(data[: end + 700]).crc32 == whole.crc32


def test_damage_names_shard_and_byte() -> None:
    data = shard()
    at = boundaries(data)[2]
    damaged = bytearray(data)
    damaged[at + 130] ^= 1
    with pytest.raises(FormatError, match=f"here.tar: damaged tar header at byte {at}$"):
        scan(bytes(damaged))
    with pytest.raises(FormatError, match="goes on behind its end-of-archive mark"):
        scan(data + data)
    assert len(members_of(bytes(damaged))) == 2  # what tarfile makes of it


@given(st.data())
def test_any_bytes_are_a_scan_or_a_format_error(draw: st.DataObject) -> None:
    data = bytearray(shard(2))
    headers = [at + byte for at in boundaries(bytes(data)) for byte in range(512)]
    for at in draw.draw(st.lists(st.sampled_from(headers), min_size=1, max_size=4)):
        data[at] = draw.draw(st.integers(0, 255))
    for start in boundaries(shard(2)):  # so that the change is not just a wrong sum
        header = data[start : start + 512]
        header[148:156] = b" " * 8
        data[start + 148 : start + 156] = f"{sum(header):06o}\0 ".encode()
    try:
        found = scan(bytes(data))
    except FormatError:
        return
    assert len(found.spans) == len(found.crc32) == len(found.num_tokens)
    assert parse_index(index.format_index(found.spans), "here") == list(found.spans)


PNG, GIF = image(), image(kind="GIF")


@pytest.mark.parametrize(
    ("members", "skips", "kept"),
    [
        ([("a.png", PNG)], {"no_code": 1}, []),
        ([("a.txt", b"x")], {"no_image": 1}, []),
        ([("a.json", b"{}")], {"no_image": 1}, []),
        ([("a.png", PNG), ("a.txt", b"x"), ("b.png", PNG)], {"no_code": 1}, ["a"]),
        ([("a.png", b""), ("a.txt", b"x")], {"empty": 1}, []),
        ([("a.png", b"no image"), ("a.txt", b"x")], {"unsupported_format": 1}, []),
        ([("a.png", GIF), ("a.txt", b"x")], {"unsupported_format": 1}, []),
        ([("a.png", PNG[:20]), ("a.txt", b"x")], {"truncated": 1}, []),
        ([("a.png", PNG), ("a.jpg", image(kind="JPEG")), ("a.txt", b"x")],
         {"several_images": 1}, []),
        ([("a.png", PNG), ("a.txt", b"\xff")], {"code_not_utf8": 1}, []),
        ([("a.png", PNG), ("a.txt", b" \n")], {"code_empty": 1}, []),
        ([("a.png", PNG), ("a.PNG", PNG), ("a.txt", b"x")], {"duplicate_member": 1}, []),
        ([("a.png", PNG), ("a.txt", b"x")] * 2, {"duplicate_member": 1}, []),
        ([("a.png", PNG), ("a.txt", b"x"), ("b.png", PNG), ("b.txt", b"y"), ("a.png", PNG)],
         {"duplicate_key": 1}, ["a", "b"]),
        ([("a.png", PNG), ("b.png", PNG), ("a.txt", b"x"), ("b.txt", b"y")],
         {"not_adjacent": 4}, []),
        ([("/a.png", PNG), ("/a.txt", b"x")], {"unsafe_name": 2}, []),
        ([("b/../a.png", PNG), ("c.png", PNG), ("c.txt", b"x")], {"unsafe_name": 1}, ["c"]),
        # Neither of these is a sample to WebDataset.
        ([("README", b"x"), (".a.png", PNG), ("__meta__/a.png", PNG)], {}, []),
        # Others between do not part a sample, and other members of it are not read.
        ([("a.png", PNG), ("a.cls", b"1"), ("._a.png", b"x"), ("a.txt", b"x")], {}, ["a"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_counted(
    members: list[tuple[str, bytes]], skips: dict[str, int], kept: list[str]
) -> None:
    data = tar_bytes(*members)
    found = scan(data)
    assert dict(found.skips) == skips
    assert [span.key for span in found.spans] == kept
    assert all(found.sizes) == bool(kept) or not kept
    if not any(cause in skips for cause in ("unsafe_name", "duplicate_member")):
        # Each sample that WebDataset makes is either indexed or skipped.
        plain = webdataset.tariterators.group_by_keys(
            {**one, "__url__": "u"}
            for one in webdataset.tariterators.tar_file_iterator(io.BytesIO(data))
        )
        assert len(list(plain)) == len(found.spans) + sum(found.skips.values())


def test_links_devices_and_sparse_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.txt").write_text("x")
    os.link(tmp_path / "a.png", tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("a.png")
    os.mkfifo(tmp_path / "d.png")
    with (tmp_path / "e.png").open("wb") as file:
        file.truncate(1 << 20)
        file.seek(1 << 19)
        file.write(b"x")
    for tar_format in ("gnu", "pax"):
        words = ["tar", "-S", "--sort=name", f"--format={tar_format}", "-cf", "out.tar"]
        names = [f"{name}.png" for name in "abcde"]
        subprocess.run([*words, "a.png", "a.txt", *names[1:]], cwd=tmp_path, check=True)
        found = scan((tmp_path / "out.tar").read_bytes())
        assert dict(found.skips) == {"link": 2, "not_a_file": 1, "sparse": 1}
        assert [span.key for span in found.spans] == ["a"]


def test_keys_and_extensions_are_those_of_webdataset() -> None:
    names = ["a/b.c.png", "a/b.c.txt", "a.d/e.JPG", "a.d/e.Txt", "./f.jpg", "./f.txt"]
    data = tar_bytes(*((name, PNG if name[-3:].lower() != "txt" else b"x") for name in names))
    adoption = Adoption("pairs", ("jpg", "c.png"), "txt", "word", 3, {})
    found = scan(data, adoption)
    assert [span.key for span in found.spans] == ["a.d/e", "./f"]
    assert [member.extension for member in found.spans[0].members] == ["JPG", "Txt"]
    adoption = Adoption("pairs", ("c.png",), "c.txt", "word", 3, {})
    assert [span.key for span in scan(data, adoption).spans] == ["a/b"]


def test_names_that_the_index_cannot_hold_are_escaped_there() -> None:
    raw = b"\xff\xfe".decode("utf-8", "surrogateescape")
    keys = ["two words", "line\nbreak", "100%", "\u2028\x85", raw, "\u00fc", "tab\t"]
    data = tar_bytes(*((f"{key}.png", PNG) for key in keys), tar_format=tarfile.GNU_FORMAT)
    found = scan(data, IMAGES)
    escaped = ["two%20words", "line%0Abreak", "100%25", "%E2%80%A8%C2%85", "%FF%FE", "\u00fc",
               "tab%09"]  # fmt: skip
    assert [span.key for span in found.spans] == escaped
    assert parse_index(index.format_index(found.spans), "here") == list(found.spans)


def test_any_case_and_format_is_decoded_upright_in_the_channels_asked_for(tmp_path: Path) -> None:
    def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
        out = io.BytesIO()
        picture.save(out, kind, **options)
        return out.getvalue()

    turned = Image.Exif()
    turned[0x0112] = 6
    red = Image.new("RGB", (20, 10), (200, 0, 0))
    deep = Image.fromarray(np.full((10, 20), 40000, dtype=np.uint16))
    clear = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    data = tar_bytes(
        ("a.JPEG", saved(red, "JPEG", quality=95)),
        ("b.jpg", saved(red, "JPEG", quality=95, exif=turned)),
        ("c.webp", saved(red, "WEBP", lossless=True)),
        ("d.png", saved(deep, "PNG")),
        ("e.png", saved(clear, "PNG")),
    )
    (tmp_path / "0.tar").write_bytes(data)
    assert run(tmp_path) == 0
    reader = reader_of(tmp_path)
    shapes = {}
    for at in range(5):
        raw = reader.read(0, at)
        (extension,) = raw.members
        pixels = images.decode(bytes(raw.members[extension]), 3)
        shapes[raw.key] = pixels.shape
        means = {"d": (156, 156, 156), "e": (255, 255, 255)}
        expected = means.get(raw.key, (200, 0, 0))
        assert np.abs(pixels.mean(axis=(0, 1)) - expected).max() < 4, raw.key
    assert shapes == dict.fromkeys("acde", (10, 20, 3)) | {"b": (20, 10, 3)}
    policy = load(tmp_path).image
    assert (policy.width, policy.height, policy.channels) == (None, None, 3)
    assert verify.main([str(tmp_path), "--deep", "--workers", "0"]) == 0
    assert run(tmp_path, "--channels", "1") == 0
    assert images.decode(bytes(reader_of(tmp_path).read(0, 2).members["webp"]), 1).shape[2] == 1


def test_damaged_shards_are_all_named_and_nothing_is_committed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shard(4)
    cut = boundaries(data)[4]
    for number, content in enumerate([data, data[:cut], data, data[: cut + 600]]):
        (tmp_path / f"{number}.tar").write_bytes(content)
    assert run(tmp_path) == 1
    err = capsys.readouterr().err
    assert f"1.tar: cut off at byte {cut}:" in err
    assert f"3.tar: cut off at byte {cut + 600}, inside" in err
    assert "2 damaged; no manifest was written" in err
    assert run(tmp_path, "--json") == 1
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["ok"], len(row["problems"])) == (False, 2)
    assert not (tmp_path / "manifest.json").exists()
    (tmp_path / "1.tar").write_bytes(data)
    (tmp_path / "3.tar").unlink()
    assert run(tmp_path) == 0
    assert load(tmp_path).num_samples("train") == 12
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone/0.tar").write_bytes(data[:cut])
    assert run(tmp_path / "lone") == 1
    assert f"0.tar: cut off at byte {cut}:" in capsys.readouterr().err


def test_skips_are_accounted_for_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{at}.png", PNG) for at in range(9)] + [("ok.png", PNG), ("ok.txt", b"x")]
    (tmp_path / "b.tar").write_bytes(tar_bytes(*members))
    (tmp_path / "a.tar").write_bytes(shard(3))
    (tmp_path / "none.tar").write_bytes(tar_bytes(("z.png", PNG)))
    assert run(tmp_path, "--max-bad", "9") == 1
    assert "--max-bad allows 9: " in capsys.readouterr().err
    assert not (tmp_path / "manifest.json").exists()
    assert run(tmp_path, "--max-bad", "10") == 0
    assert "skipped 10: 10 no_code: 'b.tar: 0', " in capsys.readouterr().err
    manifest = load(tmp_path)
    assert dict(manifest.skips) == {"no_code": 10}
    assert [shard.name for shard in manifest.splits["train"]] == ["a.tar", "b.tar"]
    assert verify.main([str(tmp_path), "--workers", "0"]) == 0


def test_verify_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.tar").write_bytes(shard(3))
    assert run(tmp_path) == 0
    data = bytearray((tmp_path / "a.tar").read_bytes())
    [_, span, _] = parse_index((tmp_path / "a.idx").read_text(), "here")
    data[span.members[0].offset + 60] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    capsys.readouterr()
    assert verify.main([str(tmp_path), "--workers", "0"]) == 1
    out = capsys.readouterr().out
    assert "a.tar: its SHA-256 is not the manifest's" in out
    assert "a.tar: 001: damaged (CRC-32)" in out
    data[span.members[0].offset + 60] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    text = (tmp_path / "a.idx").read_text()
    (tmp_path / "a.idx").write_text(
        text.replace("002.txt", "003.txt").replace("002.png", "003.png")
    )
    assert verify.main([str(tmp_path), "--workers", "0"]) == 1
    assert "a.idx: does not describe a.tar" in capsys.readouterr().out
    assert run(tmp_path) == 0
    assert (tmp_path / "a.idx").read_text() == text
    assert verify.main([str(tmp_path), "--workers", "0"]) == 0


def test_a_change_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        (tmp_path / name).write_bytes(shard(3))
    assert run(tmp_path) == 0
    digest = load(tmp_path).data_digest
    (tmp_path / "train-1.tar").write_bytes(shard(5))
    (tmp_path / "train-2.tar").write_bytes(shard(2))
    (tmp_path / "val-0.tar").unlink()
    assert run(tmp_path) == 0
    assert "made anew (new: train-2.tar; gone: val-0.tar)" in capsys.readouterr().err
    manifest = load(tmp_path)
    assert [shard.samples for shard in manifest.splits["train"]] == [3, 5, 2]
    assert list(manifest.splits) == ["train"]
    assert not list(tmp_path.glob("val-0.*"))
    # What is used of the same shards is a part of what a run was trained on.
    capsys.readouterr()
    assert run(tmp_path, "--kind", "images") == 0
    assert "its index is made anew (kind was pairs, now images; " in capsys.readouterr().err
    alone = load(tmp_path)
    assert alone.tokenizer is None
    assert run(tmp_path, "--kind", "images", "--channels", "1") == 0
    digests = {digest, manifest.data_digest, alone.data_digest, load(tmp_path).data_digest}
    assert len(digests) == 4


def test_files_of_others_are_left_alone(
    tmp_path: Path, make_pairs: Callable[..., Path], hash_tree: HashTree,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    packed = tmp_path / "packed"
    assert pack.main([str(make_pairs(6)), str(packed), "--split", "train=1", "--workers", "0"]) == 0
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.tar").write_bytes(shard(3))
    places = {"a.idx": "v1.2 0\n", "a.json": "{}", "tokenizer.json": "{}", "plan.json": "{}",
              "manifest.json": "{}"}  # fmt: skip
    capsys.readouterr()
    before = hash_tree(packed)
    assert run(packed) == 2
    assert "made by `pixloom pack`" in capsys.readouterr().err
    assert hash_tree(packed) == before
    for name, text in places.items():
        (folder / name).write_text(text)
        before = hash_tree(folder)
        assert run(folder) == 2
        assert f"{folder}/{name}: another tool's file" in capsys.readouterr().err
        assert hash_tree(folder) == before
        (folder / name).unlink()
    # The way around: a folder of links, on which everything works.
    (folder / "a.idx").write_text("v1.2 0\n")
    links = tmp_path / "links"
    links.mkdir()
    (links / "a.tar").symlink_to(folder / "a.tar")
    assert run(links) == 0
    assert reader_of(links).read(0, 2).key == "002"


def test_given_tokens_need_the_tokenizer_that_made_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.json"
    file.write_text(tokens.train_word_tokenizer({"x": 3, "y": 2}, 1))
    good, other = tokens.to_npy([1, 4, 5, 2], 6), tokens.to_npy([1, 9, 2], 6)
    (tmp_path / "only").mkdir()
    (tmp_path / "only/a.tar").write_bytes(
        tar_bytes(
            *[("a.png", PNG), ("a.tokens.npy", good), ("b.png", PNG), ("b.tokens.npy", other)],
            *[("c.png", PNG), ("c.tokens.npy", b"\x93NUMPY junk")],
        )
    )
    assert run(tmp_path / "only") == 2
    assert "give the tokenizer that made them" in capsys.readouterr().err
    assert run(tmp_path / "only", "--tokenizer", file) == 0
    assert dict(load(tmp_path / "only").skips) == {"bad_tokens": 2}
    raw = reader_of(tmp_path / "only").read(0, 0)
    assert read_tokens(raw).tolist() == [1, 4, 5, 2]
    # Beside text, ids of an unknown tokenizer are left alone.
    (tmp_path / "both").mkdir()
    (tmp_path / "both/a.tar").write_bytes(
        tar_bytes(("a.png", PNG), ("a.tokens.npy", other), ("a.txt", b"y x z"))
    )
    assert run(tmp_path / "both") == 0
    assert set(reader_of(tmp_path / "both").read(0, 0).members) == {"png", "txt"}
    assert verify.main([str(tmp_path / "only"), "--deep", "--workers", "0"]) == 0


def test_a_tokenizer_of_characters(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(("a.png", PNG), ("a.txt", "x  \u00fc\n".encode())))
    assert run(tmp_path, "--tokenizer", "char") == 0
    manifest = load(tmp_path)
    assert manifest.tokenizer is not None
    assert (manifest.tokenizer.vocab_size, manifest.tokenizer.longest) == (8, 7)
    lazy = tokens.TokenizerFile.of(str(tmp_path), manifest)
    ids = read_tokens(reader_of(tmp_path).read(0, 0), lazy)
    tokenizer = tokens.load_tokenizer((tmp_path / "tokenizer.json").read_text(), "here")
    assert tokenizer.decode(ids.tolist()) == "x  \u00fc\n"
    with pytest.raises(UserError, match="not the tokenizer that the manifest names"):
        tokens.TokenizerFile(str(tmp_path / "tokenizer.json"), "0").encode("x")
    assert verify.main([str(tmp_path), "--deep", "--workers", "0"]) == 0


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000.tar", "train"),
        ("training_1.tar", "train"),
        ("validation-000.tar", "val"),
        ("VALID.tar", "val"),
        ("test/000.tar", "test"),
        ("val/train-0.tar", "val"),
        ("imagenet-train-000.tar", "train"),
        ("cc3m/shard-val-0.tar", "val"),
        ("trainset/0.tar", None),
        ("latest-0.tar", None),
        ("a-train-test.tar", None),
        ("000000.tar", None),
    ],
)
def test_a_name_says_the_split(name: str, split: str | None) -> None:
    assert index.guess_split(name) == split


def test_splits_that_are_asked_for() -> None:
    names = [f"a/{at}.tar" for at in range(9)] + ["b/7.tar"]
    assert index.assign_splits(names, []) == {"train": tuple(names)}
    assert index.assign_splits(names, ["test=7.*", "train=a/[0-6].tar"]) == {
        "train": tuple(names[:7]),
        "test": ("a/7.tar", "b/7.tar"),
    }
    dealt = index.assign_splits(names, ["train=.7,val=.3"])
    assert [len(part) for part in dealt.values()] == [7, 3]
    assert sorted(dealt["train"] + dealt["val"]) == names
    assert list(dealt["train"]) == sorted(dealt["train"])
    for specs, match in (
        (["train=*", "val=b/*"], "b/7.tar is of train and val"),
        (["val=c*"], "there is no such shard"),
        (["*.tar"], "write NAME=PATTERN"),
        (["train=20,val=rest"], "whole shards are dealt, and 10 are too few"),
    ):
        with pytest.raises(UserError, match=match):
            index.assign_splits(names, specs)


def test_what_cannot_be_told_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error_of(*words: str) -> str:
        assert run(tmp_path, *words) == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "no .tar files there" in error_of()
    (tmp_path / "a.tar.gz").write_bytes(b"")
    assert "decompress them" in error_of()
    (tmp_path / "a.tar").write_bytes(tar_bytes())
    assert "its shards are empty" in error_of()
    both = [("a.left.png", PNG), ("a.right.png", PNG), ("a.txt", b"x"), ("a.tex", b"y")]
    (tmp_path / "b.tar").write_bytes(tar_bytes(*both))
    assert "its samples have left.png, right.png, tex, txt" in error_of()
    assert "tex and txt lie beside images" in error_of("--image-extension", "left.png")
    chosen = ("--image-extension", "right.png", "--code-suffix", ".tex")
    assert "no split named train" not in error_of(*chosen, "--split", "train=a.tar")
    assert "the split named train, there is none" in error_of(*chosen, "--split", "test=*.tar")
    assert "images alone have no code" in error_of(*chosen, "--kind", "images")
    assert run(tmp_path, *chosen) == 0
    assert [
        member.extension
        for member in parse_index((tmp_path / "b.idx").read_text(), "here")[0].members
    ] == ["right.png", "tex"]
    assert run(tmp_path / "nowhere") == 2


@pytest.mark.parametrize("service", ["moto", "seaweedfs"])
def test_in_a_bucket(
    service: str, request: pytest.FixtureRequest, tmp_path: Path, hash_tree: HashTree,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server: Server = request.getfixturevalue(service)
    root = f"{server.url}/adopt-{uuid.uuid4().hex[:8]}"
    folder = write_with_webdataset(tmp_path / "data")
    put_tree(folder, root)
    assert run(root) == 0
    assert run(folder) == 0
    stored = {
        name: hashlib.sha256(storage.read_bytes(f"{root}/{name}")).hexdigest()
        for name in storage.list_files(root)
    }
    assert stored == hash_tree(folder)
    capsys.readouterr()
    assert run(root, "--json") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nothing_to_do"]
    assert verify.main([root, "--deep", "--workers", "0"]) == 0


def test_each_shard_of_a_bucket_is_fetched_once(
    proxy: FaultyProxy, seaweedfs: Server, tmp_path: Path
) -> None:
    """Also the first, whose members tell the layout; not one that turns out to have none."""
    root = f"{seaweedfs.url}/adopt-{uuid.uuid4().hex[:8]}"
    folder = write_with_webdataset(tmp_path / "data")
    (folder / "train-.tar").write_bytes(bytes(1024))
    put_tree(folder, root)
    proxy.reset()
    assert run(root) == 0
    gets = {path.rpartition("/")[2]: count for path, count in proxy.gets.items()}
    tars = dict.fromkeys(storage.list_files(str(folder)), 1)
    assert gets == {**tars, "train-.tar": 2}
