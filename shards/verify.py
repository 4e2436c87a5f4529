"""Whether a packed dataset is what its manifest says, down to each sample.

A shard cut between two members is a valid tar to most readers, and an image with flipped bits
still decodes: so sizes, hashes and counts are compared, not just whether files can be read.
"""

import argparse
import hashlib
import io
import json
import re
import sys
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from shards import engines, foreign, images, storage, tokens
from shards.foreign import Adoption
from shards.format import (
    ARRAY_EXTENSION,
    BOS,
    EOS,
    IMAGE_EXTENSIONS,
    MANIFEST_NAME,
    PLAN_NAME,
    TAR_BLOCK_BYTES,
    TOKENS_EXTENSION,
    FormatError,
    ImagePolicy,
    Manifest,
    Member,
    Receipt,
    SampleSpan,
    ShardEntry,
    TokenizerEntry,
    image_extension,
    is_file_name,
    parse_index,
)
from shards.plan import Plan, causes
from shards.storage import SCRATCH_NAME, StorageError, UserError, command, join

MAX_PROBLEMS_PER_SHARD = 20


@dataclass(frozen=True)
class ShardCheck:
    """What a shard is held against. With `image`, every sample is decoded too."""

    root: str
    entry: ShardEntry
    plan_hash: str
    has_tokens: bool
    image: ImagePolicy | None = None
    tokenizer_json: str | None = None
    adoption: Adoption | None = None
    """Of a shard that another tool made; without its splits, and with the tokenizer always."""


def check_shard(task: ShardCheck) -> list[str]:
    """The problems of one shard, its index and its receipt; a line each, naming shard and key."""
    problems = _check_foreign(task) if task.adoption is not None else _check_packed(task)
    if len(problems) > MAX_PROBLEMS_PER_SHARD:
        more = len(problems) - MAX_PROBLEMS_PER_SHARD
        problems = [
            *problems[:MAX_PROBLEMS_PER_SHARD],
            f"{task.entry.name}: and {more} more problems",
        ]
    return problems


def _check_packed(task: ShardCheck) -> list[str]:
    name = task.entry.name
    problems: list[str] = []
    receipt = _check_receipt(task, problems)
    try:
        tar = storage.read_bytes(join(task.root, name))
    except UserError as error:
        return [*problems, f"{name}: cannot be read ({error})"]
    whole = False
    if len(tar) != task.entry.bytes:
        problems.append(f"{name}: {len(tar)} bytes, the manifest says {task.entry.bytes}")
    elif hashlib.sha256(tar).hexdigest() != task.entry.sha256:
        problems.append(f"{name}: its SHA-256 is not the manifest's")
    else:
        whole = True
    spans = None
    try:
        spans = read_spans(tar, name)
    except FormatError as error:
        problems.append(str(error))
    if spans is not None and len(spans) != task.entry.samples:
        problems.append(f"{name}: {len(spans)} samples, the manifest says {task.entry.samples}")
    index = _check_index(task, problems)
    if index is not None and spans is not None and index != spans:
        problems.append(f"{task.entry.index_name}: does not describe {name}")
    located = spans if whole else index
    if receipt is not None and located is not None:
        problems += _wrong_crc32s(tar, located, task.entry, receipt, whole)
    if spans is not None and receipt is not None and not problems:
        for at, span in enumerate(spans):
            num_tokens = receipt.num_tokens[at] if task.has_tokens else None
            problem = _count_tokens(tar, span, num_tokens, task.entry.receipt_name)
            if problem is None and task.image is not None:
                with images.memory_explained(f"{task.root}/{name}: {span.key}"):
                    problem = _check_sample(tar, span, task, num_tokens)
            if problem is not None:
                problems.append(f"{name}: {span.key}: {problem}")
    return problems


