"""Adopting shards made by another tool where they lie: their bytes are read once, never written.

Beside each tar go its index and its receipt, and in the root `plan.json` (what was decided, see
`shards.foreign`), the tokenizer, and the manifest, written last: from then on it is a dataset like
a packed one. All shards are read at every call, and a file is written only where it differs, so
that calling again after a kill goes on, and after success finds nothing to do.
"""

import argparse
import collections
import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from shards import engines, foreign, images, plan, storage, tarfiles, tokens
from shards.foreign import Adoption
from shards.format import (
    IMAGE_EXTENSIONS,
    MANIFEST_NAME,
    PLAN_NAME,
    TOKENIZER_NAME,
    TOKENS_EXTENSION,
    FormatError,
    ImagePolicy,
    Manifest,
    Receipt,
    ShardEntry,
    TokenizerEntry,
    format_index,
    image_extension,
)
from shards.layouts import choose_members, find_shards, guess_split, image_extensions
from shards.pack import TooManyBadError, channel_count, describe_skips
from shards.sources import Skip
from shards.storage import UserError, command, join
from shards.tokens import CHAR, WORD

SHOWN_PROBLEMS = 20
MEGABYTE = 1_000_000


class DamagedShardsError(Exception):
    """Shards that no index can be made of; `problems` are a line each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"{len(problems)} damaged")
        self.problems = problems


@dataclass(frozen=True)
class ShardTask:
    """One shard to read. `adoption` is without its splits, which may be long."""

    root: str
    name: str
    num_bytes: int
    copy: Path
    """Where a remote shard is fetched to, unless it is there already; removed again."""
    adoption: Adoption
    plan_hash: str
    tokenizer_json: str | None
    trains: bool
    """Whether a tokenizer is trained on it."""


@dataclass(frozen=True)
class Adopted:
    """What became of one shard; with a `problem`, it was left alone."""

    entry: ShardEntry
    problem: str = ""
    longest: int = 0
    skips: Mapping[str, int] = field(default_factory=dict)
    examples: tuple[Skip, ...] = ()
    sizes: frozenset[tuple[int, int]] = frozenset()
    counts: Mapping[str, int] = field(default_factory=dict)
    num_other_members: int = 0
    wrote: bool = False


@dataclass(frozen=True)
class Indexed:
    """What a call of `index` did."""

    manifest: Manifest
    adoption: Adoption
    examples: tuple[Skip, ...]
    num_other_members: int
    wrote: bool


def adopt_shard(task: ShardTask) -> Adopted:
    """Reads one shard and publishes its index and receipt, where they are not there already.

    Raises `UserError` when the storage fails. A damaged shard is a result, so that all are found.
    """
    engines.note(task.name)
    url = join(task.root, task.name)
    with contextlib.ExitStack() as stack:
        if storage.is_remote(url):
            if not task.copy.exists():
                storage.fetch(url, task.copy)
            stack.callback(task.copy.unlink)
            path = task.copy
        else:
            path = storage.local_path(url)
        try:
            with storage.explained(url), storage.open_read(str(path)) as file:
                found = foreign.scan(file, task.name, task.adoption, task.tokenizer_json)
        except FormatError as error:
            return Adopted(ShardEntry(task.name, 0, task.num_bytes, ""), str(error))
    entry = ShardEntry(task.name, len(found.spans), found.num_bytes, found.sha256)
    receipt = Receipt(entry, found.crc32, found.num_tokens, found.skips, task.plan_hash)
    wrote = _publish_changed(format_index(found.spans), join(task.root, entry.index_name))
    wrote |= _publish_changed(receipt.to_json(), join(task.root, entry.receipt_name))
    return Adopted(
        entry=entry,
        longest=max(found.num_tokens, default=0),
        skips=found.skips,
        examples=found.examples,
        sizes=found.sizes,
        counts=found.counts if task.trains else {},
        num_other_members=found.num_other_members,
        wrote=wrote,
    )


def index(
    root: str,
    files: Mapping[str, int],
    adoption: Adoption,
    tokenizer_json: str | None,
    scratch: Path,
    workers: int,
    *,
    max_bad: int | None = None,
) -> Indexed:
    """Makes the shards of `adoption` a dataset. The caller has `root` for itself.

    `files` are the sizes of all files below `root`; `tokenizer_json` is the given tokenizer.

    Raises:
        UserError: files of somebody else are in the way, a split is empty, or the storage fails.
        DamagedShardsError: of all damaged shards.
        TooManyBadError: above `max_bad` skips.
    """
    old = _old_adoption(root, files)
    _refuse_others_files(root, files, adoption, old, tokenizer_json)
    wrote = _settle(root, adoption, old)
    slim = dataclasses.replace(adoption, splits={})
    trained = adoption.kind == "pairs" and tokenizer_json is None
    training_shards = set(adoption.splits.get("train", ()))
    tasks = [
        ShardTask(
            root=root,
            name=name,
            num_bytes=files[name],
            copy=_copy(scratch, number),
            adoption=slim,
            plan_hash=adoption.plan_hash,
            tokenizer_json=tokenizer_json,
            trains=trained and name in training_shards,
        )
        for number, name in enumerate(adoption.shards)
    ]
    entries: dict[str, ShardEntry] = {}
    skips: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    sizes: set[tuple[int, int]] = set()
    examples: list[Skip] = []
    problems: list[str] = []
    longest = num_other_members = 0
    total = sum(task.num_bytes for task in tasks) // MEGABYTE
    with (
        closing(engines.run(adopt_shard, tasks, workers, lambda task: task.name)) as results,
        closing(engines.progress(results, total, "indexed MB", _count_megabytes)) as shown,
    ):
        for task, adopted in shown:
            if adopted.problem:
                problems.append(adopted.problem)
                continue
            entries[task.name] = adopted.entry
            skips.update(adopted.skips)
            counts.update(adopted.counts)
            sizes |= adopted.sizes if len(sizes) < 2 else set()
            examples += adopted.examples if len(examples) < 1000 else ()
            longest = max(longest, adopted.longest)
            num_other_members += adopted.num_other_members
            wrote |= adopted.wrote
            examples.sort(key=lambda skip: (skip.cause, skip.name))
            if max_bad is not None and skips.total() > max_bad:
                raise TooManyBadError(
                    f"{skips.total()} skipped, --max-bad allows {max_bad}: "
                    f"{describe_skips(skips, examples)}"
                )
    if problems:
        raise DamagedShardsError(sorted(problems))
    splits = {
        split: tuple(entries[name] for name in names if entries[name].samples)
        for split, names in adoption.splits.items()
    }
    for split, found in splits.items():
        if not found:
            causes = f" (skipped: {describe_skips(skips, examples)})" if skips else ""
            raise UserError(f"{root}: no sample of the split {split!r} can be used{causes}")
    for entry in entries.values():
        if storage.size_bytes(join(root, entry.name)) != entry.bytes:
            raise UserError(f"{join(root, entry.name)}: changed while it was indexed; index again")
    if trained:
        train = tokens.train_char_tokenizer if adoption.tokenizer == CHAR else _train_words
        tokenizer_json = train(counts)
    manifest = Manifest(
        kind=adoption.kind,
        splits=splits,
        image=_policy(adoption, sizes),
        tokenizer=_tokenizer_entry(tokenizer_json, longest) if tokenizer_json else None,
        skips=dict(sorted(skips.items())),
        plan_hash=adoption.plan_hash,
        selection=slim.plan_hash,
    )
    if tokenizer_json is not None:
        wrote |= _publish_changed(tokenizer_json, join(root, TOKENIZER_NAME))
    wrote |= _publish_changed(manifest.to_json(), join(root, MANIFEST_NAME))
    return Indexed(manifest, adoption, tuple(examples), num_other_members, wrote)


def assign_splits(names: Sequence[str], specs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Which shards each split has, in order.

    Without `specs`, a folder at the top that is named like a split decides, then the words of the
    file's name; what says nothing is `train`. A spec is `NAME=PATTERN`, of a file's name or, with
    a slash, of its path; or one spec `train=.9,val=.1` deals whole shards. Raises `UserError`.
    """
    if specs and not any(re.search(r"[*?\[/]|\.tar$", spec) for spec in specs):
        return _deal(names, specs)
    splits: dict[str, list[str]] = {}
    patterns = [_pattern(spec) for spec in specs]
    for name in names:
        if patterns:
            found = {
                split
                for split, pattern in patterns
                if fnmatch.fnmatchcase(name if "/" in pattern else name.split("/")[-1], pattern)
            }
            if len(found) > 1:
                raise UserError(f"--split: {name} is of {' and '.join(sorted(found))}; choose one")
        else:
            found = {guess_split(name) or "train"}
        for split in found:
            splits.setdefault(split, []).append(name)
    for split, pattern in patterns:
        if split not in splits:
            raise UserError(f"--split {split}={pattern}: there is no such shard")
    usual = [split for split in ("train", "val", "test") if split in splits]
    ranked = usual + sorted(splits.keys() - set(usual))
    return {split: tuple(splits[split]) for split in ranked}


