"""Images of any number of channels: `.npy` arrays in, and the members `image.npy` out.

An array is (height, width), (height, width, channels), or (channels, height, width) where the last
axis has none of the counts wanted and the first has. Values are uint8, or uint16 scaled to that:
those of other types have no known range. Headers are read here, and never evaluated; nothing is
unpickled, and nothing allocated, before type, shape and length are found to agree. TIFFs of many
bands are the subject of `shards.tiffs`, all other images that of `shards.images`.
"""

import re
import struct
from collections.abc import Collection
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from shards import tiffs
from shards.format import COLOUR_CHANNELS
from shards.limits import MAX_FILE_BYTES, ImageRefused, check_size

MAGIC = b"\x93NUMPY"
MAX_HEADER_BYTES = 4096

_FIELD = r"'(?:descr|fortran_order|shape)' *: *(?:'[^']*'|True|False|\([\d, ]*\)|\[.*\])"
_HEADER = re.compile(rf"\{{ *{_FIELD} *, *{_FIELD} *, *{_FIELD} *,? *\}}\s*", re.DOTALL)
_NAME_AND_VALUE = re.compile(_FIELD.replace("(?:", "("), re.DOTALL)

_EIGHT_BITS = ((np.arange(2**16) * 255 + 32767) // 65535).astype(np.uint8)
"""Of every uint16 value, as `shards.images` scales 16-bit grey."""
_BLOCK_VALUES = 2**20


class _Array(NamedTuple):
    """What a header says, and what it means; all sizes are checked."""

    dtype: np.dtype[np.unsignedinteger]
    is_fortran: bool
    shape: tuple[int, ...]
    start: int
    channels_first: bool
    height: int
    width: int
    channels: int


def read_shape(data: bytes, channels: int) -> tuple[int, int, int]:
    """(height, width, channels) by the header of an `.npy` file or a TIFF.

    `channels` are those wanted; where they are a colour's, an `.npy` may have any colour's.
    Raises `ImageRefused`, and `UserError` where TIFFs cannot be read here.
    """
    if _is_tiff(data, channels):
        return tiffs.read_shape(data, channels)
    array = _read_header(data, channels)
    return array.height, array.width, array.channels


def read_pixels(data: bytes, channels: int) -> NDArray[np.uint8]:
    """uint8 (height, width, channels) of an `.npy` file or a TIFF. Raises as `read_shape`."""
    if _is_tiff(data, channels):
        return tiffs.read_pixels(data, channels)
    return read_npy(data, channels)


def read_npy(data: bytes, channels: int) -> NDArray[np.uint8]:
    """The same of an `.npy` file alone; not writeable where it is `data` itself."""
    array = _read_header(data, channels)
    values = np.frombuffer(data, array.dtype, offset=array.start)
    values = values.reshape(array.shape, order="F" if array.is_fortran else "C")
    if values.ndim == 2:
        values = values[:, :, None]
    elif array.channels_first:
        values = values.transpose(1, 2, 0)
    if values.dtype == np.uint8:
        return cast(NDArray[np.uint8], np.ascontiguousarray(values))
    pixels = np.empty(values.shape, np.uint8)
    rows = max(1, _BLOCK_VALUES // (array.width * array.channels))
    for top in range(0, array.height, rows):
        # In blocks, for as an index each value takes 8 bytes.
        pixels[top : top + rows] = _EIGHT_BITS[values[top : top + rows]]
    return pixels


def to_npy(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 (height, width, channels) as a member `image.npy`, see `shards.format`."""
    height, width, channels = pixels.shape
    return _packed_header(height, width, channels) + pixels.tobytes()


def packed_channels(data: bytes) -> int:
    """The channels of an array that begins as `to_npy` writes it; else 0. Raises `ImageRefused`."""
    shape = _parse(data)[2]
    if len(shape) != 3 or not data.startswith(_packed_header(*shape)):
        return 0
    return shape[2]


def backgrounds(channels: int, background: tuple[int, int, int]) -> tuple[int, ...]:
    """A colour (RGB) as a value a channel: its grey beyond the first three, and where there are
    no three."""
    red, green, blue = background
    grey = (299 * red + 587 * green + 114 * blue + 500) // 1000
    return (grey,) * channels if channels < 3 else (*background, *(grey,) * (channels - 3))


def _is_tiff(data: bytes, channels: int) -> bool:
    """TIFFs of 1, 3 and 4 channels are left to Pillow."""
    return channels not in COLOUR_CHANNELS and tiffs.is_tiff(data)


def _packed_header(height: int, width: int, channels: int) -> bytes:
    # Spaces to 128 bytes, as NumPy leaves them; spelt here, because its versions differ in them.
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({height}, {width}, {channels}), }}"
    return MAGIC + b"\x01\x00\x76\x00" + text.encode().ljust(117) + b"\n"


def _read_header(data: bytes, channels: int) -> _Array:
    if not data:
        raise ImageRefused("empty")
    if len(data) > MAX_FILE_BYTES:
        raise ImageRefused("too_large")
    dtype, is_fortran, shape, start = _parse(data)
    if len(shape) not in (2, 3):
        raise ImageRefused("unsupported_mode")
    wanted = COLOUR_CHANNELS if channels in COLOUR_CHANNELS else (channels,)
    channels_first = _has_channels_first(shape, wanted)
    if len(shape) == 2:
        (height, width), found = shape, 1
    elif channels_first:
        found, height, width = shape
    else:
        height, width, found = shape
    num_bytes = height * width * found * dtype.itemsize
    check_size(width, height, num_bytes)
    if found not in wanted:
        raise ImageRefused("wrong_channels")
    if len(data) != start + num_bytes:
        raise ImageRefused("truncated" if len(data) < start + num_bytes else "corrupt")
    return _Array(dtype, is_fortran, shape, start, channels_first, height, width, found)


def _has_channels_first(shape: tuple[int, ...], wanted: Collection[int]) -> bool:
    return len(shape) == 3 and shape[2] not in wanted and shape[0] in wanted


def _parse(data: bytes) -> tuple[np.dtype[np.unsignedinteger], bool, tuple[int, ...], int]:
    """Type, Fortran order, shape, and where the values start; all but the type as it is said."""
    if not data.startswith(MAGIC):
        raise ImageRefused("unsupported_format")
    version = data[6:8]
    if version not in (b"\1\0", b"\2\0", b"\3\0"):
        raise ImageRefused("truncated" if len(version) < 2 else "unsupported_format")
    size_bytes = 2 if version == b"\1\0" else 4
    start = 8 + size_bytes
    if len(data) < start:
        raise ImageRefused("truncated")
    (size,) = struct.unpack_from("<H" if size_bytes == 2 else "<I", data, 8)
    if size > MAX_HEADER_BYTES:
        raise ImageRefused("corrupt")
    if len(data) < start + size:
        raise ImageRefused("truncated")
    text = data[start : start + size].decode("latin-1")
    if not _HEADER.fullmatch(text):
        raise ImageRefused("corrupt")
    fields = dict(_NAME_AND_VALUE.findall(text))
    kind = re.fullmatch(r"'([<>=|]?)u([12])'", fields.get("descr", ""))
    if len(fields) != 3 or not fields["shape"].startswith("("):
        raise ImageRefused("corrupt")
    if fields["fortran_order"] not in ("True", "False"):
        raise ImageRefused("corrupt")
    if kind is None:
        raise ImageRefused("unsupported_mode")
    order = ">" if kind[1] == ">" else "<"
    dtype: np.dtype[np.unsignedinteger] = np.dtype(f"{order}u{kind[2]}")
    shape = tuple(int(one) for one in re.findall(r"\d+", fields["shape"]))
    return dtype, fields["fortran_order"] == "True", shape, start + size
