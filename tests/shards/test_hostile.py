"""Hostile input: each row states what becomes of it.

That is: packed as it should be, skipped and counted under a cause, or refused in one line that
names the file. Never a traceback, a wait without end, memory beyond a bound, or a write outside
OUT.

Rows that stand elsewhere:

- images: 16 bits, CMYK, transparent palettes, EXIF 1 to 8, first frames, sides that an encoder has
  no room for: `test_images`; what the fast decoders leave to Pillow, and damage: `test_codecs`
- files: links and pipes in a folder, half pairs, names that differ in case: `test_sources`; bad
  text, a bomb, poison, want of memory: `test_pack`
- tables: rows that cannot be used, hostile paths, damaged tables: `test_layouts`
- tars: members absolute, linked, sparse, doubled, not adjacent; cuts, damage, names: `test_index`
  for adopting, `test_layouts` for packing
- datasets: damage of every file: `test_verify`; names that lead out, protocols: `test_storage`;
  arrays of tokens that are none: `test_tokens`; credentials in errors: `test_errors`
- any bytes at all: `tests/faults/fuzz.py`
"""

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import socket
import struct
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import (
    MB,
    SIZE,
    TAR_END,
    bmp_claiming,
    encoded,
    exif_bomb,
    exif_of,
    gif_claiming,
    gif_with,
    jpeg_claiming,
    jpeg_of_scans,
    jpeg_segment,
    jpeg_with,
    noise,
    pax_header,
    pax_record,
    png,
    png_chunk,
    png_of,
    red,
    rehashed,
    resigned,
    sealed,
    tar_header,
    tar_member,
    tiff,
    tiff_chain,
    tiff_of_strips,
    tiff_tags,
    valid_images,
    webp_claiming,
    with_adobe,
)
from PIL import Image

from pipeline.stream import SampleReader, Shard
from shards import images, index, layouts, pack, show, storage, tarfiles, verify
from shards.format import FormatError, Manifest, parse_index
from shards.images import ImageRefused

# Whatever waits for ever is ended long before the suite's own limit.
pytestmark = pytest.mark.timeout(120)

HashTree = Callable[[Path], dict[str, str]]
MakePairs = Callable[..., Path]
Capture = pytest.CaptureFixture[str]

SIDE = 31_623
"""Of 1e9 pixels."""


def run(*words: object) -> int:
    return pack.main([*map(str, words), "--workers", "0"])


def one_line(capsys: Capture) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "error: " in error
    return error


def sources_of(out: Path) -> set[str]:
    """The names of the files that were packed."""
    found = set()
    for entries in storage.load_manifest(str(out)).splits.values():
        for entry in entries:
            with tarfile.open(out / entry.name) as tar:
                for member in tar.getmembers():
                    if member.name.endswith(".json"):
                        file = tar.extractfile(member)
                        assert file is not None
                        found.add(json.load(file)["source"])
    return found


# --- Images ---------------------------------------------------------------------------------------

PLAIN = images.make_policy(
    size=None, fit=None, encode=None, channels=3, quality=90, background=(255, 255, 255)
)