def _train_words(counts: Mapping[str, int]) -> str:
    return tokens.train_word_tokenizer(counts, 1)


def _tokenizer_entry(tokenizer_json: str, longest: int) -> TokenizerEntry:
    sha256 = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    vocab_size = tokens.load_tokenizer(tokenizer_json, TOKENIZER_NAME).get_vocab_size()
    return TokenizerEntry(TOKENIZER_NAME, sha256, vocab_size, longest)


def _policy(adoption: Adoption, sizes: set[tuple[int, int]]) -> ImagePolicy:
    """Images as they are: `shards.images.decode` makes them upright and converts them."""
    kept = images.make_policy(
        size=None, fit=None, encode=None, channels=adoption.channels, quality=90,
        background=(255, 255, 255),
    )  # fmt: skip
    if any(extension.endswith("npy") for extension in adoption.image_extensions):
        kept = dataclasses.replace(kept, encode="npy")
    if len(sizes) != 1:
        return kept
    [(width, height)] = sizes
    return dataclasses.replace(kept, width=width, height=height)


def _pattern(spec: str) -> tuple[str, str]:
    split, equals, pattern = spec.partition("=")
    if not equals or not pattern or not re.fullmatch(r"[a-z0-9_-]{1,32}", split):
        raise UserError(f"--split {spec}: write NAME=PATTERN, as in train='train-*.tar'")
    return split, pattern


