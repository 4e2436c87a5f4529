import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shards import pack, verify
from shards.format import FormatError, parse_index

Check = Callable[..., list[str]]


@pytest.fixture
def dataset(make_pairs: Callable[..., Path], tmp_path: Path) -> Path:
    out = tmp_path / "out"
    arguments = [str(make_pairs(16)), str(out), "--shard-samples", "4", "--workers", "0"]
    assert pack.main([*arguments, "--split", "train=rest,test=4"]) == 0
    return out


@pytest.fixture
def check(dataset: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs `verify --json`; returns the problems it found, after checking the exit status."""

    def run(*options: str) -> list[str]:
        capsys.readouterr()
        status = verify.main([str(dataset), "--json", "--workers", "0", *options])
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert status == (1 if row["problems"] else 0)
        assert row["ok"] == (not row["problems"])
        return list(row["problems"])

    return run


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def test_a_whole_dataset_has_no_problems(check: Check) -> None:
    assert check() == []
    assert check("--deep") == []


def test_a_flipped_bit_names_shard_and_key(dataset: Path, check: Check) -> None:
    spans = parse_index((dataset / "train/000001.idx").read_text(), "here")

    def flip(data: bytearray) -> None:
        data[spans[2].members[1].offset + 50] ^= 1

    rewrite(dataset / "train/000001.tar", flip)
    problems = check()
    assert any("train/000001.tar" in line and "SHA-256" in line for line in problems)
    assert any(f"train/000001.tar: {spans[2].key}: damaged" in line for line in problems)
    assert not any(spans[1].key in line for line in problems)


def test_a_shard_cut_between_two_samples_is_found(dataset: Path, check: Check) -> None:
    path = dataset / "train/000000.tar"
    spans = parse_index((dataset / "train/000000.idx").read_text(), "here")
    path.write_bytes(path.read_bytes()[: spans[2].offset])
    with tarfile.open(path) as tar:
        assert len(tar.getnames()) == 8  # Silently half of it: why counts are compared.
    problems = check()
    assert any("train/000000.tar" in line and "cut off" in line for line in problems)
    assert any(f"{spans[2].key}: missing" in line for line in problems)


def test_padding_in_place_of_samples_is_found(dataset: Path, check: Check) -> None:
    spans = parse_index((dataset / "train/000000.idx").read_text(), "here")

    def blank(data: bytearray) -> None:
        data[spans[1].offset :] = bytes(len(data) - spans[1].offset)

    rewrite(dataset / "train/000000.tar", blank)
    assert any("1 samples, the manifest says 4" in line for line in check())


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("train/000002.tar", "train/000002.tar"),
        ("train/000002.idx", "train/000002.idx"),
        ("train/000002.json", "train/000002.json"),
        ("tokenizer.json", "tokenizer.json"),
        ("plan.json", "plan.json"),
    ],
)
def test_a_missing_or_changed_file_is_named(
    dataset: Path, check: Check, name: str, named: str
) -> None:
    whole = (dataset / name).read_bytes()
    (dataset / name).unlink()
    assert any(named in line for line in check())
    (dataset / name).write_bytes(whole[: len(whole) // 2])
    assert any(named in line for line in check())
    digit = whole.index(b"1", 10)
    (dataset / name).write_bytes(whole[:digit] + b"2" + whole[digit + 1 :])
    assert any(named in line for line in check())
    (dataset / name).write_bytes(whole)
    assert check() == []


def test_shards_that_changed_places_are_found(dataset: Path, check: Check) -> None:
    first, second = dataset / "train/000000.tar", dataset / "train/000001.tar"
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    problems = check()
    assert any("000000" in line for line in problems)
    assert any("000001" in line for line in problems)


def test_an_edited_manifest_is_an_error(dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_text(path.read_text().replace('"samples": 4', '"samples": 5', 1))
    assert verify.main([str(dataset), "--workers", "0"]) == 2


def test_a_directory_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    assert verify.main([str(tmp_path), "--workers", "0"]) == 2


@pytest.mark.parametrize(
    ("extension", "data", "problem"),
    [
        ("png", b"junk", "does not decode"),
        ("png", None, "is 8x8, not 40x24"),
        ("txt", b"\xff", "not UTF-8"),
        ("txt", b"another program", "not those of the code"),
        ("tokens.npy", b"junk", "not an .npy file"),
        ("json", b"{", "Expecting"),
    ],
)
def test_deep_finds_samples_that_were_packed_wrong(
    dataset: Path, extension: str, data: bytes | None, problem: str
) -> None:
    """A writer with a bug makes hashes that match: only decoding finds what it wrote."""
    if data is None:
        out = io.BytesIO()
        Image.new("RGB", (8, 8)).save(out, "PNG")
        data = out.getvalue()
    tar_path = dataset / "test/000000.tar"
    spans = parse_index((dataset / "test/000000.idx").read_text(), "here")
    tar = tar_path.read_bytes()
    with tar_path.open("wb") as file:
        writer = pack.TarWriter(file)
        for span in spans:
            members = {
                one.extension: tar[one.offset : one.offset + one.size] for one in span.members
            }
            if span == spans[1]:
                members[extension] = data
            writer.add(span.key, members)
        sha256 = writer.close()
    manifest_path, receipt_path = dataset / "manifest.json", dataset / "test/000000.json"
    receipt = json.loads(receipt_path.read_text())
    old = receipt["shard"]["sha256"], receipt["shard"]["bytes"]
    receipt["shard"] |= {"sha256": sha256, "bytes": writer.num_bytes}
    receipt["crc32"] = writer.crc32
    receipt_path.write_text(json.dumps(receipt))
    (dataset / "test/000000.idx").write_text(pack.format_index(writer.spans))
    manifest = verify.storage.load_manifest(str(dataset))
    [entry] = manifest.splits["test"]
    assert (entry.sha256, entry.bytes) == old
    fixed = verify.ShardEntry(entry.name, entry.samples, writer.num_bytes, sha256)
    splits = {**manifest.splits, "test": (fixed,)}
    body = verify.Manifest(
        manifest.kind, splits, manifest.image, manifest.tokenizer, manifest.skips,
        manifest.plan_hash,
    )  # fmt: skip
    manifest_path.write_text(body.to_json())
    assert verify.check_dataset(str(dataset), deep=False, workers=0)[1] == []
    [found] = verify.check_dataset(str(dataset), deep=True, workers=0)[1]
    assert found.startswith(f"test/000000.tar: {spans[1].key}: ")
    assert problem in found


@pytest.mark.parametrize("cut", [0, 100, 511, 512, 5000])
def test_a_cut_tar_is_a_format_error(dataset: Path, cut: int) -> None:
    tar = (dataset / "test/000000.tar").read_bytes()
    for part in (tar[:cut], tar[: len(tar) - 1 - cut]):
        with pytest.raises(FormatError, match="here"):
            verify.read_spans(part, "here")