def _check_foreign(task: ShardCheck) -> list[str]:
    """A shard of another tool is what indexing it again makes of it."""
    name, adoption = task.entry.name, task.adoption
    assert adoption is not None
    problems: list[str] = []
    receipt = _check_receipt(task, problems)
    index = _check_index(task, problems)
    try:
        tar = storage.read_bytes(join(task.root, name))
    except UserError as error:
        return [*problems, f"{name}: cannot be read ({error})"]
    if len(tar) != task.entry.bytes:
        problems.append(f"{name}: {len(tar)} bytes, the manifest says {task.entry.bytes}")
    elif hashlib.sha256(tar).hexdigest() != task.entry.sha256:
        problems.append(f"{name}: its SHA-256 is not the manifest's")
    if problems:
        if receipt is not None and index is not None:
            problems += _wrong_crc32s(tar, index, task.entry, receipt, whole=False)
        return problems
    given = task.tokenizer_json if adoption.has_given_tokens else None
    if adoption.has_given_tokens and given is None:
        return []  # The tokenizer is what is damaged, which is said already.
    try:
        found = foreign.scan(io.BytesIO(tar), name, adoption, given)
    except (UserError, FormatError) as error:
        return [str(error)]
    if index != list(found.spans):
        problems.append(f"{task.entry.index_name}: does not describe {name}")
    elif receipt != Receipt(task.entry, found.crc32, found.num_tokens, found.skips, task.plan_hash):
        problems.append(f"{task.entry.receipt_name}: does not describe {name}")
    elif task.image is not None:
        for span in found.spans:
            with images.memory_explained(f"{task.root}/{name}: {span.key}"):
                problem = _check_foreign_image(tar, span, task.image)
            if problem is not None:
                problems.append(f"{name}: {span.key}: {problem}")
    return problems


def _check_foreign_image(tar: bytes, span: SampleSpan, policy: ImagePolicy) -> str | None:
    chosen = image_extension(member.extension for member in span.members)
    [member] = [one for one in span.members if one.extension == chosen]
    try:
        data = tar[member.offset : member.offset + member.size]
        height, width, _ = images.decode(data, policy.channels).shape
    except images.ImageRefused as refused:
        return f"the image does not decode ({refused.cause})"
    if policy.width is not None and (width, height) != (policy.width, policy.height):
        return f"the image is {width}x{height}, not {policy.width}x{policy.height}"
    return None


def read_spans(tar: bytes, where: str) -> list[SampleSpan]:
    """Where the samples of a tar are, from its headers. Raises `FormatError` naming `where`.

    Stricter than `tarfile`, which takes a damaged header or a missing end for the end.
    """
    members: dict[str, list[Member]] = {}
    offset, last_key = 0, None
    while True:
        header = tar[offset : offset + TAR_BLOCK_BYTES]
        if len(header) < TAR_BLOCK_BYTES:
            raise FormatError(f"{where}: cut off at byte {len(tar)}, the end of the tar is missing")
        if not any(header):
            break
        try:
            info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            raise FormatError(f"{where}: damaged tar header at byte {offset}") from error
        key, _, extension = info.name.partition(".")
        if not info.isreg() or not key or not extension:
            raise FormatError(f"{where}: {info.name!r} is no member of a sample")
        if key != last_key and key in members:
            raise FormatError(f"{where}: the members of {key} are not adjacent")
        last_key = key
        offset += TAR_BLOCK_BYTES
        if info.size < 0:
            raise FormatError(f"{where}: {info.name} has a negative size")
        if offset + info.size > len(tar):
            raise FormatError(f"{where}: cut off inside {info.name}")
        members.setdefault(key, []).append(Member(extension, offset, info.size))
        offset += info.size + -info.size % TAR_BLOCK_BYTES
    if len(tar) - offset < 2 * TAR_BLOCK_BYTES or any(tar[offset:]):
        raise FormatError(f"{where}: the end of the tar at byte {offset} is damaged")
    return [SampleSpan(key, tuple(found)) for key, found in members.items()]


def check_dataset(root: str, deep: bool, workers: int) -> tuple[Manifest, list[str]]:
    """The manifest and all problems found. Raises `UserError` or `FormatError` without one."""
    manifest = storage.load_manifest(root)
    problems: list[str] = []
    plan_url = join(root, PLAN_NAME)
    slim = None
    try:
        text = storage.read_text(plan_url, None)
        plan: Plan | Adoption
        if foreign.is_adoption(text):
            plan = Adoption.from_json(text, plan_url)
            names, skips = plan.shards, {}
            slim = replace(plan, splits={})
        else:
            plan = Plan.from_json(text, plan_url)
            names, skips = [shard.name for shard in plan.shards], causes(plan.skips)
        if plan.plan_hash != manifest.plan_hash:
            problems.append(f"{PLAN_NAME}: not the plan that the manifest was made from")
        else:
            _check_totals(root, manifest, names, skips, problems)
    except (UserError, FormatError) as error:
        problems.append(str(error))
    tokenizer_json = None
    if manifest.tokenizer is not None:
        tokenizer_json = _check_tokenizer(root, manifest.tokenizer, problems)
    checks = [
        ShardCheck(
            root,
            entry,
            manifest.plan_hash,
            manifest.tokenizer is not None,
            manifest.image if deep else None,
            tokenizer_json if deep or slim is not None else None,
            slim,
        )
        for entries in manifest.splits.values()
        for entry in entries
    ]
    total = sum(check.entry.samples for check in checks)
    results = engines.run(check_shard, checks, workers, lambda check: check.entry.name)
    shown = engines.progress(results, total, "verified", lambda done: done[0].entry.samples)
    found = {check.entry.name: lines for check, lines in shown}
    for check in checks:
        problems += found[check.entry.name]
    return manifest, problems


