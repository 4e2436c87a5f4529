"""What raw samples are, how those of a folder are found, and how all of them are read.

Here and in `shards.layouts`, for tables and tars, it is only said what the samples are called and
where their bytes are; what these are is checked by `shards.plan` (hashes, headers, text) and
`shards.images`. All bytes of a source, on disk or on a store, are read through `reading`.
"""

import collections
import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache, partial
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from shards import storage, tables
from shards.format import COLOUR_CHANNELS, Kind
from shards.storage import MissingError, UserError

IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff",
)  # fmt: skip
ARRAY_SUFFIXES = (".npy", ".tif", ".tiff")
"""Of images of other than 1, 3 or 4 channels."""
CODE_SUFFIXES = (".gui", ".html", ".tex", ".txt")
MAX_CODE_BYTES = 4 * 2**20
"""Finding the words of so much text takes up to 1.5 GB, as much as the largest image."""


NUM_READ_AHEAD = 16
"""Files of a store that one worker asks for at a time: what it waits for is the answer."""
READ_AHEAD_BYTES = 64 * 2**20
"""No more is asked for while so much has come and was not used."""


class Place(NamedTuple):
    """Where bytes are that are no file of their own: in a tar, or in a cell of a table."""

    file: str
    """Relative to the source's folder, with `/`."""
    start: int
    size: int
    """In bytes: of the tar's member, or of the table's row. In Parquet, the row's number, and 1."""
    column: int | str | None = None
    """Which cell of the row, as `shards.tables` counts or calls it."""


@dataclass(frozen=True, slots=True)
class RawPair:
    """One sample: names relative to the source folder, with `/`. `code` is None without code.

    Where there is no place, the name is that of a file. A store's listing tells the sizes of the
    files, as a tar tells those of its members; that of a local folder does not.
    """

    image: str
    code: str | None
    image_bytes: int | None = field(default=None, compare=False)
    code_bytes: int | None = field(default=None, compare=False)
    image_place: Place | None = None
    code_place: Place | None = None
    split: str | None = None
    """What the source says, where it was asked for."""
    block: int | None = None
    """Samples of one block are read together, as one of them costs nearly what all do: they are
    the rows of a row group in Parquet, and stay neighbours as far as the splits allow."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A file, by its name relative to the source folder, that is not packed, and why."""

    cause: str
    name: str


@dataclass(frozen=True)
class Listing:
    """What a source holds, in order: bytewise by name in folders and of tars and tables, then as
    it comes. `num_other_files` are neither images nor code."""

    root: str
    kind: Kind
    code_suffix: str | None
    pairs: tuple[RawPair, ...]
    skips: tuple[Skip, ...]
    num_other_files: int


class TooLargeError(OSError):
    """A file that is larger than what would be read of it."""


class NoCellError(OSError):
    """A row of a table without a value where one is wanted."""


def list_folder(
    root: str, kind: Kind | None = None, code_suffix: str | None = None, channels: int = 3
) -> Listing:
    """Finds the samples under `root`, a folder on disk or on a store, at any depth.

    In a folder of `pairs` an image and its code share their path up to the suffix; a folder of
    `images` holds images alone. Without `kind`, a folder in which code lies beside images is one
    of pairs. Hidden files are ignored, links and special files never followed or opened; neither
    are objects whose names no URL can hold. `.npy` files are images where `channels` are not a
    colour's, and where there are no others.

    Raises `UserError` when there is no folder, no image, or no telling what the code is, and for a
    code suffix with `images`.
    """
    if kind == "images" and code_suffix is not None:
        raise UserError(
            f"--code-suffix {code_suffix}: --kind images packs no code; drop one of them"
        )
    if code_suffix in (*IMAGE_SUFFIXES, *ARRAY_SUFFIXES):
        raise UserError(f"--code-suffix {code_suffix}: that is an image's suffix")
    sizes, skips = _list_store(root) if storage.is_remote(root) else _list_local(root)
    files = sorted(sizes, key=os.fsencode)
    wanted = image_suffixes(channels)
    images = [name for name in files if _suffix(name) in wanted]
    if not images:
        images = [name for name in files if _suffix(name) == ".npy"]
    if not images:
        raise UserError(f"{root}: no images there; looked for {' '.join(wanted)}")
    if code_suffix is None and kind != "images":
        code_suffix = _find_code_suffix(root, files, {_stem(name) for name in images})
        if code_suffix is None and kind == "pairs":
            raise UserError(
                f"{root}: no code beside the images; looked for {' '.join(CODE_SUFFIXES)}; "
                "name another with --code-suffix, or pack --kind images"
            )
    if code_suffix is None:
        kept = _without_case_collisions({name: name for name in images}, skips)
        pairs = [RawPair(name, None, sizes[name]) for name in kept]
        num_other = len(files) - len(images)
        return Listing(root, "images", None, tuple(pairs), tuple(skips), num_other)
    code_names = [name for name in files if _suffix(name) == code_suffix]
    codes: dict[str, str] = {}
    for name in code_names:
        if codes.setdefault(_stem(name), name) != name:
            skips.append(Skip("case_collision", name))
    by_stem: dict[str, str] = {}
    for name in images:
        if _stem(name) not in codes:
            skips.append(Skip("image_without_code", name))
        elif _stem(name) in by_stem:
            skips.append(Skip("second_image_of_code", name))
        else:
            by_stem[_stem(name)] = name
    skips += [Skip("code_without_image", codes[stem]) for stem in codes if stem not in by_stem]
    kept = _without_case_collisions(by_stem, skips)
    pairs = []
    for name in kept:
        code = codes[_stem(name)]
        pairs.append(RawPair(name, code, sizes[name], sizes[code]))
    num_other = len(files) - len(images) - len(code_names)
    return Listing(root, "pairs", code_suffix, tuple(pairs), tuple(skips), num_other)


