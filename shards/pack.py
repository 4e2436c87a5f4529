"""Packing: raw samples in, a dataset of tar shards out; resumed where a killed pack stopped.

Both are on disk or on a store. One task is one shard, a pure function of its entry in the plan:
the same input gives the same bytes, whatever the number of workers, wherever it goes, and however
often it was killed. Files appear in the order plan, tokenizer, (tar, index, receipt) of each
shard, manifest; each commits those before it.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, TypeVar

from PIL import ImageColor
from tokenizers import Tokenizer

from shards import engines, images, layouts, plan, sources, storage, tokens, verify
from shards.engines import Workers
from shards.format import (
    MANIFEST_NAME,
    MAX_CHANNELS,
    PLAN_NAME,
    TAR_BLOCK_BYTES,
    TOKENIZER_NAME,
    TOKENS_EXTENSION,
    FormatError,
    ImagePolicy,
    Kind,
    Manifest,
    Member,
    Receipt,
    SampleSpan,
    ShardEntry,
    TokenizerEntry,
    format_index,
    is_file_name,
)
from shards.images import PackedImage
from shards.layouts import Columns
from shards.plan import Options, Plan, PlannedSample, PlannedShard
from shards.sources import FileRead, Listing, Reader, Skip
from shards.storage import SCRATCH_NAME, StorageError, UserError, command, join

T = TypeVar("T")

SHOWN_NAMES = 3
BUNCH_SAMPLES, BUNCH_BYTES = 32, 4 * 2**20
"""The most that is read, or made, before it is passed on."""
WRITTEN_BYTES = 4 * 2**20
"""The most of a tar that waits in memory for a disk that has nothing to do."""
_EMPTY_TAR_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)
DEFAULT_BPE_SIZE = 4096
DEFAULT_SPLIT = "train=.8,val=.1,test=.1"


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: where from, where to, and its entry in the plan."""

    source: str
    out: str
    scratch: Path
    shard: PlannedShard
    image: ImagePolicy
    tokenizer_sha256: str | None
    max_tokens: int | None
    plan_hash: str
    poison: frozenset[str] = frozenset()
    """Images to leave out, for they have cost the workers before this one their lives."""


@dataclass(frozen=True)
class Draft:
    """What a call of `pack` will do, decided before it looks at its OUT."""

    plan: Plan
    tokenizer_json: str | None
    estimated_bytes: int
    num_other_files: int


@dataclass(frozen=True)
class Packed:
    """What a call of `pack` did. `skips` are those of the plan and of the shards written now."""

    manifest: Manifest
    plan: Plan
    num_written: int
    skips: tuple[Skip, ...]
    num_other_files: int


class TooManyBadError(Exception):
    """More samples were skipped than `--max-bad` allows."""


class TarWriter:
    """Writes samples into a USTAR file, headers and all fixed but for name and size."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._sent = 0
        self.num_bytes = 0
        self.spans: list[SampleSpan] = []
        self.crc32: list[int] = []

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends the sample `key`; `members` maps extensions to contents."""
        start, parts, found = self.num_bytes, [], []
        offset = start
        for extension, data in sorted(members.items()):
            padding = bytes(-len(data) % TAR_BLOCK_BYTES)
            parts += [_tar_header(f"{key}.{extension}", len(data)), data, padding]
            found.append(Member(extension, offset + TAR_BLOCK_BYTES, len(data)))
            offset += TAR_BLOCK_BYTES + len(data) + len(padding)
        span = SampleSpan(key, tuple(found))
        block = b"".join(parts)
        self.spans.append(span)
        self.crc32.append(zlib.crc32(memoryview(block)[: span.size]))
        self._write(block)

    def close(self) -> str:
        """Writes the end of the archive; returns the file's SHA-256."""
        self._write(bytes(2 * TAR_BLOCK_BYTES))
        return self._sha256.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._sha256.update(data)
        self.num_bytes += len(data)
        if self.num_bytes - self._sent >= WRITTEN_BYTES:
            self._file.flush()
            storage.start_writing(self._file, self._sent, self.num_bytes)
            self._sent = self.num_bytes


def _tar_header(name: str, num_bytes: int) -> bytes:
    """The USTAR header of a file, as `tarfile` writes it at five times the cost."""
    encoded, size = name.encode("ascii"), b"%011o\0" % num_bytes
    if len(encoded) > 100 or len(size) > 12:
        raise ValueError(f"{name}: {num_bytes} bytes do not fit into a USTAR header")
    header = bytearray(_EMPTY_TAR_HEADER)
    header[: len(encoded)] = encoded
    header[124:136] = size
    header[148:156] = b" " * 8  # as which the checksum counts itself
    header[148:155] = b"%06o\0" % sum(header)
    return bytes(header)


