"""The image gate: untrusted bytes in; checked, upright, uniform images out.

Every image of a dataset goes through `fit_and_encode`, whose result depends on the bytes and the
policy alone, and comes back to training through `decode`: by `shards.codecs` where it can, which
is several times faster, else by Pillow. Limits are checked on the header, before
a decoder allocates anything. Images of other than 1, 3 or 4 channels are arrays, which
`shards.arrays` reads and writes. Which images there are is the subject of `shards.sources`.
"""

import dataclasses
import io
import re
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards import arrays, headers, resample
from shards.codecs import decode_plain, plain_size
from shards.format import ARRAY_EXTENSION, ImagePolicy
from shards.limits import MAX_FILE_BYTES as MAX_FILE_BYTES
from shards.limits import MAX_PIXELS as MAX_PIXELS
from shards.limits import MAX_SIDE as MAX_SIDE
from shards.limits import ImageRefused as ImageRefused
from shards.limits import check_size
from shards.storage import UserError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
MAX_ENCODED_SIDES = {"jpeg": 65_500, "webp": 16_383}
"""Pixels of a side above which these encoders give up."""

_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
SHARD_FORMATS = tuple(_EXTENSIONS)
"""What `decode` takes: all that `fit_and_encode` writes."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_EXIF_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|RIFF....WEBP|GIF8[79]a|BM|II\*\0|MM\0\*|II\+\0|MM\0\+", re.DOTALL
)

_quiet = threading.RLock()
"""of the process's list of what to warn of, which threads would put back in the wrong order"""


@dataclass(frozen=True)
class PackedImage:
    """An image as it goes into a shard. `width` and `height` are the upright original's."""

    extension: str
    data: bytes
    width: int
    height: int


def make_policy(
    *,
    size: tuple[int, int] | None,
    fit: str | None,
    encode: str | None,
    channels: int,
    quality: int,
    background: tuple[int, int, int],
) -> ImagePolicy:
    """The policy that options ask for; `size` is (width, height) in pixels.

    Raises `UserError` naming the option that does not go with another.
    """
    is_array = channels not in _MODES
    if is_array and encode not in (None, "keep"):
        raise UserError(
            f"--encode {encode} has 1, 3 or 4 channels; drop it, images of {channels} are packed "
            "as .npy"
        )
    if size is None and fit not in (None, "none"):
        raise UserError(f"--fit {fit} needs --size WxH")
    if size is not None and fit == "none":
        raise UserError("--fit none keeps every image's size; drop it or --size")
    if size is not None and encode == "keep":
        raise UserError("--encode keep keeps the file's bytes; drop it or --size")
    if size is not None and size[0] * size[1] > MAX_PIXELS:
        raise UserError(f"--size {size[0]}x{size[1]}: more than {MAX_PIXELS} pixels")
    if size is not None and max(size) > _max_side(encode):
        raise UserError(
            f"--size {size[0]}x{size[1]}: a side of {encode or 'png'} has at most "
            f"{_max_side(encode)} pixels"
        )
    if size is not None and size[0] * size[1] * channels > MAX_FILE_BYTES:
        raise UserError(
            f"--size {size[0]}x{size[1]} with --channels {channels}: more than {MAX_FILE_BYTES} "
            "bytes"
        )
    if encode == "jpeg" and channels == 4:
        raise UserError("--encode jpeg has no alpha channel; use png or webp with --channels 4")
    chosen_fit = fit or ("none" if size is None else "stretch")
    chosen_encode = "npy" if is_array else encode or ("keep" if size is None else "png")
    return ImagePolicy(
        width=size[0] if size is not None else None,
        height=size[1] if size is not None else None,
        channels=channels,
        fit=chosen_fit,  # type: ignore[arg-type]
        encode=chosen_encode,  # type: ignore[arg-type]
        quality=quality,
        background=background,
    )


def read_size(
    data: bytes, formats: tuple[str, ...] = FORMATS, channels: int = 3
) -> tuple[int, int]:
    """The upright (width, height) that the header states; of an image that will be packed with
    `channels`. Raises `ImageRefused`. Arrays are always among the `formats`."""
    if channels not in _MODES or data.startswith(arrays.MAGIC):
        if not data.startswith(arrays.MAGIC) and "TIFF" not in formats:
            raise ImageRefused("unsupported_format")
        height, width, _ = arrays.read_shape(data, channels)
        return width, height
    plain = plain_size(data) if len(data) <= MAX_FILE_BYTES else None
    if plain is not None:  # both formats are among all `formats`
        check_size(*plain)
        return plain
    with _opened(data, FORMATS) as image:
        if image.format in FORMATS and image.format not in formats:
            raise ImageRefused("unsupported_format")
        return _upright_size(image.size, _orientation(image))


def read_channels(data: bytes) -> int:
    """How many channels the header states; 0 for palettes and others, and for arrays that are not
    as `pack` writes them. Raises `ImageRefused`."""
    if data.startswith(arrays.MAGIC):
        return arrays.packed_channels(data)
    with _opened(data, FORMATS) as image:
        return next((number for number, mode in _MODES.items() if mode == image.mode), 0)


