import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shards import images
from shards.format import ImagePolicy
from shards.images import ImageRefused
from shards.storage import UserError

RED, WHITE = (200, 30, 40), (255, 255, 255)


def policy(**options: object) -> ImagePolicy:
    defaults: dict[str, object] = {
        "size": None, "fit": None, "encode": None, "channels": 3, "quality": 90,
        "background": WHITE,
    }  # fmt: skip
    return images.make_policy(**{**defaults, **options})  # type: ignore[arg-type]


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(size: tuple[int, int] = (60, 40), mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(7)
    channels = {"L": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    pixels = rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def pixels_of(data: bytes, channels: int = 3, **options: object) -> np.ndarray:
    packed = images.fit_and_encode(data, policy(channels=channels, **options))
    return images.decode(packed.data, channels)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def png_claiming(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body + png_chunk(b"IEND", b"")


PNG = encoded(noise())
JPEG = encoded(noise(), "JPEG")


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "empty"),
        (b"no image at all", "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported_format"),
        (PNG[: len(PNG) // 2], "truncated"),
        (JPEG[: len(JPEG) // 2], "truncated"),
        (PNG[:20], "truncated"),
        (PNG[:60] + bytes(len(PNG) - 60), "corrupt"),
        (png_claiming(9000, 9000), "too_large"),
        (png_claiming(60000, 60000), "too_large"),
        (png_claiming(70000, 2), "too_large"),
        (encoded(Image.new("F", (4, 4), 0.5), "TIFF"), "unsupported_mode"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_cause(data: bytes, cause: str) -> None:
    def read_and_pack() -> None:
        images.read_size(data)
        images.fit_and_encode(data, policy(size=(16, 16)))

    with pytest.raises(ImageRefused) as refused:
        read_and_pack()
    assert refused.value.cause == cause


@given(st.sampled_from([PNG, JPEG, encoded(noise(), "WEBP"), encoded(noise(), "TIFF")]), st.data())
def test_damaged_bytes_are_packed_or_refused_never_more(good: bytes, data: st.DataObject) -> None:
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    try:
        packed = images.fit_and_encode(bytes(damaged[:cut]), policy(size=(8, 8)))
    except ImageRefused:
        return
    assert images.decode(packed.data, 3).shape == (8, 8, 3)


def test_keep_leaves_the_bytes_of_plain_images_alone() -> None:
    for kind, extension in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        data = encoded(noise(), kind)
        packed = images.fit_and_encode(data, policy())
        assert (packed.data, packed.extension) == (data, extension)
        assert (packed.width, packed.height) == (60, 40)


def test_keep_still_refuses_what_does_not_decode() -> None:
    with pytest.raises(ImageRefused):
        images.fit_and_encode(JPEG[:-300], policy())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_keep_encodes_other_modes_as_png(mode: str) -> None:
    data = encoded(noise(mode=mode))
    packed = images.fit_and_encode(data, policy())
    assert (packed.data == data) == (mode == "RGB")
    with Image.open(io.BytesIO(packed.data)) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")


@pytest.mark.parametrize(("size", "fit"), [((20, 30), "stretch"), ((20, 30), "crop")])
def test_the_fitted_size_is_the_one_asked_for(size: tuple[int, int], fit: str) -> None:
    assert pixels_of(PNG, size=size, fit=fit).shape == (size[1], size[0], 3)


def test_pad_shows_the_background_at_both_sides() -> None:
    red = encoded(Image.new("RGB", (10, 20), RED))
    pixels = pixels_of(red, size=(20, 20), fit="pad", background=(1, 2, 3))
    assert (pixels[:, :4] == (1, 2, 3)).all()
    assert (pixels[:, -4:] == (1, 2, 3)).all()
    assert (pixels[:, 7:13] == RED).all()


@pytest.mark.parametrize("encode", ["png", "jpeg", "webp"])
def test_the_same_pixels_give_the_same_bytes_without_metadata(encode: str) -> None:
    image = noise()
    exif = Image.Exif()
    exif[0x010E] = "a description"
    plain = encoded(image)
    noted = encoded(image, dpi=(300, 300), exif=exif, icc_profile=b"not a profile")
    first, second = (
        images.fit_and_encode(data, policy(encode=encode)).data for data in (plain, noted)
    )
    assert first == second


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_saturated(kind: str) -> None:
    deep = np.array([[0, 257, 40000, 65535]], dtype=np.uint16)
    data = encoded(Image.fromarray(deep), kind)
    assert pixels_of(data, encode="png")[0, :, 0].tolist() == [0, 1, 156, 255]
    assert pixels_of(data, 1, encode="png")[0, :, 0].tolist() == [0, 1, 156, 255]


def test_transparency_shows_the_background() -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    for data in (
        encoded(image),
        encoded(image.convert("LA").convert("RGBA"), "WEBP", lossless=True),
    ):
        assert pixels_of(data, encode="png", background=(9, 8, 7))[0, 0].tolist() == [9, 8, 7]
    assert pixels_of(encoded(image), 4, encode="png")[0, :, 3].tolist() == [0, 255]


def test_a_transparent_palette_entry_shows_the_background() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, 0, 0, 0])
    image.putpixel((1, 0), 1)
    data = encoded(image, transparency=1)
    assert pixels_of(data).tolist() == [[list(RED), list(WHITE)]]


def test_cmyk_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    red, green, blue = pixels_of(data, encode="png")[4, 4].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), "JPEG", exif=exif, quality=95)
    width, height = images.read_size(data)
    packed = images.fit_and_encode(data, policy())
    assert (packed.width, packed.height) == (width, height)
    assert (width, height) == ((40, 60) if orientation >= 5 else (60, 40))
    assert (packed.data == data) == (orientation == 1)
    assert images.read_size(packed.data) == (width, height)
    turned = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    expected = {
        1: turned, 2: turned[:, ::-1], 3: turned[::-1, ::-1], 4: turned[::-1],
        5: turned.swapaxes(0, 1), 6: turned[::-1].swapaxes(0, 1),
        7: turned[::-1, ::-1].swapaxes(0, 1), 8: turned[:, ::-1].swapaxes(0, 1),
    }  # fmt: skip
    assert (images.decode(packed.data, 3) == expected[orientation]).all()


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("1", {}), ("L", {}), ("L", {"transparency": 9}), ("LA", {}), ("P", {}),
        ("P", {"transparency": 3}), ("P", {"transparency": b"\1\2"}), ("P", {"bits": 4}),
        ("RGB", {}), ("RGB", {"transparency": (1, 2, 3)}), ("RGBA", {}), ("I;16", {}),
    ],
)  # fmt: skip
def test_the_size_of_a_png_is_the_one_that_pillow_reads(
    mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every kind, whole and with any byte wrong: who asks Pillow or not, all say the same."""
    image = Image.new("I;16", (9, 7)) if mode == "I;16" else noise((9, 7)).convert(mode)
    data = encoded(image, **options)

    def outcomes() -> list[tuple[int, int] | str]:
        found: list[tuple[int, int] | str] = []
        for at in range(-1, len(data)):
            wrong = bytearray(data)
            if at >= 0:
                wrong[at] ^= 0x11
            try:
                found.append(images.read_size(bytes(wrong)))
            except images.ImageRefused as refused:
                found.append(refused.cause)
        return found

    quick = outcomes()
    assert quick[0] == (9, 7)
    monkeypatch.setattr(images, "plain_size", lambda data: None)
    assert outcomes() == quick


@pytest.mark.parametrize("place", ["IDAT", "IEND"])
def test_an_orientation_after_the_pixels_is_nobodys(place: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    at = PNG.index(place.encode()) - 4
    data = PNG[:at] + png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + PNG[at:]
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert image.getexif()[0x0112] == 6
    size = (40, 60) if place == "IDAT" else (60, 40)
    assert images.read_size(data) == size
    shared = ImagePolicy(*size, 3, "none", "keep", 90, WHITE)  # As of a folder of this one alone.
    packed = images.fit_and_encode(data, shared)
    assert (packed.width, packed.height) == size
    assert images.decode(packed.data, 3).shape == (size[1], size[0], 3)
    assert (packed.data == data) == (place == "IEND")


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_size_of_a_turned_tiff_is_stated_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(), "TIFF", exif=exif)
    packed = images.fit_and_encode(data, policy())
    assert images.read_size(data) == (packed.width, packed.height)
    turns = {1: 0, 3: 2, 6: 3}[orientation]
    assert (images.decode(packed.data, 3) == np.rot90(np.asarray(noise()), turns)).all()


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory when reading image file")])
@pytest.mark.parametrize(
    "place", ["PIL.Image.open", "PIL.ImageFile.ImageFile.load", "PIL.Image.Image.getexif"]
)
def test_want_of_memory_is_not_the_fault_of_an_image(
    place: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    if place.endswith("getexif") and not isinstance(error, MemoryError):
        return
    monkeypatch.setattr(place, fail)
    with pytest.raises(MemoryError):
        images.fit_and_encode(JPEG, policy())
    with (
        pytest.raises(UserError, match=r"'x\.jpg': not enough memory"),
        images.memory_explained("x.jpg"),
    ):
        images.fit_and_encode(JPEG, policy())


def test_pillow_says_that_a_decoder_has_no_memory_as_expected_here() -> None:
    assert Image.core.getcodecstatus(-9).startswith("out of memory")


@pytest.mark.parametrize(("encode", "side"), [("webp", 16_384), ("jpeg", 65_501), ("png", 65_536)])
def test_a_side_that_an_encoder_has_no_room_for_is_refused(encode: str, side: int) -> None:
    with pytest.raises(UserError, match=f"--size {side}x1: a side of {encode}"):
        policy(size=(side, 1), encode=encode)
    fitting = images.fit_and_encode(PNG, policy(size=(side - 1, 1), encode=encode))
    assert images.read_size(fitting.data) == (side - 1, 1)
    if side <= images.MAX_SIDE:
        with pytest.raises(ImageRefused) as refused:
            images.fit_and_encode(encoded(Image.new("RGB", (side, 1))), policy(encode=encode))
        assert refused.value.cause == "too_large"


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_of_an_animation_the_first_frame_is_packed_alone(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, WHITE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    packed = images.fit_and_encode(data, policy())
    with Image.open(io.BytesIO(packed.data)) as image:
        assert image.format == "PNG"
        assert not getattr(image, "is_animated", False)
    assert (images.decode(packed.data, 3) == RED).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_every_image_has_the_channels_asked_for(channels: int) -> None:
    for mode in ("L", "RGB", "RGBA"):
        packed = images.fit_and_encode(encoded(noise(mode=mode)), policy(channels=channels))
        assert images.decode(packed.data, channels).shape == (40, 60, channels)
        assert images.read_channels(packed.data) == channels


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fit": "pad"}, "--size"),
        ({"fit": "none", "size": (8, 8)}, "--fit none"),
        ({"encode": "keep", "size": (8, 8)}, "--encode keep"),
        ({"encode": "jpeg", "channels": 4}, "--channels 4"),
        ({"size": (60000, 60000)}, "--size"),
    ],
)
def test_options_that_do_not_go_together_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        policy(**options)


def test_a_screen_keeps_its_look_at_a_seventh_of_its_size(screens: Path) -> None:
    data = (screens / "0242.png").read_bytes()
    small = pixels_of(data, size=(160, 96))
    with Image.open(io.BytesIO(data)) as image:
        exact = image.convert("RGB").resize((160, 96), Image.Resampling.LANCZOS)
    assert np.abs(small.astype(int) - np.asarray(exact)).max() <= 8