def _deal(names: Sequence[str], specs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    if len(specs) > 1:
        raise UserError(f"--split {specs[1]}: write all shares in one, as in train=.9,val=.1")
    spec = plan.parse_split(specs[0])
    try:
        counts = plan.count_groups(spec, len(names))
    except UserError as error:
        raise UserError(
            f"--split {specs[0]}: whole shards are dealt, and {len(names)} are too few for that"
        ) from error
    # By a hash of the name: neighbours often come from one source.
    dealt = sorted(names, key=lambda name: hashlib.blake2b(name.encode()).digest())
    splits, at = {}, 0
    for split, count in counts.items():
        splits[split] = tuple(sorted(dealt[at : at + count]))
        at += count
    return splits


def _old_adoption(root: str, files: Mapping[str, int]) -> Adoption | None:
    """The adoption that is on storage; with no shards where it is ours and cannot be read.

    Raises `UserError` for a dataset that was packed.
    """
    if PLAN_NAME not in files:
        return None
    url = join(root, PLAN_NAME)
    text = storage.read_bytes(url).decode(errors="replace")
    if plan.is_marked(text):
        raise UserError(
            f"{root}: made by `pixloom pack`, it is a dataset already; nothing to adopt"
        )
    if not foreign.is_adoption(text):
        return None
    try:
        return Adoption.from_json(text, url)
    except FormatError:
        return Adoption("images", (), None, None, 0, {})


def _refuse_others_files(
    root: str,
    files: Mapping[str, int],
    adoption: Adoption,
    old: Adoption | None,
    tokenizer_json: str | None,
) -> None:
    """Raises `UserError` when a file to be written is there already, and is not ours."""
    ours = set(old.shards) if old is not None else set()
    names = [] if old is not None else [PLAN_NAME, MANIFEST_NAME]
    if old is None and adoption.kind == "pairs" and TOKENIZER_NAME in files:
        url = join(root, TOKENIZER_NAME)
        if tokenizer_json is None or storage.read_bytes(url) != tokenizer_json.encode():
            names.append(TOKENIZER_NAME)
    # An adoption without shards was damaged: nobody knows whose the files are, but they look it.
    if old is None or old.shards:
        for shard in adoption.shards:
            if shard not in ours:
                entry = ShardEntry(shard, 0, 0, "")
                names += [entry.index_name, entry.receipt_name]
    for name in names:
        if name in files:
            raise UserError(
                f"{join(root, name)}: another tool's file is where this one's would go; index a "
                "folder of links to the shards (`cp -rs`) or a copy without that file"
            )


def _settle(root: str, adoption: Adoption, old: Adoption | None) -> bool:
    """Makes `adoption` the plan on storage; of another one nothing is left. Whether it wrote."""
    if old is not None and old.plan_hash == adoption.plan_hash:
        return False
    if old is not None and old.shards:
        found = "; ".join(foreign.differences(old, adoption))
        print(f"{root}: its index is made anew ({found})", file=sys.stderr)
    storage.remove(join(root, MANIFEST_NAME))
    if old is not None:
        for shard in sorted(set(old.shards) - set(adoption.shards)):
            entry = ShardEntry(shard, 0, 0, "")
            storage.remove(join(root, entry.receipt_name))
            storage.remove(join(root, entry.index_name))
    storage.publish_text(adoption.to_json(), join(root, PLAN_NAME))
    return True


def _publish_changed(text: str, url: str) -> bool:
    if storage.exists(url) and storage.read_bytes(url) == text.encode():
        return False
    storage.publish_text(text, url)
    return True


def _count_megabytes(done: tuple[ShardTask, Adopted]) -> int:
    return done[0].num_bytes // MEGABYTE


def _copy(scratch: Path, number: int) -> Path:
    """For a remote shard, the `number`-th of an adoption's."""
    return scratch / f"{number}.tar"


def _first_samples(
    root: str, shards: Sequence[str], scratch: Path
) -> tuple[str, dict[str, set[str]]]:
    """The first shard that has members and is whole, and its samples' extensions.

    Of `shards`, an adoption's. A remote one's copy is left for its `ShardTask`.
    """
    problems = []
    for number, name in enumerate(shards):
        url = join(root, name)
        path = _copy(scratch, number)
        if storage.is_remote(url):
            storage.fetch(url, path)
        else:
            path = storage.local_path(url)
        found = {}
        try:
            with storage.explained(url), storage.open_read(str(path)) as file:
                found = tarfiles.list_extensions(file, name)
        except FormatError as error:
            problems.append(str(error))
        if found:
            return name, found
        if storage.is_remote(url):
            path.unlink()
    if problems:
        raise DamagedShardsError(problems)
    raise UserError(f"{root}: its shards are empty")


def _adoption_of(
    args: argparse.Namespace, shards: Sequence[str], scratch: Path
) -> tuple[Adoption, str | None]:
    """What a command line asks for, and the given tokenizer. Raises `UserError`."""
    tokenizer_json = None
    if args.tokenizer not in (None, WORD, CHAR):
        tokenizer_json = storage.read_text(args.tokenizer)
        tokens.load_tokenizer(tokenizer_json, args.tokenizer)
    splits = assign_splits(shards, args.split or ())
    used = [name for names in splits.values() for name in names]
    first, extensions = _first_samples(args.root, used, scratch)
    extensions_used, code_extension, pairs = choose_members(
        f"{args.root.rstrip('/')}/{first}",
        extensions,
        kind=args.kind,
        image_extensions=args.image_extension or image_extensions(args.channels),
        code_extension=args.code_suffix,
        given_tokenizer=tokenizer_json is not None,
    )
    if not pairs and (args.tokenizer is not None or args.code_suffix is not None):
        raise UserError(f"{args.root}: images alone have no code; drop --tokenizer, --code-suffix")
    if pairs and tokenizer_json is None and "train" not in splits:
        raise UserError(
            f"{args.root}: the vocabulary is trained on the split named train, there is none; "
            "give --tokenizer FILE"
        )
    tokenizer = None
    if tokenizer_json is not None:
        tokenizer = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    elif pairs:
        tokenizer = args.tokenizer or WORD
    adoption = Adoption(
        kind="pairs" if pairs else "images",
        image_extensions=extensions_used,
        code_extension=code_extension,
        tokenizer=tokenizer,
        channels=args.channels,
        splits=splits,
    )
    return adoption, tokenizer_json


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pixloom index",
        description="Make a dataset of WebDataset shards that another tool wrote, in place: index, "
        "receipts and manifest are written beside the tars, which stay as they are. Run again, it "
        "reads all shards again and writes what differs.",
        epilog="A folder that cannot be written: index a folder of links to it "
        "(cp -rs /absolute/shards mine).",
    )
    add = parser.add_argument
    add("root", metavar="ROOT", help="folder of the shards (*.tar, at any depth), local or remote")
    add(
        "--split",
        action="append",
        metavar="NAME=PATTERN",
        help="which shards a split has, as in --split train='train-*.tar' --split val='val-*.tar'; "
        "others are left out. Or deal whole shards, as in --split train=.9,val=.1. (default: by a "
        "folder or file name that says train, val, valid, validation or test; others are train)",
    )
    add(
        "--kind",
        choices=("auto", "pairs", "images"),
        default="auto",
        help="pairs: images with code; images: images alone; auto: pairs where the first shard "
        "has text beside images (default)",
    )
    add(
        "--image-extension",
        action="append",
        type=_image_extension,
        metavar="EXT",
        help="of the member to train on, as in left.png; may be repeated (default: png, jpg, jpeg "
        "and webp, in any case; image.npy and npy for other --channels than 1, 3, 4)",
    )
    add(
        "--code-suffix",
        type=_code_extension,
        metavar="EXT",
        help="of the member with the text (default: gui, else html, tex or txt, if only one of "
        "them lies beside the images)",
    )
    add(
        "--tokenizer",
        metavar="word|char|FILE",
        help="word, char: train a vocabulary of words or characters on the split named train "
        "(default: word); FILE: this tokenizer.json, with which members tokens.npy are used too",
    )
    add(
        "--channels",
        type=channel_count,
        default=3,
        metavar="N",
        help="1, 3, 4: grey, RGB or RGBA (default: 3); else 2 to 64: arrays of so many, as `pack` "
        "reads them",
    )
    add(
        "--max-bad",
        type=_limit,
        metavar="N",
        help="stop with exit status 1 when more is skipped (default: no limit)",
    )
    engines.add_workers_option(parser)
    add("--json", action="store_true", help="print a JSON object as the last line")
    return parser