def fit_and_encode(data: bytes, policy: ImagePolicy) -> PackedImage:
    """Decodes, turns upright, converts, fits and encodes one image. Raises `ImageRefused`.

    With `encode` = `keep` the bytes stay as they are where they already are what training reads:
    one upright PNG, JPEG or WEBP frame in the mode of `policy.channels`. Otherwise the image is
    encoded as PNG, which loses nothing. Of an animation the first frame is taken. Running out of
    memory says nothing about an image, and stays a `MemoryError`.

    Where `policy.channels` are not a colour's, the image is an array or a TIFF of so many bands,
    and comes out as an array. Raises `UserError` too then, where TIFFs cannot be read here.
    """
    if policy.channels not in _MODES:
        pixels = arrays.read_pixels(data, policy.channels)
        height, width, _ = pixels.shape
        return PackedImage(
            ARRAY_EXTENSION, arrays.to_npy(_fit_bands(pixels, policy)), width, height
        )
    with _opened(data, FORMATS) as image, _refusing():
        orientation = _orientation(image)
        image.load()
        width, height = _upright_size(image.size, orientation)
        turn = _TURNS.get(orientation)
        if policy.encode == "keep" and turn is None and _is_plain(image, _MODES[policy.channels]):
            return PackedImage(_EXTENSIONS[str(image.format)], data, width, height)
        upright = image.transpose(turn) if turn is not None else image
        fitted = _fit(_convert(upright, str(image.format), policy), policy)
        extension, encoded = _encode(fitted, policy)
    return PackedImage(extension, encoded, width, height)