def write_shard(task: ShardTask) -> tuple[Receipt, list[Skip]]:
    """Builds one shard and publishes tar, index and receipt, in this order.

    A sample that does not decode, or has too many tokens, becomes a skip. Raises `UserError` when
    a file is no longer what the plan was made from.
    """
    name = task.shard.name
    tokenizer = None
    if task.tokenizer_sha256 is not None:
        tokenizer = _load_tokenizer(join(task.out, TOKENIZER_NAME), task.tokenizer_sha256)
    if storage.is_remote(task.out):
        task.scratch.mkdir(parents=True, exist_ok=True)  # This may be another machine.
    path = task.scratch / name.replace("/", "-")
    skips: list[Skip] = []
    num_tokens: list[int] = []
    with storage.explained(str(task.scratch)), path.open("wb") as file:
        tar = TarWriter(file)
        with sources.reading(task.source, _files(task.shard.samples, tokenizer)) as read:
            raws = _in_bunches(_raws(task, read, tokenizer), lambda raw: raw.num_bytes)
            all_made = _in_bunches(_with_images(task, raws), lambda made: made.num_bytes)
            for made in all_made:
                engines.note(made.sample.image)
                members = _make_members(task, made, tokenizer, num_tokens)
                if isinstance(members, Skip):
                    skips.append(members)
                else:
                    tar.add(made.sample.key, members)
        sha256 = tar.close()
    engines.note("")
    entry = ShardEntry(name, len(tar.spans), tar.num_bytes, sha256)
    receipt = Receipt(
        shard=entry,
        crc32=tuple(tar.crc32),
        num_tokens=tuple(num_tokens),
        skips=plan.causes(skips),
        plan_hash=task.plan_hash,
    )
    files = [(path, join(task.out, name))]
    for published, text in (
        (entry.index_name, format_index(tar.spans)),
        (entry.receipt_name, receipt.to_json()),
    ):
        built = path.with_name(f"{path.name}-{len(files)}")
        with storage.explained(str(built)):
            built.write_bytes(text.encode())
        files.append((built, join(task.out, published)))
    storage.publish_all(files)
    return receipt, skips


def draft(
    source: str,
    listing: Listing,
    options: Options,
    tokenizer_json: str | None,
    workers: Workers | int,
    *,
    max_bad: int | None = None,
) -> Draft:
    """Scans what is listed of `source`, and plans its shards; writes nothing.

    With `tokenizer_json` that tokenizer is used, else one is trained on the split named train.

    Raises `UserError`, and `TooManyBadError` above `max_bad` skipped samples.
    """
    scan = plan.scan(source, listing, options, workers)
    records = scan.records
    skips = sorted((*listing.skips, *scan.skips), key=lambda skip: (skip.cause, skip.name))
    if not records:
        found = describe_skips(plan.causes(skips), skips)
        raise UserError(f"{source}: nothing to pack there ({found})")
    _check_max_bad(Counter(plan.causes(skips)), skips, max_bad)
    if options.split in (plan.FOLDERS, plan.COLUMN):
        dealt, crossing = plan.keep_splits(records)
        skips = sorted((*skips, *crossing), key=lambda skip: (skip.cause, skip.name))
        _check_max_bad(Counter(plan.causes(skips)), skips, max_bad)
    else:
        dealt = plan.deal(records, plan.parse_split(options.split), options.seed)
    if options.kind == "pairs" and tokenizer_json is None:
        if "train" not in dealt:
            raise UserError(
                f"{source}: the vocabulary is trained on the split named train, there is none; "
                "give --tokenizer FILE"
            )
        training = [one for group in dealt["train"] for one in group]
        tokenizer_json = plan.train_tokenizer(source, scan, training, options, workers)
    sha256 = None
    if tokenizer_json is not None:
        sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    new = plan.make_plan(options, dealt, skips, sha256)
    estimated_bytes = plan.estimate_bytes(dealt, new.image)
    return Draft(new, tokenizer_json, estimated_bytes, listing.num_other_files)


def pack(
    source: str,
    out: str,
    made: Draft,
    workers: Workers | int,
    *,
    overwrite: bool = False,
    max_bad: int | None = None,
) -> Packed:
    """Packs what was planned of `source` into `out`, or finishes an interrupted pack of the same.

    Raises `UserError`, and `TooManyBadError` above `max_bad` skipped samples.
    """
    new, tokenizer_json = made.plan, made.tokenizer_json
    skips = list(new.skips)
    by_cause = Counter(plan.causes(skips))
    refuse_foreign(out, new)
    with storage.exclusive(out) as scratch, _no_uploads_left(out):
        _settle(out, scratch, new, overwrite)
        if tokenizer_json is not None:
            _publish_changed(tokenizer_json, join(out, TOKENIZER_NAME), scratch)
        receipts = _valid_receipts(out, new, workers)
        for receipt in receipts.values():
            by_cause.update(receipt.skips)
        _check_max_bad(by_cause, skips, max_bad)
        todo = [
            ShardTask(
                source=storage.absolute(source),
                out=out,
                scratch=scratch,
                shard=shard,
                image=new.image,
                tokenizer_sha256=new.tokenizer_sha256,
                max_tokens=new.options.max_tokens,
                plan_hash=new.plan_hash,
            )
            for shard in new.shards
            if shard.name not in receipts
        ]
        if todo:
            storage.remove(join(out, MANIFEST_NAME))
        total = sum(len(task.shard.samples) for task in todo)
        # Closed before the folder is given up: no worker still writes there then.
        with (
            closing(engines.run(write_shard, todo, workers, _name_of, _without)) as written,
            closing(engines.progress(written, total, "packed", _count_samples, _cost)) as shown,
        ):
            for task, (receipt, shard_skips) in shown:
                receipts[task.shard.name] = receipt
                skips += shard_skips
                by_cause.update(receipt.skips)
                _check_max_bad(by_cause, skips, max_bad)
        manifest = _make_manifest(out, new, receipts, tokenizer_json)
        _publish_changed(manifest.to_json(), join(out, MANIFEST_NAME), scratch)
    return Packed(manifest, new, len(todo), tuple(skips), made.num_other_files)


