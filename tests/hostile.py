"""Files that were made to hurt, and ordinary ones with every feature: for tests and for fuzzing."""

import contextlib
import hashlib
import io
import json
import random
import struct
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from shards import format

MB = 2**20
RED = (200, 30, 40)
SIZE = (24, 16)
"""(width, height) of the ordinary images"""


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = SIZE, seed: int = 0) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    data = random.Random(seed).randbytes(size[0] * size[1] * channels)
    return Image.frombytes(mode, size, data)


def animated(kind: str, colours: int = 0, **options: object) -> bytes:
    frames = [noise(seed=1), noise(seed=2)]
    if colours:
        frames = [frame.quantize(colours) for frame in frames]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


def red(mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", SIZE, RED).convert(mode)


def exif_of(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    size: tuple[int, int],
    rows: bytes,
    *,
    depth: int = 8,
    colour: int = 2,
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """A PNG of any header around `rows`, which begin with their filter each."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    parts = [png_chunk(b"IHDR", header), before, pixels, after, png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def png_of(image: Image.Image, before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of an RGB image with other chunks before or after its pixels."""
    lines = np.asarray(image).reshape(image.height, -1)
    rows = np.pad(lines, ((0, 0), (1, 0)))
    return png(image.size, rows.tobytes(), before=before, after=after)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(segments: bytes, image: Image.Image | None = None, **options: object) -> bytes:
    data = encoded(image or red(), "JPEG", **options)
    return data[:2] + segments + data[2:]


def jpeg_claiming(size: tuple[int, int]) -> bytes:
    data = bytearray(encoded(red(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", size[1], size[0])
    return bytes(data)


def jpeg_of_scans(count: int, size: tuple[int, int] = SIZE) -> bytes:
    """A progressive JPEG whose last scan is there many times."""
    data = encoded(noise(size=size), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * count + data[-2:]


def gif_with(blocks: bytes, image: Image.Image | None = None) -> bytes:
    """A GIF with `blocks` before its first image."""
    data = encoded(image or red().quantize(4), "GIF")
    at = 13 + (3 << (data[10] & 7) + 1)
    return data[:at] + blocks + data[at:]


def gif_claiming(size: tuple[int, int]) -> bytes:
    data = bytearray(gif_with(b""))
    data[6:10] = struct.pack("<HH", *size)
    return bytes(data)


def bmp_claiming(size: tuple[int, int]) -> bytes:
    data = bytearray(encoded(red(), "BMP"))
    data[18:26] = struct.pack("<ii", *size)
    return bytes(data)


def webp_claiming(size: tuple[int, int]) -> bytes:
    data = bytearray(encoded(red(), "WEBP", lossless=True))
    (packed,) = struct.unpack_from("<I", data, 21)
    packed = packed & ~0xFFFFFFF | size[0] - 1 | size[1] - 1 << 14
    struct.pack_into("<I", data, 21, packed)
    return bytes(data)


def tiff(tags: Sequence[tuple[int, int, int, int]], body: bytes = b"", following: int = 0) -> bytes:
    """A little-endian TIFF: (tag, type, count, value) each; `body` begins at byte 256."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following)
    return head.ljust(256, b"\0") + body


def tiff_tags(
    size: tuple[int, int] = (8, 8),
    *others: tuple[int, int, int, int],
    offsets: tuple[int, int, int, int] = (273, 4, 1, 256),
    counts: tuple[int, int, int, int] = (279, 4, 1, 64),
) -> list[tuple[int, int, int, int]]:
    """Those of a grey image without compression."""
    width, height = size
    plain = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1)]
    found = {tag[0]: tag for tag in [*plain, (262, 3, 1, 1), offsets, counts, *others]}
    return list(found.values())


def tiff_of_strips(count: int) -> bytes:
    """As many strips of one row as are asked for, most of them below the image."""
    offsets, sizes = (273, 3, count, 256), (279, 3, count, 256 + 2 * count)
    tags = tiff_tags((8, 8), (278, 3, 1, 1), offsets=offsets, counts=sizes)
    return tiff(tags, struct.pack("<H", 300) * count + struct.pack("<H", 8) * count)


def tiff_chain(count: int) -> bytes:
    """As many pages as are asked for, without an end to them."""
    entries = b"".join(struct.pack("<HHII", *tag) for tag in sorted(tiff_tags()))
    size = 2 + len(entries) + 4
    first = 256 + 64
    pages = [
        struct.pack("<H", len(entries) // 12) + entries
        + struct.pack("<I", first + size * ((at + 1) % count))
        for at in range(count)
    ]  # fmt: skip
    return tiff(tiff_tags(), bytes(64) + b"".join(pages), following=first)


def exif_bomb(size: int) -> bytes:
    """EXIF of 65,535 tags, each of which is all of it."""
    tags = b"".join(struct.pack(">HHII", tag, 7, size, 8) for tag in range(65_535))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", 65_535) + tags.ljust(size, b"\0")


def with_adobe(data: bytes, transform: int | None) -> bytes:
    """A CMYK JPEG whose Adobe segment says another transform, or is not there at all."""
    at = data.index(b"Adobe") - 4
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    if transform is None:
        return data[:at] + data[end:]
    return data[: end - 1] + bytes([transform]) + data[end:]


def tar_header(name: bytes, size: int | bytes = 0, kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A USTAR header with a right checksum and any field; `size` may be the field itself."""
    info = tarfile.TarInfo("x")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    header[:100] = name[:100].ljust(100, b"\0")
    header[124:136] = size if isinstance(size, bytes) else b"%011o\0" % size
    header[157:257] = link[:100].ljust(100, b"\0")
    return sealed(header)


def sealed(header: bytes | bytearray) -> bytes:
    """A header with the checksum that it should have."""
    header = bytearray(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_member(name: bytes, data: bytes = b"", kind: bytes = b"0", link: bytes = b"") -> bytes:
    """A member; above 100 bytes its name stands in a header of its own, as GNU tar has it."""
    long = tar_member(b"././@LongLink", name + b"\0", b"L") if len(name) > 100 else b""
    return long + tar_header(name, len(data), kind, link) + padded(data)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax_header(*records: tuple[bytes, bytes], kind: bytes = b"x") -> bytes:
    return tar_member(b"pax", b"".join(pax_record(*record) for record in records), kind)


def pax_record(keyword: bytes, value: bytes) -> bytes:
    size = len(keyword) + len(value) + 3
    while size != len(keyword) + len(value) + 3 + len(str(size)):
        size = len(keyword) + len(value) + 3 + len(str(size))
    return b"%d %s=%s\n" % (size, keyword, value)


TAR_END = bytes(1024)


def valid_images() -> dict[str, bytes]:
    """A small image of every format and feature that the gate knows."""
    deep = np.random.default_rng(1).integers(0, 65536, (SIZE[1], SIZE[0]), dtype=np.uint16)
    cmyk = encoded(noise("CMYK"), "JPEG")
    found = {
        "png": encoded(noise()),
        "png grey": encoded(noise("L")),
        "png alpha": encoded(noise("RGBA")),
        "png grey alpha": encoded(noise("LA")),
        "png 1 bit": encoded(noise("L").convert("1")),
        "png palette": encoded(noise().quantize(16)),
        "png palette alpha": encoded(noise().quantize(16), transparency=3),
        "png transparent colour": encoded(noise(), transparency=(77, 77, 77)),
        "png 16 bit": encoded(Image.fromarray(deep)),
        "png 16 bit colour": png((4, 3), (b"\0" + bytes(range(24))) * 3, depth=16),
        "png text": png_of(noise(), png_chunk(b"tEXt", b"a\0b")
                           + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"c"))
                           + png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>")),
        "png exif": encoded(noise(), exif=exif_of(6)),
        "png profile": encoded(noise(), icc_profile=b"profile" * 40),
        "apng": animated("PNG"),
        "jpeg": encoded(noise(), "JPEG"),
        "jpeg grey": encoded(noise("L"), "JPEG"),
        "jpeg progressive": encoded(noise(), "JPEG", progressive=True),
        "jpeg 4:4:4 restarts": encoded(noise(), "JPEG", subsampling=0, restart_marker_blocks=1),
        "jpeg exif": encoded(noise(), "JPEG", exif=exif_of(5), dpi=(72, 72)),
        "jpeg profile": encoded(noise(), "JPEG", icc_profile=b"profile" * 40, comment="c"),
        "jpeg cmyk": cmyk,
        "jpeg ycck": with_adobe(cmyk, 2),
        "mpo": animated("MPO"),
        "webp": encoded(noise(), "WEBP"),
        "webp lossless alpha": encoded(noise("RGBA"), "WEBP", lossless=True, exif=exif_of(3)),
        "webp animated": animated("WEBP"),
        "gif": encoded(noise().quantize(16), "GIF", comment=b"c"),
        "gif animated": animated("GIF", 8, loop=0, transparency=2),
        "bmp": encoded(noise(), "BMP"),
        "bmp palette": encoded(noise().quantize(16), "BMP"),
        "bmp rle": bmp_rle(),
        "tiff": encoded(noise(), "TIFF"),
        "tiff alpha": encoded(noise("RGBA"), "TIFF"),
        "tiff 16 bit": encoded(Image.fromarray(deep), "TIFF"),
        "tiff cmyk": encoded(noise("CMYK"), "TIFF"),
        "tiff pages": animated("TIFF"),
        "tiff turned": encoded(noise(), "TIFF", exif=exif_of(6)),
        "tiff big": encoded(noise(), "TIFF", big_tiff=True),
    }  # fmt: skip
    for compression in ("tiff_deflate", "tiff_lzw", "jpeg", "packbits", "group4"):
        image = noise("L").convert("1") if compression == "group4" else noise()
        found[f"tiff {compression}"] = encoded(image, "TIFF", compression=compression)
    return found


def bmp_rle() -> bytes:
    palette = bytes(range(256)) * 4
    runs = b"".join(b"\x18" + bytes([at]) + b"\0\0" for at in range(16)) + b"\0\1"
    head = struct.pack("<IiiHHIIiiII", 40, 24, 16, 1, 8, 1, len(runs), 0, 0, 256, 0)
    offset = 14 + len(head) + 1024
    return b"BM" + struct.pack("<IHHI", offset + len(runs), 0, 0, offset) + head + palette + runs


def resigned(body: dict[str, Any]) -> str:
    """The text of a manifest with the digests that it should have, whatever else it holds."""
    body.pop("manifest_sha256", None)
    body.pop("data_digest", None)
    # Without them it is where they cannot be had: then it is no manifest in other ways.
    with contextlib.suppress(Exception):
        splits = {
            split: tuple(format.ShardEntry(**shard) for shard in shards)
            for split, shards in body["splits"].items()
        }
        tokenizer = body["tokenizer"] and format.TokenizerEntry(**body["tokenizer"])
        lines = format._data_lines(splits, tokenizer, body.get("selection", ""))
        body["data_digest"] = format._sha256(lines)
        body["manifest_sha256"] = format._sha256(format._canonical({**body, "splits": splits}))
    return json.dumps(body)


def rehashed(body: dict[str, Any]) -> str:
    """The text of a plan with the hash that it should have."""
    hashed = {key: body[key] for key in body if key not in ("format", "version", "plan_hash")}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    indent = 1 if "adoption" in str(body.get("format")) else None
    return json.dumps({**body, "plan_hash": digest}, indent=indent)
