"""Where files live: reading, naming and publishing whole objects under a root.

The root is a local folder, as a path or a `file://` URL, or a folder of an object store
(`shards.remote`). A file appears under its final name only when it is complete and kept, so that a
kill at any moment leaves the old file, the new one, or none. What the files mean is
`shards.format`'s subject.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from shards import remote
from shards.errors import MissingError as MissingError
from shards.errors import StorageError as StorageError
from shards.errors import UserError as UserError
from shards.errors import command as command
from shards.errors import redact as redact
from shards.format import MANIFEST_NAME, FormatError, Manifest

SCRATCH_NAME = ".pixloom-tmp"
"""The folder, under a dataset's root, in which files are built; also the suffix of temp files."""

NUM_REQUESTS = 16
"""At a time, to a store: each takes long, and costs it little."""

RANGE_BYTES = 2**20
"""Asked of a store at a time for a file that is read as one: a request costs as long as so much."""

MAX_TEXT_BYTES = 256 * 2**20
"""Of a manifest, receipt, index or tokenizer: a manifest of a million shards has 200 MB. What JSON
becomes in memory can be twenty times as large, and is read before it is known to be ours."""

T = TypeVar("T")
R = TypeVar("R")


def is_remote(url: str) -> bool:
    """Whether `url` is on an object store. Anything else is local, or refused when it is used."""
    return remote.protocol_of(url) is not None


def local_path(url: str) -> Path:
    """The path behind a plain path or a `file://` URL. Raises `UserError` for other protocols."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        if re.match(r"[a-z][a-z0-9]+:/", url):  # also what `Path` makes of a URL
            raise UserError(f"{redact(url)}: a local path is needed here, or a URL with ://")
        return Path(url)
    if is_remote(url):
        raise UserError(
            f"{redact(url)}: an object store will not do here; "
            "supported so far: local paths and file:// URLs"
        )
    if protocol != "file":
        known = ", ".join(f"{name}://" for name in remote.PROTOCOLS)
        raise UserError(
            f"{protocol}://: this storage protocol is not supported; "
            f"supported so far: local paths, file://, {known}"
        )
    return Path(rest)


def join(root: str, name: str) -> str:
    """The URL of `name` under `root`. Raises `FormatError` when `name` leads out of `root`."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise FormatError(f"{root}: {name!r} is no name of a file inside a dataset")
    return f"{root if root.endswith('/') else (root or '.') + '/'}{name}"


def absolute(url: str) -> str:
    """`url`, which holds for a process in another working folder too."""
    return url if is_remote(url) else str(local_path(url).absolute())


def is_inside(url: str, folder: str) -> bool:
    """Whether `url` is `folder` or lies in it. Raises `UserError` for a protocol not supported."""
    if is_remote(url) and is_remote(folder):
        return remote.is_inside(url, folder)
    if is_remote(url) or is_remote(folder):
        return False
    # Not by `Path.resolve`, to which links in a circle are an error.
    real, real_folder = (Path(os.path.realpath(local_path(one))) for one in (url, folder))
    return real.is_relative_to(real_folder)


def exists(url: str) -> bool:
    """Whether there is such a file or folder. Raises `UserError` when the storage does not say."""
    if is_remote(url):
        return remote.exists(url)
    return local_path(url).exists()


def size_bytes(url: str) -> int:
    """The size of one object. Raises `UserError` naming it when it is missing."""
    if is_remote(url):
        return remote.size_bytes(url)
    with explained(url):
        return local_path(url).stat().st_size


