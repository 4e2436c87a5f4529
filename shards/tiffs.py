"""TIFFs of many bands: their headers, checked here before tifffile decodes what they speak of.

Bands are the samples of the first page, interleaved or planar; or the pages, where each has one
sample and all are alike. 8 or 16 bits, as unsigned integers; as they are, in deflate, or in LZW
where imagecodecs is installed; in strips or tiles. Everything else is refused with its cause.

tifffile is shown a header made here of numbers that were checked, and one strip or tile at a time:
so no metadata of a file reaches it, and no few bytes can make it allocate more than the limits.
Specification: TIFF 6.0, and BigTIFF.
"""

import importlib.util
import io
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import UserError
from shards.format import MAX_CHANNELS
from shards.limits import MAX_FILE_BYTES, ImageRefused, check_size

MAX_SEGMENTS = 2**18
"""Strips or tiles of a page."""

_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MAX_TAGS = 4096

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_FILL_ORDER, _STRIP_OFFSETS, _ORIENTATION, _BANDS = 266, 273, 274, 277
_STRIP_ROWS, _STRIP_BYTES, _PLANAR, _PREDICTOR = 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_SAMPLE_FORMAT, _DEPTH, _TILE_DEPTH = 339, 32997, 32998
_LISTS = (_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES)
_TAGS = frozenset(
    (
        _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _ORIENTATION, _BANDS,
        _STRIP_ROWS, _PLANAR, _PREDICTOR, _TILE_WIDTH, _TILE_HEIGHT, _SAMPLE_FORMAT, _DEPTH,
        _TILE_DEPTH, *_LISTS,
    )
)  # fmt: skip
_MAX_VALUES = 1024
"""Of a tag that is none of `_LISTS`."""
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_NONE, _LZW, _DEFLATE = 1, 5, (8, 32946)
_GREY, _RGB = 1, 2


@dataclass(frozen=True)
class _Page:
    order: str
    """of bytes, as `struct` writes it"""
    width: int
    height: int
    bands: int
    bits: int
    is_planar: bool
    compression: int
    predictor: int
    is_tiled: bool
    rows: int
    """of a strip or a tile, as the number of columns"""
    columns: int
    segments: tuple[tuple[int, int], ...]
    """offset and number of bytes of each strip or tile"""

    @property
    def segment_bytes(self) -> int:
        """Of a whole strip or tile, decoded."""
        return self.rows * self.columns * (1 if self.is_planar else self.bands) * self.bits // 8


def is_tiff(data: bytes) -> bool:
    return data[:4] in _MAGIC


def read_shape(data: bytes, bands: int) -> tuple[int, int, int]:
    """(height, width, bands), from headers alone. Raises as `read_pixels`."""
    pages = _pages_of(data, bands)
    return pages[0].height, pages[0].width, bands


def read_pixels(data: bytes, bands: int) -> NDArray[np.uint8]:
    """uint8 (height, width, bands), 16 bits scaled to 8; of a TIFF of so many bands.

    Raises `ImageRefused`, and `UserError` where tifffile is not installed.
    """
    pages = _pages_of(data, bands)
    pixels = np.empty((pages[0].height, pages[0].width, bands), np.uint8)
    try:
        for at, page in enumerate(pages):
            _decode(data, page, pixels[:, :, at : at + page.bands])
    except (ImageRefused, MemoryError):
        raise
    except Exception as error:
        # As everywhere: what decoders raise for damaged bytes is nearly anything.
        raise ImageRefused("corrupt") from error
    return pixels