def zipped(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


IMAGES: dict[str, tuple[Callable[[], bytes], str]] = {
    # The header says 1e9 pixels, or as many as the format can.
    "png of 1e9 pixels": (lambda: png((SIDE, SIDE), bytes(99)), "too_large"),
    "jpeg of 1e9 pixels": (lambda: jpeg_claiming((65_535, 15_260)), "too_large"),
    "gif of 1e9 pixels": (lambda: gif_claiming((SIDE, SIDE)), "too_large"),
    "bmp of 1e9 pixels": (lambda: bmp_claiming((SIDE, SIDE)), "too_large"),
    "bmp of -2**31 rows": (lambda: bmp_claiming((8, -(2**31))), "too_large"),
    "tiff of 1e9 pixels": (lambda: tiff(tiff_tags((SIDE, SIDE)), bytes(64)), "too_large"),
    "webp of 16383 x 16383": (lambda: webp_claiming((16_383, 16_383)), "too_large"),
    "gif frame beyond its canvas": (
        lambda: gif_with(b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\2\2\x4c\1\0"),
        "too_large",
    ),
    "png, 86 kB of 88 megapixels": (
        lambda: png((9400, 9362), bytes(9362 * 9401), colour=0), "too_large",
    ),
    "png without pixels": (lambda: png((0, 5), b""), "corrupt"),
    # Metadata that unpacks to more than the image, or is made of too many parts.
    "png zTXt of 100 MB": (
        lambda: png_of(red(), png_chunk(b"zTXt", b"a\0\0" + zipped(100 * MB))), "corrupt",
    ),
    "png iTXt of 100 MB": (
        lambda: png_of(red(), png_chunk(b"iTXt", b"a\0\1\0\0\0" + zipped(100 * MB))), "corrupt",
    ),
    "png iCCP of 100 MB": (
        lambda: png_of(red(), png_chunk(b"iCCP", b"a\0\0" + zipped(100 * MB))), "corrupt",
    ),
    "png zTXt of 100 MB behind the pixels": (
        lambda: png_of(red(), b"", png_chunk(b"zTXt", b"a\0\0" + zipped(100 * MB))), "corrupt",
    ),
    "png zTXt of 1 MB, 99 times": (
        lambda: png_of(red(), png_chunk(b"zTXt", b"a\0\0" + zipped(MB - 9)) * 99), "corrupt",
    ),
    "png of 400,000 chunks": (
        lambda: png_of(red(), png_chunk(b"abCd", b"") * 400_000), "too_large",
    ),
    "png chunk of 17 MB": (lambda: png_of(red(), png_chunk(b"abCd", bytes(17 * MB))), "too_large"),
    "png exif whose tags overlap": (
        lambda: png_of(red(), png_chunk(b"eXIf", exif_bomb(MB))), "packed",
    ),
    "webp exif whose tags overlap": (
        lambda: encoded(red(), "WEBP", exif=b"Exif\0\0" + exif_bomb(MB)), "packed",
    ),
    "webp exif of 17 MB": (
        lambda: encoded(red(), "WEBP", exif=b"Exif\0\0" + bytes(17 * MB)), "too_large",
    ),
    "jpeg of 300,000 segments": (
        lambda: jpeg_with(jpeg_segment(0xE5, b"") * 300_000), "too_large",
    ),
    "jpeg of 2 MB of fill bytes": (lambda: jpeg_with(b"\xff" * 2 * MB), "too_large"),
    "jpeg exif of 17 MB": (
        lambda: jpeg_with(jpeg_segment(0xE1, b"Exif\0\0" + bytes(65_000)) * 275), "too_large",
    ),
    "jpeg of 600 scans": (lambda: jpeg_of_scans(600), "too_large"),
    "jpeg of 100 scans": (lambda: jpeg_of_scans(90), "packed"),
    "gif of 600,000 comment blocks": (
        lambda: gif_with(b"!\xfe" + b"\1x" * 600_000 + b"\0"), "too_large",
    ),
    "tiff of 1,100,000 strips": (lambda: tiff_of_strips(1_100_000), "too_large"),
    "tiff page that is its own next": (
        lambda: tiff(tiff_tags(), bytes(64), following=8), "packed",
    ),
    "tiff of 100,000 pages in a circle": (lambda: tiff_chain(100_000), "packed"),
    "tiff of 65,535 channels": (
        lambda: tiff(tiff_tags((8, 8), (277, 3, 1, 65_535)), bytes(64)), "corrupt",
    ),
    "tiff whose pixels lie outside": (
        lambda: tiff(tiff_tags(offsets=(273, 4, 1, 2**31)), bytes(64)), "truncated",
    ),
    "tiff tile of 60000 x 60000": (
        lambda: tiff(
            [tag for tag in tiff_tags((8, 8), (259, 3, 1, 8)) if tag[0] not in (273, 279)]
            + [(322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 256), (325, 4, 1, 64)],
            zipped(5000).ljust(64),
        ),
        "corrupt",
    ),
    # Damage.
    "zero bytes": (lambda: b"", "empty"),
    "gif whose codes are none": (
        lambda: gif_with(b",\0\0\0\0\x18\0\x10\0\0\x02\x10" + bytes(range(200, 216)) + b"\0"),
        "corrupt",
    ),
    "gif of 255-bit codes": (
        lambda: gif_with(b",\0\0\0\0\x18\0\x10\0\0\xff\x02\x4c\1\0"), "corrupt",
    ),
    # No image, or none that is taken, whatever its suffix says.
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_format"),
    "pdf": (lambda: b"%PDF-1.7\n1 0 obj\n", "unsupported_format"),
    "psd": (lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 8, 8, 3) + bytes(99),
            "unsupported_format"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
    "html": (lambda: b"<!doctype html><title>404</title>", "unsupported_format"),
    "avif": (lambda: encoded(red(), "AVIF"), "unsupported_format"),
    "jpeg 2000": (lambda: encoded(red(), "JPEG2000"), "unsupported_format"),
    "ico": (lambda: encoded(red(), "ICO"), "unsupported_format"),
    "pickle": (lambda: pickle.dumps(list(range(99))), "unsupported_format"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_the_gate_states_what_becomes_of_an_image(name: str) -> None:
    make, outcome = IMAGES[name]
    data = make()
    if outcome == "packed":
        width, height = images.read_size(data)
        packed = images.fit_and_encode(data, PLAIN)
        assert (packed.width, packed.height) == (width, height)
        assert images.decode(packed.data, 3).shape == (height, width, 3)
        return
    with pytest.raises(ImageRefused) as refused:
        images.fit_and_encode(data, PLAIN)
    assert refused.value.cause == outcome
    # As training meets it in an adopted shard: the fast decoders keep nothing of many segments.
    with contextlib.suppress(ImageRefused):
        assert images.decode(data, 3).shape == (SIZE[1], SIZE[0], 3)
        assert name.startswith("jpeg of ")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_folder_of_hostile_images_is_packed_within_a_bound_of_memory(tmp_path: Path) -> None:
    """As above, by the command: what takes more memory or time would be counted as poison."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    causes: dict[str, int] = {}
    packed = {"good 0.png", "good 1.png"}
    for number in range(2):
        (raw / f"good {number}.png").write_bytes(encoded(noise(seed=number)))
    for number, (make, outcome) in enumerate(IMAGES.values()):
        name = f"{number}.jpg"  # Most of them are none.
        (raw / name).write_bytes(make())
        if outcome == "packed":
            packed.add(name)
        else:
            causes[outcome] = causes.get(outcome, 0) + 1
    words = [str(raw), str(out), "--kind", "images", "--split", "train=1", "--workers", "1"]
    assert pack.main([*words, "--worker-memory", "300", "--task-timeout", "60"]) == 0
    assert storage.load_manifest(str(out)).skips == causes
    assert sources_of(out) == packed
    assert verify.main([str(out), "--deep", "--workers", "0"]) == 0


def pixels(data: bytes, channels: int = 3) -> np.ndarray:
    policy = images.make_policy(
        size=None, fit=None, encode="png", channels=channels, quality=90, background=(9, 8, 7)
    )
    return images.decode(images.fit_and_encode(data, policy).data, channels)


def test_deep_colours_are_scaled_to_8_bits() -> None:
    """Of 16-bit colours the upper 8 bits are taken; 16-bit greys are rounded, see `test_images`."""
    values = (0, 255, 257, 40_000, 65_279, 65_535)
    rows = b"\0" + b"".join(struct.pack(">3H", *[value] * 3) for value in values)
    assert pixels(png((6, 1), rows, depth=16))[0, :, 1].tolist() == [0, 0, 1, 156, 254, 255]
    clear = b"\0" + b"".join(struct.pack(">4H", value, 0, 0, 65_535) for value in values)
    assert pixels(png((6, 1), clear, depth=16, colour=6))[0, :, 0].tolist()[3] == 156
    grey = b"\0" + struct.pack(">4H", 40_000, 65_535, 40_000, 0)
    assert pixels(png((2, 1), grey, depth=16, colour=4)).tolist() == [[[156] * 3, [9, 8, 7]]]


def test_one_bit_grey_and_grey_with_alpha() -> None:
    dots = Image.new("1", (2, 1))
    dots.putpixel((1, 0), 1)
    assert pixels(encoded(dots)).tolist() == [[[0] * 3, [255] * 3]]
    assert pixels(encoded(dots, "TIFF", compression="group4"), 1).tolist() == [[[0], [255]]]
    grey = Image.new("LA", (2, 1), (100, 255))
    grey.putpixel((1, 0), (100, 0))
    assert pixels(encoded(grey)).tolist() == [[[100] * 3, [9, 8, 7]]]
    assert pixels(encoded(grey), 4)[0, :, 3].tolist() == [255, 0]
    assert pixels(encoded(grey), 1)[0, 0].tolist() == [100]


def test_inks_become_colours() -> None:
    """Inks of a JPEG are inverted, as Adobe's are: also where nothing says who wrote it."""
    inks = Image.new("CMYK", SIZE, (0, 200, 200, 20))
    plain = encoded(inks, "JPEG", quality=95)
    expected = pixels(encoded(inks, "TIFF"))[0, 0].astype(int)
    assert np.abs(pixels(plain)[4, 4] - expected).max() <= 3
    assert np.abs(pixels(with_adobe(plain, None))[4, 4] - expected).max() <= 3
    # Read as luma and chroma, (Y, 128, 128, K) is a grey.
    grey = encoded(Image.new("CMYK", SIZE, (60, 127, 127, 0)), "JPEG", quality=95)
    assert np.ptp(pixels(with_adobe(grey, 2))[4, 4].astype(int)) <= 3


def test_a_colour_profile_changes_nothing_and_stays_with_kept_bytes_alone() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    for kind, options in (("PNG", {}), ("JPEG", {"quality": 95}), ("WEBP", {"lossless": True})):
        plain, noted = (
            encoded(red(), kind, **options, **more) for more in ({}, {"icc_profile": profile})
        )
        assert (pixels(plain) == pixels(noted)).all()
        assert images.fit_and_encode(noted, PLAIN).data == noted
        with Image.open(io.BytesIO(images.fit_and_encode(noted, PLAIN).data)) as kept:
            assert kept.info["icc_profile"] == profile
    turned = encoded(red(), "JPEG", icc_profile=profile, exif=exif_of(6))
    with Image.open(io.BytesIO(images.fit_and_encode(turned, PLAIN).data)) as made:
        assert "icc_profile" not in made.info


@pytest.mark.parametrize(
    ("kind", "count", "value"),
    [
        (3, 1, b"\0\0\0\0"), (3, 1, b"\0\x09\0\0"), (3, 1, b"\xff\xff\0\0"),
        (3, 0, b"\0\6\0\0"), (3, 2**32 - 1, b"\0\0\0\x08"), (2, 4, b"six\0"), (1, 1, b"\6\0\0\0"),
        (5, 1, b"\0\0\0\x08"), (11, 1, b"\x7f\xc0\0\0"), (99, 1, b"\0\6\0\0"),
    ],
)  # fmt: skip
def test_an_orientation_that_is_none_is_upright(kind: int, count: int, value: bytes) -> None:
    tag = struct.pack(">HHHI", 1, 0x0112, kind, count) + value
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + tag + bytes(4)
    for name in ("JPEG", "PNG", "WEBP"):
        data = encoded(red(), name, exif=exif)
        assert images.read_size(data) == SIZE
        assert images.fit_and_encode(data, PLAIN).width == SIZE[0]


@pytest.mark.parametrize("name", valid_images())
def test_of_an_image_that_is_cut_anywhere_all_pixels_are_packed_or_none(name: str) -> None:
    data = valid_images()[name]
    whole = pixels(data)
    found_causes: set[str] = set()
    num_refused = 0
    for at in {*range(0, len(data), max(1, len(data) // 40)), *range(len(data) - 16, len(data))}:
        try:
            found = pixels(data[:at])
        except ImageRefused as refused:
            found_causes.add(refused.cause)
            num_refused += 1
        else:
            assert (found == whole).all(), f"cut at {at} of {len(data)}"
    assert found_causes <= {"empty", "unsupported_format", "truncated", "corrupt"}
    assert num_refused >= 18


# --- Files ----------------------------------------------------------------------------------------


def test_special_files_are_skipped_or_ignored_and_never_waited_for(
    make_pairs: MakePairs, tmp_path: Path, hash_tree: HashTree
) -> None:
    raw, out = make_pairs(8), tmp_path / "out"
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(encoded(noise(seed=77)))
    (outside / "secret.gui").write_text("secret")
    for name, target in (
        ("loop.png", "loop.png"),
        ("loop", "."),
        ("up", ".."),
        ("dangling.png", "nothing"),
        ("out.png", outside / "secret.png"),
        ("out.gui", outside / "secret.gui"),
        ("folder", outside),
    ):
        (raw / name).symlink_to(target)
    os.mkfifo(raw / "pipe.png")
    os.mkfifo(raw / "pipe.gui")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        here = Path.cwd()
        os.chdir(raw)  # The names of sockets have room for 100 bytes.
        try:
            server.bind("socket.png")
        finally:
            os.chdir(here)
        num_devices = 0
        with contextlib.suppress(PermissionError):
            os.mknod(raw / "zero.png", 0o600 | 0o020000, os.makedev(1, 5))
            num_devices = 1
        before = hash_tree(outside)
        assert run(raw, out, "--split", "train=1") == 0
    assert storage.load_manifest(str(out)).skips == {"not_a_file": 10 + num_devices}
    assert len(sources_of(out)) == 8
    assert hash_tree(outside) == before


def test_a_file_that_may_not_be_read_is_counted(make_pairs: MakePairs, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read every file")
    raw, out = make_pairs(8), tmp_path / "out"
    (raw / "a" / "0001.png").chmod(0)
    (raw / "a" / "0003.gui").chmod(0)
    assert run(raw, out, "--split", "train=1") == 0
    assert storage.load_manifest(str(out)).skips == {"unreadable": 2}


ODD_NAMES = [
    "new\nline", "carriage\rreturn", "tab\t", " ", "-rf", "--json", "a.b.c", "quote'\"",
    "back\\slash", "per%00cent", "question?", "hash#", "colon:", "\u202eright to left", "caf\u00e9",
    "\x1b[31mred", "\x7f\x01", os.fsdecode(b"\xff\xfe"), "x" * 240, "CON", "pipe:cat", "$(touch x)",
]  # fmt: skip


def test_odd_names_are_packed_and_shown_on_one_line(
    make_pairs: MakePairs, tmp_path: Path, capsys: Capture
) -> None:
    raw, out = make_pairs(4), tmp_path / "out"
    for number, name in enumerate(ODD_NAMES):
        (raw / f"{name}.png").write_bytes(encoded(noise(seed=100 + number)))
        (raw / f"{name}.gui").write_text(f"odd {number}")
        (raw / f"bad {name[:200]}.png").touch()
        (raw / f"bad {name[:200]}.gui").write_text("x")
    assert run(raw, out, "--split", "train=1") == 0
    assert storage.load_manifest(str(out)).skips == {"empty": len(ODD_NAMES)}
    assert {f"{name}.png" for name in ODD_NAMES} <= sources_of(out)
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert shown[:-1].isprintable()
    assert verify.main([str(out), "--deep", "--workers", "0"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "manifest.json", "plan.json", "tokenizer.json", "train",
    ]  # fmt: skip
    # An error that names such a file is one line, too.
    listing, options, _ = pack._prepare(*_arguments(raw, tmp_path / "other"))
    made = pack.draft(str(raw), listing, options, None, 0)
    (raw / "new\nline.png").write_bytes(encoded(noise(seed=5)))

    def pack_again() -> int:
        pack.pack(str(raw), str(tmp_path / "other"), made, 0)
        return 0

    capsys.readouterr()
    assert storage.command("pack", pack_again) == 2
    assert r"new\nline.png: changed" in one_line(capsys)


def _arguments(raw: Path, out: Path) -> tuple[Any, Any]:
    words = [str(raw), str(out), "--split", "train=1", "--workers", "0"]
    args = pack._parser().parse_args(words)
    return args, pack.engines.chosen(args)


PROGRAMS: dict[str, tuple[bytes | int, str]] = {
    "empty": (b"", "code_empty"),
    "white space": (b" \r\n\t\x0b\x0c", "code_empty"),
    "a mark alone": (b"\xef\xbb\xbf", "code_empty"),
    "latin": (b"caf\xe9", "code_not_utf8"),
    "utf-16": ("header".encode("utf-16"), "code_not_utf8"),
    "surrogate": (b"\xed\xa0\x80", "code_not_utf8"),
    "overlong": (b"\xc0\xaf", "code_not_utf8"),
    "sparse": (2**30, "code_too_large"),
    "one byte more": (4 * MB + 1, "code_too_large"),
    "nul": (b"a\0b", "packed"),
    "a word of 1 MB": (b"x" * MB, "packed"),
    "controls": (bytes(range(1, 128)), "packed"),
    "spells <eos>": (b"<eos> <pad>", "packed"),
    "old line ends": (b"a\r\rb", "packed"),
}


def test_programs_are_packed_or_counted(make_pairs: MakePairs, tmp_path: Path) -> None:
    raw, out = make_pairs(4), tmp_path / "out"
    causes: dict[str, int] = {}
    kept = {}
    for number, (name, (text, outcome)) in enumerate(PROGRAMS.items()):
        (raw / f"{name}.png").write_bytes(encoded(noise(seed=100 + number)))
        path = raw / f"{name}.gui"
        path.write_bytes(text if isinstance(text, bytes) else b"")
        if isinstance(text, int):
            os.truncate(path, text)
        elif outcome == "packed":
            kept[f"{name}.png"] = text
        if outcome != "packed":
            causes[outcome] = causes.get(outcome, 0) + 1
    words = [str(raw), str(out), "--split", "train=1", "--workers", "1"]
    assert pack.main([*words, "--worker-memory", "600"]) == 0
    manifest = storage.load_manifest(str(out))
    assert manifest.skips == causes
    [entry] = manifest.splits["train"]
    found = {}
    with tarfile.open(out / entry.name) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    for name, data in members.items():
        if name.endswith(".json"):
            found[json.loads(data)["source"]] = members[name[:-5] + ".txt"]
    assert {name: found[name] for name in kept} == kept


# --- Tables ---------------------------------------------------------------------------------------


def test_what_is_no_path_inside_the_folder_is_not_fetched(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "good.png").write_bytes(encoded(noise()))
    (tmp_path / "secret.png").write_bytes(encoded(noise(seed=1)))
    secret = tmp_path / "secret.png"
    missing = [
        "http://169.254.169.254/latest", "https://u:secret@example.org/a.png", "s3://bucket/a.png",
        "file:good.png", "pipe:cat good.png", "data:image/png;base64,AAAA", "good.png\n", "~/a.png",
        "C:\\a.png", "$HOME/a.png", "*.png",
    ]  # fmt: skip
    unsafe = [str(secret), "../secret.png", "a/../../secret.png", "/etc/passwd", "good.png\0x"]
    # As a path it is `file:` and what follows.
    missing.append(f"file://{secret}")
    table = folder / "t.jsonl"
    rows = [{"image": path} for path in ["good.png", *missing, *unsafe]]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    assert run(table, out, "--split", "train=1") == 0
    assert storage.load_manifest(str(out)).skips == {
        "missing_file": len(missing), "unsafe_name": len(unsafe),
    }  # fmt: skip
    assert sources_of(out) == {"good.png"}


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet", "t.tar"])
@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "folder"])
def test_a_source_that_is_no_file_is_one_line(
    name: str, kind: str, tmp_path: Path, capsys: Capture
) -> None:
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else name)
    assert run(path, tmp_path / "out", "--split", "train=1") == 2
    said = one_line(capsys)
    assert name in said
    expected = {"loop": "symbolic links", "folder": ""}.get(kind, "not a regular file")
    assert expected in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "line", "said"),
    [
        ("t.jsonl", (b'{"image": "', 100 * MB, b'"}\n'), "line or record at byte 22"),
        ("t.csv", (b"", 100 * MB, b"\n"), "line or record at byte 17"),
    ],
)
def test_a_line_of_100_mb_is_one_line(
    name: str, line: tuple[bytes, int, bytes], said: str, tmp_path: Path, capsys: Capture
) -> None:
    start = b'{"image": "good.png"}\n' if name == "t.jsonl" else b"image,x\ngood,png\n"
    with (tmp_path / name).open("wb") as file:
        file.write(start + line[0])
        file.seek(line[1], io.SEEK_CUR)
        file.write(line[2])
    assert run(tmp_path / name, tmp_path / "out", "--split", "train=1") == 2
    assert said in one_line(capsys)


def test_a_record_of_many_lines_has_a_limit(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each field and each line is short enough, and they never end."""
    monkeypatch.setattr(layouts.tables, "MAX_LINE_BYTES", 5 * MB)
    (tmp_path / "t.csv").write_bytes(b"image\n" + b'"x\n",' * (2 * MB))
    assert run(tmp_path / "t.csv", tmp_path / "out", "--split", "train=1") == 2
    assert "t.csv: the line or record at byte 6 has more than" in one_line(capsys)


# --- Tars -----------------------------------------------------------------------------------------

PNG = encoded(noise())
GOOD = tar_member(b"good.png", PNG) + tar_member(b"good.txt", b"x y")


def pair(name: bytes, kind: bytes = b"0", link: bytes = b"") -> bytes:
    data = PNG if kind == b"0" else b""
    return tar_member(name + b".png", data, kind, link) + tar_member(name + b".txt", b"x y")


class Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch executed",)


LONG = b"n" * 5000
# What both commands say: causes, or a part of the one line about the whole shard.
TARS: dict[str, tuple[Callable[[], bytes], dict[str, int] | str]] = {
    "absolute": (lambda: GOOD + pair(b"/etc/passwd"), {"unsafe_name": 2}),
    "outside": (lambda: GOOD + pair(b"../../a") + pair(b"b/../../c"), {"unsafe_name": 4}),
    "symbolic link": (
        lambda: GOOD + pair(b"a", b"2", b"/etc/passwd"), {"link": 1, "no_image": 1},
    ),
    "hard link": (lambda: GOOD + pair(b"a", b"1", b"good.png"), {"link": 1, "no_image": 1}),
    "link to the outside, and a member below it": (
        lambda: GOOD + tar_member(b"a", b"", b"2", b"/tmp") + pair(b"a/b"), {"link": 1},
    ),
    "character device": (lambda: GOOD + pair(b"a", b"3"), {"not_a_file": 1, "no_image": 1}),
    "block device": (lambda: GOOD + pair(b"a", b"4"), {"not_a_file": 1, "no_image": 1}),
    "pipe": (lambda: GOOD + pair(b"a", b"6"), {"not_a_file": 1, "no_image": 1}),
    "folders": (lambda: tar_member(b"d/", b"", b"5") + GOOD, {}),
    "sparse of GNU": (
        lambda: GOOD + sealed(tar_header(b"a.png", 512, b"S")[:483] + b"%011o\0" % 2**32
                              + bytes(17)) + bytes(512) + tar_member(b"a.txt", b"x y"),
        {"sparse": 1, "no_image": 1},
    ),
    "sparse of pax": (
        lambda: GOOD + pax_header((b"GNU.sparse.major", b"1"), (b"GNU.sparse.name", b"a.png"),
                                  (b"GNU.sparse.realsize", b"99999999999")) + pair(b"a"),
        {"sparse": 1, "no_image": 1},
    ),
    "names": (
        lambda: GOOD + b"".join(map(pair, [b"new\nline", b"two words", b"\xff\xfe", b"-rf",
                                           b"\x1b[31m", b"tab\t", b"100%", b"\xe2\x80\xa8"])),
        {},
    ),
    "long names": (lambda: GOOD + pair(b"n" * 4000), {}),
    "names that are too long": (lambda: GOOD + pair(LONG), {"unsafe_name": 2}),
    "names that are too long for pax": (
        lambda: GOOD + pax_header((b"path", LONG + b".png")) + tar_member(b"x", PNG),
        {"unsafe_name": 1},
    ),
    "a chain of long names": (
        lambda: GOOD + tar_member(b"x", b"a" * 99 + b"\0", b"L") * 1000
        + tar_member(b"x", b"b.png\0", b"L") + tar_member(b"y", PNG) + tar_member(b"b.txt", b"x y"),
        {},
    ),
    "not adjacent": (
        lambda: tar_member(b"a.png", PNG) + GOOD + tar_member(b"a.txt", b"x y"),
        {"not_adjacent": 2},
    ),
    "doubled": (lambda: GOOD + pair(b"a") + pair(b"b") + pair(b"a"), {"duplicate_key": 1}),
    "doubled member": (
        lambda: GOOD + tar_member(b"a.png", PNG) + pair(b"a"), {"duplicate_member": 1},
    ),
    "pickles": (
        lambda: GOOD + b"".join(
            tar_member(b"good." + one, pickle.dumps(Executes()))
            for one in (b"pyd", b"pickle", b"pth", b"pt", b"npy", b"cls")
        ),
        {},
    ),
    "an archive in a member": (lambda: GOOD + tar_member(b"good.tar", GOOD + TAR_END), {}),
    # The whole shard is refused: what follows cannot be trusted, or would go unseen.
    "cut at a member": (lambda: GOOD + pair(b"a")[:-1024] + b"", "cut off at byte"),
    "cut inside": (lambda: (GOOD + pair(b"a"))[:-600], "cut off at byte"),
    "a size beyond the end": (lambda: GOOD + tar_header(b"a.png", 8**11 - 1), "cut off at byte"),
    "a size of 2**86": (
        lambda: GOOD + tar_header(b"a.png", b"\x80\x7f" + b"\xff" * 10), "cut off at byte",
    ),
    "a size below 0": (
        lambda: GOOD + tar_header(b"a.png", b"\xff" * 11 + b"\xfe"), "damaged tar header at byte",
    ),
    "a size that is none": (
        lambda: GOOD + tar_header(b"a.png", b"0x12\0      \0"), "damaged tar header at byte",
    ),
    "a size in pax beyond the end": (
        lambda: GOOD + pax_header((b"size", b"9" * 18)) + pair(b"a"), "cut off at byte",
    ),
    "a size in pax below 0": (
        lambda: GOOD + pax_header((b"size", b"-512")) + pair(b"a"), "damaged pax header",
    ),
    "a size in pax of all members": (
        lambda: pax_header((b"size", b"0"), kind=b"g") + GOOD, "one name or size for all",
    ),
    "a pax header of 300 MB": (
        lambda: GOOD + tar_header(b"x", 300 * MB, b"x"), "a header of 314572800 bytes",
    ),
    "a long name of 300 MB": (
        lambda: GOOD + tar_header(b"x", 300 * MB, b"L"), "a header of 314572800 bytes",
    ),
    "a pax record that overlaps": (
        lambda: GOOD + tar_member(b"x", b"999999999 path=a\n", b"x") + pair(b"a"),
        "damaged pax header",
    ),
    "a pax record without a length": (
        lambda: GOOD + tar_member(b"x", b"path=a\n", b"x") + pair(b"a"), "damaged pax header",
    ),
    "a pax header for nobody": (lambda: GOOD + pax_header((b"path", b"a")), "no member follows"),
    "checksum": (lambda: GOOD + b"Z" + pair(b"a")[1:], "damaged tar header at byte"),
    "garbage behind the end": (lambda: GOOD + TAR_END + b"garbage", "goes on behind its end"),
    "a second archive": (lambda: GOOD + TAR_END + pair(b"a"), "goes on behind its end"),
    "gzip": (lambda: gzip.compress(GOOD + TAR_END), "damaged tar header at byte 0"),
    "zip": (lambda: b"PK\3\4" + bytes(600), "damaged tar header at byte 0"),
    "text": (lambda: b"404 not found\n" * 99, "damaged tar header at byte 0"),
    "zero bytes": (lambda: b"", "cut off at byte 0"),
}  # fmt: skip
UNENDED = ("cut", "garbage", "a second", "gzip", "zip", "text", "zero", "a size beyond",
           "a pax header of", "a long name of")  # fmt: skip


@pytest.mark.parametrize("command", ["index", "pack"])
@pytest.mark.parametrize("name", TARS)
def test_a_tar_is_used_counted_or_refused(
    name: str,
    command: str,
    tmp_path: Path,
    capsys: Capture,
    hash_tree: HashTree,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, outcome = TARS[name]
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    (folder / "0.tar").write_bytes(GOOD + TAR_END)
    (folder / "1.tar").write_bytes(make() + (b"" if name.startswith(UNENDED) else TAR_END))
    monkeypatch.chdir(tmp_path)
    before = hash_tree(tmp_path)
    words = [str(folder), "--workers", "0"]
    if command == "pack":
        words += [str(out), "--kind", "webdataset", "--split", "train=1"]
    status = {"index": index.main, "pack": pack.main}[command](words)
    error = capsys.readouterr().err
    after = hash_tree(tmp_path)
    ours = {one for one in after if one.startswith(("out/", "data/")) and one not in before}
    assert {one: after[one] for one in before} == before
    assert set(after) - set(before) == ours, "something was written elsewhere"
    if isinstance(outcome, str):
        assert status == (1 if command == "index" else 2)
        assert outcome in error
        assert "1.tar" in error
        assert error.count("\n") == (2 if command == "index" else 1)
        assert not (folder / "manifest.json").exists()
        assert not out.exists()
        return
    assert status == 0
    manifest = storage.load_manifest(str(out if command == "pack" else folder))
    assert manifest.skips == outcome
    shown = error.removesuffix("\n")
    assert shown.isprintable()
    assert verify.main([str(out if command == "pack" else folder), "--workers", "0"]) == 0


def test_a_tar_of_many_headers_takes_no_memory(tmp_path: Path) -> None:
    """32 MB of headers: long names, of which one counts, and records that mean nothing."""
    records = b"".join(pax_record(b"k%06d" % at, b"v" * 40) for at in range(15_000))
    path = tmp_path / "0.tar"
    with path.open("wb") as file:
        for number in range(32):
            keywords = records.replace(b"k0", b"%c0" % (65 + number))
            file.write(tar_member(b"pax", keywords, b"x"))
            file.write(tar_member(b"long", b"n" * 900_000, b"L") if number % 8 == 0 else b"")
        file.write(tar_member(b"a.png", PNG) + TAR_END)
    tracemalloc.start()
    with path.open("rb") as file:
        entries = list(tarfiles.walk(tarfiles.TarReader(file, "0.tar")))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [tarfiles.why_unused(entry) for entry in entries] == ["unsafe_name"]
    assert peak < 12 * MB


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:cat /etc/passwd", "no such folder"),
        ("pipe:touch executed |", "no such folder"),
        ("http://example.org/{000..009}.tar", "not supported"),
        ("ftp://u:hunter22@example.org/", "not supported"),
        ("file:///no/such", "no such folder"),
        ("file://../no", "no such folder"),
        ("gopher:x", "no such folder"),
        ("-", "no such folder"),
    ],
)
def test_urls_that_are_commands_or_other_protocols_are_refused(
    url: str, said: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for main, words in (
        (index.main, ["--workers", "0"]),
        (pack.main, ["out", "--kind", "webdataset", "--workers", "0"]),
    ):
        assert main([*words, "--", url] if main is index.main else ["--", url, "out"]) == 2
        error = one_line(capsys)
        assert said in error or "no such" in error
        assert "hunter22" not in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["pipe", "device", "loop", "dangling"])
def test_a_shard_that_is_no_file_is_one_line(kind: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "0.tar").write_bytes(GOOD + TAR_END)
    if kind == "pipe":
        os.mkfifo(tmp_path / "1.tar")
    else:
        target = {"device": "/dev/zero", "loop": "1.tar", "dangling": "nothing"}[kind]
        (tmp_path / "1.tar").symlink_to(target)
    assert index.main([str(tmp_path), "--workers", "0"]) == 2
    assert "1.tar: " in one_line(capsys)
    assert not (tmp_path / "manifest.json").exists()


# --- Datasets -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    raw = folder / "raw"
    raw.mkdir()
    for number in range(6):
        (raw / f"{number}.png").write_bytes(encoded(noise(seed=number)))
        (raw / f"{number}.gui").write_text(f"row btn-{number}")
    assert run(raw, folder / "out", "--split", "train=1", "--shard-samples", 3) == 0
    return folder / "out"


@pytest.fixture
def dataset(packed: Path, tmp_path: Path) -> Path:
    shutil.copytree(packed, tmp_path / "dataset")
    return tmp_path / "dataset"


def test_the_digests_of_these_tests_are_right(dataset: Path) -> None:
    path = dataset / "manifest.json"
    path.write_text(resigned(json.loads(path.read_text())))
    assert verify.main([str(dataset), "--workers", "0"]) == 0


HUGE = 10**30
FIELDS: dict[str, tuple[tuple[str | int, ...], object]] = {
    "kind": (("kind",), "pickle"),
    "kind of a list": (("kind",), []),
    "no splits": (("splits",), None),
    "splits of a list": (("splits",), [[]]),
    "a split of a number": (("splits", "train"), 7),
    "a shard of a text": (("splits", "train", 0), "train/000000.tar"),
    "fewer than no samples": (("splits", "train", 0, "samples"), -1),
    "1e30 samples": (("splits", "train", 0, "samples"), HUGE),
    "samples that are no number": (("splits", "train", 0, "samples"), float("nan")),
    "samples without end": (("splits", "train", 0, "samples"), float("inf")),
    "half a sample": (("splits", "train", 0, "samples"), 1.5),
    "true samples": (("splits", "train", 0, "samples"), True),
    "1e30 bytes": (("splits", "train", 0, "bytes"), HUGE),
    "a hash of a number": (("splits", "train", 0, "sha256"), 1),
    "no name": (("splits", "train", 0, "name"), None),
    "a name of two lines": (("splits", "train", 0, "name"), "train/0\n0.tar"),
    "a name that colours": (("splits", "train", 0, "name"), "\x1b[31m.tar"),
    "half a character": (("splits", "train", 0, "name"), "\ud800.tar"),
    "an unknown field": (("splits", "train", 0, "url"), "pipe:cat"),
    "no width": (("image", "width"), 0),
    "a width alone": (("image", "height"), None),
    "a width of a text": (("image", "width"), "24"),
    "1e30 pixels": (("image", "width"), HUGE),
    "two channels": (("image", "channels"), 2),
    "channels of a text": (("image", "channels"), "3"),
    "no such fit": (("image", "fit"), "../x"),
    "a background of two": (("image", "background"), [0, 0]),
    "a background of a text": (("image", "background"), "red"),
    "an unknown policy": (("image", "pickle"), 1),
    "vocabulary of a text": (("tokenizer", "vocab_size"), "9"),
    "a vocabulary below 0": (("tokenizer", "vocab_size"), -9),
    "the longest is no number": (("tokenizer", "longest"), float("nan")),
    "a tokenizer of a list": (("tokenizer",), []),
    "a tokenizer's file of a number": (("tokenizer", "file"), 5),
    "skips of a list": (("skips",), [1]),
    "fewer than no skips": (("skips", "corrupt"), -1),
    "another version": (("version",), 3),
    "a version of a list": (("version",), [1]),
    "another format": (("format",), "pickle"),
    "a secret": (("kind",), "https://user:hunter22@example.org/"),
}


def changed(body: Any, path: tuple[str | int, ...], value: object) -> Any:
    *parents, last = path
    at = body
    for step in parents:
        at = at[step]
    at[last] = value
    return body


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_a_manifest_that_cannot_be_is_one_line(
    name: str, dataset: Path, capsys: Capture
) -> None:
    path = dataset / "manifest.json"
    path.write_text(resigned(changed(json.loads(path.read_text()), *FIELDS[name])))
    with pytest.raises(FormatError, match=r"manifest\.json: "):
        storage.load_manifest(str(dataset))
    capsys.readouterr()
    assert verify.main([str(dataset), "--workers", "0"]) == 2
    error = one_line(capsys)
    assert "manifest.json" in error
    assert "edited" not in error, "it is the digest that was found, not the field"
    assert "hunter22" not in error
    assert show.main([str(dataset), "--out", str(dataset / "sheet.png")]) == 2


NAMES = [
    "../0.tar",
    "/etc/passwd",
    "train/../../0.tar",
    "..",
    "",
    "train//0.tar",
    "a\0b.tar",
    "./a.tar",
]


@pytest.mark.parametrize("where", ["shard", "tokenizer"])
@pytest.mark.parametrize("name", NAMES)
def test_names_that_lead_out_of_a_dataset_are_one_line(
    name: str, where: str, dataset: Path, capsys: Capture
) -> None:
    path = dataset / "manifest.json"
    at = ("splits", "train", 0, "name") if where == "shard" else ("tokenizer", "file")
    path.write_text(resigned(changed(json.loads(path.read_text()), at, name)))
    status = verify.main([str(dataset), "--workers", "0"])
    said = capsys.readouterr()
    text = (said.out + said.err).splitlines()
    assert status in (1, 2)
    assert any(
        "no name of a file inside a dataset" in line or "manifest.json" in line for line in text
    )
    assert "Traceback" not in said.err


TEXTS: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": "{",
    "no object": "[]",
    "a number": "1e999999",
    "null": "null",
    "a number of a million digits": '{"version": ' + "9" * 1_000_000 + "}",
    "lists in lists": "[" * 200_000,
    "objects in objects": '{"a":' * 200_000,
    "no text": b"\xff\xfe\x00",
    "zeros": bytes(1000),
    "two marks": b"\xef\xbb\xbf{}",
    "a pickle": pickle.dumps(Executes()),
}


@pytest.mark.parametrize("file", ["manifest.json", "plan.json", "train/000000.json",
                                  "train/000000.idx", "tokenizer.json"])  # fmt: skip
@pytest.mark.parametrize("name", [*TEXTS, "1 GB", "pipe", "device", "folder", "loop"])
def test_a_file_of_a_dataset_that_is_none_is_named(
    name: str, file: str, dataset: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(dataset)
    path = dataset / file
    path.unlink()
    if name == "1 GB":
        path.touch()
        os.truncate(path, 50 * MB if file == "plan.json" else 2**30)
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    elif name in ("device", "loop"):
        path.symlink_to("/dev/zero" if name == "device" else path.name)
    else:
        text = TEXTS[name]
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    status = verify.main([str(dataset), "--workers", "0"])
    said = capsys.readouterr()
    assert status == (2 if file == "manifest.json" else 1)
    lines = (said.out + said.err).splitlines()
    assert any(file in line for line in lines)
    assert len(lines) <= 6
    assert all(len(line) < 500 for line in lines)
    assert "Traceback" not in said.err
    assert not (dataset / "executed").exists()


def test_the_last_of_two_equal_keys_counts_and_is_signed(dataset: Path, capsys: Capture) -> None:
    path = dataset / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace("{", '{"kind": "images",', 1))
    assert Manifest.from_json(path.read_text(), "here").kind == "pairs"
    path.write_text(text.rstrip()[:-1] + ', "kind": "images"}')
    assert verify.main([str(dataset), "--workers", "0"]) == 2
    assert "digest does not match" in one_line(capsys)


LINES = [
    ("png 512 99 a.png", "a.png"), ("png 0 9 a.png", "out of range"),
    ("png -512 9 a.png", "out of range"), ("png 512 -1 a.png", "out of range"),
    (f"png 512 {HUGE} a.png", "behind the shard's"),
    ("png 512 1000000000 a.png", "behind the shard's"),
    (f"png {HUGE} 1 a.png", "behind the shard's"),
    ("txt 5120 9 a.txt png 512 9 a.png", "out of range"),
    ("png 512 900 a.png txt 1024 9 a.txt", "out of range"),
    ("png 512", "damaged index line"), ("png 512 9", "damaged index line"),
    ("png x 9 a.png", "damaged index line"), ("png 1e3 9 a.png", "damaged index line"),
    ("png nan 9 a.png", "damaged index line"), (" 512 9 a.png", "damaged index line"),
    ("png " + "9" * 5000 + " 9 a.png", "damaged index line"), ("", "damaged index line"),
    ("pipe:cat /etc/passwd", "damaged index line"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "said"), LINES)
def test_a_line_of_an_index_that_cannot_be_is_named(line: str, said: str, dataset: Path) -> None:
    text = f"v1.2 1\n{line}\n"
    if said == "a.png":
        assert parse_index(text, "here", 10_000)[0].key == "a"
        return
    with pytest.raises(FormatError, match=r"^here: ") as refused:
        parse_index(text, "here", 10_000)
    assert said in str(refused.value)
    assert len(str(refused.value)) < 200
    # Training takes the memory for what an index says.
    (dataset / "train/000000.idx").write_text(text)
    manifest = storage.load_manifest(str(dataset))
    reader = SampleReader(Shard(str(dataset), entry) for entry in manifest.splits["train"])
    with pytest.raises((FormatError, storage.UserError), match=r"train/000000\.idx"):
        reader.read(0, 0)


@pytest.mark.parametrize(
    "head", ["", "v1.2", "v1.2 -1", "v1.2 2", "v1.1 1", "v1.2 1 ", "PK", f"v1.2 {HUGE}"]
)
def test_an_index_of_another_number_of_lines_is_none(head: str) -> None:
    with pytest.raises(FormatError, match="here: not a complete"):
        parse_index(f"{head}\npng 512 9 a.png\n", "here")


def test_a_manifest_of_somebody_elses_removes_nothing_of_theirs(
    dataset: Path, tmp_path: Path
) -> None:
    """It lists files beside the shards, which `--overwrite` would take for old ones."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for number in range(6):
        (raw / f"{number}.png").write_bytes(encoded(noise(seed=number)))
        (raw / f"{number}.gui").write_text(f"row btn-{number}")
    (dataset / "mine.json").write_text("mine")
    path = dataset / "manifest.json"
    at = ("splits", "train", 0, "name")
    path.write_text(resigned(changed(json.loads(path.read_text()), at, "mine.tar")))
    plan = dataset / "plan.json"
    plan.write_text(plan.read_text()[:-100])
    words = (raw, dataset, "--split", "train=1", "--shard-samples", 3)
    assert run(*words, "--overwrite") == 0
    assert (dataset / "mine.json").read_text() == "mine"


def test_a_shard_that_became_a_pipe_is_a_bad_sample(dataset: Path) -> None:
    from pipeline.batch import SampleError

    manifest = storage.load_manifest(str(dataset))
    reader = SampleReader(Shard(str(dataset), entry) for entry in manifest.splits["train"])
    path = dataset / manifest.splits["train"][0].name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SampleError, match="cannot be read"):
        reader.read(0, 0)


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "groups of a number": lambda body: body.update(num_groups=1.5),
    "groups of a list": lambda body: body.update(num_groups=[[]]),
    "half a group": lambda body: body["num_groups"].update(train=0.5),
    "a skip without a name": lambda body: body.update(skips=[["corrupt", None]]),
    "an image of a number": lambda body: body["shards"]["train/000000.tar"][0].__setitem__(1, 5),
    "a hash of a list": lambda body: body["shards"]["train/000000.tar"][0].__setitem__(2, []),
    "no shards": lambda body: body.update(shards=None),
    "no options": lambda body: body.update(options={}),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_of_other_types_is_named(name: str, dataset: Path, capsys: Capture) -> None:
    path = dataset / "plan.json"
    body = json.loads(path.read_text())
    PLANS[name](body)
    path.write_text(rehashed(body))
    assert verify.main([str(dataset), "--workers", "0"]) == 1
    assert "plan.json: damaged plan" in capsys.readouterr().out


def test_a_receipt_whose_hash_is_no_text_is_named(dataset: Path, capsys: Capture) -> None:
    path = dataset / "train/000000.json"
    body = json.loads(path.read_text())
    body["shard"]["sha256"] = dict(body["shard"])
    path.write_text(json.dumps(body))
    assert verify.main([str(dataset), "--workers", "0"]) == 1
    assert "train/000000.json: damaged receipt" in capsys.readouterr().out


def test_a_tokenizer_that_fails_at_unknown_words_is_refused(
    make_pairs: MakePairs, tmp_path: Path, capsys: Capture
) -> None:
    from tokenizers import Tokenizer, models

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(path))
    assert run(make_pairs(4), tmp_path / "out", "--tokenizer", path, "--split", "test=1") == 2
    assert "tokenizer.json: cannot encode a word that is not in it" in one_line(capsys)


def test_a_column_whose_name_is_no_text_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    out = io.BytesIO()
    pq.write_table(pa.table({"image": ["a.png"], "xyzzy": ["b"]}), out, store_schema=False)
    data = out.getvalue().replace(b"xyzzy", b"xy\xffzy")
    (tmp_path / "t.parquet").write_bytes(data)
    assert run(tmp_path / "t.parquet", tmp_path / "out", "--split", "train=1") == 2
    assert "t.parquet: damaged, or no Parquet file" in one_line(capsys)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_webp_of_any_channels_is_as_it_was_packed(channels: int, tmp_path: Path) -> None:
    """It has no grey, and leaves out an alpha channel that hides nothing."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    for number in range(2):
        (raw / f"{number}.png").write_bytes(encoded(noise(seed=number)))
    words = ("--channels", channels, "--encode", "webp", "--split", "train=1")
    assert run(raw, out, *words) == 0
    assert verify.main([str(out), "--deep", "--workers", "0"]) == 0