def read_bytes(url: str, num_bytes: int | None = None) -> bytes:
    """The whole object. Raises `UserError` naming it when it is missing or cannot be read.

    `num_bytes` is its size where a listing told it: it saves a store one question.
    """
    if is_remote(url):
        return remote.read_bytes(url, num_bytes)
    with explained(url), _open_regular(url) as file:
        return file.read()


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of one object; fewer where it ends before.

    Raises `MissingError` when there is none, `UserError` when it cannot be read.
    """
    if is_remote(url):
        return remote.read_range(url, start, stop)
    with explained(url), _open_regular(url) as file:
        file.seek(start)
        return file.read(stop - start)


def open_read(url: str) -> BinaryIO:
    """One object as a file to read and seek in; one of a store is asked for by ranges.

    Raises `UserError` naming it when it is missing, also while it is read.
    """
    if is_remote(url):
        return io.BufferedReader(_RangeFile(url), RANGE_BYTES)
    with explained(url):
        return _open_regular(url)


def _open_regular(url: str) -> BinaryIO:
    """A local file; a pipe, which nobody may ever write to, or a device, which may never end, is
    an OSError."""
    descriptor = os.open(local_path(url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError("not a regular file")
    return file


class _RangeFile(io.RawIOBase):
    def __init__(self, url: str) -> None:
        self._url = url
        self._num_bytes = size_bytes(url)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._num_bytes)
        if stop <= self._position:
            return 0
        data = read_range(self._url, self._position, stop)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_text(url: str, max_bytes: int | None = MAX_TEXT_BYTES) -> str:
    """The whole object as UTF-8.

    Raises `UserError`, or `FormatError` when it is not UTF-8 or, unread, has more than `max_bytes`.
    """
    num_bytes = size_bytes(url)
    if max_bytes is not None and num_bytes > max_bytes:
        raise FormatError(f"{url}: {num_bytes} bytes, more than the {max_bytes} it may have")
    try:
        return read_bytes(url, num_bytes).decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{url}: damaged, not UTF-8 text") from error


def load_manifest(root: str) -> Manifest:
    """The manifest of the dataset at `root`.

    Raises `UserError` when there is none, `FormatError` when it is damaged.
    """
    url = join(root, MANIFEST_NAME)
    if not exists(url):
        found = "no packed dataset" if exists(root) else "no such directory"
        raise UserError(
            f"{root}: {found} ({MANIFEST_NAME} is missing); run `pixloom pack SOURCE {root}`, "
            "or run it again when it was interrupted; `pixloom index` for another tool's shards"
        )
    return Manifest.from_json(read_text(url), url)


def list_files(url: str) -> dict[str, int]:
    """Sizes in bytes of all files below a folder, by name relative to it (`a/b.json`).

    Empty when there is no such folder. Never from a cache.
    """
    if is_remote(url):
        return remote.list_files(url)
    root = local_path(url)
    sizes = {}
    with explained(url):
        for folder, _, names in os.walk(root, onerror=_unless_missing):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # removed while we list
                    sizes[path.relative_to(root).as_posix()] = _size_of(path)
    return dict(sorted(sizes.items()))


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        # Of a link that leads nowhere or in a circle, its own: who reads the file is told.
        return path.lstat().st_size


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def fetch(url: str, destination: Path) -> None:
    """Copies one whole object to a local file, which appears complete or not at all.

    It is not forced to the disk: it can be fetched again. Raises `UserError` when there is no such
    object or not all of it arrives.
    """
    with explained(str(destination)):
        destination.parent.mkdir(parents=True, exist_ok=True)
        owner = f"{os.getpid()}-{threading.get_ident()}"
        temporary = destination.with_name(f".{destination.name}.{owner}{SCRATCH_NAME}")
        temporary.touch()
        try:
            if is_remote(url):
                remote.fetch(url, temporary)
            else:
                with explained(url), _open_regular(url) as file, temporary.open("wb") as copy:
                    shutil.copyfileobj(file, copy)
            temporary.replace(destination)
        finally:
            temporary.unlink(missing_ok=True)


def publish(scratch: Path, destination: str) -> None:
    """Moves a finished local file to `destination`, where it appears complete or not at all.

    Raises `UserError`; what was at `destination` is then as it was, or replaced as a whole. May be
    called from any thread.
    """
    publish_all([(scratch, destination)])


def publish_all(files: Sequence[tuple[Path, str]]) -> None:
    """As `publish`, of several files one after the other. Raises for the first that fails.

    On disk they are forced there together: after a power cut, any of them may be missing as long
    as this has not returned.
    """
    folders = []
    for scratch, destination in files:
        if not is_remote(destination):
            target = local_path(destination)
            with explained(destination):
                target.parent.mkdir(parents=True, exist_ok=True)
                sync(scratch)
            folders.append(target.parent)
    for scratch, destination in files:
        if is_remote(destination):
            with explained(str(scratch)):
                remote.put(scratch, destination)
                scratch.unlink()
        else:
            with explained(destination):
                _move(scratch, local_path(destination))
    for folder in dict.fromkeys(folders):
        sync(folder)


def _move(scratch: Path, target: Path) -> None:
    try:
        scratch.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        temporary = target.with_name(f".{target.name}.{os.getpid()}{SCRATCH_NAME}")
        try:
            shutil.copyfile(scratch, temporary)
            sync(temporary)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        scratch.unlink()


def publish_text(text: str, destination: str, scratch: Path | None = None) -> None:
    """Writes `text` as UTF-8 to `destination`, where it appears complete or not at all.

    In `scratch`, a folder that is cleaned after a kill, it is built where that is given.
    """
    if scratch is not None:
        temporary = scratch / f"text-{os.getpid()}-{threading.get_ident()}"
        with explained(str(temporary)):
            temporary.write_bytes(text.encode())
        publish(temporary, destination)
        return
    if is_remote(destination):
        with tempfile.TemporaryDirectory(prefix="pixloom-") as folder:
            scratch = Path(folder, "text")
            scratch.write_bytes(text.encode())
            publish(scratch, destination)
        return
    target = local_path(destination)
    with explained(destination):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}{SCRATCH_NAME}")
        try:
            temporary.write_bytes(text.encode())
            publish(temporary, destination)
        finally:
            temporary.unlink(missing_ok=True)


def remove(url: str) -> None:
    """Removes one file; none there is no error."""
    if is_remote(url):
        remote.remove(url)
        return
    with explained(url):
        local_path(url).unlink(missing_ok=True)


def remove_tree(url: str) -> None:
    """Removes a folder and everything in it; none there is no error."""
    if is_remote(url):
        remote.remove_tree(url)
        return
    with explained(url), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(local_path(url))


def abort_uploads(url: str, is_ours: Callable[[str], bool] = lambda name: True) -> int:
    """Ends uploads that killed writers left unfinished below `url`; returns how many.

    Only S3 keeps such uploads (and asks money for them). The caller must be the only writer of
    what `is_ours` says of a name below `url`. Nothing is done for a whole bucket, to which others
    may be writing.
    """
    return remote.abort_uploads(url, is_ours) if is_remote(url) else 0


def each(root: str, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """`function` of each of `items`, in their order; where `root` is a store, several at a time."""
    if not is_remote(root):
        return [function(item) for item in items]
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return list(pool.map(function, items))


@contextlib.contextmanager
def locked(root: str) -> Iterator[Path]:
    """Holds `root` for one writer, and yields the folder that is locked: `root` itself.

    The lock is the kernel's: it ends with the process, whatever ends that. No lock guards a
    store; for one, a folder of its own in this machine's temporary one keeps out those who write
    there from here. Raises `UserError` when another writer holds it.
    """
    path = _private_folder(root) if is_remote(root) else local_path(root)
    lock = None
    while lock is None:
        with explained(str(path)):
            path.mkdir(0o700 if is_remote(root) else 0o777, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # removed by its last holder
                lock = _try_lock(path, root)
    try:
        yield path
    finally:
        if is_remote(root):
            with contextlib.suppress(OSError):
                path.rmdir()
        os.close(lock)


def _private_folder(root: str) -> Path:
    """This user's folder on this machine for what is to go to the store `root`."""
    name = hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir(), f"pixloom-{os.getuid()}-{name}")
    with contextlib.suppress(FileNotFoundError):
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(
                f"{path}: is another user's, or no folder; set TMPDIR to a place of yours"
            )
    return path


