"""The fast decoders: Pillow's pixels bit for bit, and Pillow asked about everything unusual."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from shards import images
from shards.codecs import decode_plain
from shards.images import ImageRefused

CHANNELS = {"L": 1, "RGB": 3, "RGBA": 4}


def noise(size: tuple[int, int], mode: str = "RGB", seed: int = 7) -> Image.Image:
    """Smooth and rough parts, so that encoders use all they have."""
    rng = np.random.default_rng(seed)
    channels = {"CMYK": 4, **CHANNELS}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    pixels[: size[1] // 2] //= 16
    pixels[size[1] // 3 :, : size[0] // 3] = 77
    return Image.frombytes(mode, size, pixels.tobytes())


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """The PNG with one more chunk, after its header."""
    return png[:33] + chunk(kind, data) + png[33:]


def png_of(raw: bytes) -> bytes:
    """8x8 RGB from what stands in IDAT."""
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", raw), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def fast(data: bytes, channels: int = 3) -> np.ndarray | None:
    return decode_plain(data, channels, max_pixels=images.MAX_PIXELS, max_side=images.MAX_SIDE)


def result(decode: object, data: bytes, channels: int) -> object:
    """Pixels as bytes and their shape, or the cause of the refusal."""
    try:
        pixels = decode(data, channels)  # type: ignore[operator]
    except ImageRefused as refused:
        return refused.cause
    return pixels.shape, pixels.tobytes()


def assert_same(data: bytes, channels: int = 3) -> None:
    assert result(images.decode, data, channels) == result(images._decode_any, data, channels)


SIZES = [(1, 1), (8, 9), (33, 17), (130, 70)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", CHANNELS)
def test_ordinary_pngs_are_decoded_fast_and_bit_for_bit(mode: str, size: tuple[int, int]) -> None:
    text = PngInfo()
    text.add_text("Software", "a browser")
    for options in (
        {},
        {"compress_level": 0},
        {"compress_level": 9, "pnginfo": text, "dpi": (9, 9)},
    ):
        data = encoded(noise(size, mode), "PNG", **options)
        assert fast(data, CHANNELS[mode]) is not None
        assert_same(data, CHANNELS[mode])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_ordinary_jpegs_are_decoded_fast_and_bit_for_bit(
    size: tuple[int, int], mode: str, progressive: bool, subsampling: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010F] = "a camera"
    for options in ({"quality": 60}, {"quality": 95, "exif": exif, "restart_marker_blocks": 2}):
        image = noise(size, mode)
        data = encoded(image, "JPEG", progressive=progressive, subsampling=subsampling, **options)
        assert fast(data, CHANNELS[mode]) is not None
        assert_same(data, CHANNELS[mode])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(noise((40, 30)), "JPEG", exif=exif)


PNG, JPEG = encoded(noise((40, 30)), "PNG"), encoded(noise((40, 30)), "JPEG")
UNUSUAL = {
    "palette": encoded(noise((40, 30)).quantize(16), "PNG"),
    "one bit": encoded(noise((40, 30)).convert("1"), "PNG"),
    "16 bits": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "PNG"),
    "grey": encoded(noise((40, 30), "L"), "PNG"),
    "alpha": encoded(noise((40, 30), "RGBA"), "PNG"),
    "transparent colour": encoded(noise((40, 30)), "PNG", transparency=(77, 77, 77)),
    "orientation in PNG": with_chunk(PNG, b"eXIf", b"MM\0*\0\0\0\x08\0\0"),
    "animation": encoded(
        noise((40, 30)), "PNG", save_all=True, append_images=[noise((40, 30), seed=8)]
    ),
    "interlaced": b"".join(
        [PNG[:28], b"\1", struct.pack(">I", zlib.crc32(PNG[12:28] + b"\1")), PNG[33:]]
    ),
    "profile as text": with_chunk(PNG, b"tEXt", b"Raw profile type exif\0\nexif\n0\n"),
    "an unknown chunk": with_chunk(PNG, b"abCd", b"what"),
    "bytes after the end": PNG + b"more",
    "a wrong checksum": PNG[:-16] + bytes([PNG[-16] ^ 1]) + PNG[-15:],
    "grey JPEG": encoded(noise((40, 30), "L"), "JPEG"),
    "CMYK": encoded(noise((40, 30), "CMYK"), "JPEG"),
    "turned": turned(),
    "no end": JPEG[:-2],
    "WEBP": encoded(noise((40, 30)), "WEBP", quality=80),
    "lossless WEBP": encoded(noise((40, 30)), "WEBP", lossless=True),
    "too few pixels": png_of(zlib.compress(bytes(100))),
    "no such filter": png_of(zlib.compress((b"\x09" + bytes(24)) * 8)),
    "no pixels": png_of(b""),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_left_to_pillow(name: str) -> None:
    assert fast(UNUSUAL[name]) is None
    assert_same(UNUSUAL[name])


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([PNG, JPEG, encoded(noise((40, 30)), "JPEG", progressive=True)]),
    st.sampled_from(["cut", "flip", "zeros"]),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 7),
)
def test_damage_has_the_outcome_that_it_has_with_pillow(
    data: bytes, how: str, where: float, bit: int
) -> None:
    at = int(where * len(data))
    damaged = {
        "cut": data[:at],
        "flip": data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :],
        "zeros": data[:at] + bytes(len(data) - at),
    }[how]
    assert_same(damaged)


def test_limits_hold_before_anything_is_decoded() -> None:
    assert decode_plain(PNG, 3, max_pixels=1199, max_side=99) is None
    assert decode_plain(JPEG, 3, max_pixels=1199, max_side=99) is None
    assert decode_plain(PNG, 3, max_pixels=1200, max_side=39) is None
    assert decode_plain(JPEG, 3, max_pixels=1200, max_side=40) is not None


def test_a_jpeg_comes_smaller_by_a_power_of_two_but_not_below_the_least_size() -> None:
    smooth = noise((9, 7)).resize((641, 481), Image.Resampling.BICUBIC)
    data = encoded(smooth, "JPEG", quality=95)
    shapes = {
        least: images.decode(data, 3, least=least).shape[:2]
        for least in [(81, 61), (81, 62), (161, 121), (320, 240), (322, 9), (9, 482)]
    }
    assert shapes == {
        (81, 61): (61, 81),
        (81, 62): (121, 161),
        (161, 121): (121, 161),
        (320, 240): (241, 321),
        (322, 9): (481, 641),
        (9, 482): (481, 641),
    }
    half = images.decode(data, 3, least=(321, 241)).astype(int)
    expected = np.asarray(smooth.resize((321, 241), Image.Resampling.BOX)).astype(int)
    assert np.abs(half - expected).mean() < 1
    assert images.decode(encoded(smooth, "PNG"), 3, least=(81, 61)).shape == (481, 641, 3)


@pytest.mark.parametrize("data", [PNG, JPEG, UNUSUAL["WEBP"], UNUSUAL["grey"]])
def test_the_pixels_go_where_they_are_wanted(data: bytes) -> None:
    rows = np.full((3, 30, 40, 3), 9, np.uint8)
    assert images.decode(data, 3, out=rows[1]) is not rows[0]
    assert np.array_equal(rows[1], images.decode(data, 3))
    assert (rows[[0, 2]] == 9).all()
    other = np.zeros((31, 40, 3), np.uint8)
    assert images.decode(data, 3, out=other).shape == (30, 40, 3)