def find_garbage(root: str) -> list[str]:
    """Names of files below `root` that a killed writer left and that nothing needs.

    Those are temporary files; and tars and indexes without a receipt, if `pack` made them, the
    manifest does not list them, and no plan of that manifest will make them good. Nothing else:
    what is not surely ours is not garbage. Empty where there is no dataset that can be read.
    """
    files = storage.list_files(root)
    manifest, planned, is_adopted = None, None, False
    with suppress(FormatError):
        if MANIFEST_NAME in files:
            manifest = storage.load_manifest(root)
            is_adopted = bool(manifest.selection)
    with suppress(FormatError):
        if PLAN_NAME in files:
            text = storage.read_text(join(root, PLAN_NAME), None)
            is_adopted |= foreign.is_adoption(text)
            planned = {shard.name for shard in Plan.from_json(text, PLAN_NAME).shards}
    if is_adopted:  # Its tars are another tool's.
        return [name for name in files if _is_temporary(name)]
    if manifest is None and (planned is None or MANIFEST_NAME in files):
        return []
    wanted = set()
    if manifest is not None:
        listed = {entry.name for entries in manifest.splits.values() for entry in entries}
        wanted = listed | (planned or set())
    suspects = [
        name
        for name in files
        if name.endswith((".tar", ".idx"))
        and is_file_name(name)
        and f"{name[:-4]}.json" not in files
        and f"{name[:-4]}.tar" not in wanted
    ]
    ours = storage.each(root, lambda name: _is_packed(root, name, files[name]), suspects)
    packed = {name for name, is_ours in zip(suspects, ours, strict=True) if is_ours}
    return [name for name in files if _is_temporary(name) or name in packed]


def collect_garbage(root: str) -> tuple[list[str], int]:
    """Removes what `find_garbage` finds, and uploads to `root` that were never finished.

    Returns the names of the files and the number of uploads. Raises `UserError` when another
    pixloom writes there: from this machine, if `root` is a store, for none other is known.
    """
    if not storage.exists(join(root, MANIFEST_NAME)) and not storage.exists(join(root, PLAN_NAME)):
        storage.load_manifest(root)  # Says what is missing.
    with storage.locked(root):
        garbage = find_garbage(root)
        storage.each(root, lambda name: storage.remove(join(root, name)), garbage)
        if any(name.startswith(f"{SCRATCH_NAME}/") for name in garbage):
            storage.remove_tree(join(root, SCRATCH_NAME))
        return garbage, storage.abort_uploads(root, is_file_name)


def _is_temporary(name: str) -> bool:
    folder, _, last = name.rpartition("/")
    is_ours = last.startswith(".") and last.endswith(SCRATCH_NAME) and last != SCRATCH_NAME
    return is_ours or f"{folder}/".startswith(f"{SCRATCH_NAME}/")


def _is_packed(root: str, name: str, num_bytes: int) -> bool:
    """Whether a tar or an index begins as those that `pack` writes."""
    split, _, last = name.partition("/")
    key = re.compile(rf"{re.escape(split)}-[0-9]{{9}}\.[a-z.]+")
    try:
        head = storage.read_range(join(root, name), 0, TAR_BLOCK_BYTES)
        if last.endswith(".idx"):
            words = head.decode("ascii").split(maxsplit=6)
            return words[:1] == ["v1.2"] and (words[1:] == ["0"] or bool(key.fullmatch(words[5])))
        if not any(head):
            return num_bytes == 2 * TAR_BLOCK_BYTES
        info = tarfile.TarInfo.frombuf(head, "ascii", "strict")
    except (ValueError, IndexError, tarfile.HeaderError):
        return False
    return key.fullmatch(info.name) is not None and info.mtime == 0


def _check_receipt(task: ShardCheck, problems: list[str]) -> Receipt | None:
    url = join(task.root, task.entry.receipt_name)
    try:
        receipt = Receipt.from_json(storage.read_text(url), task.entry.receipt_name)
    except (UserError, FormatError) as error:
        problems.append(str(error))
        return None
    if receipt.shard != task.entry or receipt.plan_hash != task.plan_hash:
        problems.append(f"{task.entry.receipt_name}: is of another shard than the manifest's")
    expected = task.entry.samples if task.has_tokens else 0
    if len(receipt.num_tokens) != expected:
        problems.append(
            f"{task.entry.receipt_name}: token counts of {len(receipt.num_tokens)} samples, "
            f"not of {expected}"
        )
    return receipt