def image_suffixes(channels: int) -> tuple[str, ...]:
    """Of the files that may hold images of so many channels."""
    return IMAGE_SUFFIXES if channels in COLOUR_CHANNELS else ARRAY_SUFFIXES


def read_file(
    root: str, name: str, num_bytes: int | None = None, max_bytes: int | None = None
) -> bytes:
    """The bytes of a listed file of the folder `root`, on disk or on a store.

    Raises `TooLargeError`, having read nothing, when there are more than `max_bytes`; another
    OSError when it cannot be read, also when it is gone or has become a link or a pipe; and
    `UserError` when the store does not answer. `num_bytes` is what a store's listing said: it saves
    a question, and need not be true any more.
    """
    folder = _local_folder(root)
    if folder is None:
        url = storage.join(root, name)
        try:
            if num_bytes is None:
                num_bytes = storage.size_bytes(url)
            _check_size(name, num_bytes, max_bytes)
            return storage.read_bytes(url, num_bytes)
        except MissingError as error:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url) from error
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with FileIO(os.open(f"{folder}/{name}", flags)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{name}: not a regular file")
        _check_size(name, status.st_size, max_bytes)
        return file.readall()


@lru_cache(maxsize=8)
def _local_folder(root: str) -> str | None:
    return None if storage.is_remote(root) else str(storage.local_path(root))


def _check_size(name: str, num_bytes: int, max_bytes: int | None) -> None:
    if max_bytes is not None and num_bytes > max_bytes:
        raise TooLargeError(f"{name}: {num_bytes} bytes")


@dataclass(frozen=True, slots=True)
class FileRead:
    """A file to be read, or what is at a place. `num_bytes` and `max_bytes` as in `read_file`."""

    name: str
    num_bytes: int | None = None
    max_bytes: int | None = None
    place: Place | None = None


Reader = Callable[[FileRead], bytes]


@contextlib.contextmanager
def reading(root: str, files: Iterable[FileRead]) -> Iterator[Reader]:
    """Yields `read_file` for these files, each of which is asked for once, in this order.

    A file may be left out. From a store they are read ahead, several at a time. Rows of Parquet
    are quickest in blocks, see `RawPair`.
    """
    files = list(files)
    rows = [file for file in files if _row_of(file) is not None]
    if rows:
        wanted = [row for row in map(_row_of, rows) if row is not None]
        others = [file for file in files if _row_of(file) is None]
        with (
            closing(tables.ParquetCells(root, wanted)) as cells,
            reading(root, others) as read_other,
        ):

            def read(file: FileRead) -> bytes:
                row = _row_of(file)
                if row is None:
                    return read_other(file)
                return _check_cell(file, cells.read(*row))

            yield read
        return
    if not storage.is_remote(root):
        yield partial(_read, root)
        return
    waiting = iter(files)
    ahead: collections.deque[tuple[FileRead, Future[bytes]]] = collections.deque()
    pool = ThreadPoolExecutor(NUM_READ_AHEAD, "read-ahead")

    def held_bytes(file: FileRead, read: Future[bytes]) -> int:
        if not read.done():
            return file.num_bytes or 0
        return 0 if read.exception() else len(read.result())

    def look_ahead() -> None:
        left_bytes = READ_AHEAD_BYTES - sum(held_bytes(*one) for one in ahead)
        while not ahead or (len(ahead) < NUM_READ_AHEAD and left_bytes > 0):
            file = next(waiting, None)
            if file is None:
                return
            left_bytes -= file.num_bytes or 0
            ahead.append((file, pool.submit(_read, root, file)))

    def read_next(wanted: FileRead) -> bytes:
        while True:
            look_ahead()
            file, read = ahead.popleft()
            if file == wanted:
                return read.result()

    try:
        yield read_next
    finally:
        pool.shutdown(cancel_futures=True)


def _read(root: str, file: FileRead) -> bytes:
    if file.place is None:
        return read_file(root, file.name, file.num_bytes, file.max_bytes)
    place = file.place
    if place.column is None:
        _check_size(file.name, place.size, file.max_bytes)
    data = storage.read_range(storage.join(root, place.file), place.start, place.start + place.size)
    if len(data) != place.size:
        raise OSError(f"{file.name}: cut off")
    if place.column is None:
        return data
    return _check_cell(file, tables.read_cell(data, place.file, place.column))


def _check_cell(file: FileRead, cell: bytes | None) -> bytes:
    if cell is None:
        raise NoCellError(f"{file.name}: no value")
    _check_size(file.name, len(cell), file.max_bytes)
    return cell


def _row_of(file: FileRead) -> tuple[str, int, str] | None:
    """What `ParquetCells` calls the cell; None where it is none of Parquet."""
    place = file.place
    if place is None or tables.suffix_of(place.file) != ".parquet":
        return None
    return place.file, place.start, str(place.column)


def _list_local(root: str) -> tuple[dict[str, int | None], list[Skip]]:
    """The names of all files, with no sizes, and what is no file."""
    folder = storage.local_path(root)
    if not folder.is_dir():
        raise UserError(f"{root}: {'not a folder' if folder.exists() else 'no such folder'}")
    try:
        entries = sorted(_walk(folder), key=lambda entry: os.fsencode(entry[0]))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    files: dict[str, int | None] = {name: None for name, is_file in entries if is_file}
    return files, [Skip("not_a_file", name) for name, is_file in entries if not is_file]


def _list_store(root: str) -> tuple[dict[str, int | None], list[Skip]]:
    """The sizes of all objects, and those whose names a URL cannot hold."""
    sizes = storage.list_files(root)
    if not sizes:
        raise UserError(f"{root}: {'not a folder' if storage.exists(root) else 'no such folder'}")
    files: dict[str, int | None] = {}
    skips = []
    for name, num_bytes in sizes.items():
        parts = name.split("/")
        if "" in parts or "?" in name or "#" in name:
            skips.append(Skip("unsupported_name", name))
        elif not any(part.startswith(".") for part in parts):
            files[name] = num_bytes
    return files, skips


def _walk(root: Path) -> Iterator[tuple[str, bool]]:
    folders = [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(name + "/")
                else:
                    yield name, entry.is_file(follow_symlinks=False)


def _find_code_suffix(root: str, files: list[str], image_stems: set[str]) -> str | None:
    # A .gui file is always code; another text may be a README, unless an image shares its name.
    found = {_suffix(name) for name in files if _stem(name) in image_stems}
    candidates = [suffix for suffix in CODE_SUFFIXES if suffix in found]
    if ".gui" in candidates or any(_suffix(name) == ".gui" for name in files):
        return ".gui"
    if len(candidates) > 1:
        raise UserError(
            f"{root}: {' and '.join(candidates)} files lie beside the images; "
            "say which are the code with --code-suffix"
        )
    return candidates[0] if candidates else None


def _without_case_collisions(names: Mapping[str, str], skips: list[Skip]) -> list[str]:
    """The values whose keys differ by more than case; of others the first.

    On file systems that ignore case, and to readers who do, colliding names are one file.
    """
    kept: dict[str, str] = {}
    for key, name in names.items():
        if kept.setdefault(key.lower(), name) != name:
            skips.append(Skip("case_collision", name))
    return list(kept.values())


def _suffix(name: str) -> str:
    # As of a `Path`, which takes ten times as long.
    dot, slash = name.rfind("."), name.rfind("/")
    return name[dot:].lower() if slash + 1 < dot < len(name) - 1 else ""


def _stem(name: str) -> str:
    return name[: len(name) - len(_suffix(name))]
