"""Where files live: reading, naming and publishing whole objects under a dataset's root.

A file appears under its final name only when it is complete and on disk, so that a kill at any
moment leaves the old file, the new one, or none. What the files mean is `shards.format`'s subject.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from shards.format import MANIFEST_NAME, FormatError, Manifest

SCRATCH_NAME = ".pixloom-tmp"
"""The folder, under a dataset's root, in which files are built; also the suffix of temp files."""


class UserError(Exception):
    """What a user can put right: one line that names the file or option and what to do."""


def command(verb: str, action: Callable[[], int]) -> int:
    """Runs a command's `action`; returns its exit status, or 2 after one line about its error."""
    try:
        return action()
    except (UserError, FormatError) as error:
        print(f"pixloom {verb}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pixloom {verb}: interrupted", file=sys.stderr)
        return 130


def local_path(url: str) -> Path:
    """The path behind a plain path or a `file://` URL. Raises `UserError` for other protocols."""
    protocol, separator, rest = url.partition("://")
    if not separator:
        return Path(url)
    if protocol != "file":
        raise UserError(
            f"{protocol}://: this storage protocol is not supported; "
            "supported so far: local paths and file:// URLs"
        )
    return Path(rest)


def join(root: str, name: str) -> str:
    """The URL of `name` under `root`. Raises `FormatError` when `name` leads out of `root`."""
    parts = name.split("/")
    if not name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise FormatError(f"{root}: {name!r} is no name of a file inside a dataset")
    return f"{root if root.endswith('/') else (root or '.') + '/'}{name}"


def exists(url: str) -> bool:
    return local_path(url).exists()


def size_bytes(url: str) -> int:
    with explained(url):
        return local_path(url).stat().st_size


def read_bytes(url: str) -> bytes:
    """The whole object. Raises `UserError` naming it when it is missing or cannot be read."""
    with explained(url):
        return local_path(url).read_bytes()


def read_text(url: str) -> str:
    """The whole object as UTF-8. Raises `UserError`, or `FormatError` when it is not UTF-8."""
    try:
        return read_bytes(url).decode()
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
            "or run it again when it was interrupted"
        )
    return Manifest.from_json(read_text(url), url)


def publish(scratch: Path, destination: str) -> None:
    """Moves a finished local file to `destination`, where it appears complete or not at all."""
    target = local_path(destination)
    with explained(destination):
        target.parent.mkdir(parents=True, exist_ok=True)
        sync(scratch)
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
        sync(target.parent)


def publish_text(text: str, destination: str) -> None:
    """Writes `text` as UTF-8 to `destination`, where it appears complete or not at all."""
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
    with explained(url):
        local_path(url).unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(root: str) -> Iterator[Path]:
    """Holds `root` for one writer and yields an empty scratch folder, on the same file system.

    What an earlier, killed writer left unfinished is removed. The lock is the kernel's, on the
    folder itself: it ends with the process, whatever ends that. Raises `UserError` when another
    writer holds it.
    """
    path = local_path(root)
    with explained(root):
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{root}: another pixloom is writing there; wait for it") from error
        with explained(root):
            _remove_leftovers(path)
            scratch = path / SCRATCH_NAME
            scratch.mkdir()
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)


def _remove_leftovers(root: Path) -> None:
    shutil.rmtree(root / SCRATCH_NAME, ignore_errors=True)
    for folder in (root, *(entry for entry in root.iterdir() if entry.is_dir())):
        for left in folder.glob(f".*{SCRATCH_NAME}"):
            left.unlink()


def sync(path: Path) -> None:
    """Forces a file's data, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turns an OSError, such as a full disk, into a `UserError` naming `url`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{url}: {error.strerror or error}") from error
