import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from shards import pack, tokens, verify
from shards.format import FormatError, Receipt, parse_index

Check = Callable[..., list[str]]

NUM_TOKENS = 26
"""Of every program that `make_pairs` writes, with <bos> and <eos>."""


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
    ("name", "changed_after"),
    [
        ("train/000002.tar", b""),
        ("train/000002.idx", b"json"),
        ("train/000002.json", b'"crc32":['),
        ("train/000002.json", b'"num_tokens":['),
        ("train/000002.json", b'"plan_hash":"'),
        ("tokenizer.json", b"btn-red"),
        ("plan.json", b'"seed"'),
    ],
)
def test_a_missing_or_changed_file_is_named(
    dataset: Path, check: Check, name: str, changed_after: bytes
) -> None:
    whole = (dataset / name).read_bytes()
    (dataset / name).unlink()
    assert any(name in line for line in check())
    (dataset / name).write_bytes(whole[: len(whole) // 2])
    assert any(name in line for line in check())
    start = whole.index(changed_after) + len(changed_after)
    digit = next(at for at in range(start, len(whole)) if whole[at : at + 1].isdigit())
    other = b"1" if whole[digit : digit + 1] != b"1" else b"2"
    (dataset / name).write_bytes(whole[:digit] + other + whole[digit + 1 :])
    assert any(name in line for line in check())
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


@pytest.mark.parametrize(
    ("key", "value"),
    [("splits", {}), ("image", None), ("kind", "images"), ("skips", {"corrupt": 1}),
     ("plan_hash", "0" * 64), ("data_digest", "0" * 64), ("manifest_sha256", "0" * 64)],
)  # fmt: skip
def test_an_edited_manifest_is_an_error(
    dataset: Path, key: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = dataset / "manifest.json"
    body = json.loads(path.read_text())
    if key == "image":
        value = {**body["image"], "quality": 89}
    path.write_text(json.dumps({**body, key: value}))
    assert verify.main([str(dataset), "--workers", "0"]) == 2
    assert "it was edited" in capsys.readouterr().err
    del body["manifest_sha256"]
    path.write_text(json.dumps(body))
    assert verify.main([str(dataset), "--workers", "0"]) == 2


def test_the_sums_of_a_manifest_are_held_against_what_they_sum_up(
    dataset: Path, check: Check
) -> None:
    path = dataset / "manifest.json"
    manifest = verify.storage.load_manifest(str(dataset))
    assert manifest.tokenizer is not None
    for changed, named in [
        ({"tokenizer": replace(manifest.tokenizer, vocab_size=99)}, "has 99 tokens"),
        ({"tokenizer": replace(manifest.tokenizer, longest=99)}, "longest sample has 99 tokens"),
        ({"skips": {"corrupt": 1}}, "its skips"),
    ]:
        path.write_text(replace(manifest, **changed).to_json())
        [problem] = check()
        assert problem.startswith("manifest.json: ")
        assert named in problem


@pytest.mark.parametrize("counts", [[], [9] * 3, [9] * 5])
def test_token_counts_of_another_number_of_samples_are_found(
    dataset: Path, check: Check, counts: list[int]
) -> None:
    path = dataset / "train/000002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_tokens": counts}))
    for options in ((), ("--deep",)):
        assert any("train/000002.json: token counts of" in line for line in check(*options))


def test_token_counts_of_images_alone_are_found(dataset: Path) -> None:
    entry = verify.storage.load_manifest(str(dataset)).splits["test"][0]
    plan_hash = json.loads((dataset / "plan.json").read_text())["plan_hash"]
    assert verify.check_shard(verify.ShardCheck(str(dataset), entry, plan_hash, True)) == []
    [problem] = verify.check_shard(verify.ShardCheck(str(dataset), entry, plan_hash, False))
    assert "token counts of 4 samples, not of 0" in problem


@pytest.mark.parametrize(
    "change",
    [
        {"skips": "ab"}, {"skips": ["ab"]}, {"skips": {"corrupt": "x"}}, {"skips": None},
        {"crc32": "abcd"}, {"crc32": 5}, {"num_tokens": ["9"] * 4}, {"num_tokens": [-1] * 4},
        {"shard": {}}, {"shard": "x"}, {"shard": {"name": "x", "samples": "4", "bytes": 0,
        "sha256": ""}}, {"version": 9},
    ],
)  # fmt: skip
def test_a_receipt_of_other_types_is_a_format_error(
    dataset: Path, check: Check, change: dict[str, object]
) -> None:
    path = dataset / "train/000002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FormatError, match="here"):
        Receipt.from_json(path.read_text(), "here")
    assert any("train/000002.json" in line for line in check())


def test_a_directory_without_a_manifest_is_an_error(tmp_path: Path) -> None:
    assert verify.main([str(tmp_path), "--workers", "0"]) == 2


@pytest.mark.parametrize(
    ("extension", "data", "problem", "is_shallow"),
    [
        ("png", b"junk", "does not decode", False),
        ("png", None, "is 8x8, not 40x24", False),
        ("txt", b"\xff", "not UTF-8", False),
        ("txt", b"another program", "not those of the code", False),
        ("tokens.npy", tokens.to_npy([7] * NUM_TOKENS, 9), "with <bos> and <eos>", False),
        ("tokens.npy", b"junk", "not an .npy file", True),
        ("tokens.npy", tokens.to_npy([1, 2], 9), "2 tokens, test/000000.json says 26", True),
        ("json", b"{", "Expecting", False),
    ],
)
def test_deep_finds_samples_that_were_packed_wrong(
    dataset: Path, extension: str, data: bytes | None, problem: str, is_shallow: bool
) -> None:
    """A writer with a bug makes hashes that match: often only decoding finds what it wrote."""
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
    shallow = verify.check_dataset(str(dataset), deep=False, workers=0)[1]
    assert len(shallow) == (1 if is_shallow else 0)
    [found] = verify.check_dataset(str(dataset), deep=True, workers=0)[1]
    assert found.startswith(f"test/000000.tar: {spans[1].key}: ")
    assert problem in found


@pytest.mark.parametrize("cut", [0, 100, 511, 512, 5000])
def test_a_cut_tar_is_a_format_error(dataset: Path, cut: int) -> None:
    tar = (dataset / "test/000000.tar").read_bytes()
    for part in (tar[:cut], tar[: len(tar) - 1 - cut]):
        with pytest.raises(FormatError, match="here"):
            verify.read_spans(part, "here")


def test_a_negative_size_in_a_header_is_a_format_error() -> None:
    info = tarfile.TarInfo("key.png")
    info.size = -512
    with pytest.raises(FormatError, match=r"here: key\.png has a negative size"):
        verify.read_spans(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "here")