def decode(
    data: bytes,
    channels: int,
    *,
    least: tuple[int, int] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The pixels of a packed image: uint8, (height, width, channels). Raises `ImageRefused`.

    Args:
        least: (width, height) in pixels of what the image will be scaled down to: a JPEG may come
            smaller by a power of two, not below this. Which is a function of bytes and `least`.
        out: filled and returned if the image has its shape, which saves a copy. Else it may hold
            anything afterwards.
    """
    pixels = decode_plain(
        data, channels, max_pixels=MAX_PIXELS, max_side=MAX_SIDE, least=least, out=out
    )
    if pixels is None:
        pixels = _decode_any(data, channels)
        if out is not None and out.shape == pixels.shape:
            out[...] = pixels
            return out
    return pixels


def viewable(pixels: NDArray[Any]) -> NDArray[Any]:
    """(height, width, channels) as a screen can show it: of many channels the first 3, of 2 one."""
    channels = pixels.shape[2]
    return pixels if channels in _MODES else pixels[:, :, : 3 if channels > 4 else 1]


def to_picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """(height, width, channels) as a grey, RGB or RGBA picture of what is `viewable`."""
    shown = np.ascontiguousarray(viewable(pixels))
    return Image.fromarray(shown[:, :, 0] if shown.shape[2] == 1 else shown)


def _decode_any(data: bytes, channels: int) -> NDArray[np.uint8]:
    """Packed images are upright and in the dataset's mode. Those of adopted shards are made so
    here, as `fit_and_encode` does it, on white."""
    if channels not in _MODES:
        return arrays.read_npy(data, channels)
    with _opened(data, SHARD_FORMATS) as image, _refusing():
        turn = _TURNS.get(_orientation(image))
        upright = image.transpose(turn) if turn is not None else image
        if image.mode != _MODES[channels] or "transparency" in image.info:
            policy = make_policy(
                size=None, fit=None, encode=None, channels=channels, quality=90,
                background=(255, 255, 255),
            )  # fmt: skip
            upright = _convert(upright, str(image.format), policy)
        pixels = np.asarray(upright)
        return cast(NDArray[np.uint8], pixels.reshape(upright.height, upright.width, channels))


@contextmanager
def memory_explained(name: str) -> Iterator[None]:
    """Turns a MemoryError into a `UserError` naming the image that was worked on."""
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"{name!r}: not enough memory to decode it; use fewer --workers, or remove it"
        ) from error


@contextmanager
def _opened(data: bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    if not data:
        raise ImageRefused("empty")
    if len(data) > MAX_FILE_BYTES:
        raise ImageRefused("too_large")
    if data.startswith(arrays.MAGIC):
        pixels = arrays.read_npy(data, 3)  # or any other colour's
        yield Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
        return
    with _quiet, warnings.catch_warnings():
        # Pillow warns of odd metadata and of sizes; what matters of it is decided here.
        warnings.simplefilter("ignore")
        try:
            file = headers.limited(data)
            image = Image.open(file, formats=formats)
        except (Image.DecompressionBombError, headers.TooMuchError) as error:
            raise ImageRefused("too_large") from error
        except Exception as error:
            cause = _cause(error)
            known = _MAGIC.match(data) is not None
            raise ImageRefused(cause if known else "unsupported_format") from error
        with image:
            check_size(*image.size)
            file.pixels_begin(byte_by_byte=image.format == "BMP")
            yield image


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except ImageRefused:
        raise
    except (Image.DecompressionBombError, headers.TooMuchError) as error:
        raise ImageRefused("too_large") from error
    except Exception as error:
        # Decoders fed with damaged bytes raise nearly anything, IndexError and TypeError among it.
        raise ImageRefused(_cause(error)) from error


def _cause(error: Exception) -> str:
    # Decoders written in C have their own way to say it.
    if isinstance(error, MemoryError) or str(error).startswith("out of memory"):
        raise MemoryError(str(error)) from error
    return "truncated" if "truncated" in str(error).lower() else "corrupt"


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that an image just opened states before its pixels.

    Asked for before `load`, always: that reads on, and a PNG may carry more metadata at its end.
    """
    if image.format == "TIFF":
        return 1  # Pillow turns these itself, and states the upright size.
    if len(image.info.get("exif") or b"") > headers.MAX_METADATA_BYTES:
        raise ImageRefused("too_large")
    try:
        # The base class's method: that of PNG decodes the whole image in search of metadata.
        return int(Image.Image.getexif(image).get(_EXIF_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:
        return 1  # Damaged metadata says nothing about the pixels.


def _upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    width, height = size
    return (height, width) if orientation in (5, 6, 7, 8) else (width, height)


def _max_side(encode: str | None) -> int:
    return MAX_ENCODED_SIDES.get(encode or "png", MAX_SIDE)


def _is_plain(image: Image.Image, mode: str) -> bool:
    return (
        image.format in _EXTENSIONS
        and image.mode == mode
        and "transparency" not in image.info
        and not getattr(image, "is_animated", False)
    )


def _convert(image: Image.Image, source_format: str, policy: ImagePolicy) -> Image.Image:
    """To the policy's mode: 16 bits are scaled, and transparency shows the background."""
    if image.mode.startswith("I;16") or (image.mode == "I" and source_format == "PNG"):
        deep = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode in ("I", "F", "LAB"):
        # 32-bit and floating-point pixels have no known range, LAB needs a colour profile.
        raise ImageRefused("unsupported_mode")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if policy.channels != 4:
            opaque = Image.new("RGBA", image.size, (*policy.background, 255))
            image = Image.alpha_composite(opaque, image).convert("RGB")
    mode = _MODES[policy.channels]
    if image.mode not in (mode, "L", "RGB"):
        image = image.convert("RGB")
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, policy: ImagePolicy) -> Image.Image:
    if policy.width is None or policy.height is None:
        return image
    size = (policy.width, policy.height)
    if image.size == size:
        return image
    if policy.fit == "none":
        raise ImageRefused("corrupt")  # Its header had stated the size all images share.
    # Lanczos averages over all pixels that fall into one, so thin strokes of text survive.
    if policy.fit == "crop":
        scale = min(image.width / size[0], image.height / size[1])
        width, height = scale * size[0], scale * size[1]
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return resample.resize(image, size, (left, top, left + width, top + height))
    if policy.fit == "pad":
        width, height = resample.inside(image.size, size)
        padded = Image.new(image.mode, size, _paint(policy, image.mode))
        inner = resample.resize(image, (width, height))
        padded.paste(inner, ((size[0] - width) // 2, (size[1] - height) // 2))
        return padded
    return resample.resize(image, size)


def _fit_bands(pixels: NDArray[np.uint8], policy: ImagePolicy) -> NDArray[np.uint8]:
    """As `_fit`, every channel on its own."""
    height, width, channels = pixels.shape
    if (policy.width or width, policy.height or height) == (width, height):
        return pixels
    bands = []
    for at, value in enumerate(arrays.backgrounds(channels, policy.background)):
        painted = dataclasses.replace(policy, background=(value, value, value))
        band = Image.fromarray(np.ascontiguousarray(pixels[:, :, at]))
        bands.append(np.asarray(_fit(band, painted)))
    return np.stack(bands, axis=2)


def _paint(policy: ImagePolicy, mode: str) -> int | tuple[int, ...]:
    if mode == "L":
        return cast(int, Image.new("RGB", (1, 1), policy.background).convert("L").getpixel((0, 0)))
    return policy.background if mode == "RGB" else (*policy.background, 255)


def _encode(image: Image.Image, policy: ImagePolicy) -> tuple[str, bytes]:
    if max(image.size) > _max_side(policy.encode):
        raise ImageRefused("too_large")
    # The same pixels give the same bytes: metadata stays out, every encoder setting is stated.
    image = image.copy()
    image.info = {}
    image.getexif().clear()
    out = io.BytesIO()
    if policy.encode == "jpeg":
        image.save(out, "JPEG", quality=policy.quality, subsampling=0, optimize=False)
        return "jpg", out.getvalue()
    if policy.encode == "webp":
        image.save(out, "WEBP", quality=policy.quality, method=4, lossless=False, exact=True)
        return "webp", out.getvalue()
    # Of the filtered rows runs alone are looked for: photographs are encoded four times as fast
    # as at level 6, in 8% more bytes, screenshots twice as fast in 10% more; decoded no slower.
    image.save(out, "PNG", compress_type=zlib.Z_RLE, compress_level=6, optimize=False)
    return "png", out.getvalue()
