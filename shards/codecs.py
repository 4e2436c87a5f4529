"""Fast decoders of ordinary images: 8-bit PNG and JPEG in the channels that are asked for.

Where the bytes are anything else (palettes, 16 bits, CMYK, transparency, a stated orientation,
metadata of odd kinds, damage of any sort) the answer is None, and `shards.images` asks Pillow, as
it does for all other formats. So nothing is refused here, and every pixel is the one that Pillow
gives: bit for bit, with a JPEG at full scale too where Pillow is built on libjpeg-turbo. Neither
decoder has threads of its own. Damage is found by the checksum of each chunk; a PNG made with right
ones around pixels whose own checksum is wrong is read here, where Pillow refuses it.
"""

import re
import struct
import zlib

import numpy as np
import simplejpeg
from kornia_rs.io import decode_image_png_u8
from numpy.typing import NDArray

from shards.headers import has_too_many_scans

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_COLOURS = {1: 0, 3: 2, 4: 6}
"""channels -> colour type"""
_PNG_PALETTE = 3
_PNG_MODES = {1: "mono", 3: "rgb", 4: "rgba"}
# Chunks that change no pixel and that Pillow takes whatever they hold.
_PNG_PLAIN_CHUNKS = frozenset((b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"sBIT", b"bKGD"))
_PNG_PALETTE_CHUNKS = frozenset((b"PLTE", b"tRNS"))
_PNG_MAX_METADATA_BYTES = 2**14
_JPEG_FORMATS = {1: "GRAY", 3: "RGB"}
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
"""baseline, extended and progressive, with Huffman coding"""
_JPEG_PROGRESSIVE = 0xC2
# The only scales with vector instructions: the others take longer than no scale.
_JPEG_DIVISORS = (8, 4, 2)


def decode_plain(
    data: bytes,
    channels: int,
    *,
    max_pixels: int,
    max_side: int,
    least: tuple[int, int] | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8] | None:
    """uint8 (height, width, channels) of an ordinary PNG or JPEG; None for anything else.

    Args:
        max_pixels, max_side: larger images give None, before anything is allocated.
        least: (width, height) in pixels. A JPEG may come scaled by 1/2, 1/4 or 1/8, as long as
            neither side gets shorter than this.
        out: filled and returned if the image has its shape.
    """
    size = plain_size(data, channels)
    if size is None or size[0] * size[1] > max_pixels or max(size) > max_side:
        return None
    if data.startswith(_PNG_SIGNATURE):
        return _decode_png(data, channels, size, out)
    return _decode_jpeg(data, channels, size, least, out)


def plain_size(data: bytes, channels: int | None = None) -> tuple[int, int] | None:
    """(width, height) that an ordinary PNG or JPEG states; None for anything else.

    One of so many channels; without a number it may have any, or a palette.
    """
    if data.startswith(_PNG_SIGNATURE):
        return _plain_png_size(data, channels)
    if data.startswith(b"\xff\xd8\xff"):
        return _plain_jpeg_size(data, channels)
    return None


def _decode_png(
    data: bytes, channels: int, size: tuple[int, int], out: NDArray[np.uint8] | None
) -> NDArray[np.uint8] | None:
    width, height = size
    try:
        pixels: NDArray[np.uint8] = decode_image_png_u8(data, (height, width), _PNG_MODES[channels])
    except Exception:  # it raises no other kind
        return None
    if out is not None and out.shape == pixels.shape:
        out[...] = pixels
        return out
    return pixels


def _decode_jpeg(
    data: bytes,
    channels: int,
    size: tuple[int, int],
    least: tuple[int, int] | None,
    out: NDArray[np.uint8] | None,
) -> NDArray[np.uint8] | None:
    width, height = size
    if least is not None:
        for divisor in _JPEG_DIVISORS:
            scaled = -(-size[0] // divisor), -(-size[1] // divisor)
            if scaled[0] >= least[0] and scaled[1] >= least[1]:
                width, height = scaled
                break
    shape = (height, width, channels)
    pixels = out if out is not None and out.shape == shape else np.empty(shape, np.uint8)
    try:
        # `strict`: what libjpeg would fill up with grey, and warn of, is an error.
        simplejpeg.decode_jpeg(
            data,
            colorspace=_JPEG_FORMATS[channels],
            min_width=width,
            min_height=height,
            buffer=pixels,
            strict=True,
        )
    except ValueError:
        return None
    return pixels


def _plain_png_size(data: bytes, channels: int | None) -> tuple[int, int] | None:
    """(width, height) if every chunk is whole and of a kind that changes no pixel.

    The checksums are verified here: of chunks that it skips, the decoder does not.
    """
    if len(data) < 57 or data[8:16] != b"\0\0\0\rIHDR":
        return None
    width, height, depth, colour, *methods = struct.unpack(">IIBBBBB", data[16:29])
    wanted = (*_PNG_COLOURS.values(), _PNG_PALETTE)
    if channels is not None:
        wanted = (_PNG_COLOURS.get(channels, -1),)
    if depth != 8 or colour not in wanted or any(methods) or not width * height:
        return None
    plain_chunks = _PNG_PLAIN_CHUNKS
    if colour == _PNG_PALETTE:
        plain_chunks |= _PNG_PALETTE_CHUNKS
    view, at, before, has_pixels = memoryview(data), 8, b"", False
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data):
            return None
        if zlib.crc32(view[at + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            return None
        if kind == b"IEND":
            return (width, height) if end == len(data) else None
        if kind == b"IDAT":
            if has_pixels and before != b"IDAT":
                return None  # decoders differ over pixels in two places
            has_pixels = True
        elif kind == b"IHDR":
            if at != 8:
                return None
        elif not (kind in plain_chunks or _is_plain_metadata(kind, data[at + 8 : end - 4])):
            return None
        before, at = kind, end
    return None


def _is_plain_metadata(kind: bytes, body: bytes) -> bool:
    """Whether it is text or a colour profile, too small to matter, that states no orientation."""
    if len(body) > _PNG_MAX_METADATA_BYTES:
        return False
    return kind == b"iCCP" or (kind == b"tEXt" and not re.match(rb"(?i)raw profile|xmp", body))


def _plain_jpeg_size(data: bytes, channels: int | None) -> tuple[int, int] | None:
    """(width, height) of a frame of 8 bits in grey or three colours, without an orientation."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker in _JPEG_FRAMES:
            depth, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            plain = depth == 8 and components in _JPEG_FORMATS
            plain = plain and channels in (None, components)
            plain = plain and not (marker == _JPEG_PROGRESSIVE and has_too_many_scans(data))
            return (width, height) if plain and width * height else None
        if not (marker == 0xC4 or 0xDB <= marker <= 0xFE):
            return None
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and _may_turn(data[at + 4 : end]):
            return None
        at = end
    return None


def _may_turn(segment: bytes) -> bool:
    """Whether an APP1 segment states an orientation other than upright, or is hard to read."""
    if not segment.startswith(b"Exif\0\0"):
        return b"Orientation" in segment  # of XMP
    tiff = segment[6:]
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return True
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * entries, 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112 and value != 1:
                return True
    except struct.error:
        return True
    return False