def _check_index(task: ShardCheck, problems: list[str]) -> list[SampleSpan] | None:
    url = join(task.root, task.entry.index_name)
    try:
        return parse_index(storage.read_text(url), task.entry.index_name, task.entry.bytes)
    except (UserError, FormatError) as error:
        problems.append(str(error))
        return None


def _check_totals(
    root: str,
    manifest: Manifest,
    names: Sequence[str],
    planned_skips: Mapping[str, int],
    problems: list[str],
) -> None:
    """What the manifest sums up: the skips of plan and receipts, and the longest sample.

    `names` are those of all shards of the plan.
    """
    listed = {entry.name for entries in manifest.splits.values() for entry in entries}
    skips = Counter(planned_skips)
    longest = 0
    damaged = False

    def read(shard_name: str) -> Receipt | UserError | FormatError:
        name = ShardEntry(shard_name, 0, 0, "").receipt_name
        try:
            return Receipt.from_json(storage.read_text(join(root, name)), name)
        except (UserError, FormatError) as error:
            return error

    for shard_name, receipt in zip(names, storage.each(root, read, names), strict=True):
        if not isinstance(receipt, Receipt):
            damaged = True
            if shard_name not in listed:  # Others are named where their shard is checked.
                problems.append(str(receipt))
            continue
        skips.update(receipt.skips)
        longest = max(longest, *receipt.num_tokens, 0)
    if damaged:
        return
    if skips != Counter(manifest.skips):
        problems.append(f"{MANIFEST_NAME}: its skips are not those of plan and receipts")
    if manifest.tokenizer is not None and manifest.tokenizer.longest != longest:
        problems.append(
            f"{MANIFEST_NAME}: says that the longest sample has {manifest.tokenizer.longest} "
            f"tokens, the receipts say {longest}"
        )


def _check_tokenizer(root: str, entry: TokenizerEntry, problems: list[str]) -> str | None:
    try:
        text = storage.read_text(join(root, entry.file))
        if hashlib.sha256(text.encode()).hexdigest() != entry.sha256:
            problems.append(f"{entry.file}: its SHA-256 is not the manifest's")
            return None
        vocab_size = tokens.load_tokenizer(text, entry.file).get_vocab_size()
        if vocab_size != entry.vocab_size:
            problems.append(
                f"{MANIFEST_NAME}: says that the vocabulary has {entry.vocab_size} tokens, "
                f"{entry.file} has {vocab_size}"
            )
        return text
    except (UserError, FormatError) as error:
        problems.append(str(error))
        return None


def _wrong_crc32s(
    tar: bytes, spans: Sequence[SampleSpan], entry: ShardEntry, receipt: Receipt, whole: bool
) -> list[str]:
    """Samples that are not as the receipt says; with a `whole` tar the receipt is wrong."""
    name = entry.name
    lines = []
    for span, crc32 in zip(spans, receipt.crc32, strict=False):
        data = tar[span.offset : span.offset + span.size]
        if len(data) < span.size:
            lines.append(f"{name}: {span.key}: missing, the shard ends before it")
        elif zlib.crc32(data) != crc32 and whole:
            lines.append(f"{entry.receipt_name}: {span.key}: not its CRC-32 in {name}")
        elif zlib.crc32(data) != crc32:
            lines.append(f"{name}: {span.key}: damaged (CRC-32)")
    return lines


def _count_tokens(
    tar: bytes, span: SampleSpan, num_tokens: int | None, receipt_name: str
) -> str | None:
    found = [member for member in span.members if member.extension == TOKENS_EXTENSION]
    if len(found) != (0 if num_tokens is None else 1):
        return f"has {len(found)} members {TOKENS_EXTENSION}"
    for member in found:
        try:
            count = tokens.count_npy(tar[member.offset : member.offset + member.size], "the tokens")
        except FormatError as error:
            return str(error)
        if count != num_tokens:
            return f"{count} tokens, {receipt_name} says {num_tokens}"
    return None


