"""Fuzzing of everything that reads bytes of others: images, tars, tables, files of a dataset.

    python tests/faults/fuzz.py --target all --seconds 60           each for a minute
    python tests/faults/fuzz.py --target image --seconds 600 --seed 7 --json
    python tests/faults/fuzz.py --target index --seconds 600 --atheris    guided by coverage
    python tests/faults/fuzz.py --target tar --repeat FILE          one input again

A corpus of valid files, of every format and feature, is mutated: bits, numbers, pieces, and pieces
of others; mostly with the checksums and digests that it should then have, so that a change is not
just a wrong sum. `--atheris` (PyPI, not needed otherwise) lets libFuzzer choose the mutations by
the lines of pixloom that they reach. What may come of an input is a result that holds what its
reader promises, or the reader's own refusal. Anything else is a crash, and so are 20 s of work, and
more memory than `--memory` beside what a process takes that has read the corpus (a limit of the
kernel's on its address space). Images are fuzzed with a limit of 1e6 pixels, so that memory shows
what is not pixels.

Each target runs in a process of its own, whose end by a signal is a crash as well. The input of a
crash is kept in a file, which is named. `--json` prints one JSON object on stdout's last line. The
exit status is 1 where there was a crash.
"""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # this checkout, not an installed pixloom

import hostile  # noqa: E402
import numpy as np  # noqa: E402

MAX_PIXELS = 1_000_000
MAX_SECONDS = 20
MAX_INPUT_BYTES = 2**18
MAX_CRASHES = 20
STARTUP_S = 120
"""until a process has imported everything and read its corpus, on a busy machine"""
MB = 2**20


class HangError(BaseException):
    """Nothing that a reader catches."""


# --- What is fuzzed -------------------------------------------------------------------------------
# Each takes an input and returns what became of it, in a word or two. Choices are made by the
# input, so that the input alone gives the same again.


def _choice(data: bytes, *options: Any) -> Any:
    return options[zlib.crc32(data) % len(options)]


def fuzz_image(data: bytes) -> str:
    from shards import images

    size, fit, encode, channels = _choice(
        data,
        (None, None, None, 3), (None, None, "png", 1), (None, None, None, 4),
        ((16, 12), None, None, 3), ((16, 12), "pad", "jpeg", 3), ((9, 9), "crop", "webp", 4),
    )  # fmt: skip
    policy = images.make_policy(
        size=size, fit=fit, encode=encode, channels=channels, quality=80, background=(9, 8, 7)
    )
    stated = None
    with contextlib.suppress(images.ImageRefused):
        stated = images.read_size(data)
    try:
        packed = images.fit_and_encode(data, policy)
    except images.ImageRefused as refused:
        return refused.cause
    assert stated == (packed.width, packed.height), "another size than its header states"
    width, height = size or stated
    found = images.decode(packed.data, channels)
    assert found.shape == (height, width, channels)
    if packed.extension != "webp":  # which has no grey, and leaves an alpha out that hides nothing
        assert images.read_channels(packed.data) == channels
    assert images.fit_and_encode(data, policy) == packed
    return "packed"