def _limit(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,15}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write a whole number")
    return int(text)


def _extension(text: str) -> str:
    if not re.fullmatch(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: write one extension, as in txt")
    return text.removeprefix(".").lower()


def _code_extension(text: str) -> str:
    extension = _extension(text)
    if extension == TOKENS_EXTENSION or image_extension([extension]) is not None:
        raise argparse.ArgumentTypeError(f"{text!r}: that is no text")
    return extension


def _image_extension(text: str) -> str:
    extension = _extension(text)
    if image_extension([extension]) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must end in one of {', '.join((*IMAGE_EXTENSIONS, 'npy'))}"
        )
    return extension


def _report(root: str, done: Indexed, num_left_out: int, duration_s: float) -> dict[str, object]:
    manifest = done.manifest
    shards = [shard for shards in manifest.splits.values() for shard in shards]
    row: dict[str, object] = {
        "url": root,
        "ok": True,
        "kind": manifest.kind,
        "samples": {split: manifest.num_samples(split) for split in manifest.splits},
        "shards": len(shards),
        "shards_left_out": num_left_out,
        "bytes": sum(shard.bytes for shard in shards),
        "skips": dict(manifest.skips),
        "other_members": done.num_other_members,
        "image": dataclasses.asdict(manifest.image),
        "image_extensions": list(done.adoption.image_extensions),
        "code_extension": done.adoption.code_extension,
        "vocab_size": manifest.tokenizer.vocab_size if manifest.tokenizer else None,
        "longest": manifest.tokenizer.longest if manifest.tokenizer else None,
        "nothing_to_do": not done.wrote,
        "plan_hash": manifest.plan_hash,
        "data_digest": manifest.data_digest,
        "duration_s": round(duration_s, 3),
    }
    return row