def _pages_of(data: bytes, bands: int) -> list[_Page]:
    """The pages that hold the bands: the first, or all of one band each."""
    if len(data) > MAX_FILE_BYTES:
        raise ImageRefused("too_large")
    _tifffile()
    try:
        pages = _read_pages(data)
    except struct.error as error:
        raise ImageRefused("truncated") from error
    first = pages[0]
    if len(pages) > 1:
        looks = {(page.width, page.height, page.bits, page.bands) for page in pages}
        if looks != {(first.width, first.height, first.bits, 1)}:
            pages = [first]
    if sum(page.bands for page in pages) != bands:
        raise ImageRefused("wrong_channels")
    check_size(first.width, first.height, bands * first.width * first.height * first.bits // 8)
    return pages


def _read_pages(data: bytes) -> list[_Page]:
    """The first page; the others too, as far as they may be bands, where it has one band."""
    order = "<" if data[:2] == b"II" else ">"
    is_big = b"+" in data[2:4]
    word = "Q" if is_big else "I"
    (at,) = struct.unpack_from(order + word, data, 8 if is_big else 4)
    pages: list[_Page] = []
    while at and len(pages) <= MAX_CHANNELS:
        tags, at = _read_tags(data, at, order, is_big)
        try:
            pages.append(_page(tags, order, len(data)))
        except ImageRefused:
            if not pages:
                raise
            break  # Whatever follows the first page: it is no band.
        if pages[0].bands > 1:
            break
    if not pages:
        raise ImageRefused("corrupt")
    return pages


def _read_tags(
    data: bytes, at: int, order: str, is_big: bool
) -> tuple[dict[int, tuple[int, ...]], int]:
    """The values of the tags that matter, and where the next page is described; 0 without one."""
    if at > len(data):
        raise ImageRefused("truncated")
    (num_tags,) = struct.unpack_from(order + ("Q" if is_big else "H"), data, at)
    if num_tags > _MAX_TAGS:
        raise ImageRefused("corrupt")
    at += 8 if is_big else 2
    head, word, word_bytes = ("HHQ", "Q", 8) if is_big else ("HHI", "I", 4)
    head_bytes = 4 + word_bytes
    tags: dict[int, tuple[int, ...]] = {}
    for _ in range(num_tags):
        code, kind, count = struct.unpack_from(order + head, data, at)
        value_at = at + head_bytes
        at = value_at + word_bytes
        if code not in _TAGS:
            continue
        if count > (MAX_SEGMENTS if code in _LISTS else _MAX_VALUES):
            raise ImageRefused("too_large" if code in _LISTS else "corrupt")
        if code in tags or kind not in _TYPES or not count:
            raise ImageRefused("corrupt")
        values = f"{order}{count}{_TYPES[kind]}"
        if struct.calcsize(values) > word_bytes:
            (value_at,) = struct.unpack_from(order + word, data, value_at)
            if value_at > len(data):
                raise ImageRefused("truncated")
        tags[code] = struct.unpack_from(values, data, value_at)
    (following,) = struct.unpack_from(order + word, data, at)
    return tags, following


def _page(tags: Mapping[int, tuple[int, ...]], order: str, num_bytes: int) -> _Page:
    """Raises `ImageRefused`: sizes are judged first, then what the values are, then where."""

    def one(code: int, default: int) -> int:
        found = tags.get(code, (default,))
        if len(found) != 1:
            raise ImageRefused("corrupt")
        return found[0]

    width, height, bands = one(_WIDTH, 0), one(_HEIGHT, 0), one(_BANDS, 1)
    bits = max(tags.get(_BITS, (1,)))
    if bands < 1:
        raise ImageRefused("corrupt")
    check_size(width, height, width * height * bands * bits // 8)
    if bands > MAX_CHANNELS:
        raise ImageRefused("wrong_channels")
    if (
        set(tags.get(_BITS, (1,))) not in ({8}, {16})
        or set(tags.get(_SAMPLE_FORMAT, (1,))) != {1}
        or one(_PHOTOMETRIC, _GREY) not in (_GREY, _RGB)
        or any(one(code, 1) != 1 for code in (_FILL_ORDER, _ORIENTATION, _DEPTH, _TILE_DEPTH))
    ):
        raise ImageRefused("unsupported_mode")
    compression, predictor = one(_COMPRESSION, _NONE), one(_PREDICTOR, 1)
    if compression not in (_NONE, _LZW, *_DEFLATE) or predictor not in (1, 2):
        raise ImageRefused("unsupported_compression")
    if compression == _LZW and not _has_imagecodecs():
        raise ImageRefused("needs_imagecodecs")
    is_planar = one(_PLANAR, 1) == 2 and bands > 1
    is_tiled = _TILE_WIDTH in tags
    rows, columns = min(one(_STRIP_ROWS, height), height), width
    if is_tiled:
        rows, columns = one(_TILE_HEIGHT, 0), one(_TILE_WIDTH, 0)
    if min(rows, columns) < 1:
        raise ImageRefused("corrupt")
    num_segments = -(-height // rows) * -(-width // columns) * (bands if is_planar else 1)
    offsets = tags.get(_TILE_OFFSETS if is_tiled else _STRIP_OFFSETS, ())
    sizes = tags.get(_TILE_BYTES if is_tiled else _STRIP_BYTES, ())
    page = _Page(
        order, width, height, bands, bits, is_planar, compression, predictor, is_tiled, rows,
        columns, tuple(zip(offsets, sizes, strict=False)),
    )  # fmt: skip
    if num_segments > MAX_SEGMENTS or num_segments * page.segment_bytes > 2 * MAX_FILE_BYTES:
        raise ImageRefused("too_large")
    if not len(offsets) == len(sizes) == num_segments or not all(sizes):
        raise ImageRefused("corrupt")
    if any(offset + size > num_bytes for offset, size in page.segments):
        raise ImageRefused("truncated")
    return page


def _decode(data: bytes, page: _Page, out_HWC: NDArray[np.uint8]) -> None:
    with _tifffile().TiffFile(io.BytesIO(_header(page))) as file:
        decode = file.pages[0].decode
        for number, (offset, size) in enumerate(page.segments):
            segment = data[offset : offset + size]
            if page.compression in _DEFLATE:
                segment = _inflate(segment, page.segment_bytes)
            # A copy that it may undo the prediction in.
            values, place, _ = decode(bytearray(segment), number)
            band, _, top, left, _ = place
            bands = slice(band, band + 1) if page.is_planar else slice(None)
            out = out_HWC[top : top + page.rows, left : left + page.columns, bands]
            values = values[0, : out.shape[0], : out.shape[1]]
            if page.bits == 16:
                values = (values.astype(np.uint32) * 255 + 32767) // 65535
            out[...] = values


def _inflate(segment: bytes, max_bytes: int) -> bytes:
    """What is compressed; its checksum too is compared. The last strip may be shorter."""
    inflater = zlib.decompressobj()
    # One more than there may be: so the end of the stream is seen too.
    found = inflater.decompress(segment, max_bytes + 1)
    if len(found) > max_bytes:
        raise ImageRefused("corrupt")
    if not inflater.eof:
        raise ImageRefused("truncated")
    return found


def _header(page: _Page) -> bytes:
    """A TIFF without pixels: this page's, its segments as they will be after `_inflate`."""
    nothing = (0,) * len(page.segments)
    tags: dict[int, tuple[str, tuple[int, ...]]] = {
        _WIDTH: ("I", (page.width,)),
        _HEIGHT: ("I", (page.height,)),
        _BITS: ("H", (page.bits,) * page.bands),
        _COMPRESSION: ("H", (_LZW if page.compression == _LZW else _NONE,)),
        _PHOTOMETRIC: ("H", (_GREY,)),
        _BANDS: ("H", (page.bands,)),
        _PLANAR: ("H", (2 if page.is_planar else 1,)),
        _PREDICTOR: ("H", (page.predictor,)),
        _SAMPLE_FORMAT: ("H", (1,) * page.bands),
        _TILE_OFFSETS if page.is_tiled else _STRIP_OFFSETS: ("I", nothing),
        _TILE_BYTES if page.is_tiled else _STRIP_BYTES: ("I", nothing),
    }
    if page.is_tiled:
        tags |= {_TILE_WIDTH: ("I", (page.columns,)), _TILE_HEIGHT: ("I", (page.rows,))}
    else:
        tags[_STRIP_ROWS] = ("I", (page.rows,))
    kinds = {kind: number for number, kind in _TYPES.items()}
    head = struct.pack(
        page.order + "2sHIH", b"II" if page.order == "<" else b"MM", 42, 8, len(tags)
    )
    entries, rest = b"", b""
    rest_at = len(head) + 12 * len(tags) + 4
    for code, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{page.order}{len(values)}{kind}", *values)
        entry = struct.pack(page.order + "HHI", code, kinds[kind], len(values))
        if len(packed) > 4:
            entry += struct.pack(page.order + "I", rest_at + len(rest))
            rest += packed
        else:
            entry += packed.ljust(4, b"\0")
        entries += entry
    return head + entries + bytes(4) + rest


@cache
def _has_imagecodecs() -> bool:
    return importlib.util.find_spec("imagecodecs") is not None


@cache
def _tifffile() -> Any:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(
            "tifffile is needed to read TIFFs of other than 1, 3 or 4 channels; "
            "pip install 'pixloom[tiff]'"
        ) from error
    return tifffile