def fuzz_decode(data: bytes) -> str:
    from shards import images

    channels, least = _choice(data, (3, None), (1, None), (4, None), (3, (4, 4)), (1, (9, 3)))
    try:
        found = images.decode(data, channels, least=least)
    except images.ImageRefused as refused:
        return refused.cause
    assert found.dtype == np.uint8
    try:
        width, height = images.read_size(data)
    except images.ImageRefused:
        return "decoded, though its metadata is damaged"
    if least is None or found.shape[:2] == (height, width):
        assert found.shape == (height, width, channels)
    else:
        divisor = next(one for one in (2, 4, 8) if found.shape[0] == -(-height // one))
        assert found.shape == (-(-height // divisor), -(-width // divisor), channels)
        assert found.shape[1] >= least[0]
        assert found.shape[0] >= least[1]
    return "decoded"


def fuzz_array(data: bytes) -> str:
    from shards import images

    channels, size = _choice(data, (2, None), (5, None), (6, (7, 5)), (3, None))
    policy = images.make_policy(
        size=size, fit=None, encode=None, channels=channels, quality=80, background=(9, 8, 7)
    )
    try:
        packed = images.fit_and_encode(data, policy)
    except images.ImageRefused as refused:
        return refused.cause
    width, height = size or (packed.width, packed.height)
    assert images.decode(packed.data, channels).shape == (height, width, channels)
    return "packed"


def _text(data: bytes) -> str:
    """As `storage.read_text` has it."""
    from shards.format import FormatError

    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise FormatError("here: damaged, not UTF-8 text") from error


def fuzz_index(data: bytes) -> str:
    from shards.format import format_index, parse_index

    num_bytes = 10**6
    spans = parse_index(_text(data), "here", num_bytes)
    for span in spans:
        assert span.offset >= 0
        assert 0 <= span.size <= num_bytes
        assert all(member.size >= 0 and member.offset >= 512 for member in span.members)
    assert parse_index(format_index(spans), "here") == spans
    return "read"


def fuzz_manifest(data: bytes) -> str:
    from shards import storage
    from shards.format import FormatError, Manifest

    manifest = Manifest.from_json(_text(data), "here")
    again = Manifest.from_json(manifest.to_json(), "here")
    assert again == manifest
    assert again.data_digest == manifest.data_digest
    for split in manifest.splits:
        assert 0 <= manifest.num_samples(split) < 2**63
        for entry in manifest.splits[split]:
            for name in (entry.name, entry.index_name, entry.receipt_name):
                with contextlib.suppress(FormatError):
                    found = Path(storage.join("/data", name))
                    assert Path(os.path.normpath(found)).is_relative_to("/data")
    image = manifest.image
    assert image.channels in (1, 3, 4)
    assert (image.width is None) == (image.height is None)
    return "read"


def fuzz_receipt(data: bytes) -> str:
    from shards.format import Receipt

    receipt = Receipt.from_json(_text(data), "here")
    assert Receipt.from_json(receipt.to_json(), "here") == receipt
    assert len(receipt.crc32) == receipt.shard.samples >= 0
    return "read"


def fuzz_plan(data: bytes) -> str:
    from shards import foreign
    from shards.plan import Plan, differences

    text = _text(data)
    old_adoption, old_plan = _old_plans()
    if foreign.is_adoption(text):
        adoption = foreign.Adoption.from_json(text, "here")
        assert foreign.Adoption.from_json(adoption.to_json(), "here") == adoption
        assert foreign.differences(adoption, old_adoption)
        return "read as an adoption"
    plan = Plan.from_json(text, "here")
    assert Plan.from_json(plan.to_json(), "here").plan_hash == plan.plan_hash
    assert differences(plan, old_plan)
    return "read"


@functools.cache
def _old_plans() -> tuple[Any, Any]:
    from shards import foreign
    from shards.plan import Plan

    adoption, *plans = (data.decode() for data in _files("plan.json"))
    return foreign.Adoption.from_json(adoption, "here"), Plan.from_json(plans[0], "here")


def fuzz_tar(data: bytes) -> str:
    from shards import foreign, tarfiles, verify
    from shards.format import FormatError, format_index, parse_index

    adoption = foreign.Adoption("pairs", ("png", "jpg"), "txt", "word", 3, {})
    headers, whole = None, None
    with contextlib.suppress(FormatError):
        whole = verify.read_spans(data, "here")
    with contextlib.suppress(FormatError):
        reader = tarfiles.TarReader(io.BytesIO(data), "here", hashing=False)
        headers = [(entry.name, entry.offset, entry.size) for entry in tarfiles.walk(reader)]
        assert all(size >= 0 and start + size <= len(data) for _, start, size in headers)
    try:
        found = foreign.scan(io.BytesIO(data), "here", adoption)
    except FormatError:
        assert headers is None, "with hashes it is damaged, by its headers alone it is not"
        assert whole is None or b"ustar" not in data, "verify takes what index refuses"
        raise
    assert headers is not None
    assert found.num_bytes == len(data)
    assert len(found.spans) == len(found.crc32) == len(found.num_tokens)
    assert parse_index(format_index(found.spans), "here", len(data)) == list(found.spans)
    for span, crc32 in zip(found.spans, found.crc32, strict=True):
        assert zlib.crc32(data[span.offset : span.offset + span.size]) == crc32
    return "read, with skips" if found.skips else "read"


def _list_table(data: bytes, suffix: str) -> str:
    from shards import layouts, sources

    folder = Path(_table_folder())
    (folder / f"t{suffix}").write_bytes(data)
    columns = layouts.Columns("image", "code", None)
    listing = layouts.list_table(str(folder), [f"t{suffix}"], columns)
    with sources.reading(
        str(folder),
        (
            sources.FileRead(f"row {at}", max_bytes=9999, place=place)
            for at, pair in enumerate(listing.pairs)
            for place in (pair.image_place, pair.code_place)
            if place is not None
        ),
    ) as read:
        for at, pair in enumerate(listing.pairs):
            for place in (pair.image_place, pair.code_place):
                if place is not None:
                    with contextlib.suppress(OSError):
                        read(sources.FileRead(f"row {at}", max_bytes=9999, place=place))
    return "read, with skips" if listing.skips else "read"


@functools.cache
def _table_folder() -> str:
    shared = Path("/dev/shm")
    return tempfile.mkdtemp(prefix="pixloom-fuzz-", dir=shared if shared.is_dir() else None)


def fuzz_table(data: bytes) -> str:
    return _list_table(
        data, ".jsonl" if data.lstrip()[:1] == b"{" else _choice(data, ".csv", ".tsv")
    )


def fuzz_parquet(data: bytes) -> str:
    return _list_table(data, ".parquet")


def fuzz_tokens(data: bytes) -> str:
    from shards import plan, tokens

    if data[:1] == b"\x93":
        ids = tokens.from_npy(data, "here")
        assert tokens.count_npy(data, "here") == len(ids)
        return "read"
    if data.lstrip()[:1] == b"{":
        tokenizer = tokens.load_tokenizer(_text(data), "here")
        ids = tokens.encode(tokenizer, "row {\nbtn-green, caf\u00e9 <eos>\n}")
        assert ids[0] == 1
        return "read as a tokenizer"
    try:
        words = tokens.words(plan.read_code(data))
    except UnicodeDecodeError:
        return "not UTF-8"
    assert all(words)
    return "read as code"


# --- Corpora --------------------------------------------------------------------------------------


def image_corpus() -> list[bytes]:
    return list(hostile.valid_images().values())


def array_corpus() -> list[bytes]:
    rng, found = np.random.default_rng(3), []
    for shape, kind in (((6, 8, 5), "u1"), ((2, 6, 8), "<u2"), ((6, 8, 6), ">u2"), ((6, 8), "u1")):
        out = io.BytesIO()
        np.save(out, rng.integers(0, 200, shape).astype(kind))
        found.append(out.getvalue())
    for bands, planar in ((5, 1), (2, 2), (6, 1)):
        plain = (258, 3, bands, 250 - 2 * bands) if bands > 2 else (258, 3, bands, 8 | 8 << 16)
        count = bands if planar == 2 else 1
        sizes = 8 * 8 * bands // count
        offsets, counts = (273, 4, count, 230), (279, 4, count, 238)
        if count == 1:
            offsets, counts = (273, 4, 1, 256), (279, 4, 1, sizes)
        tags = hostile.tiff_tags(
            (8, 8), plain, (277, 3, 1, bands), (284, 3, 1, planar), offsets=offsets, counts=counts
        )
        data = bytearray(hostile.tiff(tags, rng.bytes(8 * 8 * bands)))
        if bands > 2:
            data[250 - 2 * bands : 250] = struct.pack(f"<{bands}H", *[8] * bands)
        else:
            data[230:246] = struct.pack("<4I", 256, 256 + sizes, sizes, sizes)
        found.append(bytes(data))
    return found


def _dataset() -> dict[str, bytes]:
    """The files of a small packed dataset, of one of images alone, and of an adopted one."""
    from shards import index, pack

    found = {}
    with tempfile.TemporaryDirectory() as name, Path(os.devnull).open("w") as null:
        folder = Path(name)
        for at in range(6):
            (folder / "raw").mkdir(exist_ok=True)
            (folder / "raw" / f"{at}.png").write_bytes(hostile.encoded(hostile.noise(seed=at)))
            (folder / "raw" / f"{at}.gui").write_text(f"row {{ btn-{at} }}")
        (folder / "raw" / "empty.png").touch()
        (folder / "raw" / "empty.gui").touch()
        with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            words = ["--workers", "0", "--shard-samples", "3"]
            for out, more in (("pairs", []), ("images", ["--kind", "images", "--size", "8x8"])):
                assert pack.main([str(folder / "raw"), str(folder / out), *words, *more]) == 0
            (folder / "adopted" / "train").mkdir(parents=True)
            tar = (folder / "pairs" / "train" / "000000.tar").read_bytes()
            (folder / "adopted" / "train" / "0.tar").write_bytes(tar)
            assert index.main([str(folder / "adopted"), "--workers", "0"]) == 0
        for path in sorted(folder.glob("*/**/*")):
            if path.is_file() and path.parts[len(folder.parts)] != "raw":
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def _files(*ends: str) -> list[bytes]:
    files = _dataset()
    return [data for name, data in files.items() if name.endswith(ends)]


def tar_corpus() -> list[bytes]:
    from hostile import TAR_END, pax_header, tar_member

    png, jpeg = hostile.encoded(hostile.noise()), hostile.encoded(hostile.noise(), "JPEG")
    pair = tar_member(b"a.png", png) + tar_member(b"a.txt", b"x y")
    other = (
        tar_member(b"b/c.jpg", jpeg) + tar_member(b"b/c.txt", b"x") + tar_member(b"b/c.cls", b"1")
    )
    long = b"n" * 150
    return [
        _files("pairs/train/000000.tar")[0],
        pair + other + TAR_END,
        pair + tar_member(long + b".png", png) + tar_member(long + b".txt", b"z") + TAR_END,
        pair + pax_header((b"path", long + b".png"), (b"size", b"%d" % len(png)))
        + tar_member(b"x", png) + pax_header((b"path", long + b".txt")) + tar_member(b"x", b"z")
        + TAR_END,
        pair + tar_member(b"l", b"", b"2", b"/x") + tar_member(b"d/", b"", b"5") + other + TAR_END,
        tar_member(b"s.png", b"", b"S") + pair + pax_header((b"comment", b"c"), kind=b"g") + other
        + TAR_END,
    ]  # fmt: skip


def table_corpus() -> list[bytes]:
    return [
        b'image,code\nimages/0.png,row\nb.png,"a ""b""\nc"\n',
        b"\xef\xbb\xbfcode\timage\tmore\r\nx y\ta.png\t1\r\n\r\nz\tb.png\t2\r\n",
        b'{"image": "a.png", "code": "x"}\n{"image": "b.png", "code": "\\u00e9", "c": [1, {}]}\n',
    ]


def parquet_corpus() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    png = hostile.encoded(hostile.noise())
    tables = [
        {"image": [png, None, png], "code": ["x", "y", None]},
        {"image": ["a.png", "b.png"] * 9, "code": ["x", "x"] * 9},
        {"image": [{"bytes": png, "path": "a"}] * 3, "code": ["x", "y", "z"]},
    ]
    found = []
    for columns, options in zip(
        tables,
        ({}, {"use_dictionary": True, "row_group_size": 5}, {"compression": "zstd"}),
        strict=True,
    ):
        out = io.BytesIO()
        pq.write_table(pa.table(columns), out, **options)
        found.append(out.getvalue())
    return found


def token_corpus() -> list[bytes]:
    from shards import tokens

    return [
        tokens.to_npy([1, 5, 6, 2], 9),
        tokens.to_npy([1, 70_000, 2], 80_000),
        tokens.train_word_tokenizer({"row": 3, "btn-green": 2}, 1).encode(),
        tokens.train_char_tokenizer({"r": 3, "o": 2}).encode(),
        "header {\nbtn-active, \\frac{a_1}{2} caf\u00e9\n}".encode(),
    ]


# --- Mutations ------------------------------------------------------------------------------------

NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 511, 512, 4096, 2**15, 2**16 - 1, 2**31 - 1, 2**31,
           2**32 - 1)  # fmt: skip
PIECES = (
    b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"fdAT", b"eXIf",
    b"IEND", b"\xff\xd8", b"\xff\xc0", b"\xff\xc2", b"\xff\xda", b"\xff\xdb", b"\xff\xc4",
    b"\xff\xe1", b"\xff\xdd", b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH",
    b"EXIF", b"II*\0", b"MM\0*", b"Exif\0\0",
    b"!\xfe", b"!\xf9\x04", b",", b";", b"ustar\0", b"././@LongLink", b"\0" * 512, b"path=",
    b"size=", b"GNU.sparse.", b"../", b"/", b"\n", b" ", b'"', b",", b"{", b"}", b"[", b"]",
    b"null", b"NaN",
    b"-1", b"1e999", b"9" * 30, b"\\ud800", b"\xed\xa0\x80", b"\xff", b"v1.2 ", b"png 512 9 a.png",
)  # fmt: skip


def mutate(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 9, 30))):
        at = rng.randrange(len(out) + 1)
        size = min(len(out) - at, rng.choice((1, 2, 4, 8, 16, 100, 512, 2000)))
        match rng.randrange(11):
            case 0 if size:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if size:
                out[at] = rng.randrange(256)
            case 2:
                kind, order = rng.choice("BHI"), rng.choice("<>")
                number = rng.choice(NUMBERS) & 256 ** struct.calcsize(kind) - 1
                packed = struct.pack(order + kind, number)
                out[at : at + len(packed)] = packed
            case 3:
                del out[at : at + size]
            case 4:
                out[at:at] = out[at : at + size] * rng.choice((1, 1, 2, 20))
            case 5:
                out[at:at] = rng.randbytes(size)
            case 6:
                out[at : at + size] = bytes(size)
            case 7:
                del out[at:]
            case 8:
                piece = rng.choice(PIECES)
                out[at : at + rng.choice((0, len(piece)))] = piece
            case 9:
                other = rng.choice(corpus)
                start = rng.randrange(len(other) + 1)
                out[at : at + rng.choice((0, size))] = other[start : start + size]
            case _:
                start = rng.randrange(len(out) + 1)
                out[at : at + size] = out[start : start + size]
    return bytes(out[:MAX_INPUT_BYTES])


VALUES: tuple[Any, ...] = (
    None, True, 0, 1, -1, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\ud800",
    "../x", "/etc", "a\0b", "train/000000.tar", "\n", [], [1], [[]], {}, {"bytes": 1}, {"a": {}},
)  # fmt: skip


def mutate_json(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Half of the time in what it says: values of other types, fields lost, moved and doubled."""
    if rng.random() < 0.5:
        return mutate(data, rng, corpus)
    body = json.loads(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = []
        waiting = [body]
        while waiting:
            one = waiting.pop()
            keys = list(one) if isinstance(one, dict) else range(len(one))
            places += [(one, key) for key in keys]
            waiting += [one[key] for key in keys if isinstance(one[key], dict | list)]
        if not places:
            break
        parent, key = rng.choice(places)
        match rng.randrange(6):
            case 0:
                del parent[key]
            case 1:
                source, from_key = rng.choice(places)
                with contextlib.suppress(LookupError):
                    parent[key] = json.loads(json.dumps(source[from_key]))
            case 2 if isinstance(parent, dict):
                parent[rng.choice(("bytes", "x", "", "\ud800", "a" * 999))] = parent.pop(key)
            case _:
                parent[key] = rng.choice(VALUES)
    return json.dumps(body).encode()


def repair(name: str, data: bytes) -> bytes:
    """With the checksums and digests that it should have, as far as there is sense in it."""
    if name in ("image", "decode") and data.startswith(b"\x89PNG"):
        return _repair_png(data)
    if name == "tar":
        return _repair_tar(data)
    if name == "manifest":
        with contextlib.suppress(Exception):
            return hostile.resigned(json.loads(data)).encode()
    if name == "plan":
        with contextlib.suppress(Exception):
            return hostile.rehashed(json.loads(data)).encode()
    return data


def _repair_png(data: bytes) -> bytes:
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        end = at + 8 + int.from_bytes(out[at : at + 4], "big")
        if end + 4 > len(out):
            break
        out[end : end + 4] = struct.pack(">I", zlib.crc32(out[at + 4 : end]))
        at = end + 4
    return bytes(out)


def _repair_tar(data: bytes) -> bytes:
    out = bytearray(data)
    for at in range(0, len(out) - 511, 512):
        header = out[at : at + 512]
        if header[257:262] == b"ustar":
            out[at : at + 512] = hostile.sealed(header)
    return bytes(out)


# --- One process ----------------------------------------------------------------------------------

Target = tuple[Callable[[bytes], str], Callable[[], list[bytes]]]
TARGETS: dict[str, Target] = {
    "image": (fuzz_image, image_corpus),
    "decode": (fuzz_decode, image_corpus),
    "array": (fuzz_array, array_corpus),
    "index": (fuzz_index, lambda: _files(".idx")),
    "manifest": (fuzz_manifest, lambda: _files("manifest.json")),
    "receipt": (fuzz_receipt, lambda: _files("train/000000.json", "train/0.json")),
    "plan": (fuzz_plan, lambda: _files("plan.json")),
    "tar": (fuzz_tar, tar_corpus),
    "table": (fuzz_table, table_corpus),
    "parquet": (fuzz_parquet, parquet_corpus),
    "tokens": (fuzz_tokens, token_corpus),
}
JSON_TARGETS = ("manifest", "receipt", "plan")


class Fuzzer:
    """The executions of one target, in this process."""

    def __init__(self, name: str, seed: int, kept: Path) -> None:
        self.name, self.kept = name, kept
        self.function, make_corpus = TARGETS[name]
        self.corpus = make_corpus()
        self.rng = random.Random(f"{name} {seed}")
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.crashes: list[str] = []
        self.executions = 0
        self.slowest_s = 0.0
        self.start_s = 0.0
        self.base_kb = 0
        # Still there when this process is not.
        self.current = os.open(kept / f"{name}.current", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        signal.signal(signal.SIGALRM, self._hang)

    def _hang(self, *_: object) -> None:
        raise HangError(f"more than {MAX_SECONDS} s")

    def begin(self, memory_mb: int) -> None:
        """Reads the corpus, as what all executions share; from now on memory is limited."""
        for data in self.corpus:
            self.execute(data)
        assert not self.crashes, self.crashes
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory_mb * MB
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        self.base_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.start_s = time.monotonic()

    def next_input(self) -> bytes:
        data = self.rng.choice(self.corpus)
        change = mutate_json if self.name in JSON_TARGETS else mutate
        data = change(data, self.rng, self.corpus)
        return repair(self.name, data) if self.rng.random() < 0.8 else data

    def execute(self, data: bytes) -> None:
        from shards.errors import UserError
        from shards.format import FormatError

        os.pwrite(self.current, struct.pack("<I", len(data)) + data, 0)
        start_s = time.monotonic()
        try:
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
            try:
                outcome = self.function(data)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except (FormatError, UserError) as error:
            outcome = type(error).__name__
            if "here" not in str(error) and _table_folder() not in str(error):
                outcome = "CRASH unnamed"
                self.crash(data, f"the message names no file: {error}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            outcome = f"CRASH {type(error).__name__}"
            self.crash(data, "".join(traceback.format_exception(error)[-3:]))
        self.slowest_s = max(self.slowest_s, time.monotonic() - start_s)
        self.outcomes[outcome] += 1
        self.executions += 1

    def crash(self, data: bytes, what: str) -> None:
        path = self.kept / f"{self.name}-{zlib.crc32(data):08x}"
        path.write_bytes(data)
        said = f"{path}: {what}"
        print(f"CRASH {said}", file=sys.stderr, flush=True)
        if len(self.crashes) < MAX_CRASHES:
            self.crashes.append(said[-2000:])

    def report(self) -> dict[str, Any]:
        peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            "target": self.name,
            "executions": self.executions,
            "seconds": round(time.monotonic() - self.start_s, 1),
            "outcomes": dict(sorted(self.outcomes.items())),
            "base_mb": round(self.base_kb / 1024),
            "peak_growth_mb": round((peak_kb - self.base_kb) / 1024, 1),
            "slowest_s": round(self.slowest_s, 2),
            "crashes": self.crashes,
        }

    def save_report(self) -> None:
        path = self.kept / f"{self.name}.report"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.report()))
        temporary.replace(path)


def lower_limits() -> None:
    from shards import images, limits

    images.MAX_PIXELS = limits.MAX_PIXELS = MAX_PIXELS


def fuzz_here(arguments: argparse.Namespace, kept: Path) -> None:
    lower_limits()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # What decoders in C say of their input.
    fuzzer = Fuzzer(arguments.target, arguments.seed, kept)
    fuzzer.begin(arguments.memory)
    while (
        time.monotonic() - fuzzer.start_s < arguments.seconds
        and fuzzer.executions < arguments.executions
        and len(fuzzer.crashes) < MAX_CRASHES
    ):
        fuzzer.execute(fuzzer.next_input())
    fuzzer.save_report()


def fuzz_with_atheris(arguments: argparse.Namespace, kept: Path) -> None:
    import atheris

    with atheris.instrument_imports(include=["shards"]):
        from shards import foreign, images, index, layouts, pack, plan, tarfiles, tokens, verify  # noqa: F401
    lower_limits()
    fuzzer = Fuzzer(arguments.target, arguments.seed, kept)
    fuzzer.begin(arguments.memory)
    corpus = kept / f"{arguments.target}.corpus"
    corpus.mkdir(exist_ok=True)
    for number, data in enumerate(fuzzer.corpus):
        (corpus / f"valid-{number}").write_bytes(data)

    def execute(data: bytes) -> None:
        fuzzer.execute(data)
        if fuzzer.executions % 500 == 0:
            fuzzer.save_report()

    def choose(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        if rng.random() < 0.5:
            data = bytes(atheris.Mutate(data, max_size))
        else:
            data = mutate(data, rng, fuzzer.corpus)
        data = repair(arguments.target, data) if rng.random() < 0.8 else data
        return data[:max_size]

    words = [sys.argv[0], str(corpus), f"-max_total_time={arguments.seconds:.0f}"]
    words += [f"-seed={arguments.seed + 1}", "-max_len=65536", "-rss_limit_mb=0", "-timeout=60"]
    words += ["-print_final_stats=0", "-verbosity=0", f"-artifact_prefix={kept}/"]
    atheris.Setup(words, execute, custom_mutator=choose)
    atheris.Fuzz()


# --- All of them ----------------------------------------------------------------------------------


def fuzz_apart(arguments: argparse.Namespace, name: str, kept: Path) -> dict[str, Any]:
    """One target in a process of its own, and what is left of it where that ends by a signal."""
    report, current = kept / f"{name}.report", kept / f"{name}.current"
    report.unlink(missing_ok=True)
    words = [sys.executable, __file__, "--child", "--kept", str(kept), "--target", name]
    for option in ("seconds", "seed", "memory", "executions"):
        words += [f"--{option}", str(getattr(arguments, option))]
    words += ["--atheris"] if arguments.atheris else []
    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    try:
        _, said = process.communicate(timeout=arguments.seconds + STARTUP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    for line in said.splitlines():
        if line.startswith(("CRASH", "Traceback", "AssertionError")):
            print(line, file=sys.stderr, flush=True)
    row: dict[str, Any] = {"target": name, "executions": 0, "crashes": []}
    if report.exists():
        row = json.loads(report.read_text())
    if process.returncode != 0 or not report.exists():
        raw = current.read_bytes() if current.exists() else b""
        data = raw[4 : 4 + int.from_bytes(raw[:4], "little")]
        path = kept / f"{name}-{zlib.crc32(data):08x}"
        path.write_bytes(data)
        row["crashes"].append(
            f"{path}: its process ended with {process.returncode}: {said[-1500:]}"
        )
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Fuzz pixloom's readers.")
    add = parser.add_argument
    add("--target", choices=(*TARGETS, "all"), default="all")
    add("--seconds", type=float, default=10.0, help="for each target (default: %(default)s)")
    add("--executions", type=int, default=10**12, help="at most, for each target")
    add("--seed", type=int, default=0)
    add("--memory", type=int, default=512, metavar="MB", help="(default: %(default)s)")
    add("--atheris", action="store_true", help="guided by coverage; needs the package of that name")
    add("--repeat", type=Path, metavar="FILE", help="only this input, in this process")
    add("--kept", type=Path, metavar="FOLDER", help="where inputs of crashes are put")
    add("--json", action="store_true", help="print a JSON object as the last line")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    kept = arguments.kept or Path(tempfile.mkdtemp(prefix="pixloom-fuzz-"))
    kept.mkdir(parents=True, exist_ok=True)
    if arguments.repeat is not None:
        lower_limits()
        print(TARGETS[arguments.target][0](arguments.repeat.read_bytes()))
        return 0
    if arguments.child:
        (fuzz_with_atheris if arguments.atheris else fuzz_here)(arguments, kept)
        return 0
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    rows = []
    for name in names:
        rows.append(fuzz_apart(arguments, name, kept))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    num_crashes = sum(len(row["crashes"]) for row in rows)
    if num_crashes:
        print(f"{num_crashes} crashes; their inputs are in {kept}", file=sys.stderr)
    if arguments.json:
        print(json.dumps({"seed": arguments.seed, "crashes": num_crashes, "targets": rows}))
    return 1 if num_crashes else 0


if __name__ == "__main__":
    sys.exit(main())
