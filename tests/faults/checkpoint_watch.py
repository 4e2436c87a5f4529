"""What happens to a run's checkpoint files, seen from outside: on a local disk, on a store.

Folders are watched through inotify, which tells within a fraction of a millisecond; a store is
listed again and again.
"""

import contextlib
import ctypes
import os
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import fsspec


class Event(NamedTuple):
    """`kind` is opened, written (in part), done (whole under its name) or removed."""

    kind: str
    step: int
    name: str


class File(NamedTuple):
    """`mark` changes whenever the file does; `whole`: has the length that its header says."""

    mark: str
    whole: bool


Listing = dict[int, dict[str, File]]
"""By step, what lies in its folder: the folder itself, as "", and its files by name."""


def listing(where: str) -> Listing:
    """All checkpoint folders, committed or not, oldest first."""
    found = _store_listing(where) if "://" in where else _folder_listing(Path(where))
    return dict(sorted(found.items()))


def clear(where: str) -> None:
    """Removes all that lies there."""
    filesystem, root = fsspec.core.url_to_fs(where)
    filesystem.rm(root, recursive=True)


class Watch:
    """Gathers events from its making on."""

    fd: int | None = None
    """readable when there are events; None: ask every now and then"""

    def events(self) -> list[Event]:
        """What has happened since the last call."""
        raise NotImplementedError

    def close(self) -> None:
        """Frees what the watch holds."""

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# From linux/inotify.h
_MODIFY, _CLOSE_WRITE, _OPEN, _MOVED_TO = 0x2, 0x8, 0x20, 0x80
_CREATE, _DELETE, _IS_DIR, _OVERFLOW = 0x100, 0x200, 0x40000000, 0x4000
_KINDS = {
    _OPEN: "opened",
    _MODIFY: "written",
    _CREATE: "written",
    _CLOSE_WRITE: "done",
    _MOVED_TO: "done",
    _DELETE: "removed",
}
_HEADER = struct.Struct("iIII")


class FolderWatch(Watch):
    """A local `checkpoints/` and the folders that it has and gets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self._steps: dict[int, int | None] = {}
        self._add(folder, None)
        for path in folder.iterdir():
            self._add(path, _step_of(path.name))

    def _add(self, path: Path, step: int | None) -> None:
        mask = sum(_KINDS)
        descriptor = self._libc.inotify_add_watch(self.fd, os.fsencode(path), mask)
        if descriptor >= 0:  # else it is gone already
            self._steps[descriptor] = step

    def events(self) -> list[Event]:
        events = []
        with contextlib.suppress(BlockingIOError):
            while True:
                events += self._parse(os.read(self.fd, 65536))
        return events

    def _parse(self, buffer: bytes) -> list[Event]:
        events, offset = [], 0
        while offset < len(buffer):
            descriptor, mask, _, size = _HEADER.unpack_from(buffer, offset)
            offset += _HEADER.size + size
            name = os.fsdecode(buffer[offset - size : offset].rstrip(b"\0"))
            assert not mask & _OVERFLOW, "events were lost"
            step = self._steps.get(descriptor)
            if step is None:
                if mask & (_CREATE | _MOVED_TO) and _step_of(name) is not None:
                    self._add(self._folder / name, _step_of(name))
                continue
            for bit, kind in _KINDS.items():
                if mask & bit and not mask & _IS_DIR:
                    events.append(Event(kind, step, name))
        return events

    def close(self) -> None:
        os.close(self.fd)


class StoreWatch(Watch):
    """An fsspec URL. An object appears whole, so it is never opened or written, only done."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._last = listing(url)

    def events(self) -> list[Event]:
        last, self._last = self._last, listing(self._url)
        events = []
        for step in last.keys() | self._last.keys():
            old, new = last.get(step, {}), self._last.get(step, {})
            events += [Event("removed", step, name) for name in old.keys() - new.keys()]
            events += [Event("done", step, name) for name in new if new[name] != old.get(name)]
        # In the order of a save: the commit comes last.
        return sorted(events, key=lambda event: (event.name.startswith("COMMIT"), event))


def _folder_listing(folder: Path) -> Listing:
    found: Listing = {}
    for path in folder.iterdir() if folder.exists() else ():
        step = _step_of(path.name)
        if step is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # survivors of a kill may be at work
            found[step] = {"": File(str(path.stat().st_mtime_ns), True)}
            for file in path.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    mark = f"{stat.st_ino} {stat.st_size} {stat.st_mtime_ns}"
                    found[step][file.name] = File(mark, _is_whole(file, stat.st_size))
    return found


def _is_whole(file: Path, size: int) -> bool:
    """A safetensors file says its length in its header; other files are short."""
    if file.suffix != ".safetensors":
        return True
    with file.open("rb") as opened:
        start = opened.read(8)
        if len(start) < 8:
            return False
        (header,) = struct.unpack("<Q", start)
        ends = re.findall(rb'"data_offsets":\[\d+,(\d+)\]', opened.read(header))
    length: int = 8 + header + max(map(int, ends), default=-1)
    return size == length


def _store_listing(url: str) -> Listing:
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    found: Listing = {}
    objects: dict[str, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        objects = filesystem.find(root, detail=True)
    for path, info in objects.items():
        folder, _, name = path.removeprefix(root).lstrip("/").partition("/")
        step = _step_of(folder)
        if step is not None:
            mark = " ".join(str(info.get(key)) for key in ("ETag", "LastModified", "size", "mtime"))
            found.setdefault(step, {})[name] = File(mark, True)
    return found


def _step_of(name: str) -> int | None:
    match = re.fullmatch(r"step-(\d{8,})", name)
    return int(match[1]) if match else None
