"""What a SOURCE is: a folder, tables, or WebDataset shards; and the samples that it holds.

A new layout is one function here that returns a `Listing`. Tables are read as `shards.tables`
says, tars as `shards.tarfiles` does; that of folders is in `shards.sources`.
"""

import dataclasses
import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO, NamedTuple

from shards import engines, storage, tables, tarfiles
from shards.engines import Workers
from shards.format import (
    ARRAY_EXTENSIONS,
    COLOUR_CHANNELS,
    IMAGE_EXTENSIONS,
    TOKENS_EXTENSION,
    Kind,
)
from shards.sources import CODE_SUFFIXES, Listing, Place, RawPair, Skip, list_folder
from shards.storage import UserError

CODE_EXTENSIONS = tuple(suffix.removeprefix(".") for suffix in CODE_SUFFIXES)

SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


class Columns(NamedTuple):
    """The names of a table's columns that are used."""

    image: str = "image"
    code: str | None = None
    split: str | None = None


def list_source(
    source: str,
    *,
    kind: str = "auto",
    code_suffix: str | None = None,
    columns: Columns | None = None,
    by_name: bool = False,
    channels: int = 3,
    workers: Workers | int = 0,
) -> Listing:
    """Finds the samples of `source`: a folder, one table or tar, or several by a pattern.

    With `kind` table or webdataset it is a folder of those, at any depth. `by_name` asks for the
    splits that the names of folders or shards speak of. `channels` are those the images will
    have, which says what files may be images.

    Raises `UserError` for anything else, and for options that do not go together.
    """
    root, names = _files_of(source, kind)
    asks_columns = columns is not None
    columns = columns or Columns()
    if names and tables.suffix_of(names[0]):
        if kind == "webdataset":
            raise UserError(f"{source}: no tar; drop --kind webdataset")
        if kind == "images" and columns.code is not None:
            raise UserError("--code-column: --kind images packs no code; drop one of them")
        if kind == "pairs" and columns.code is None:
            raise UserError(f"{source}: --kind pairs needs --code-column")
        if code_suffix is not None or by_name:
            option = "--split folders" if by_name else f"--code-suffix {code_suffix}"
            raise UserError(f"{option}: {source} is a table; see --code-column, --split-column")
        return list_table(root, names, columns)
    if asks_columns:
        raise UserError(
            f"{source}: no table ({', '.join(tables.SUFFIXES)}); drop --image-column, "
            "--code-column and --split-column"
        )
    if names:
        if kind == "table":
            raise UserError(f"{source}: no table; drop --kind table")
        listing = list_shards(root, names, kind, code_suffix, workers, channels)
        return _split_by(listing, _split_of_shard) if by_name else listing
    chosen: Kind | None = "pairs" if kind == "pairs" else "images" if kind == "images" else None
    listing = list_folder(root, chosen, code_suffix, channels)
    return _split_by(listing, _split_of_folder) if by_name else listing


def _files_of(source: str, kind: str) -> tuple[str, list[str]]:
    """A folder, and the names of the tables or tars in it that are meant; none: all of a folder."""
    folder, slash, last = source.rpartition("/")
    is_folder = not storage.is_remote(source) and storage.local_path(source).is_dir()
    if not is_folder and (tables.suffix_of(last) or last.endswith(".tar")):
        root = folder or ("/" if slash else ".")
        if not re.search(r"[*?\[]", last) or storage.exists(source):
            storage.size_bytes(source)  # raises where there is none
            return root, [last]
        files = storage.list_files(root)
        names = [name for name in sorted(files) if "/" not in name]
        names = [name for name in names if fnmatch.fnmatchcase(name, last)]
        if not names:
            raise UserError(f"{source}: no such files")
        return root, names
    if kind == "webdataset":
        return source, find_shards(source, storage.list_files(source))
    if kind == "table":
        names = [name for name in sorted(storage.list_files(source)) if tables.suffix_of(name)]
        names = [name for name in names if not any(p.startswith(".") for p in name.split("/"))]
        if not names:
            raise UserError(f"{source}: no tables there; looked for {' '.join(tables.SUFFIXES)}")
        return source, names
    return source, []


def split_of(name: str) -> str | None:
    """The split that a folder or a cell names; None where that could not be part of a key."""
    lower = name.lower()
    if lower in SPLIT_WORDS:
        return SPLIT_WORDS[lower]
    return lower if re.fullmatch(r"[a-z0-9_-]{1,32}", lower) else None


