"""The members of a tar that nobody vouches for: read forward once, or by their headers alone.

The tar's own rules are kept more strictly than `tarfile` does, which takes a damaged header, or a
cut between two members, for the end. Keys are WebDataset's: they end at the first dot of a
member's base name. What samples are made of is the subject of `shards.foreign` (adopted where they
lie) and of `shards.sources` (packed again).
"""

import hashlib
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from shards.format import TAR_BLOCK_BYTES, FormatError

MAX_HEADER_BYTES = 1 << 20
"""Of a long name or a pax header."""
MAX_NAME_CHARS = 4096
"""Of a member, as of a path on Linux: the names of a shard's samples are in memory together."""
CHUNK_BYTES = 1 << 20

_PAX_RECORD = re.compile(rb"([0-9]{1,9}) ")
_SPARSE = "GNU.sparse."
_META_NAME = re.compile(r"__[^/]*__($|/)")


class TarReader:
    """A tar, read forward once. `crc32` is of everything read since somebody last set it."""

    def __init__(self, file: BinaryIO, where: str, *, hashing: bool = True) -> None:
        self._file = file
        self._hashing = hashing
        self._num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        self.where = where
        self.position = 0
        self.sha256 = hashlib.sha256()
        self.crc32 = 0

    def read(self, size: int) -> bytes:
        """At most `size` bytes; fewer at the end of the file."""
        data = self._file.read(size)
        self.position += len(data)
        if self._hashing:
            self.sha256.update(data)
            self.crc32 = zlib.crc32(data, self.crc32)
        return data

    def skip_to(self, position: int) -> None:
        """Goes forward to `position`, or to the end of the file where that comes before."""
        if not self._hashing:
            self.position = self._file.seek(min(position, self._num_bytes))
        while self.position < position and self.read(min(CHUNK_BYTES, position - self.position)):
            pass

    def require(self, size: int, name: str) -> None:
        """Raises `FormatError` when fewer than `size` bytes are left for the data of `name`."""
        if self.position + size > self._num_bytes:
            raise FormatError(
                f"{self.where}: cut off at byte {self._num_bytes}, inside {name!r}; copy it again"
            )


@dataclass(frozen=True, slots=True)
class Entry:
    """One member. `kind` is `file`, `folder`, or why it is none: `link`, `not_a_file`, `sparse`."""

    name: str
    kind: str
    header: bytes
    offset: int
    """Of its data, where the source stands when the entry is given out."""
    size: int


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, split where WebDataset splits; empty where it ignores it."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    if not stem or not extension or _META_NAME.match(name):
        return "", ""
    return folder + slash + stem, extension


def why_unused(entry: Entry) -> str:
    """Why a member is no part of a sample: a cause to be counted under, `ignored`, or nothing."""
    if entry.kind != "file":
        return "ignored" if entry.kind == "folder" else entry.kind
    if len(entry.name) > MAX_NAME_CHARS:
        return "unsafe_name"
    if not split_name(entry.name)[0]:
        return "unnamed"
    if entry.name.startswith("/") or ".." in entry.name.split("/"):
        return "unsafe_name"
    return ""


def list_extensions(file: BinaryIO, where: str) -> dict[str, set[str]]:
    """The extensions, in lower case, of every sample of a shard, from its headers alone."""
    found: dict[str, set[str]] = {}
    for entry in walk(TarReader(file, where, hashing=False)):
        key, extension = split_name(entry.name)
        if entry.kind == "file" and key:
            found.setdefault(key, set()).add(extension.lower())
    return found