@contextmanager
def _no_uploads_left(out: str) -> Iterator[None]:
    """Ends uploads that a killed pack left on a store, and those of workers that are killed now."""
    storage.abort_uploads(out, is_file_name)
    try:
        yield
    except StorageError:
        raise  # It may not answer: to ask for more would only make the error come late.
    except BaseException:
        storage.abort_uploads(out, is_file_name)
        raise
    storage.abort_uploads(out, is_file_name)


def describe_skips(counts: Mapping[str, int], skips: Sequence[Skip]) -> str:
    """Causes with their counts and first names, as in `2 corrupt: 'a.png', 'b.png'`.

    `skips` may be fewer than `counts`: receipts of shards written earlier hold no names.
    """
    parts = []
    for cause, count in sorted(counts.items()):
        names = [ascii(skip.name) for skip in skips if skip.cause == cause][:SHOWN_NAMES]
        more = ["..."] if names and count > len(names) else []
        parts.append(f"{count} {cause}" + (f": {', '.join(names + more)}" if names else ""))
    return "; ".join(parts)


def _files(samples: Sequence[PlannedSample], tokenizer: Tokenizer | None) -> Iterator[FileRead]:
    for sample in samples:
        yield _image_file(sample)
        if tokenizer is not None and sample.code is not None:
            yield _code_file(sample)


def _image_file(sample: PlannedSample) -> FileRead:
    return FileRead(sample.image, place=sample.image_place)


def _code_file(sample: PlannedSample) -> FileRead:
    return FileRead(str(sample.code), place=sample.code_place)


@dataclass(frozen=True, slots=True)
class _Raw:
    """A planned sample with the bytes of its files. Poison has no image here."""

    sample: PlannedSample
    image: bytes | None
    code: bytes | None

    @property
    def num_bytes(self) -> int:
        return len(self.image or b"") + len(self.code or b"")


@dataclass(frozen=True, slots=True)
class _Made:
    """A planned sample with its image as it will be in the shard, or why it will not be there."""

    sample: PlannedSample
    image: PackedImage | Skip
    code: bytes | None

    @property
    def num_bytes(self) -> int:
        return 0 if isinstance(self.image, Skip) else len(self.image.data)