def _split_by(listing: Listing, find: Callable[[RawPair], str | None]) -> Listing:
    pairs, skips = [], list(listing.skips)
    for pair in listing.pairs:
        split = find(pair)
        if split is None:
            skips.append(Skip("no_split", pair.image))
        else:
            pairs.append(dataclasses.replace(pair, split=split))
    return dataclasses.replace(listing, pairs=tuple(pairs), skips=tuple(skips))


def _split_of_folder(pair: RawPair) -> str | None:
    folder, slash, _ = pair.image.partition("/")
    if not slash:
        return None
    split = split_of(folder)
    if split is None:
        raise _unfit_split(folder, folder)
    return split


def _split_of_shard(pair: RawPair) -> str:
    assert pair.image_place is not None
    return guess_split(pair.image_place.file) or "train"


def _unfit_split(where: str, name: str) -> UserError:
    return UserError(
        f"{where!r}: {name[:40]!r}: a split is named with 1 to 32 characters of a-z, 0-9, _ and -"
    )


def list_table(root: str, names: Sequence[str], columns: Columns) -> Listing:
    """The rows of the tables `names` below `root`: images alone, or pairs with a code column.

    The image column holds bytes, in Parquet, or paths relative to `root`; the code column holds
    the code itself. Raises `UserError` for a table that lacks a column or is damaged.
    """
    pairs: list[RawPair] = []
    skips: list[Skip] = []
    num_blocks = 0
    wanted = [one for one in columns if one is not None]
    is_inside = _inside(root)
    for name in names:
        table = tables.open_table(storage.join(root, name), wanted)
        loaded = [] if columns.image in table.binary else [columns.image]
        loaded += [] if columns.split is None else [columns.split]
        num_groups = 0
        for row in table.rows(loaded):
            found = _pair_of_row(name, table, row, columns, is_inside)
            if isinstance(found, Skip):
                skips.append(found)
            elif row.group is None:
                pairs.append(found)
            else:
                num_groups = row.group + 1
                pairs.append(dataclasses.replace(found, block=num_blocks + row.group))
        num_blocks += num_groups
    if not pairs and not skips:
        raise UserError(f"{storage.join(root, names[0])}: no rows there")
    kind: Kind = "images" if columns.code is None else "pairs"
    return Listing(root, kind, None, tuple(pairs), tuple(skips), 0)


def _pair_of_row(
    name: str,
    table: tables.Table,
    row: tables.Row,
    columns: Columns,
    is_inside: Callable[[str], bool],
) -> RawPair | Skip:
    where = f"{name} row {row.number}"
    if row.cells is None:
        return Skip("bad_row", where)

    def place(column: str) -> Place:
        return Place(name, row.start, row.size, table.positions[column])

    image, image_place = where, None
    if columns.image in table.binary:
        image_place = place(columns.image)
    else:
        path = row.cells[columns.image]
        if not path:
            return Skip("no_image", where)
        relative = _relative(path)
        if relative is None or not is_inside(relative):
            return Skip("unsafe_name", where)
        image = relative
    split = None
    if columns.split is not None:
        cell = row.cells[columns.split]
        if not cell:
            return Skip("no_split", where)
        split = split_of(cell)
        if split is None:
            raise _unfit_split(where, cell)
    if columns.code is None:
        return RawPair(image, None, image_place=image_place, split=split)
    return RawPair(
        image,
        f"{where}, {columns.code}",
        image_place=image_place,
        code_place=place(columns.code),
        split=split,
    )


def _relative(path: str) -> str | None:
    """A path of a table as the name of a file in its folder; None where it is none, or leads out.

    With surrogates it is no UTF-8.
    """
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if path.startswith("/") or "\0" in path or ".." in parts or not parts:
        return None
    return None if re.search("[\ud800-\udfff]", path) else "/".join(parts)


def _inside(root: str) -> Callable[[str], bool]:
    """Tells whether a file is in the folder `root` also when its folders' links are followed."""
    if storage.is_remote(root):
        # A URL would take these for its own.
        return lambda name: "?" not in name and "#" not in name
    top = os.path.realpath(storage.local_path(root))

    @lru_cache(maxsize=1024)
    def is_folder_inside(folder: str) -> bool:
        path = os.path.realpath(os.path.join(top, folder))  # noqa: PTH118
        return os.path.commonpath([path, top]) == top

    return lambda name: is_folder_inside(name.rpartition("/")[0])