def _describe(done: Indexed, row: Mapping[str, object], notes: Sequence[str]) -> str:
    manifest = done.manifest
    lines = []
    if row["nothing_to_do"]:
        lines.append(f"{row['url']}: nothing to do, the dataset is complete")
    lines += notes
    for split, shards in manifest.splits.items():
        noun = "shard" if len(shards) == 1 else "shards"
        lines.append(f"{split}: {manifest.num_samples(split)} samples in {len(shards)} {noun}")
    if manifest.image.width is None:
        lines.append("images: of differing sizes")
    else:
        lines.append(f"images: all {manifest.image.width}x{manifest.image.height}")
    if manifest.tokenizer is not None:
        lines.append(
            f"code: {done.adoption.code_extension or TOKENS_EXTENSION}; vocabulary: "
            f"{manifest.tokenizer.vocab_size} tokens; longest sample: "
            f"{manifest.tokenizer.longest} tokens"
        )
    if done.num_other_members:
        lines.append(f"ignored: {done.num_other_members} members without a key or an extension")
    lines.append(f"{row['bytes']:,} bytes in {row['duration_s']} s, digest {row['data_digest']}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)

    def action() -> int:
        start = time.monotonic()
        if not storage.is_remote(args.root) and not storage.local_path(args.root).is_dir():
            raise UserError(f"{args.root}: no such folder")
        with storage.exclusive(args.root) as scratch:
            files = storage.list_files(args.root)
            shards = find_shards(args.root, files)
            try:
                adoption, tokenizer_json = _adoption_of(args, shards, scratch)
                done = index(
                    args.root,
                    files,
                    adoption,
                    tokenizer_json,
                    scratch,
                    args.workers,
                    max_bad=args.max_bad,
                )
            except TooManyBadError as error:
                print(f"pixloom index: {error}", file=sys.stderr)
                if args.json:
                    print(json.dumps({"url": args.root, "ok": False, "problems": [str(error)]}))
                return 1
            except DamagedShardsError as error:
                for line in error.problems[:SHOWN_PROBLEMS]:
                    print(line, file=sys.stderr)
                print(f"pixloom index: {error}; no manifest was written", file=sys.stderr)
                if args.json:
                    print(json.dumps({"url": args.root, "ok": False, "problems": error.problems}))
                return 1
        if done.manifest.skips:
            total = sum(done.manifest.skips.values())
            found = describe_skips(done.manifest.skips, done.examples)
            print(f"skipped {total}: {found}", file=sys.stderr)
        num_left_out = len(shards) - len(adoption.shards)
        notes = []
        if not args.split and all(guess_split(name) is None for name in shards):
            notes.append("no name says which split a shard is of: all are `train`; see --split")
        elif not args.split and any(guess_split(name) is None for name in shards):
            count = sum(guess_split(name) is None for name in shards)
            notes.append(f"{count} shards whose names say no split are in `train`; see --split")
        if num_left_out:
            notes.append(f"left out: {num_left_out} shards that no --split names")
        row = _report(args.root, done, num_left_out, time.monotonic() - start)
        print(json.dumps(row) if args.json else _describe(done, row, notes))
        return 0

    return command("index", action)


if __name__ == "__main__":
    sys.exit(main())