def _check_sample(
    tar: bytes, span: SampleSpan, task: ShardCheck, num_tokens: int | None
) -> str | None:
    policy = task.image
    assert policy is not None
    members = {
        member.extension: tar[member.offset : member.offset + member.size]
        for member in span.members
    }
    image_extensions = (*IMAGE_EXTENSIONS, ARRAY_EXTENSION)
    found_images = [extension for extension in image_extensions if extension in members]
    others = {"json"} if num_tokens is None else {"json", "txt", TOKENS_EXTENSION}
    if len(found_images) != 1 or members.keys() - set(found_images) != others:
        return f"has the members {' '.join(sorted(members))}"
    data = members[found_images[0]]
    try:
        height, width, _ = images.decode(data, policy.channels).shape
        # WebP has no grey, and leaves out an alpha channel that hides nothing.
        allowed = (policy.channels, 3) if found_images == ["webp"] else (policy.channels,)
        if images.read_channels(data) not in allowed:
            return f"the image has not {policy.channels} channels"
        if policy.width is not None and (width, height) != (policy.width, policy.height):
            return f"the image is {width}x{height}, not {policy.width}x{policy.height}"
        json.loads(members["json"])
        if num_tokens is not None:
            code = members["txt"].decode("utf-8-sig")
            return _check_tokens(members[TOKENS_EXTENSION], code, num_tokens, task.tokenizer_json)
    except images.ImageRefused as refused:
        return f"the image does not decode ({refused.cause})"
    except UnicodeDecodeError:
        return "the code is not UTF-8"
    except ValueError as error:
        return str(error)
    return None


def _check_tokens(
    data: bytes, code: str, num_tokens: int, tokenizer_json: str | None
) -> str | None:
    ids = tokens.from_npy(data, "the tokens").tolist()
    if len(ids) != num_tokens or len(ids) < 2 or ids[0] != BOS or ids[-1] != EOS:
        return f"{len(ids)} tokens, the receipt says {num_tokens} with <bos> and <eos>"
    if tokenizer_json is not None and ids != tokens.encode(_tokenizer(tokenizer_json), code):
        return "the tokens are not those of the code"
    return None


_loaded: dict[str, Tokenizer] = {}


def _tokenizer(text: str) -> Tokenizer:
    if text not in _loaded:
        _loaded.clear()
        _loaded[text] = tokens.load_tokenizer(text, "the dataset's tokenizer")
    return _loaded[text]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pixloom verify",
        description="Check a packed dataset against its manifest: counts, sizes, hashes, indexes "
        "and receipts. Exit status 1 when there is damage; `pixloom pack` again repairs it, and "
        "`pixloom index` all but the shards of an adopted dataset.",
    )
    parser.add_argument(
        "url", metavar="URL", help="folder of the packed dataset, local or on a store"
    )
    parser.add_argument("--deep", action="store_true", help="decode every sample too")
    parser.add_argument(
        "--collect-garbage",
        action="store_true",
        help="first remove what a killed pack left there and nothing needs: temporary files, tars "
        "and indexes of pixloom without a receipt that no manifest lists, and unfinished uploads; "
        "not while a pack writes there, which for a store is known of this machine alone",
    )
    engines.add_workers_option(parser)
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    args = parser.parse_args(argv)

    def action() -> int:
        start = time.monotonic()
        out = sys.stderr if args.json else sys.stdout
        removed: list[str] = []
        num_uploads = 0
        if args.collect_garbage:
            removed, num_uploads = collect_garbage(args.url)
            for name in removed:
                print(f"removed {name!r}", file=out)
            if num_uploads:
                print(f"ended {num_uploads} unfinished uploads", file=out)
        manifest, problems = check_dataset(args.url, args.deep, args.workers)
        garbage: list[str] = []
        with suppress(StorageError):  # Who reads a dataset need not be allowed to list it.
            garbage = find_garbage(args.url)
        if garbage:
            print(
                f"{len(garbage)} files that nothing needs, as {garbage[0]!r}; "
                "--collect-garbage removes them",
                file=sys.stderr,
            )
        samples = {split: manifest.num_samples(split) for split in manifest.splits}
        for problem in problems:
            print(problem, file=out)
        if args.json:
            row = {
                "url": args.url,
                "ok": not problems,
                "deep": args.deep,
                "samples": samples,
                "shards": sum(len(shards) for shards in manifest.splits.values()),
                "problems": problems,
                "garbage": garbage,
                "removed": removed,
                "ended_uploads": num_uploads,
                "data_digest": manifest.data_digest,
                "duration_s": round(time.monotonic() - start, 3),
            }
            print(json.dumps(row))
        elif not problems:
            counts = ", ".join(f"{split} {count}" for split, count in samples.items())
            how = "decoded and " if args.deep else ""
            print(f"{args.url}: all samples {how}as the manifest says ({counts})")
        return 1 if problems else 0

    return command("verify", action)


if __name__ == "__main__":
    sys.exit(main())