def _try_lock(path: Path, root: str) -> int | None:
    """The descriptor that holds the folder; None where another folder has taken its place."""
    lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), path.stat()):
            return lock
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"{root}: another pixloom is writing there; wait for it") from error
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


@contextlib.contextmanager
def exclusive(root: str) -> Iterator[Path]:
    """Holds `root` for one writer, as `locked` does, and yields an empty scratch folder.

    For a local root it is on the same file system. What an earlier, killed writer left unfinished
    on this machine is removed. Raises `UserError` when another writer holds the root.
    """
    with locked(root) as path:
        with explained(str(path)):
            _remove_leftovers(path)
            scratch = path.absolute() / SCRATCH_NAME
            scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _remove_leftovers(root: Path) -> None:
    shutil.rmtree(root / SCRATCH_NAME, ignore_errors=True)
    for folder in (root, *(entry for entry in root.iterdir() if entry.is_dir())):
        for left in folder.glob(f".*{SCRATCH_NAME}"):
            left.unlink()


def sync(path: Path) -> None:
    """Forces a file's data, or a folder's names, to the disk."""
    with explained(str(path)):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def start_writing(file: BinaryIO, start: int, stop: int) -> None:
    """Lets the disk begin with the bytes [start, stop), so that `sync` has less to wait for."""
    # Linux writes what it is to forget, and does not wait for it; the kernel's own call for this
    # is not in Python.
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns an OSError, such as a full disk, into a `StorageError` naming `url`."""
    try:
        yield
    except OSError as error:
        raise StorageError(redact(f"{url}: {error.strerror or error}")) from error
