"""Limits on what an image costs beside its pixels: its chunks, segments, tags and scans.

A decoder makes an object of every chunk or block, and of every number in a TIFF; and for each scan
of a JPEG it goes over all pixels once more. So a file can take seventy times its size in memory,
or hours, around an image of a few pixels. Pixels and bytes are counted by `shards.images`.
"""

import io
import math
import struct

MAX_READS = 2**19
"""Pieces that a file is read in. A PNG of 512 MB in the usual chunks of 8 kB needs 200,000."""
MAX_METADATA_BYTES = 16 * 2**20
"""Read before the first pixel; of EXIF alone, too: Pillow puts its segments together one by one."""
MAX_TIFF_NUMBERS = 2**21
"""In all tags: each strip or tile has two."""
MAX_SCANS = 500
"""Of a JPEG: progressive ones have about ten."""

_PIXEL_SCAN = b"\xff\xda"
_TIFF_ORDERS = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
_TIFF_BYTES = (1, 2, 7)
_TIFF_FRACTIONS = (5, 10)
_TIFF_FOLDERS = (0x8769, 0x8825, 0xA005)
"""Tags that point to more of them: of EXIF, of GPS and of interoperability."""
_MAX_TIFF_FOLDERS = 8


class TooMuchError(Exception):
    """What is not pixels costs more than an image has any use for."""


class LimitedFile(io.BytesIO):
    """An image's bytes; raises `TooMuchError` when they are read in too many pieces, or too much
    of them before `pixels_begin` is called."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads_left: float = MAX_READS
        # A TIFF's tags may hold a picture's layers, or lie behind its pixels: see `check`.
        self._bytes_left: float = math.inf if data[:4] in _TIFF_ORDERS else MAX_METADATA_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._reads_left -= 1
        if size is not None and size >= 0:  # else it is the whole file, as of WebP
            self._bytes_left -= len(data)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise TooMuchError
        return data

    def pixels_begin(self, *, byte_by_byte: bool = False) -> None:
        """`byte_by_byte`: the decoder reads them so, and keeps nothing else."""
        self._bytes_left = math.inf
        if byte_by_byte:
            self._reads_left = math.inf


def limited(data: bytes) -> LimitedFile:
    """`data` for a decoder. Raises `TooMuchError` for what can be told before it is opened."""
    if data[:4] in _TIFF_ORDERS and _count_tiff_numbers(data) > MAX_TIFF_NUMBERS:
        raise TooMuchError
    if data[:2] == b"\xff\xd8" and has_too_many_scans(data):
        raise TooMuchError
    return LimitedFile(data)


def has_too_many_scans(jpeg: bytes) -> bool:
    """Whether there are more scans than `MAX_SCANS`, or what looks like it, as in thumbnails."""
    return jpeg.count(_PIXEL_SCAN) > MAX_SCANS


def _count_tiff_numbers(data: bytes) -> int:
    """About how many numbers the tags hold that a decoder may read of the first image."""
    if len(data) < 16:
        return 0
    order, is_big = _TIFF_ORDERS[data[:4]], b"+" in data[2:4]
    head, entry = (order + "Q", order + "HHQQ") if is_big else (order + "H", order + "HHII")
    first = (
        struct.unpack_from(order + "Q", data, 8)
        if is_big
        else struct.unpack_from(order + "I", data, 4)
    )
    total, waiting, seen = 0, [*first], set[int]()
    while waiting and len(seen) < _MAX_TIFF_FOLDERS:
        at = waiting.pop()
        start, step = at + struct.calcsize(head), struct.calcsize(entry)
        if at in seen or start > len(data):
            continue
        seen.add(at)
        (num_tags,) = struct.unpack_from(head, data, at)
        stop = start + step * min(num_tags, (len(data) - start) // step, 2**16)
        for tag, kind, count, value in struct.iter_unpack(entry, data[start:stop]):
            weight = 8 if kind in _TIFF_FRACTIONS else kind not in _TIFF_BYTES
            # Of more than the file can hold, decoders read none.
            total += 1 + (weight * count if count <= len(data) else 0)
            if tag in _TIFF_FOLDERS:
                waiting.append(value)
    return total