def list_shards(
    root: str,
    names: Sequence[str],
    kind: str,
    code_suffix: str | None,
    workers: Workers | int,
    channels: int = 3,
) -> Listing:
    """The samples of the WebDataset shards `names` below `root`, by the rules of `pixloom index`:
    neighbouring members of one key, an image and, for pairs, its text. Only headers are read.

    Raises `UserError` where no image is there, or no telling what the code is, and `FormatError`
    naming the shard and the byte for a tar that is damaged or cut.
    """
    extension = code_suffix.removeprefix(".") if code_suffix is not None else None
    wanted = image_extensions(channels)
    if extension is not None and (kind == "images" or extension in wanted):
        found_out = "--kind images packs no code" if kind == "images" else "that is an image's"
        raise UserError(f"--code-suffix {code_suffix}: {found_out}; drop it")
    where, found = _first_extensions(root, names)
    if not any(one in wanted for some in found.values() for one in some):
        seen = ", ".join(sorted(set().union(*found.values()))[:12])
        raise UserError(
            f"{where}: no image members there; looked for {', '.join(wanted)}, its "
            f"samples have {seen}"
        )
    _, code_extension, has_code = choose_members(
        where,
        found,
        kind=kind,
        image_extensions=wanted,
        code_extension=extension,
        given_tokenizer=True,
    )
    if has_code and code_extension is None:
        raise UserError(
            f"{where}: has {TOKENS_EXTENSION} and no text, which packing needs; adopt the shards "
            "with `pixloom index --tokenizer FILE`, or give --kind images"
        )
    tasks = [(root, name, wanted, code_extension) for name in names]
    listed: dict[str, _Shard] = {}
    with closing(engines.run(_list_shard, tasks, workers, lambda task: task[1])) as results:
        for task, shard in results:
            listed[task[1]] = shard
    shards = [listed[name] for name in names]
    return Listing(
        root,
        "pairs" if has_code else "images",
        None if code_extension is None else f".{code_extension}",
        tuple(pair for shard in shards for pair in shard.pairs),
        tuple(skip for shard in shards for skip in shard.skips),
        sum(shard.num_other_members for shard in shards),
    )


@dataclass
class _Shard:
    pairs: list[RawPair]
    skips: list[Skip]
    num_other_members: int


def _first_extensions(root: str, names: Sequence[str]) -> tuple[str, dict[str, set[str]]]:
    """The first shard that has samples, and their extensions in lower case."""
    for name in names:
        url = storage.join(root, name)
        with storage.open_read(url) as file, storage.explained(url):
            found = tarfiles.list_extensions(file, name)
        if found:
            return url, found
    raise UserError(f"{storage.join(root, names[0])}: no samples there")


def _list_shard(task: tuple[str, str, tuple[str, ...], str | None]) -> _Shard:
    root, name, wanted, code_extension = task
    shard = _Shard([], [], 0)
    pairs: dict[str, RawPair | None] = {}
    halves: dict[str, int] = {}
    url = storage.join(root, name)
    with storage.open_read(url) as file, storage.explained(url):
        for key, members in _runs(shard, name, file):
            found = _pair_of(name, members, wanted, code_extension)
            cause = found if isinstance(found, str) else ""
            if key in halves:
                # Its other half was there, elsewhere.
                at = halves[key]
                shard.skips[at] = Skip("not_adjacent", shard.skips[at].name)
                cause = "not_adjacent"
            elif key in pairs:
                cause = "duplicate_key"
            elif cause in ("no_image", "no_code"):
                halves[key] = len(shard.skips)
            if cause:
                shard.skips.append(Skip(cause, f"{name}/{key}"))
            pairs.setdefault(key, None if cause or isinstance(found, str) else found)
    shard.pairs = [pair for pair in pairs.values() if pair is not None]
    return shard


def _runs(
    shard: _Shard, name: str, file: BinaryIO
) -> Iterator[tuple[str, list[tuple[str, tarfiles.Entry]]]]:
    """Neighbouring members of one key, with their extensions; what is none goes into `shard`."""
    run: tuple[str, list[tuple[str, tarfiles.Entry]]] = ("", [])
    for entry in tarfiles.walk(tarfiles.TarReader(file, name, hashing=False)):
        cause = tarfiles.why_unused(entry)
        if cause in ("ignored", "unnamed"):
            shard.num_other_members += cause == "unnamed"
        elif cause:
            shard.skips.append(Skip(cause, f"{name}/{entry.name}"))
        else:
            key, extension = tarfiles.split_name(entry.name)
            if key != run[0]:
                if run[0]:
                    yield run
                run = (key, [])
            run[1].append((extension.lower(), entry))
    if run[0]:
        yield run