def walk(source: TarReader) -> Iterator[Entry]:
    """The members of a tar in order: USTAR, GNU or pax; long names and sizes are understood.

    Raises `FormatError` naming the shard and the byte for a damaged header, for data behind the
    end, and where the end-of-archive mark is missing: a shard cut between two members looks like
    one whose writer left the mark out, and training on half of the samples goes unnoticed.
    """
    long_name: bytes | None = None
    pax: dict[str, bytes] = {}
    is_announced = False
    while True:
        start = source.position
        header = source.read(TAR_BLOCK_BYTES)
        if len(header) < TAR_BLOCK_BYTES:
            raise FormatError(
                f"{source.where}: cut off at byte {source.position}: the end-of-archive mark is "
                "missing. Copy it again; where it is surely whole, its writer was not closed, and "
                "1024 zero bytes at its end mend it"
            )
        if not any(header):
            if is_announced:
                raise FormatError(f"{source.where}: damaged: no member follows at byte {start}")
            _check_end(source)
            return
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            raise FormatError(f"{source.where}: damaged tar header at byte {start}") from error
        name, size = info.name, info.size
        if info.type in (b"L", b"K", b"x", b"X", b"g"):
            data = _extended_header(source, size, start)
            is_announced = is_announced or info.type != b"g"
            if info.type == b"L":
                long_name = data.partition(b"\0")[0]
            elif info.type in (b"x", b"X"):
                # Of the others there may be any number, header after header.
                pax |= _kept(_pax_records(data, source.where, start))
            elif info.type == b"g":
                shared = _pax_records(data, source.where, start)
                if "path" in shared or "size" in shared:
                    raise FormatError(f"{source.where}: one name or size for all, at byte {start}")
            continue
        sparse = info.type == tarfile.GNUTYPE_SPARSE or _SPARSE in pax
        if info.type == tarfile.GNUTYPE_SPARSE:
            more = header[482]
            while more:
                block = source.read(TAR_BLOCK_BYTES)
                more = block[504] if len(block) == TAR_BLOCK_BYTES else 0
        if long_name is not None:
            name = long_name.decode("utf-8", "surrogateescape")
        if "path" in pax:
            name = pax["path"].decode("utf-8", "surrogateescape")
        if "size" in pax:
            if not re.fullmatch(rb"[0-9]{1,18}", pax["size"]):
                raise FormatError(f"{source.where}: damaged pax header before byte {start}")
            size = int(pax["size"])
        long_name, pax, is_announced = None, {}, False
        # As everywhere: links, folders and devices carry no data, whatever their size says.
        if info.type in tarfile.SUPPORTED_TYPES and not info.isreg():
            size = 0
        if size < 0:
            raise FormatError(f"{source.where}: damaged tar header at byte {start}")
        source.require(size, name)
        kind = "file" if info.isreg() else "folder" if info.isdir() else "not_a_file"
        if sparse:
            kind = "sparse"
        elif info.islnk() or info.issym():
            kind = "link"
        offset = source.position
        yield Entry(name[: MAX_NAME_CHARS + 1], kind, header, offset, size)
        source.skip_to(offset + size + -size % TAR_BLOCK_BYTES)


def _extended_header(source: TarReader, size: int, start: int) -> bytes:
    if not 0 <= size <= MAX_HEADER_BYTES:
        raise FormatError(f"{source.where}: a header of {size} bytes at byte {start}")
    source.require(size, "a header")
    data = source.read(size)
    source.skip_to(source.position + -size % TAR_BLOCK_BYTES)
    return data


def _kept(records: dict[str, bytes]) -> dict[str, bytes]:
    kept: dict[str, bytes] = {
        keyword: records[keyword] for keyword in ("path", "size") if keyword in records
    }
    if any(keyword.startswith(_SPARSE) for keyword in records):
        kept[_SPARSE] = b""
    return kept


def _pax_records(data: bytes, where: str, start: int) -> dict[str, bytes]:
    records, at = {}, 0
    while at < len(data) and data[at]:
        match = _PAX_RECORD.match(data, at)
        end = at + int(match[1]) if match is not None else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise FormatError(f"{where}: damaged pax header at byte {start}")
        keyword, _, value = data[match.end() : end - 1].partition(b"=")
        records[keyword.decode("utf-8", "replace")] = value
        at = end
    return records


def _check_end(source: TarReader) -> None:
    """The first zero block proves that no member is missing; behind it are only zeros."""
    while data := source.read(CHUNK_BYTES):
        if data.strip(b"\0"):
            raise FormatError(
                f"{source.where}: goes on behind its end-of-archive mark, before byte "
                f"{source.position}: readers would not see the rest. Joined archives must be "
                "unpacked and packed again"
            )
