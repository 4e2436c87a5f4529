"""Tables, WebDataset shards and folders of splits: what of them is packed, and what is not."""

import collections
import csv
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from servers import Server, put_tree

from shards import layouts, pack, storage, tables
from shards.format import parse_index
from shards.layouts import Columns, list_source
from shards.sources import FileRead, reading

MakePairs = Callable[..., Path]
HashTree = Callable[[Path], dict[str, str]]


def run(*arguments: object) -> int:
    return pack.main([str(argument) for argument in (*arguments, "--workers", 0)])


def png(seed: int, size: tuple[int, int] = (8, 6)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (seed % 256, seed // 256 % 256, 7)).save(out, "PNG")
    return out.getvalue()


def samples_of(out: Path) -> list[tuple[str, str, bytes, str | None]]:
    """Split, source, image and code of every packed sample."""
    found = []
    for split, entries in storage.load_manifest(str(out)).splits.items():
        for entry in entries:
            tar = (out / entry.name).read_bytes()
            for span in parse_index((out / entry.index_name).read_text(), entry.index_name):
                members = {
                    one.extension: tar[one.offset : one.offset + one.size] for one in span.members
                }
                code = members["txt"].decode() if "txt" in members else None
                source = json.loads(members["json"])["source"]
                found.append((split, source, members["png"], code))
    return found


def contents(out: Path) -> collections.Counter[tuple[bytes, str | None]]:
    return collections.Counter((image, code) for _, _, image, code in samples_of(out))


def write_table(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> Path:
    """`rows` as a table of the kind that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, **options)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


ODD_CODES = ['row, "a" {\n\tb\r\n}', "é\u2028\u3042 ;", "  x\n\n", "'\\n\"", "<eos>,\t,"]


def make_rows(folder: Path, count: int, **others: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Rows of distinct images, as files in `folder`, and distinct odd programs."""
    rows = []
    for number in range(count):
        name = f"pics/{number % 3}/a b{number}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
        code = f"p{number} {ODD_CODES[number % len(ODD_CODES)]}"
        row = {"id": number, "image": name, "code": code}
        rows.append(row | {key: make(number) for key, make in others.items()})
    return rows


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_of_paths_and_code(suffix: str, tmp_path: Path) -> None:
    rows = make_rows(tmp_path, 20)
    table = write_table(tmp_path / f"table{suffix}", rows)
    out = tmp_path / "out"
    assert run(table, out, "--code-column", "code", "--shard-samples", 5) == 0
    assert contents(out) == {(png(number), row["code"]): 1 for number, row in enumerate(rows)}
    assert {source for _, source, _, _ in samples_of(out)} == {row["image"] for row in rows}
    assert storage.load_manifest(str(out)).kind == "pairs"
    alone = tmp_path / "alone"
    assert run(table, alone, "--image-column", "image") == 0
    assert contents(alone) == {(png(number), None): 1 for number in range(20)}


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_with_the_bytes_of_images(
    as_struct: bool, tmp_path: Path, hash_tree: HashTree
) -> None:
    rows = make_rows(tmp_path, 90)
    for number, row in enumerate(rows):
        row["image"] = {"bytes": png(number), "path": "x.png"} if as_struct else png(number)
    parts = [rows[:50], rows[50:]]
    for number, part in enumerate(parts):
        write_table(tmp_path / "parts" / f"{number}.parquet", part, row_group_size=7)
    options = ("--code-column", "code", "--shard-samples", 9, "--encode", "webp")
    plain = tmp_path / "plain"
    pattern = tmp_path / "parts" / "*.parquet"
    assert run(pattern, plain, *options[:-2]) == 0
    assert contents(plain) == {(png(at), row["code"]): 1 for at, row in enumerate(rows)}
    # Few row groups a shard, in an order that is not that of the table.
    order = [source for _, source, _, _ in samples_of(plain)]
    assert sorted(order) != order
    for at in range(0, 72, 9):
        groups = {
            (file, (int(number) - 1) // 7)
            for file, _, number in (source.split(" ") for source in order[at : at + 9])
        }
        assert len(groups) <= 5
    if as_struct:
        return
    assert run(pattern, tmp_path / "0", *options) == 0
    words = [str(one) for one in (tmp_path / "parts", tmp_path / "2", *options, "--workers", 2)]
    assert pack.main([*words, "--kind", "table"]) == 0
    assert hash_tree(tmp_path / "2") == hash_tree(tmp_path / "0")


def test_rows_are_read_in_any_order_inside_a_group(tmp_path: Path) -> None:
    rows = [{"image": png(number), "code": f"c{number}"} for number in range(200)]
    write_table(tmp_path / "t.parquet", rows, row_group_size=64)
    listing = list_source(str(tmp_path / "t.parquet"), columns=Columns(code="code"))
    assert [pair.block for pair in listing.pairs] == [row // 64 for row in range(200)]
    wanted = [150, 149, 70, 120, 64, 199, 3, 63, 0]
    files = [
        FileRead(pair.image, place=place)
        for pair in (listing.pairs[row] for row in wanted)
        for place in (pair.image_place, pair.code_place)
    ]
    with reading(listing.root, files) as read:
        for row, image, code in zip(wanted, files[::2], files[1::2], strict=True):
            assert read(image) == png(row)
            if row != 70:  # What is not asked for does no harm.
                assert read(code) == b"c%d" % row


def test_memory_is_that_of_the_wanted_rows(tmp_path: Path) -> None:
    """One row group of 32 MB in pages of 1 MB, of which a row near the end is read."""
    size = 2**18
    images = [bytes([number]) * size for number in range(128)]
    rows = [{"image": one} for one in images]
    write_table(tmp_path / "t.parquet", rows, write_batch_size=1, use_dictionary=False)
    before = pa.total_allocated_bytes()
    with pytest.MonkeyPatch.context() as patch:
        peaks = []
        hold = tables.ParquetCells._hold

        def watch(self: tables.ParquetCells, batch: Any) -> None:
            hold(self, batch)
            peaks.append(pa.total_allocated_bytes() - before)

        patch.setattr(tables.ParquetCells, "_hold", watch)
        cells = tables.ParquetCells(str(tmp_path), [("t.parquet", 120, "image")])
        assert cells.read("t.parquet", 120, "image") == images[120]
        cells.close()
    assert len(peaks) > 4
    assert max(peaks) < 64 * size


def test_splits_of_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["train", "train", "Validation", "test", "extra", ""]
    rows = make_rows(tmp_path, 24, split=lambda at: names[at % 6])
    rows[0]["code"] = " " + rows[3]["code"]  # train 0 and test 3 share a program,
    (tmp_path / rows[4]["image"]).write_bytes(png(2))  # extra 4 and val 2 an image.
    for suffix in (".csv", ".parquet"):
        table, out = write_table(tmp_path / f"t{suffix}", rows), tmp_path / f"out{suffix}"
        assert run(table, out, "--code-column", "code", "--split-column", "split") == 0
        found = {code: split for split, _, _, code in samples_of(out)}
        assert storage.load_manifest(str(out)).skips == {
            "duplicate_across_splits": 2, "no_split": 4,
        }  # fmt: skip
        expected = {
            row["code"]: {"Validation": "val"}.get(row["split"], row["split"])
            for number, row in enumerate(rows)
            if row["split"] and number not in (0, 4)
        }
        assert found == expected
        assert list(storage.load_manifest(str(out)).splits) == ["train", "val", "test", "extra"]
        error = capsys.readouterr().err
        assert "2 duplicate_across_splits: " in error
        assert "4 no_split: " in error


def test_splits_of_folders(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    for split, number in (("train", 6), ("validation", 3), ("test", 4)):
        make_pairs(number, name=f"raw/{split}")
        for path in sorted((raw / split).rglob("*.gui")):
            path.write_text(f"{split} {path.stem}")
            path.with_suffix(".png").write_bytes(png(hash_of(split) + int(path.stem)))
    (raw / "train" / "a" / "0001.png").write_bytes(
        (raw / "test" / "b" / "c" / "0002.png").read_bytes()
    )
    (raw / "loose.png").write_bytes(png(999))
    (raw / "loose.gui").write_text("loose")
    out = tmp_path / "out"
    assert run(raw, out, "--split", "folders") == 0
    manifest = storage.load_manifest(str(out))
    assert {split: manifest.num_samples(split) for split in manifest.splits} == {
        "train": 5, "val": 3, "test": 4,
    }  # fmt: skip
    assert manifest.skips == {"duplicate_across_splits": 1, "no_split": 1}
    for split, source, _, _ in samples_of(out):
        assert source.startswith({"val": "validation"}.get(split, split))
    assert run(raw, out, "--split", "folders", "--max-bad", 1) == 1
    capsys.readouterr()
    (raw / "Über").mkdir()
    (raw / "Über" / "x.png").write_bytes(png(1000))
    (raw / "Über" / "x.gui").write_text("x")
    assert run(raw, tmp_path / "other", "--split", "folders") == 2
    assert "a split is named with 1 to 32" in capsys.readouterr().err


def hash_of(name: str) -> int:
    return sum(name.encode()) * 16


def test_a_split_of_copies_alone_is_named(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(3, name="raw/train")
    make_pairs(3, name="raw/test")
    assert run(tmp_path / "raw", tmp_path / "out", "--split", "folders") == 2
    error = capsys.readouterr().err
    assert "nothing would be in 'train'" in error
    assert "train/" in error
    for path in (tmp_path / "raw" / "train").rglob("*"):
        if path.is_file():
            path.rename(path.with_name(f"x{path.name}"))
    (tmp_path / "raw" / "train").rename(tmp_path / "raw" / "val")
    assert run(tmp_path / "raw", tmp_path / "out", "--split", "folders") == 2
    assert "nothing would be in 'val'" in capsys.readouterr().err


def test_without_a_training_split_a_tokenizer_is_needed(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pairs(3, name="raw/test")
    assert run(tmp_path / "raw", tmp_path / "out", "--split", "folders") == 2
    assert "give --tokenizer FILE" in capsys.readouterr().err
    assert run(tmp_path / "raw", tmp_path / "whole", "--split", "train=1") == 0
    tokenizer = tmp_path / "whole" / "tokenizer.json"
    options = ("--split", "folders", "--tokenizer", tokenizer)
    assert run(tmp_path / "raw", tmp_path / "out", *options) == 0
    assert storage.load_manifest(str(tmp_path / "out")).num_samples("test") == 3


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            add_member(tar, name, data)
    return path


def test_shards_are_packed_again(tmp_path: Path, hash_tree: HashTree) -> None:
    expected = {}
    for number, split in enumerate(["train", "train", "val"]):
        members = []
        for at in range(number * 8, number * 8 + 8):
            code = f"row {at} {{ }}\n"
            members += [
                (f"deep/{at:04d}.v1.json", b"{}"),
                (f"deep/{at:04d}.PNG", png(at)),
                (f"deep/{at:04d}.tex", code.encode()),
            ]
            expected[png(at), code] = split
        write_tar(tmp_path / "in" / f"{split}-{number}.tar", members)
    out, again = tmp_path / "out", tmp_path / "again"
    assert run(tmp_path / "in" / "*.tar", out, "--shard-samples", 5) == 0
    assert contents(out) == dict.fromkeys(expected, 1)
    words = (tmp_path / "in", again, "--kind", "webdataset", "--split", "folders")
    assert pack.main([*map(str, words), "--workers", "2"]) == 0
    assert {(image, code): split for split, _, image, code in samples_of(again)} == expected
    # What pack wrote is a source, too.
    third = tmp_path / "third"
    assert run(again, third, "--kind", "webdataset", "--split", "folders") == 0
    assert {(image, code): split for split, _, image, code in samples_of(third)} == expected
    one = tmp_path / "in" / "val-2.tar"
    assert run(one, tmp_path / "one", "--kind", "images", "--split", "test=1") == 0
    assert contents(tmp_path / "one") == {(png(at), None): 1 for at in range(16, 24)}


def test_what_a_tar_holds_beside_samples_is_counted(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar",
        [
            ("1.png", png(1)), ("1.txt", b"one"),
            ("../2.png", png(2)), ("/3.txt", b"three"),
            ("4.png", png(4)),
            ("5.txt", b"five"),
            ("6.png", png(6)), ("6.jpg", png(7)), ("6.txt", b"six"),
            ("8.png", png(8)), ("9.png", png(9)), ("9.txt", b"nine"), ("8.txt", b"eight"),
            ("1.png", png(11)), ("1.txt", b"again"),
            ("12.png", png(12)), ("12.png", png(13)), ("12.txt", b"twelve"),
            ("14.png", b""), ("14.txt", b"x"),
            ("15.png", png(15)), ("15.txt", b"\xff"),
            ("no\nline.png", png(16)), ("no\nline.txt", b"sixteen"),
            ("README", b"?"), ("__meta__/x.txt", b"?"),
        ],
    )  # fmt: skip
    with tarfile.open(tar, "a") as more:
        link = tarfile.TarInfo("17.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        more.addfile(link)
    out = tmp_path / "out"
    assert run(tar, out, "--split", "train=1") == 0
    assert contents(out) == {(png(1), "one"): 1, (png(9), "nine"): 1, (png(16), "sixteen"): 1}
    assert storage.load_manifest(str(out)).skips == {
        "code_not_utf8": 1, "duplicate_key": 1, "duplicate_member": 1, "empty": 1, "link": 1,
        "no_code": 1, "no_image": 1, "not_adjacent": 2, "several_images": 1, "unsafe_name": 2,
    }  # fmt: skip


@pytest.mark.parametrize("cut", [-1024, 700, 513, 1536])
def test_a_tar_that_is_cut_short_is_one_line(
    cut: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_tar(tmp_path / "0.tar", [("1.png", png(1)), ("1.txt", b"one")])
    data = whole.read_bytes()
    cut = cut if cut > 0 else 512 * 4
    (tmp_path / "1.tar").write_bytes(data[:cut])
    assert run(tmp_path / "*.tar", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1.tar" in error
    assert "cut off" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


HOSTILE_PATHS = [
    "../secret.png", "pics/../../secret.png", "/etc/secret.png", "a\0b.png", "linked/secret.png",
    "..", "./", "//x", "\ud800.png",
]  # fmt: skip


def test_paths_that_lead_out_are_refused_and_counted(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    rows = make_rows(folder, 4)
    (tmp_path / "secret.png").write_bytes(png(77))
    (folder / "linked").symlink_to(tmp_path)
    (folder / "inner").symlink_to(folder / "pics" / "0")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "new\nline.png").write_bytes(png(78))
    rows += [{"id": 0, "image": path, "code": f"bad {path!r}"} for path in HOSTILE_PATHS]
    for path in ("gone.png", "link.png", "pics", "x" * 5000, None, ""):
        rows.append({"id": 0, "image": path, "code": f"bad {path}"})
    rows.append({"id": 0, "image": "./new\nline.png", "code": "newline"})
    rows.append({"id": 0, "image": "inner//a b0.png", "code": "by a link inside"})
    table, out = write_table(folder / "t.jsonl", rows), tmp_path / "out"
    assert run(table, out, "--code-column", "code", "--split", "train=1") == 0
    assert storage.load_manifest(str(out)).skips == {
        "missing_file": 1, "no_image": 2, "unreadable": 3, "unsafe_name": len(HOSTILE_PATHS),
    }  # fmt: skip
    found = contents(out)
    assert found.total() == 6
    assert found[png(78), "newline"] == 1
    assert not any(image == png(77) for image, _ in found)


def test_rows_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    make_rows(tmp_path, 4)
    path = tmp_path / "t.csv"
    head = b"\xef\xbb\xbfcode, image ,other\r\n"
    lines = [
        b"c0,pics/0/a b0.png,\xff\r\n",
        b"\r\n",
        b"c1,pics/1/a b1.png\r\n",
        b"c2,pics/2/a b2.png,x,y\r\n",
        b"c3\xff,pics/0/a b3.png,x\r\n",
        b",pics/0/a b3.png,x\r\n",
        b'"c ""3""\n",pics/0/a b3.png,x',
    ]
    path.write_bytes(head + b"".join(lines))
    out = tmp_path / "out"
    assert run(path, out, "--code-column", "code", "--split", "train=1") == 0
    assert contents(out) == {(png(0), "c0"): 1, (png(3), 'c "3"\n'): 1}
    assert storage.load_manifest(str(out)).skips == {
        "bad_row": 2, "code_empty": 1, "code_not_utf8": 1,
    }  # fmt: skip
    json_path = tmp_path / "t.jsonl"
    json_lines = [
        b'{"image": "pics/0/a b0.png", "code": "c0", "more": {"image": 1}}',
        b"",
        b'{"image": "pics/0/a b0.png", "image": "pics/0/a b3.png", "code": "c1"}',
        b'{"image": "pics/0/a b0.png", "code": 7}',
        b'{"image": "pics/0/a b0.png"}',
        b'{"image": "pics/0/a b0.png", "code": "\\ud800"}',
        b'{"image": "pics/0/a b0.png", "code": "\xff"}',
        b'["pics/0/a b0.png"]',
        b"[" * 100_000,
        b'{"image": "pics/0/a b3.png", "code": "c\\u00e9"}',
    ]
    json_path.write_bytes(b"\n".join(json_lines))
    out = tmp_path / "json"
    assert run(json_path, out, "--code-column", "code", "--split", "train=1") == 0
    assert contents(out) == {(png(0), "c0"): 1, (png(3), "cé"): 1}
    assert storage.load_manifest(str(out)).skips == {
        "bad_row": 4, "code_not_utf8": 2, "no_code": 1,
    }  # fmt: skip
    columns = {
        "image": pa.array([png(0), None, b"", png(3), png(2)], pa.binary()),
        "code": pa.array([b"c0", b"x", b"y", None, b"\xff"], pa.binary()).cast(
            pa.string(), safe=False
        ),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    out = tmp_path / "parquet"
    assert run(tmp_path / "t.parquet", out, "--code-column", "code", "--split", "train=1") == 0
    assert contents(out) == {(png(0), "c0"): 1}
    assert storage.load_manifest(str(out)).skips == {
        "code_not_utf8": 1, "empty": 1, "no_code": 1, "no_image": 1,
    }  # fmt: skip


def parquet_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), out)
    return out.getvalue()


GOOD = parquet_bytes([{"image": png(at), "code": f"c{at}"} for at in range(9)])
HUGE = b'code,image\n"' + b"x" * (17 * 2**20)


@pytest.mark.parametrize(
    ("name", "data", "options", "named"),
    [
        ("t.csv", b"", (), "must name the columns"),
        ("t.csv", b"image,code\n", (), "no rows there"),
        ("t.csv", b"a,b\n1,2\n", (), "no column 'image', it has 'a', 'b'"),
        ("t.csv", b"image,image\n1,2\n", (), "2 columns are called 'image'"),
        ("t.csv", b'image,code\n"a,b\n', (), "the record at byte 11"),
        ("t.csv", b'image,code\n"a"b,c\n', (), "the record at byte 11"),
        ("t.csv", b"image,code\ra,b\r", (), "new-line"),
        ("t.csv", HUGE, (), "larger than field limit"),
        ("t.tsv", b"image,code\n", (), "no column 'image', it has 'image,code'"),
        ("t.jsonl", b'{"a": 1}\n', (), "no column 'code', it has 'a'"),
        ("t.jsonl", b"\n", (), "no rows there"),
        ("t.parquet", GOOD[:-3], (), "t.parquet: damaged, or no Parquet file"),
        ("t.parquet", GOOD[: len(GOOD) // 2], (), "t.parquet: damaged, or no Parquet file"),
        ("t.parquet", b"", (), "t.parquet: damaged, or no Parquet file"),
        ("t.parquet", b"PAR1" + bytes(400) + GOOD[404:], (), "t.parquet: damaged"),
        ("t.parquet", parquet_bytes([{"image": "x"}]), (), "no column 'code'"),
        ("t.parquet", parquet_bytes([{"image": 1, "code": "x"}]), (), "holds int64"),
        ("t.csv", b"image,code\na,b\n", ("--kind", "webdataset"), "no tar"),
        ("t.csv", b"image,code\na,b\n", ("--kind", "images"), "--kind images packs no code"),
        ("t.csv", b"image,code\na,b\n", ("--split", "folders"), "--split folders"),
        ("t.csv", b"image,code\na,b\n", ("--code-suffix", "tex"), "--code-suffix .tex"),
        ("t.csv", b"image,code\na,b\n", ("--image-column", "code"), "each column once"),
        ("t.csv", b"image,code,s\na,b,x y\n", ("--split-column", "s"), "'x y': a split is named"),
        (
            "t.csv",
            b"image,code,s\na,b,x\n",
            ("--split-column", "s", "--split", "train=1"),
            "drop one",
        ),
        ("t.tar", b"", (), "--code-column"),
    ],
)  # fmt: skip
def test_tables_that_are_none_are_one_line(
    name: str,
    data: bytes,
    options: tuple[str, ...],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(data)
    assert run(tmp_path / name, tmp_path / "out", "--code-column", "code", *options) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.startswith("pixloom pack: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sources_that_are_none_are_one_line(
    make_pairs: MakePairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = make_pairs(3)
    write_tar(tmp_path / "text.tar", [("1.txt", b"x")])
    write_tar(tmp_path / "tokens.tar", [("1.png", png(1)), ("1.tokens.npy", b"x")])
    write_tar(tmp_path / "two.tar", [("1.png", png(1)), ("1.txt", b"x"), ("1.tex", b"x")])
    write_tar(tmp_path / "empty.tar", [])
    for arguments, named in [
        ((raw, "--code-column", "code"), "no table"),
        ((raw, "--kind", "table"), "no tables there"),
        ((raw, "--kind", "webdataset"), "no .tar files there"),
        ((tmp_path / "none.csv",), "No such file"),
        ((tmp_path / "none*.tar",), "no such files"),
        ((tmp_path / "text.tar",), "no image members there"),
        ((tmp_path / "tokens.tar",), "pixloom index"),
        ((tmp_path / "two.tar",), "tex and txt lie beside images"),
        ((tmp_path / "two.tar", "--code-suffix", "png"), "that is an image's"),
        ((tmp_path / "two.tar", "--kind", "table"), "drop --kind table"),
        ((tmp_path / "empty.tar",), "no samples there"),
        ((raw, "--split", "folder"), "write each split once"),
    ]:
        assert run(arguments[0], tmp_path / "out", *arguments[1:]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert error.count("\n") == 1


def test_pyarrow_is_asked_for_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.parquet").write_bytes(GOOD)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert run(tmp_path / "t.parquet", tmp_path / "out") == 2
    assert "pip install 'pixloom[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.tar"])
def test_a_source_that_changes_while_it_is_packed_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(tmp_path, 6)
    path = tmp_path / name

    def write(suffix: str) -> None:
        if name == "t.tar":
            members = []
            for row in rows:
                members += [
                    (f"{row['id']}.png", png(row["id"])),
                    (f"{row['id']}.txt", (suffix + row["code"]).encode()),
                ]
            write_tar(path, members)
        else:
            write_table(path, [row | {"code": suffix + row["code"]} for row in rows])

    write("")
    settle = pack._settle

    def change(*arguments: Any) -> None:
        settle(*arguments)
        write("more ")

    monkeypatch.setattr(pack, "_settle", change)
    options = () if name == "t.tar" else ("--code-column", "code")
    assert run(path, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "changed" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_resuming_and_what_changed(
    tmp_path: Path, hash_tree: HashTree, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(tmp_path, 12)
    table, out = write_table(tmp_path / "t.parquet", rows), tmp_path / "out"
    options = ("--code-column", "code", "--shard-samples", 3)
    assert run(table, out, *options) == 0
    expected = hash_tree(out)
    (out / "train" / "000001.tar").unlink()
    (out / "manifest.json").unlink()
    assert run(table, out, *options) == 0
    assert hash_tree(out) == expected
    write_table(table, [*rows[:-1], rows[-1] | {"code": "other"}])
    capsys.readouterr()
    assert run(table, out, *options) == 2
    assert "changed: 't.parquet row 12, code'" in capsys.readouterr().err
    assert run(table, out, "--split-column", "code", "--code-column", "id") == 2


cells = st.sampled_from(
    ["good", "good", "good", "good", "gone", "junk", "out", "null", "latin", "blank", "same"]
)


@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=12),
    suffix=st.sampled_from([".csv", ".jsonl", ".parquet", "bytes.parquet", ".tar"]),
    group=st.integers(1, 5),
    by_column=st.booleans(),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_row_is_packed_once_or_skipped_once(
    rows: list[tuple[str, str]],
    suffix: str,
    group: int,
    by_column: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("raw")
    made: list[dict[str, Any]] = []
    for number, (image, code) in enumerate(rows):
        data = {"junk": b"junk", "blank": b"", "same": png(0)}.get(image, png(number + 1))
        name = f"{number}.png"
        (folder / name).write_bytes(data)
        path = {"gone": "gone.png", "out": "../x.png", "null": None}.get(image, name)
        text = {"null": None, "latin": "\ud800", "blank": " \n", "same": "same"}.get(
            code, f"code {number}"
        )
        split = ["train", "test"][number % 2]
        if suffix == "bytes.parquet":
            path = None if image == "null" else data
        made.append({"image": path, "code": text, "split": split})
    if suffix == ".tar":
        members = []
        for number, row in enumerate(made):
            if row["image"] is not None:
                data = (folder / f"{number}.png").read_bytes()
                prefix = "../" if row["image"] == "../x.png" else ""
                members.append((f"{prefix}{number}.png", data))
            if row["code"] is not None:
                text = row["code"].encode("utf-8", "surrogatepass")
                members.append((f"{number}.txt", text))
        source = write_tar(folder / "t.tar", members)
        options: tuple[object, ...] = ("--kind", "pairs")
        num_in = sum(row["image"] is not None or row["code"] is not None for row in made)
        # The image outside is skipped, and its text has none.
        num_in += sum(row["image"] == "../x.png" and row["code"] is not None for row in made)
    else:
        if not suffix.startswith(".") or suffix == ".parquet":
            for row in made:
                row["code"] = (
                    None if row["code"] is None else row["code"].encode("utf-8", "surrogatepass")
                )
            schema = pa.schema(
                [
                    ("image", pa.binary() if suffix == "bytes.parquet" else pa.string()),
                    ("code", pa.binary()),
                    ("split", pa.string()),
                ]
            )
            source = folder / "t.parquet"
            pq.write_table(pa.Table.from_pylist(made, schema), source, row_group_size=group)
        elif suffix == ".csv":
            source = folder / "t.csv"
            with source.open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
                writer = csv.DictWriter(file, ["image", "code", "split"])
                writer.writeheader()
                writer.writerows(made)
        else:
            source = write_table(folder / "t.jsonl", made)
        options = ("--code-column", "code", *(("--split-column", "split") if by_column else ()))
        num_in = len(made)
    out = tmp_path_factory.mktemp("out")
    if not by_column or suffix == ".tar":
        options = (*options, "--split", "train=1")
    status = run(source, out, *options)
    if status != 0:
        # Nothing good, or nothing that is left in a split.
        assert status == 2
        assert not (out / "manifest.json").exists()
        return
    manifest = storage.load_manifest(str(out))
    packed = samples_of(out)
    assert len({source for _, source, _, _ in packed}) == len(packed)
    assert len(packed) + sum(manifest.skips.values()) == num_in
    seen: dict[object, str] = {}
    for split, _, image, code in packed:
        for content in (image, " ".join(str(code).split())):
            assert seen.setdefault(content, split) == split


def test_the_names_of_splits() -> None:
    names = ["train", "Training", "VALID", "validation", "test", "x-1", "", "a b", "é", "y" * 33]
    assert [layouts.split_of(name) for name in names] == [
        "train", "train", "val", "val", "test", "x-1", None, None, None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["t.csv", "t.jsonl", "t.parquet", "t.tar"])
def test_a_source_on_a_store_gives_the_bytes_of_one_on_disk(
    name: str, moto: Server, tmp_path: Path, hash_tree: HashTree
) -> None:
    raw, url = tmp_path / "raw", f"{moto.url}/layouts-{name}"
    rows = make_rows(raw, 12)
    options: tuple[object, ...] = ("--code-column", "code", "--shard-samples", 5)
    if name == "t.tar":
        members = []
        for row in rows:
            members += [
                (f"{row['id']}.png", png(row["id"])),
                (f"{row['id']}.txt", row["code"].encode()),
            ]
        write_tar(raw / name, members)
        options = options[2:]
    elif name == "t.parquet":
        bytes_rows = [row | {"image": png(row["id"])} for row in rows]
        write_table(raw / name, bytes_rows, row_group_size=4)
    else:
        write_table(raw / name, rows)
    put_tree(raw, url)
    assert run(raw / name, tmp_path / "local", *options) == 0
    assert run(f"{url}/{name}", tmp_path / "remote", *options) == 0
    assert hash_tree(tmp_path / "remote") == hash_tree(tmp_path / "local")
    pattern = f"{url}/*{Path(name).suffix}"
    assert run(pattern, tmp_path / "pattern", *options) == 0
    assert hash_tree(tmp_path / "pattern") == hash_tree(tmp_path / "local")