def _in_bunches(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[T]:
    """The same items, but several are made before the first of them is passed on.

    Work on an image leaves no other code or data in the processor's caches: what is to do before
    and after it takes two to five times as long for one image as for each of many.
    """
    bunch: list[T] = []
    held_bytes = 0
    for item in items:
        bunch.append(item)
        held_bytes += num_bytes(item)
        if len(bunch) >= BUNCH_SAMPLES or held_bytes >= BUNCH_BYTES:
            yield from bunch
            bunch, held_bytes = [], 0
    yield from bunch


def _raws(task: ShardTask, read: Reader, tokenizer: Tokenizer | None) -> Iterator[_Raw]:
    for sample in task.shard.samples:
        if sample.image in task.poison:
            yield _Raw(sample, None, None)
            continue
        engines.note(sample.image)
        image = _read_planned(task.source, read, _image_file(sample), sample.image_sha256)
        code = None
        if tokenizer is not None and sample.code is not None:
            code = _read_planned(task.source, read, _code_file(sample), sample.code_sha256)
        yield _Raw(sample, image, code)


def _with_images(task: ShardTask, raws: Iterable[_Raw]) -> Iterator[_Made]:
    for raw in raws:
        image: PackedImage | Skip
        if raw.image is None:
            image = Skip(plan.POISON, raw.sample.image)
        else:
            engines.note(raw.sample.image)
            try:
                with images.memory_explained(f"{task.source}/{raw.sample.image}"):
                    image = images.fit_and_encode(raw.image, task.image)
            except images.ImageRefused as refused:
                image = Skip(refused.cause, raw.sample.image)
        yield _Made(raw.sample, image, raw.code)


def _make_members(
    task: ShardTask, made: _Made, tokenizer: Tokenizer | None, num_tokens: list[int]
) -> dict[str, bytes] | Skip:
    sample, image = made.sample, made.image
    if isinstance(image, Skip):
        return image
    about = {
        "source": sample.image,
        "sha256": sample.image_sha256,
        "width": image.width,
        "height": image.height,
    }
    members = {"json": json.dumps(about).encode(), image.extension: image.data}
    if tokenizer is not None and made.code is not None:
        ids = tokens.encode(tokenizer, plan.read_code(made.code))
        if task.max_tokens is not None and len(ids) > task.max_tokens:
            return Skip("too_many_tokens", str(sample.code))
        num_tokens.append(len(ids))
        vocab_size = tokenizer.get_vocab_size()
        members |= {"txt": made.code, TOKENS_EXTENSION: tokens.to_npy(ids, vocab_size)}
    return members


def _read_planned(source: str, read: Reader, file: FileRead, sha256: str | None) -> bytes:
    try:
        data = read(file)
    except OSError as error:
        raise UserError(f"{source}/{file.name}: {error.strerror or error}; pack again") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{source}/{file.name}: changed while it was packed; pack again")
    return data


@lru_cache(maxsize=1)
def _load_tokenizer(url: str, sha256: str) -> Tokenizer:
    text = storage.read_text(url)
    if hashlib.sha256(text.encode()).hexdigest() != sha256:
        raise UserError(f"{url}: changed while it was used; pack again with --overwrite")
    return tokens.load_tokenizer(text, url)


def _name_of(task: ShardTask) -> str:
    return task.shard.name


def _without(task: ShardTask, image: str) -> ShardTask | None:
    if all(sample.image != image for sample in task.shard.samples):
        return None
    return dataclasses.replace(task, poison=task.poison | {image})


def _count_samples(done: tuple[ShardTask, tuple[Receipt, list[Skip]]]) -> int:
    return len(done[0].shard.samples)


def _cost(done: tuple[ShardTask, tuple[Receipt, list[Skip]]]) -> tuple[int, int]:
    receipt, skips = done[1]
    return receipt.shard.bytes, len(skips)


def _check_max_bad(counts: Counter[str], skips: Sequence[Skip], max_bad: int | None) -> None:
    if max_bad is not None and counts.total() > max_bad:
        raise TooManyBadError(
            f"{counts.total()} files skipped, --max-bad allows {max_bad}: "
            f"{describe_skips(counts, skips)}"
        )


def refuse_foreign(out: str, new: Plan) -> None:
    """Raises `UserError` for a place that holds something, but no pack of ours."""
    if not storage.is_remote(out):
        path = storage.local_path(out)
        if path.exists() and not path.is_dir():
            raise UserError(f"{out}: not a folder; choose another OUT")
    files = storage.list_files(out)
    others = [name for name in files if not name.partition("/")[0].endswith(SCRATCH_NAME)]
    if others and not (plan.is_marked(_read_plan(out)) or _is_vouched_for(out, new, files)):
        raise UserError(f"{out}: not empty, and not begun by pack; choose another OUT")


def _read_plan(out: str) -> str:
    """The text of the plan on storage; empty without one, or where it is no text at all."""
    url = join(out, PLAN_NAME)
    with suppress(FormatError):
        return storage.read_text(url, None) if storage.exists(url) else ""
    return ""


def _is_vouched_for(out: str, new: Plan, files: Mapping[str, int]) -> bool:
    """Whether the manifest, or the receipt of a shard, was made from `new`."""
    if MANIFEST_NAME in files:
        with suppress(FormatError):
            if storage.load_manifest(out).plan_hash == new.plan_hash:
                return True
    found = _read_receipts(out, new, files)
    return any(receipt.plan_hash == new.plan_hash for receipt in found.values())


def _read_receipts(out: str, new: Plan, files: Mapping[str, int]) -> dict[str, Receipt]:
    """Those of the plan's shards that are among `files` and can be read, by the shard's name."""

    def read(name: str) -> Receipt | None:
        url = join(out, name.removesuffix(".tar") + ".json")
        with suppress(FormatError):
            receipt = Receipt.from_json(storage.read_text(url), url)
            return receipt if receipt.shard.name == name else None
        return None

    names = [one.name for one in new.shards if one.name.removesuffix(".tar") + ".json" in files]
    found = zip(names, storage.each(out, read, names), strict=True)
    return {name: receipt for name, receipt in found if receipt is not None}


def _settle(out: str, scratch: Path, new: Plan, overwrite: bool) -> None:
    """Makes `new` the plan on storage: nothing of another one is left.

    Raises `UserError` saying what differs when there is another one, and no `overwrite`.
    """
    url = join(out, PLAN_NAME)
    old, found = None, []
    if storage.exists(url):
        try:
            old = Plan.from_json(_read_plan(out), url)
            if old.plan_hash == new.plan_hash and not overwrite:
                return
            found = plan.differences(old, new)
        except FormatError as error:
            found = [str(error)]
    if (
        found
        and not overwrite
        and (old is not None or not _is_vouched_for(out, new, storage.list_files(out)))
    ):
        raise UserError(
            f"{out}: holds another pack ({'; '.join(found)}); give --overwrite to replace it, or "
            "choose another OUT"
        )
    if overwrite:
        _remove_pack(out, (old or new).shards, all_listed=old is None)
    storage.publish_text(new.to_json(), url, scratch)


def _remove_pack(out: str, shards: Sequence[PlannedShard], all_listed: bool) -> None:
    """Deletes what a pack of `shards`, or of those the manifest lists, wrote, but for the plan.

    In the reverse of the order in which files vouch for each other; the plan stays until another
    takes its place, so that what a kill leaves is still known as ours.
    """
    names = {shard.name for shard in shards}
    if all_listed and storage.exists(join(out, MANIFEST_NAME)):
        with suppress(FormatError):
            listed = storage.load_manifest(out).splits.values()
            # No other name is ours, whoever wrote that manifest.
            found = {entry.name for entries in listed for entry in entries}
            names |= {name for name in found if is_file_name(name)}
    storage.remove(join(out, MANIFEST_NAME))
    for suffix in (".json", ".tar", ".idx"):
        urls = [join(out, name.removesuffix(".tar") + suffix) for name in sorted(names)]
        storage.each(out, storage.remove, urls)
    if not storage.is_remote(out):
        for split in {name.partition("/")[0] for name in names}:
            # Not where someone else has put something.
            with suppress(OSError):
                storage.local_path(join(out, split)).rmdir()
    storage.remove(join(out, TOKENIZER_NAME))


def _publish_changed(text: str, url: str, scratch: Path) -> None:
    if not storage.exists(url) or storage.read_bytes(url) != text.encode():
        storage.publish_text(text, url, scratch)


def _valid_receipts(out: str, new: Plan, workers: Workers | int) -> dict[str, Receipt]:
    """Receipts of this plan whose shard and index are on storage as they say."""
    found = _read_receipts(out, new, storage.list_files(out))
    claimed = {
        name: receipt for name, receipt in found.items() if receipt.plan_hash == new.plan_hash
    }
    has_tokens = new.tokenizer_sha256 is not None
    checks = [
        verify.ShardCheck(out, receipt.shard, new.plan_hash, has_tokens)
        for receipt in claimed.values()
    ]
    results = engines.run(verify.check_shard, checks, workers, lambda check: check.entry.name)
    total = sum(check.entry.samples for check in checks)
    shown = engines.progress(results, total, "checked", lambda done: done[0].entry.samples)
    return {
        check.entry.name: claimed[check.entry.name] for check, problems in shown if not problems
    }


def _make_manifest(
    out: str, new: Plan, receipts: Mapping[str, Receipt], tokenizer_json: str | None
) -> Manifest:
    """The manifest of all receipts, read back from storage. Raises `UserError`."""
    skips = plan.causes(new.skips)
    splits: dict[str, list[ShardEntry]] = {split: [] for split in new.splits}
    longest = 0
    files = storage.list_files(out)
    stored = _read_receipts(out, new, files)
    for shard in new.shards:
        receipt = receipts[shard.name]
        if stored.get(shard.name) != receipt or files.get(shard.name) != receipt.shard.bytes:
            url = join(out, receipt.shard.receipt_name)
            raise UserError(f"{url}: changed while the dataset was packed; pack again")
        for cause, count in receipt.skips.items():
            skips[cause] = skips.get(cause, 0) + count
        longest = max(longest, *receipt.num_tokens, 0)
        # A shard of which every sample was refused has nothing to read.
        if receipt.shard.samples:
            splits[shard.name.partition("/")[0]].append(receipt.shard)
    for split, entries in splits.items():
        if not entries:
            raise UserError(f"{out}: every sample of the split {split!r} was refused")
    entry = None
    if tokenizer_json is not None and new.tokenizer_sha256 is not None:
        tokenizer = tokens.load_tokenizer(tokenizer_json, TOKENIZER_NAME)
        vocab_size = tokenizer.get_vocab_size()
        entry = TokenizerEntry(TOKENIZER_NAME, new.tokenizer_sha256, vocab_size, longest)
    return Manifest(
        kind=new.options.kind,
        splits={split: tuple(entries) for split, entries in splits.items()},
        image=new.image,
        tokenizer=entry,
        skips=dict(sorted(skips.items())),
        plan_hash=new.plan_hash,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pixloom pack",
        description="Pack images, or images with code, into WebDataset tar shards with an index. "
        "Run again after an interruption, it goes on; run again after success, it finds nothing to "
        "do.",
        epilog="SOURCE and OUT are local or on a store: s3://, gs://, abfs://. Credentials come "
        "from the environment. For a store, each worker builds one shard at a time in the folder "
        "for temporary files (TMPDIR). No lock guards a store: let one pack at a time write there.",
    )
    add = parser.add_argument
    add(
        "source",
        metavar="SOURCE",
        help="folder of images, at any depth, local or on a store, links are not followed; or a "
        "table (.csv, .tsv, .jsonl, .parquet), or a WebDataset shard (.tar), or a pattern of "
        "them, in quotes as in 'shards/*.tar'",
    )
    add(
        "out",
        metavar="OUT",
        help="folder of the dataset, local or on a store: new, empty, or an earlier pack of it",
    )
    add(
        "--kind",
        choices=("auto", "pairs", "images", "table", "webdataset"),
        default="auto",
        help="pairs: an image and its code share their name up to the suffix; images: images "
        "alone; auto: pairs where code lies beside images (default). table, webdataset: SOURCE is "
        "a folder of tables, or of tars",
    )
    add(
        "--code-suffix",
        type=_suffix,
        metavar=".EXT",
        help="suffix of the code files, or of the code's members in tars (default: .gui, else "
        ".html, .tex or .txt, if only one of them lies beside the images)",
    )
    group = parser.add_argument_group("tables")
    add = group.add_argument
    add(
        "--image-column",
        metavar="NAME",
        help="paths of the images, relative to the table's folder and inside it, or in Parquet "
        "their bytes, as they are or in a struct with a field `bytes` (default: image)",
    )
    add("--code-column", metavar="NAME", help="the code itself (default: none, images alone)")
    add(
        "--split-column",
        metavar="NAME",
        help="the split of each row, in place of --split; `validation` is val, and duplicates are "
        "dealt with as by --split folders",
    )
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--size", type=_size, metavar="WxH", help="make every image this size (default: as it is)")
    add(
        "--fit",
        choices=("stretch", "pad", "crop", "none"),
        help="how an image of another shape gets there (default: stretch with --size, else none)",
    )
    add(
        "--channels",
        type=channel_count,
        default=3,
        metavar="N",
        help="1, 3, 4: grey, RGB or RGBA (default: 3); else 2 to 64: arrays, of .npy files or of "
        "TIFFs of so many bands, packed as .npy. An .npy is HxWxC, or HxW for 1 channel; it is "
        "read as CxHxW where its last axis cannot be the channels and its first can. Values are "
        "uint8, or uint16 scaled to it. With 1, 3, 4 .npy files are used where SOURCE has no other "
        "images",
    )
    add(
        "--encode",
        choices=("keep", "png", "jpeg", "webp"),
        help="keep: the file's own bytes where it is an upright PNG, JPEG or WEBP with these "
        "channels and one frame, else PNG (default: keep, or png with --size). Of arrays: npy",
    )
    add("--quality", type=_count, default=90, help="of jpeg and webp, 1 to 100 (default: 90)")
    add(
        "--background",
        type=_colour,
        default=(255, 255, 255),
        metavar="COLOUR",
        help="shown by transparent pixels and by padding, as #rrggbb or a name (default: white); "
        "in channels beyond the third its grey, and in all of 2",
    )
    group = parser.add_argument_group("code")
    add = group.add_argument
    add(
        "--tokenizer",
        metavar="word|char|bpe|FILE",
        help="train a vocabulary on the split named train, of word: words, without the white "
        "space (default); char: characters; bpe: byte pairs, which take any text. FILE: use this "
        "tokenizer.json, as for another test set",
    )
    add(
        "--min-frequency",
        type=_count,
        metavar="N",
        help="rarer words or characters become <unk> (default: 1); rarer byte pairs stay two "
        "tokens (default: 2)",
    )
    add(
        "--vocab-size",
        type=_count,
        metavar="N",
        help="most tokens of the vocabulary, <pad> <bos> <eos> <unk> counted: the most frequent "
        f"ones are kept (default: no limit; bpe: {DEFAULT_BPE_SIZE})",
    )
    add(
        "--max-tokens",
        type=_count,
        metavar="N",
        help="skip samples of more tokens, <bos> and <eos> counted (default: no limit)",
    )
    group = parser.add_argument_group("splits and shards")
    add = group.add_argument
    add(
        "--split",
        metavar="NAME=PART,...|folders",
        help="a PART up to 1 is a share, a whole number from 2 on a number of groups, `rest` what "
        "others leave; a group is all samples that share an image or a program: image files equal "
        "byte for byte, or programs equal word for word, so neither is in two splits (equal "
        "pixels in different files are not noticed). Shares are of what the numbers leave. Parts "
        "are dealt before images are decoded, so a broken image can leave a group empty. As in "
        "train=rest,val=50,test=250, or test=1 for everything. `folders`: by the top-level folder "
        "(train/, val/ or validation/, test/, or other names); of tars also by their names, others "
        "are train. An image or a program that is then in two splits stays in test, else in val, "
        "else elsewhere: the other samples that have it are skipped as duplicate_across_splits "
        f"(default: {DEFAULT_SPLIT})",
    )
    add("--seed", type=int, default=0, help="of the splits and of the order (default: 0)")
    add(
        "--shard-samples",
        type=_count,
        default=1024,
        metavar="N",
        help="most samples of a shard (default: %(default)s)",
    )
    add(
        "--shard-bytes",
        type=_count,
        default=256 * 2**20,
        metavar="N",
        help="size of a shard not to exceed by much, as estimated (default: %(default)s)",
    )
    group = parser.add_argument_group("the run")
    add = group.add_argument
    engines.add_engine_options(parser)
    add(
        "--max-bad",
        type=_limit,
        metavar="N",
        help="stop with exit status 1 when more files are skipped (default: no limit)",
    )
    add("--overwrite", action="store_true", help="replace an earlier pack in OUT")
    add("--dry-run", action="store_true", help="say what would be packed, and write nothing")
    add("--json", action="store_true", help="print a JSON object as the last line")
    return parser


def _suffix(text: str) -> str:
    if not re.fullmatch(r"\.?[A-Za-z0-9_-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write one suffix, as in .tex")
    return "." + text.removeprefix(".").lower()


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write width x height, as in 160x96")
    return int(match[1]), int(match[2])


def _colour(text: str) -> tuple[int, int, int]:
    try:
        red, green, blue = ImageColor.getrgb(text)[:3]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write a colour, as in #ffffff") from error
    return red, green, blue


def _limit(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number")
    return int(text)


def channel_count(text: str) -> int:
    """The value of `--channels`. Raises `argparse.ArgumentTypeError`."""
    if not (re.fullmatch(r"[0-9]{1,2}", text) and 1 <= int(text) <= MAX_CHANNELS):
        raise argparse.ArgumentTypeError(f"{text!r}: choose 1 to {MAX_CHANNELS}")
    return int(text)


def _count(text: str) -> int:
    value = _limit(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number from 1 on")
    return value


def _prepare(args: argparse.Namespace, workers: Workers) -> tuple[Listing, Options, str | None]:
    """Listing, options and given tokenizer of a command line. Raises `UserError`."""
    if storage.is_inside(args.out, args.source):
        raise UserError(f"{args.out}: OUT lies in SOURCE, the next pack would read it; choose "
                        "another OUT")  # fmt: skip
    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality}: choose 1 to 100")
    image = images.make_policy(
        size=args.size,
        fit=args.fit,
        encode=args.encode,
        channels=args.channels,
        quality=args.quality,
        background=args.background,
    )
    split, columns = _choose_splits(args)
    listing = layouts.list_source(
        args.source,
        kind=args.kind,
        code_suffix=args.code_suffix,
        columns=columns,
        by_name=split == plan.FOLDERS,
        channels=args.channels,
        workers=workers,
    )
    tokenizer, tokenizer_json = _choose_tokenizer(args, listing.kind)
    by_source = split in (plan.FOLDERS, plan.COLUMN)
    trains = listing.kind == "pairs" and tokenizer_json is None
    if trains and not by_source and "train" not in plan.parse_split(split):
        raise UserError(
            f"--split {split}: the vocabulary is trained on the split named train; add it, or "
            "give --tokenizer FILE"
        )
    min_frequency, vocab_size = args.min_frequency, args.vocab_size
    if tokenizer == tokens.BPE:
        min_frequency, vocab_size = min_frequency or 2, vocab_size or DEFAULT_BPE_SIZE
    options = Options(
        kind=listing.kind,
        code_suffix=listing.code_suffix,
        image=image,
        split=split,
        seed=args.seed,
        tokenizer=tokenizer,
        min_frequency=min_frequency or 1,
        vocab_size=vocab_size,
        max_tokens=args.max_tokens,
        shard_samples=args.shard_samples,
        shard_bytes=args.shard_bytes,
        image_column=args.image_column,
        code_column=args.code_column,
        split_column=args.split_column,
    )
    return listing, options, tokenizer_json


def _choose_splits(args: argparse.Namespace) -> tuple[str, Columns | None]:
    """What `Options.split` is, and the columns if any are named. Raises `UserError`."""
    named = (args.image_column, args.code_column, args.split_column)
    columns = None
    if any(name is not None for name in named):
        columns = Columns(args.image_column or Columns().image, args.code_column, args.split_column)
        given = [name for name in columns if name is not None]
        if len(set(given)) < len(given):
            raise UserError("--image-column, --code-column, --split-column: name each column once")
    if args.split_column is not None:
        if args.split is not None:
            raise UserError(f"--split {args.split}: --split-column says it all; drop one of them")
        return plan.COLUMN, columns
    split = (args.split or DEFAULT_SPLIT).replace(" ", "")
    if split != plan.FOLDERS:
        plan.parse_split(split)
    return split, columns


def _choose_tokenizer(args: argparse.Namespace, kind: Kind) -> tuple[str | None, str | None]:
    """What `Options.tokenizer` is, and the text of a given file. Raises `UserError`."""
    sized = [
        f"{name} {value}"
        for name, value in (
            ("--min-frequency", args.min_frequency),
            ("--vocab-size", args.vocab_size),
        )
        if value is not None
    ]
    if kind == "images":
        given = [f"--tokenizer {args.tokenizer}"] if args.tokenizer is not None else sized
        if given:
            raise UserError(f"{given[0]}: there is no code in {args.source}; drop it")
        return None, None
    tokenizer = args.tokenizer or tokens.WORD
    if tokenizer not in (tokens.WORD, tokens.CHAR, tokens.BPE):
        if sized:
            raise UserError(f"{sized[0]}: the vocabulary of {tokenizer} is as it is; drop one")
        tokenizer_json = storage.read_text(tokenizer)
        tokens.load_tokenizer(tokenizer_json, tokenizer)
        return hashlib.sha256(tokenizer_json.encode()).hexdigest(), tokenizer_json
    least = tokens.min_vocab_size(tokenizer)
    if args.vocab_size is not None and args.vocab_size < least:
        raise UserError(
            f"--vocab-size {args.vocab_size}: --tokenizer {tokenizer} has {least} tokens at least, "
            "special tokens counted"
        )
    return tokenizer, None


def _say_skips(counts: Mapping[str, int], skips: Sequence[Skip]) -> None:
    if counts:
        total = sum(counts.values())
        print(f"skipped {total}: {describe_skips(counts, skips)}", file=sys.stderr)


def _report(out: str, packed: Packed, duration_s: float) -> dict[str, object]:
    manifest = packed.manifest
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    samples = {split: manifest.num_samples(split) for split in manifest.splits}
    planned = sum(len(shard.samples) for shard in packed.plan.shards)
    row: dict[str, object] = {
        "out": out,
        "kind": manifest.kind,
        "samples": samples,
        "groups": dict(packed.plan.num_groups),
        "duplicates": planned - sum(packed.plan.num_groups.values()),
        "shards": len(shards),
        "bytes": sum(shard.bytes for shard in shards),
        "skips": dict(manifest.skips),
        "image": dataclasses.asdict(manifest.image),
        "vocab_size": manifest.tokenizer.vocab_size if manifest.tokenizer else None,
        "longest": manifest.tokenizer.longest if manifest.tokenizer else None,
        "nothing_to_do": packed.num_written == 0,
        "plan_hash": manifest.plan_hash,
        "data_digest": manifest.data_digest,
        "duration_s": round(duration_s, 3),
    }
    return row


def _report_draft(out: str, made: Draft, duration_s: float) -> dict[str, object]:
    new = made.plan
    samples = Counter(dict.fromkeys(new.splits, 0))
    for shard in new.shards:
        samples[shard.name.partition("/")[0]] += len(shard.samples)
    return {
        "out": out,
        "dry_run": True,
        "kind": new.options.kind,
        "samples": dict(samples),
        "groups": dict(new.num_groups),
        "duplicates": samples.total() - sum(new.num_groups.values()),
        "shards": len(new.shards),
        "estimated_bytes": made.estimated_bytes,
        "skips": plan.causes(new.skips),
        "image": dataclasses.asdict(new.image),
        "plan_hash": new.plan_hash,
        "duration_s": round(duration_s, 3),
    }


def _describe_draft(made: Draft, row: Mapping[str, object]) -> str:
    new = made.plan
    lines = []
    for split, num_groups in new.num_groups.items():
        shards = [shard for shard in new.shards if shard.name.startswith(f"{split}/")]
        num_samples = sum(len(shard.samples) for shard in shards)
        lines.append(_describe_split(split, num_samples, num_groups, len(shards)))
    lines.append(f"duplicates: {row['duplicates']} samples beyond one a group")
    if made.num_other_files:
        lines.append(f"ignored: {made.num_other_files} files, neither images nor code")
    lines.append(f"about {made.estimated_bytes:,} bytes; nothing was written")
    return "\n".join(lines)


def _describe_split(split: str, num_samples: int, num_groups: int, num_shards: int) -> str:
    return (
        f"{split}: {num_samples} samples in {num_groups} "
        f"{'group' if num_groups == 1 else 'groups'}, "
        f"{num_shards} {'shard' if num_shards == 1 else 'shards'}"
    )


def _describe(packed: Packed, row: Mapping[str, object]) -> str:
    manifest = packed.manifest
    lines = []
    if row["nothing_to_do"]:
        lines.append(f"{row['out']}: nothing to do, the dataset is complete")
    for split in manifest.splits:
        num_groups, num_shards = packed.plan.num_groups[split], len(manifest.splits[split])
        lines.append(_describe_split(split, manifest.num_samples(split), num_groups, num_shards))
    if manifest.tokenizer is not None:
        lines.append(
            f"vocabulary: {manifest.tokenizer.vocab_size} tokens; "
            f"longest sample: {manifest.tokenizer.longest} tokens"
        )
    if packed.num_other_files:
        lines.append(f"ignored: {packed.num_other_files} files, neither images nor code")
    lines.append(f"{row['bytes']:,} bytes in {row['duration_s']} s, digest {row['data_digest']}")
    return "\n".join(lines)


def _pack(args: argparse.Namespace, workers: Workers) -> int:
    """One call of `pack`; returns the exit status."""
    start = time.monotonic()
    if workers.address is not None:
        # Workers there have other working folders.
        args.source, args.out = storage.absolute(args.source), storage.absolute(args.out)
    listing, options, tokenizer_json = _prepare(args, workers)
    try:
        made = draft(
            listing.root,
            listing,
            options,
            tokenizer_json,
            workers,
            max_bad=args.max_bad,
        )
        if args.dry_run:
            refuse_foreign(args.out, made.plan)
            _say_skips(plan.causes(made.plan.skips), made.plan.skips)
            row = _report_draft(args.out, made, time.monotonic() - start)
            print(json.dumps(row) if args.json else _describe_draft(made, row))
            return 0
        packed = pack(
            listing.root,
            args.out,
            made,
            workers,
            overwrite=args.overwrite,
            max_bad=args.max_bad,
        )
    except TooManyBadError as error:
        print(f"pixloom pack: {error}", file=sys.stderr)
        return 1
    _say_skips(packed.manifest.skips, packed.skips)
    row = _report(args.out, packed, time.monotonic() - start)
    print(json.dumps(row) if args.json else _describe(packed, row))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)

    def action() -> int:
        with engines.kept(engines.chosen(args)) as workers:
            return _pack(args, workers)

    return command("pack", action)


if __name__ == "__main__":
    # Under its own name: workers of a cluster do not have our __main__.
    from shards.pack import main

    sys.exit(main())
