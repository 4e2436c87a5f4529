"""Where raw samples come from: a layout on disk in, a sorted listing of samples out.

A new layout is one function here. Only names and file types are looked at; what is inside the
files is checked by `shards.plan` (hashes, headers, text) and `shards.images`.
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from shards.format import Kind
from shards.storage import UserError

IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff",
)  # fmt: skip
CODE_SUFFIXES = (".gui", ".html", ".tex", ".txt")


@dataclass(frozen=True, slots=True)
class RawPair:
    """One sample: names relative to the source folder, with `/`. `code` is None without code."""

    image: str
    code: str | None


@dataclass(frozen=True, slots=True)
class Skip:
    """A file, by its name relative to the source folder, that is not packed, and why."""

    cause: str
    name: str


@dataclass(frozen=True)
class Listing:
    """What a folder holds, in bytewise order. `num_other_files` are neither images nor code."""

    kind: Kind
    code_suffix: str | None
    pairs: tuple[RawPair, ...]
    skips: tuple[Skip, ...]
    num_other_files: int


def list_folder(root: Path, kind: Kind | None = None, code_suffix: str | None = None) -> Listing:
    """Finds the samples under `root`, at any depth.

    In a folder of `pairs` an image and its code share their path up to the suffix; a folder of
    `images` holds images alone. Without `kind`, a folder in which code lies beside images is one
    of pairs. Hidden files are ignored, links and special files never followed or opened.

    Raises `UserError` when there is no folder, no image, or no telling what the code is, and for a
    code suffix with `images`.
    """
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'no such folder'}")
    if kind == "images" and code_suffix is not None:
        raise UserError(
            f"--code-suffix {code_suffix}: --kind images packs no code; drop one of them"
        )
    if code_suffix in IMAGE_SUFFIXES:
        raise UserError(f"--code-suffix {code_suffix}: that is an image's suffix")
    try:
        entries = sorted(_walk(root), key=lambda entry: os.fsencode(entry[0]))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    files, skips = [], []
    for name, is_file in entries:
        if is_file:
            files.append(name)
        else:
            skips.append(Skip("not_a_file", name))
    images = [name for name in files if _suffix(name) in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{root}: no images there; looked for {' '.join(IMAGE_SUFFIXES)}")
    if code_suffix is None and kind != "images":
        code_suffix = _find_code_suffix(root, files, {_stem(name) for name in images})
        if code_suffix is None and kind == "pairs":
            raise UserError(
                f"{root}: no code beside the images; looked for {' '.join(CODE_SUFFIXES)}; "
                "name another with --code-suffix, or pack --kind images"
            )
    if code_suffix is None:
        kept = _without_case_collisions({name: name for name in images}, skips)
        pairs = [RawPair(name, None) for name in kept]
        num_other = len(files) - len(images)
        return Listing("images", None, tuple(pairs), tuple(skips), num_other)
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
    pairs = [RawPair(name, codes[_stem(name)]) for name in kept]
    num_other = len(files) - len(images) - len(code_names)
    return Listing("pairs", code_suffix, tuple(pairs), tuple(skips), num_other)


def read_file(root: Path, name: str) -> bytes:
    """The bytes of a listed file. Raises OSError, also when it has become a link or a pipe."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(root / name, flags)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{name}: not a regular file")
        return file.read()


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


def _find_code_suffix(root: Path, files: list[str], image_stems: set[str]) -> str | None:
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
    return PurePosixPath(name).suffix.lower()


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)