def _pair_of(
    shard: str,
    members: Sequence[tuple[str, tarfiles.Entry]],
    wanted: Sequence[str],
    code_extension: str | None,
) -> RawPair | str:
    """The sample that neighbouring members make, or why they make none."""
    found = [entry for extension, entry in members if extension in wanted]
    codes = [entry for extension, entry in members if extension == code_extension]
    code = codes[0] if codes else None
    extensions = [extension for extension, _ in members if extension in wanted]
    if len(set(extensions)) < len(extensions) or len(codes) > 1:
        return "duplicate_member"
    if len(found) != 1:
        return "several_images" if found else "no_image"
    if code is None and code_extension is not None:
        return "no_code"
    [image] = found
    return RawPair(
        f"{shard}/{image.name}",
        None if code is None else f"{shard}/{code.name}",
        image_bytes=image.size,
        code_bytes=None if code is None else code.size,
        image_place=Place(shard, image.offset, image.size),
        code_place=None if code is None else Place(shard, code.offset, code.size),
    )


def find_shards(root: str, files: Mapping[str, int]) -> list[str]:
    """The names of the shards among `files`, in order. Raises `UserError` when there is none."""
    names = [
        name
        for name in sorted(files)
        if name.endswith(".tar") and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not names:
        if any(re.search(r"\.(tar\.\w+|tgz)$", name) for name in files):
            raise UserError(f"{root}: compressed shards cannot be read by offset; decompress them")
        raise UserError(f"{root}: no .tar files there")
    for name in names:
        if not name.isprintable():
            raise UserError(f"{root}: {name!r}: rename it, a shard's name must be printable")
    return names


def guess_split(name: str) -> str | None:
    """The split that the name of a shard speaks of; None when it speaks of none, or of several."""
    folder, slash, rest = name.lower().partition("/")
    if slash and folder in SPLIT_WORDS:
        return SPLIT_WORDS[folder]
    words = re.split(r"[^a-z]+", (rest if slash else folder).rpartition("/")[2])
    if words[0] in SPLIT_WORDS:
        return SPLIT_WORDS[words[0]]
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def image_extensions(channels: int) -> tuple[str, ...]:
    """Of the members that may hold images of so many channels, unless others are named."""
    return IMAGE_EXTENSIONS if channels in COLOUR_CHANNELS else ARRAY_EXTENSIONS


def choose_members(
    where: str,
    extensions: Mapping[str, set[str]],
    *,
    kind: str,
    image_extensions: Sequence[str],
    code_extension: str | None,
    given_tokenizer: bool,
) -> tuple[tuple[str, ...], str | None, bool]:
    """Image extensions, code extension, and whether samples are pairs, by one shard's samples.

    `extensions` are those of each sample. Raises `UserError` naming `where` and what is there.
    """
    wanted = tuple(image_extensions)
    beside = [found for found in extensions.values() if found & set(wanted)]
    if not beside:
        seen = ", ".join(sorted(set().union(*extensions.values()))[:12])
        raise UserError(
            f"{where}: no image members there (looked for {', '.join(wanted)}; its samples have "
            f"{seen}); choose with --image-extension"
        )
    if kind == "images":
        return wanted, None, False
    seen_beside = set().union(*beside)
    if code_extension is None:
        candidates = [one for one in CODE_EXTENSIONS if one in seen_beside]
        if len(candidates) > 1 and candidates[0] != "gui":
            raise UserError(
                f"{where}: {' and '.join(candidates)} lie beside images; choose with "
                "--code-suffix, or give --kind images"
            )
        code_extension = candidates[0] if candidates else None
    if code_extension is None and TOKENS_EXTENSION in seen_beside and not given_tokenizer:
        raise UserError(
            f"{where}: has {TOKENS_EXTENSION} and no text; give the tokenizer that made them with "
            "--tokenizer FILE, or --kind images"
        )
    pairs = code_extension is not None or TOKENS_EXTENSION in seen_beside
    if kind == "pairs" and not pairs:
        raise UserError(f"{where}: no text beside the images; choose with --code-suffix")
    return wanted, code_extension, pairs
