"""Images of any number of channels: hostile arrays and TIFFs, and packs of good ones."""

import csv
import gc
import importlib.util
import io
import itertools
import json
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards import arrays, images, index, pack, show, storage, tiffs, verify
from shards.format import FormatError, ImagePolicy, Manifest, image_extension, parse_index
from shards.images import ImageRefused
from shards.storage import UserError

BACKGROUND = (10, 200, 30)
PIXELS = np.random.default_rng(0).integers(0, 256, (50, 37, 5), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 2**16, (50, 37, 5), dtype=np.uint16)


def policy(channels: int = 5, **options: Any) -> ImagePolicy:
    defaults = {"size": None, "fit": None, "encode": None, "quality": 90, "background": BACKGROUND}
    return images.make_policy(channels=channels, **{**defaults, **options})


def npy(array: np.ndarray, version: tuple[int, int] | None = None, pickled: bool = False) -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array(out, array, version=version, allow_pickle=pickled)
    return out.getvalue()


def npy_saying(text: str, body: bytes = b"", version: int = 1) -> bytes:
    """An `.npy` file with any header."""
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + body


def header(shape: str = "(2, 2, 5)", descr: str = "'|u1'", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


def tiff(array: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    tifffile.imwrite(out, array, **{"photometric": "minisblack", **options})
    return out.getvalue()


def tiff_with(tags: dict[int, tuple[int, ...]], body: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF of these tags, all of them LONG; `body` begins at byte 8."""
    at = 8 + len(body)
    entries, rest = b"", b""
    for code, values in sorted(tags.items()):
        packed = struct.pack(f"<{len(values)}I", *values)
        if len(packed) > 4:
            value = struct.pack("<I", at + 2 + 12 * len(tags) + 4 + len(rest))
            rest += packed
        else:
            value = packed
        entries += struct.pack("<HHI", code, 4, len(values)) + value
    ifd = struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return struct.pack("<2sHI", b"II", 42, at) + body + ifd + rest


def bands(body: bytes = bytes(100 * 5), **changes: tuple[int, ...]) -> bytes:
    """A TIFF of 10x10 pixels in 5 bands, but for `changes`, as in t259=(8,)."""
    tags: dict[int, tuple[int, ...]] = {
        256: (10,), 257: (10,), 258: (8,) * 5, 259: (1,), 262: (1,), 273: (8,), 277: (5,),
        278: (10,), 279: (len(body),), 284: (1,), 339: (1,) * 5,
    }  # fmt: skip
    return tiff_with({**tags, **{int(name[1:]): value for name, value in changes.items()}}, body)


def eight_bits(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def refusal(data: bytes, channels: int = 5) -> str:
    try:
        images.read_size(data, channels=channels)
        images.fit_and_encode(data, policy(channels))
    except ImageRefused as refused:
        return refused.cause
    return "none"


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u2"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("axes", ["HWC", "CHW"])
def test_arrays_are_read_however_they_were_written(
    version: tuple[int, int], dtype: str, order: str, axes: str
) -> None:
    values = PIXELS if dtype == "|u1" else DEEP
    turned = values if axes == "HWC" else values.transpose(2, 0, 1)
    data = npy(np.asarray(turned.astype(dtype), order=order), version)  # type: ignore[call-overload]
    assert images.read_size(data, channels=5) == (37, 50)
    packed = images.fit_and_encode(data, policy())
    assert (packed.extension, packed.width, packed.height) == ("image.npy", 37, 50)
    assert np.array_equal(images.decode(packed.data, 5), eight_bits(values))
    assert np.array_equal(images.decode(data, 5), eight_bits(values))


def test_the_last_axis_is_the_channels_where_it_can_be() -> None:
    for shape, channels, found in [
        ((5, 4, 5), 5, (5, 4)),
        ((5, 4, 6), 5, (4, 6)),
        ((3, 7, 4), 3, (3, 7)),
        ((3, 7, 8), 3, (7, 8)),
        ((7, 8), 1, (7, 8)),
        ((1, 7, 8), 3, (7, 8)),
    ]:
        width, height = images.read_size(npy(np.zeros(shape, np.uint8)), channels=channels)
        assert (height, width) == found


def test_a_member_s_bytes_are_numpy_s() -> None:
    assert arrays.to_npy(PIXELS) == npy(PIXELS)
    assert images.fit_and_encode(npy(np.asfortranarray(PIXELS)), policy()).data == npy(PIXELS)
    assert images.read_channels(npy(PIXELS)) == 5
    assert images.read_channels(npy(PIXELS, (2, 0))) == 0
    out = np.empty((50, 37, 5), np.uint8)
    assert images.decode(npy(PIXELS), 5, out=out) is out
    assert np.array_equal(out, PIXELS)


GOOD = npy(PIXELS)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b"no array", "unsupported_format"),
        (b"PK\3\4" + bytes(100), "unsupported_format"),
        (GOOD[:7], "truncated"),
        (GOOD[:9], "truncated"),
        (GOOD[:100], "truncated"),
        (GOOD[:-1], "truncated"),
        (GOOD + b"\0", "corrupt"),
        (b"\x93NUMPY\x04\0" + GOOD[8:], "unsupported_format"),
        (npy_saying(" " * 5000 + header()), "corrupt"),
        (b"\x93NUMPY\x02\0\xff\xff\xff\xff{", "corrupt"),
        (npy_saying("__import__('os').abort()"), "corrupt"),
        (npy_saying("-" * 4000 + "1"), "corrupt"),
        (npy_saying("(" * 4000), "corrupt"),
        (npy_saying(header("(-2, 2, 5)")), "corrupt"),
        (npy_saying(header("(2L, 2L, 5L)")), "corrupt"),
        (npy_saying(header("(0, 2, 5)")), "corrupt"),
        (npy_saying(header(fortran="1")), "corrupt"),
        (npy_saying(header(fortran="'False'")), "corrupt"),
        (npy_saying(header("'a'")), "corrupt"),
        (npy_saying(header().replace("descr", "shape")), "corrupt"),
        (npy_saying(header("(4294967296, 4294967296, 5)")), "too_large"),
        (npy_saying(header(f"({2**62}, 4, 5)")), "too_large"),
        (npy_saying(header(f"({'9' * 4000}, 4, 5)")), "too_large"),
        (npy_saying(header("(9000, 9000, 5)")), "too_large"),
        (npy_saying(header("(70000, 2, 5)")), "too_large"),
        (npy_saying(header("(7000, 8000, 64)", "'<u2'")), "too_large"),
        (npy_saying(header("(2, 2, 6)"), bytes(24)), "wrong_channels"),
        (npy_saying(header("(2, 2)"), bytes(4)), "wrong_channels"),
        (npy_saying(header("()"), bytes(1)), "unsupported_mode"),
        (npy_saying(header("(20,)"), bytes(20)), "unsupported_mode"),
        (npy_saying(header("(1, 2, 2, 5)"), bytes(20)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), bool)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), np.int8)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), np.int32)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), np.uint64)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), np.float32)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), np.complex128)), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), "M8[s]")), "unsupported_mode"),
        (npy(np.zeros((2, 2, 5), "S3")), "unsupported_mode"),
        (npy(np.zeros((2, 2), [("a", "u1"), ("b", "<f8")])), "unsupported_mode"),
        (npy(np.full((2, 2, 5), None), pickled=True), "unsupported_mode"),
        (npy_saying(header(descr="('|u1', (9999,))")), "corrupt"),
    ],
    ids=itertools.count(),
)
def test_hostile_arrays_are_refused_with_their_cause(data: bytes, cause: str) -> None:
    tracemalloc.start()
    try:
        assert refusal(data) == cause
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_a_colour_s_channels_go_through_the_gate_as_images_do(channels: int) -> None:
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    pixels = PIXELS[:, :, :channels]
    out = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels, mode).save(out, "PNG")
    for wanted in (1, 3, 4):
        chosen = policy(wanted, size=(20, 24), fit="pad")
        as_array = images.fit_and_encode(npy(pixels), chosen)
        as_image = images.fit_and_encode(out.getvalue(), chosen)
        assert (as_array.extension, as_array.data) == ("png", as_image.data)
        assert np.array_equal(
            images.decode(npy(pixels), wanted), images.decode(out.getvalue(), wanted)
        )
    assert images.fit_and_encode(npy(pixels), policy(channels)).extension == "png"
    assert refusal(npy(PIXELS), channels) == "wrong_channels"
    assert refusal(npy(PIXELS[:, :, :2].astype(np.float32)), channels) == "unsupported_mode"


def test_channels_are_fitted_one_by_one_as_grey_images_are() -> None:
    grey = (299 * 10 + 587 * 200 + 114 * 30 + 500) // 1000
    values = (*BACKGROUND, grey, grey)
    assert arrays.backgrounds(5, BACKGROUND) == values
    assert arrays.backgrounds(2, BACKGROUND) == (grey, grey)
    for fit in ("stretch", "crop", "pad"):
        packed = images.fit_and_encode(GOOD, policy(size=(20, 12), fit=fit))
        assert (packed.width, packed.height) == (37, 50)
        found = images.decode(packed.data, 5)
        for at, value in enumerate(values):
            out = io.BytesIO()
            Image.fromarray(np.ascontiguousarray(PIXELS[:, :, at])).save(out, "PNG")
            as_grey = policy(1, size=(20, 12), fit=fit, background=(value, value, value))
            grey_image = images.fit_and_encode(out.getvalue(), as_grey)
            assert np.array_equal(found[:, :, at : at + 1], images.decode(grey_image.data, 1))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"encode": "jpeg"}, "--encode jpeg has 1, 3 or 4 channels"),
        ({"encode": "png"}, "--encode png has 1, 3 or 4 channels"),
        ({"encode": "webp", "channels": 2}, "images of 2 are packed as .npy"),
        ({"size": (8000, 8000), "channels": 64}, "--size 8000x8000 with --channels 64: more than"),
    ],
)
def test_options_that_do_not_go_with_arrays_are_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        policy(**options)
    assert policy(encode="keep") == policy()
    assert policy().encode == "npy"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("compression", [None, "adobe_deflate"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_tiffs_are_read_as_tifffile_wrote_them(
    dtype: type[np.generic], compression: str | None, planar: str
) -> None:
    values = PIXELS if dtype == np.uint8 else DEEP
    turned = values if planar == "contig" else values.transpose(2, 0, 1).copy()
    blocks: list[dict[str, Any]] = [{}, {"rowsperstrip": 7}, {"tile": (16, 32)}]
    for block, predictor, order, big in itertools.product(
        blocks, (None, 2) if compression else (None,), "<>", (False, True)
    ):
        data = tiff(
            turned, planarconfig=planar, compression=compression, predictor=predictor,
            byteorder=order, bigtiff=big, **block,
        )  # fmt: skip
        assert images.read_size(data, channels=5) == (37, 50)
        assert np.array_equal(arrays.read_pixels(data, 5), eight_bits(values))
        assert refusal(data, 6) == "wrong_channels"


def test_pages_of_a_tiff_are_its_bands_where_each_has_one() -> None:
    data = tiff(DEEP.transpose(2, 0, 1).copy())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        assert len(file.pages) == 5
    assert np.array_equal(arrays.read_pixels(data, 5), eight_bits(DEEP))
    out = io.BytesIO()
    with tifffile.TiffWriter(out) as writer:
        writer.write(PIXELS, photometric="minisblack", planarconfig="contig")
        writer.write(PIXELS[::2, ::2, :1].copy(), photometric="minisblack", subfiletype=1)
    assert np.array_equal(arrays.read_pixels(out.getvalue(), 5), PIXELS)


def test_tiffs_of_a_colour_s_channels_are_left_to_pillow() -> None:
    data = tiff(PIXELS[:, :, :3].copy(), photometric="rgb")
    packed = images.fit_and_encode(data, policy(3))
    assert packed.extension == "png"
    assert np.array_equal(images.decode(packed.data, 3), PIXELS[:, :, :3])


def test_lzw_needs_a_library_and_says_so() -> None:
    # Made by Pillow, as tifffile needs imagecodecs to write it too.
    pages = [Image.fromarray(PIXELS[:, :, at].copy()) for at in range(5)]
    out = io.BytesIO()
    pages[0].save(out, "TIFF", compression="tiff_lzw", save_all=True, append_images=pages[1:])
    if importlib.util.find_spec("imagecodecs") is None:
        assert refusal(out.getvalue()) == "needs_imagecodecs"
    else:
        assert np.array_equal(arrays.read_pixels(out.getvalue(), 5), PIXELS)


BOMB = zlib.compress(bytes(200_000_000), 9)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (bands(bytes(499)), "corrupt"),
        (bands()[:7], "truncated"),
        (bands(t256=(60000,), t257=(60000,)), "too_large"),
        (bands(t256=(2**32 - 1,), t257=(2**32 - 1,)), "too_large"),
        (bands(t256=(70000,), t257=(2,)), "too_large"),
        (bands(t256=(0,)), "corrupt"),
        (bands(t256=(10, 10)), "corrupt"),
        (bands(t277=(0,)), "corrupt"),
        (bands(t277=(2**31,)), "too_large"),
        (bands(t277=(100,), t258=(8,) * 100, t339=(1,) * 100), "wrong_channels"),
        (bands(t277=(6,)), "wrong_channels"),
        (bands(t258=(1,) * 5), "unsupported_mode"),
        (bands(t258=(8, 8, 8, 8, 16)), "unsupported_mode"),
        (bands(t258=(32,) * 5), "unsupported_mode"),
        (bands(t258=(8,) * 2000), "corrupt"),
        (bands(t339=(2,) * 5), "unsupported_mode"),
        (bands(t339=(3,) * 5), "unsupported_mode"),
        (bands(t262=(3,)), "unsupported_mode"),
        (bands(t262=(0,)), "unsupported_mode"),
        (bands(t266=(2,)), "unsupported_mode"),
        (bands(t274=(6,)), "unsupported_mode"),
        (bands(t32997=(2,)), "unsupported_mode"),
        (bands(t259=(7,)), "unsupported_compression"),
        (bands(t259=(32773,)), "unsupported_compression"),
        (bands(t317=(3,)), "unsupported_compression"),
        (bands(t273=(8, 8)), "corrupt"),
        (bands(t273=(9000,)), "truncated"),
        (bands(t279=(2**32 - 1,)), "truncated"),
        (bands(t279=(0,)), "corrupt"),
        (bands(t278=(0,)), "corrupt"),
        (bands(t278=(1,)), "corrupt"),
        (bands(t256=(60000,), t257=(1000,), t278=(1,), t284=(2,)), "corrupt"),
        (bands(t257=(65535,), t278=(1,), t284=(2,)), "too_large"),
        (bands(t322=(60000,), t323=(60000,), t324=(8,), t325=(500,)), "too_large"),
        (bands(t322=(0,), t323=(16,), t324=(8,), t325=(500,)), "corrupt"),
        (bands(t322=(1,), t323=(1,), t324=(8,), t325=(500,)), "corrupt"),
        (bands(BOMB, t259=(8,)), "corrupt"),
        (bands(BOMB[:5000], t259=(8,)), "corrupt"),
        (bands(b"\0" * 90, t259=(8,)), "corrupt"),
        (bands(zlib.compress(bytes(500))[:-3], t259=(8,)), "truncated"),
        (bands(zlib.compress(bytes(500))[:-1] + b"\7", t259=(8,)), "corrupt"),
        (bands(zlib.compress(bytes(499)), t259=(8,)), "corrupt"),
        (tiff_with({}), "corrupt"),
        (struct.pack("<2sHI", b"II", 42, 0), "corrupt"),
        (struct.pack("<2sHI", b"II", 42, 2**31), "truncated"),
        (struct.pack("<2sHIH", b"II", 42, 8, 65535) + bytes(20), "corrupt"),
        (b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 2**63), "corrupt"),
        (images.fit_and_encode(npy(PIXELS[:, :, :3]), policy(3)).data, "unsupported_format"),
    ],
    ids=itertools.count(),
)
def test_hostile_tiffs_are_refused_with_their_cause(
    data: bytes, cause: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert refusal(bands(t256=(0,))) == "corrupt"  # tifffile is imported
    tracemalloc.start()
    try:
        assert refusal(data) == cause
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()
    assert capfd.readouterr() == ("", "")


def test_a_tiff_whose_pages_never_end_is_refused() -> None:
    page = bands(t258=(8,), t277=(1,), t339=(1,))
    assert refusal(tiff_with({256: (10,)})) == "corrupt"
    at = struct.unpack_from("<I", page, 4)[0]
    (count,) = struct.unpack_from("<H", page, at)
    endless = bytearray(page)
    struct.pack_into("<I", endless, at + 2 + 12 * count, at)
    assert refusal(bytes(endless)) == "wrong_channels"


def test_a_tag_that_comes_twice_is_refused() -> None:
    data = bands()
    assert data.count(struct.pack("<HHI", 284, 4, 1)) == 1
    twice = data.replace(struct.pack("<HHI", 284, 4, 1), struct.pack("<HHI", 256, 4, 1))
    assert refusal(twice) == "corrupt"


def test_without_tifffile_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tifffile", None)
    tiffs._tifffile.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'pixloom\[tiff\]'"):
        images.read_size(bands(), channels=5)
    tiffs._tifffile.cache_clear()


@given(
    st.sampled_from(
        [
            GOOD,
            npy(DEEP, (2, 0)),
            tiff(PIXELS, planarconfig="contig"),
            tiff(DEEP.transpose(2, 0, 1).copy(), planarconfig="separate", tile=(16, 32)),
            tiff(PIXELS, planarconfig="contig", compression="adobe_deflate", predictor=2),
        ]
    ),
    st.data(),
)
def test_damaged_bytes_are_packed_or_refused_never_more(good: bytes, data: st.DataObject) -> None:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(0, 8))):
        # Headers are at one end or the other.
        at = data.draw(st.one_of(st.integers(0, 400), st.integers(len(good) - 400, len(good) - 1)))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(good)), st.integers(0, len(good))))
    try:
        packed = images.fit_and_encode(bytes(damaged[:cut]), policy(size=(8, 8)))
    except ImageRefused:
        return
    assert images.decode(packed.data, 5).shape == (8, 8, 5)


def run(*words: object) -> int:
    return pack.main([str(word) for word in words])


def make_folder(folder: Path, count: int, code: bool = False) -> Path:
    """Arrays and TIFFs of 5 channels by turns, of one size; the last is a copy of the first."""
    folder.mkdir()
    for number in range(count):
        seed = 0 if number == count - 1 else number
        pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 5), dtype=np.uint8)
        path = folder / f"{number:03}.npy"
        if number % 2 and seed:
            path = path.with_suffix(".tif")
            path.write_bytes(tiff(pixels, planarconfig="contig"))
        else:
            path.write_bytes(npy(pixels))
        if code:
            path.with_suffix(".gui").write_text(f"row {{ btn-{number} }}")
    return folder


# webdataset leaves its tar files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("size", [None, "16x20"])
def test_arrays_are_packed_verified_and_read_by_plain_webdataset(
    tmp_path: Path, size: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_folder(tmp_path / "raw", 13), tmp_path / "out"
    (raw / "float.npy").write_bytes(npy(np.zeros((24, 32, 5), np.float32)))
    (raw / "six.npy").write_bytes(npy(np.zeros((24, 32, 6), np.uint8)))
    (raw / "cut.tif").write_bytes(tiff(PIXELS, planarconfig="contig")[:300])
    Image.new("RGB", (32, 24)).save(raw / "preview.png")
    words = [raw, out, "--channels", 5, "--split", "train=rest,test=4", "--workers", 0, "--json"]
    words += ["--shard-samples", 4] + (["--size", size, "--fit", "pad"] if size else [])
    assert run(*words) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["skips"] == {"truncated": 1, "unsupported_mode": 1, "wrong_channels": 1}
    assert (row["duplicates"], sum(row["samples"].values())) == (1, 13)
    assert row["image"]["encode"] == "npy"
    manifest = storage.load_manifest(str(out))
    shape = (24, 32, 5) if size is None else (20, 16, 5)
    assert (manifest.image.height, manifest.image.width, manifest.image.channels) == shape
    assert json.loads((out / "manifest.json").read_text())["version"] == 2
    assert verify.main([str(out), "--deep", "--workers", "0"]) == 0
    assert run(*words) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["nothing_to_do"]

    urls = sorted(str(path) for path in out.glob("*/*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    gc.collect()
    assert len(samples) == 13
    chosen = policy(size=None if size is None else (16, 20), fit=size and "pad")
    chosen = ImagePolicy(**{**vars(chosen), "background": (255, 255, 255)})
    for sample in samples:
        assert {name for name in sample if not name.startswith("__")} == {"image.npy", "json"}
        source = (raw / sample["json"]["source"]).read_bytes()
        expected = images.decode(images.fit_and_encode(source, chosen).data, 5)
        assert sample["image.npy"].shape == shape
        assert np.array_equal(sample["image.npy"], expected)

    assert show.main([str(out), "--out", str(tmp_path / "sheet.png")]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 100


def test_arrays_with_code_have_tokens_and_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = make_folder(tmp_path / "raw", 8, code=True), tmp_path / "out"
    assert run(raw, out, "--channels", 5, "--split", "train=1", "--workers", 0) == 0
    [span, *_] = parse_index((out / "train/000000.idx").read_text(), "here")
    names = [member.extension for member in span.members]
    assert names == ["image.npy", "json", "tokens.npy", "txt"]
    assert image_extension(names) == "image.npy"
    assert image_extension(["tokens.npy", "txt"]) is None
    assert verify.main([str(out), "--deep", "--workers", "0"]) == 0
    assert show.main([str(out), "--out", str(tmp_path / "sheet.png")]) == 0
    # And packed again, from its own tars.
    again = tmp_path / "again"
    assert run(f"{out}/train/*.tar", again, "--channels", 5, "--split", "train=1") == 0
    assert storage.load_manifest(str(again)).num_samples("train") == 8
    capsys.readouterr()
    assert run(raw, tmp_path / "no", "--channels", 5, "--encode", "webp") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    for channels in ("0", "65", "-1", "x"):
        with pytest.raises(SystemExit):
            run(raw, tmp_path / "no", f"--channels={channels}")


def test_arrays_beside_other_images_are_left_alone(tmp_path: Path) -> None:
    """As ever: `.npy` files there may be anything, features of these images for one."""
    raw = make_folder(tmp_path / "raw", 4)
    for number in range(4):
        pixels = np.full((8, 8, 3), number, np.uint8)
        Image.fromarray(pixels).save(raw / f"{number:03}.png")
    for path in raw.glob("*.tif"):
        path.unlink()
    assert run(raw, tmp_path / "out", "--split", "train=1", "--workers", 0) == 0
    manifest = storage.load_manifest(str(tmp_path / "out"))
    assert (manifest.num_samples("train"), dict(manifest.skips)) == (4, {})
    assert json.loads((tmp_path / "out/manifest.json").read_text())["version"] == 1
    # Alone, they are images.
    for path in [*raw.glob("*.png"), *raw.glob("*.npy")]:
        path.unlink()
    for number in range(4):
        np.save(raw / f"{number}.npy", PIXELS[:, :, :3] + np.uint8(number))
    assert run(raw, tmp_path / "rgb", "--split", "train=1", "--workers", 0) == 0
    [span, *_] = parse_index((tmp_path / "rgb/train/000000.idx").read_text(), "here")
    assert [member.extension for member in span.members] == ["json", "png"]


def test_tables_name_arrays_and_hold_them(tmp_path: Path) -> None:
    raw = make_folder(tmp_path / "raw", 6)
    with (raw / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image"], *([path.name] for path in sorted(raw.glob("0*")))])
    words = ["--channels", 5, "--split", "train=1", "--workers", 0]
    assert run(raw / "list.csv", tmp_path / "paths", *words) == 0
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    cells = [path.read_bytes() for path in sorted(raw.glob("0*"))]
    parquet.write_table(pa.table({"image": cells}), raw / "list.parquet")
    assert run(raw / "list.parquet", tmp_path / "bytes", *words) == 0
    for name in ("paths", "bytes"):
        assert storage.load_manifest(str(tmp_path / name)).num_samples("train") == 6
        assert verify.main([str(tmp_path / name), "--deep", "--workers", "0"]) == 0


@pytest.mark.parametrize("channels", [3, 5])
def test_shards_of_another_tool_may_hold_arrays(
    tmp_path: Path, channels: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    deep = [DEEP[:, :, :channels] // (number + 1) for number in range(6)]
    with webdataset.TarWriter(str(folder / "train.tar")) as writer:
        for number, values in enumerate(deep):
            array = values.transpose(2, 0, 1) if number % 2 else np.asfortranarray(values)
            sample = {"__key__": f"{number}", "npy": npy(array), "txt": f"row {number}"}
            writer.write(sample)
        writer.write({"__key__": "bad", "npy": npy(np.zeros((4, 4, channels))), "txt": "a"})
    words = ["--channels", str(channels), "--workers", "0"]
    words += ["--image-extension", "npy"] if channels == 3 else []
    assert index.main([str(folder), *words]) == 0
    assert "1 unsupported_mode" in capsys.readouterr().err
    manifest = storage.load_manifest(str(folder))
    assert manifest.kind == "pairs"
    assert (manifest.image.width, manifest.image.height) == (37, 50)
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2
    assert verify.main([str(folder), "--deep", "--workers", "0"]) == 0
    tar = (folder / "train.tar").read_bytes()
    for span, values in zip(
        parse_index((folder / "train.idx").read_text(), "here"), deep, strict=True
    ):
        names = [member.extension for member in span.members]
        assert image_extension(names) == "npy"
        [member] = [one for one in span.members if one.extension == "npy"]
        data = tar[member.offset : member.offset + member.size]
        assert np.array_equal(images.decode(data, channels), eight_bits(values))
    with pytest.raises(SystemExit):
        index.main([str(folder), "--image-extension", "tokens.npy"])


def test_an_older_pixloom_would_say_that_it_cannot_read_arrays(tmp_path: Path) -> None:
    raw, out = make_folder(tmp_path / "raw", 4), tmp_path / "out"
    assert run(raw, out, "--channels", 5, "--split", "train=1", "--workers", 0) == 0
    text = (out / "manifest.json").read_text()
    assert Manifest.from_json(text, "here").image.encode == "npy"
    with pytest.raises(FormatError, match="format version 3, this pixloom reads up to 2"):
        Manifest.from_json(text.replace('"version": 2', '"version": 3'), "here")


def test_a_page_behind_the_end_of_any_file() -> None:
    assert refusal(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 2**63 + 1)) == "truncated"
