"""What a pack will do, decided before any shard is written.

`scan` looks at every raw sample once; from there on all is pure: samples that share an image or a
program form a group, groups are dealt to splits, samples are shuffled and cut into shards. The
result, `Plan`, depends on the inputs and the options alone; `shards.pack` carries it out.

Images are the same when their files are equal byte for byte, programs when their words are equal
in their order, whatever the white space. Equal pixels in different files are different images.
"""

import collections
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import Any

from shards import engines, images, sources, tokens
from shards.engines import Workers
from shards.format import TAR_BLOCK_BYTES, FormatError, ImagePolicy, Kind
from shards.sources import (
    MAX_CODE_BYTES,
    FileRead,
    Listing,
    NoCellError,
    Place,
    RawPair,
    Reader,
    Skip,
    TooLargeError,
)
from shards.storage import UserError

PLAN_VERSION = 5
PLAN_FORMAT = "pixloom plan"
FOLDERS, COLUMN = "folders", "column"
"""Values of `Options.split`: the source says which split a sample is of."""
CHUNK = 64

POISON = "poison"
"""The cause of skips whose samples end, block or overfill each process that works on them."""

SplitSpec = Mapping[str, int | Decimal | None]
"""Split name -> number of groups, share of the groups that numbers leave, or None: the rest."""


@dataclass(frozen=True)
class Options:
    """What decides a dataset's bytes, beside its inputs; one field an option of `pack`."""

    kind: Kind
    code_suffix: str | None
    image: ImagePolicy
    split: str
    seed: int
    tokenizer: str | None
    """`word`, `char`, `bpe`, or the SHA-256 of the file given; None for images alone."""
    min_frequency: int
    vocab_size: int | None
    max_tokens: int | None
    shard_samples: int
    shard_bytes: int
    image_column: str | None = None
    code_column: str | None = None
    split_column: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """A raw sample as `scan` found it. Hashes are SHA-256; `code_hash` ignores white space."""

    pair: RawPair
    image_sha256: str
    image_bytes: int
    width: int
    height: int
    code_sha256: str | None = None
    code_bytes: int = 0
    code_hash: str | None = None


@dataclass(frozen=True, slots=True)
class PlannedSample:
    key: str
    image: str
    image_sha256: str
    code: str | None
    code_sha256: str | None
    image_place: Place | None = None
    code_place: Place | None = None


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be: `name` as in `train/000000.tar`, its samples in the order of the tar."""

    name: str
    samples: tuple[PlannedSample, ...]


@dataclass(frozen=True)
class Plan:
    options: Options
    image: ImagePolicy
    """`options.image`, with the size that all images share where it was left open."""
    tokenizer_sha256: str | None
    shards: tuple[PlannedShard, ...]
    skips: tuple[Skip, ...]
    num_groups: Mapping[str, int]
    """Groups dealt to each split, before their images are decoded: one may turn out empty."""

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256 over everything in the plan."""
        return hashlib.sha256(json.dumps(self._body(), sort_keys=True).encode()).hexdigest()

    @property
    def splits(self) -> list[str]:
        return list(self.num_groups)

    def to_json(self) -> str:
        head = {"format": PLAN_FORMAT, "version": PLAN_VERSION, "plan_hash": self.plan_hash}
        return json.dumps({**head, **self._body()}, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Plan":
        """Raises `FormatError` naming `where` when the text is no plan of this version."""
        try:
            body = json.loads(text)
            if body.get("format") != PLAN_FORMAT:
                raise FormatError(f"{where}: not a pixloom plan")
            if body["version"] != PLAN_VERSION:
                raise FormatError(f"{where}: a plan of another version; pack with --overwrite")
            options = body["options"]
            plan = cls(
                options=Options(**{**options, "image": _policy(options["image"])}),
                image=_policy(body["image"]),
                tokenizer_sha256=body["tokenizer_sha256"],
                shards=tuple(
                    PlannedShard(name, tuple(_planned(*sample) for sample in samples))
                    for name, samples in body["shards"].items()
                ),
                skips=tuple(Skip(cause, name) for cause, name in body["skips"]),
                num_groups=body["num_groups"],
            )
            _check_types(plan)
            plan_hash = plan.plan_hash
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{where}: damaged plan ({error!r})") from error
        if plan_hash != body.get("plan_hash"):
            raise FormatError(f"{where}: the plan's own hash does not match; it was edited")
        return plan

    def _body(self) -> dict[str, Any]:
        return {
            "options": dataclasses.asdict(self.options),
            "image": dataclasses.asdict(self.image),
            "tokenizer_sha256": self.tokenizer_sha256,
            "num_groups": dict(self.num_groups),
            "skips": [[skip.cause, skip.name] for skip in self.skips],
            "shards": {
                shard.name: [_fields(sample) for sample in shard.samples] for shard in self.shards
            },
        }


def _check_types(plan: Plan) -> None:
    """Raises `TypeError` where what is named, sorted or counted is no text or number."""
    texts = [text for skip in plan.skips for text in (skip.cause, skip.name)]
    for shard in plan.shards:
        for sample in shard.samples:
            texts += [sample.key, sample.image, sample.image_sha256]
            texts += [one for one in (sample.code, sample.code_sha256) if one is not None]
    numbers = list(plan.num_groups.values())
    for kind, values in ((str, texts), (int, numbers)):
        for value in values:
            if type(value) is not kind:
                raise TypeError(f"{value!r} is of another type")


def _fields(sample: PlannedSample) -> list[Any]:
    """In JSON: places are there only where a sample has one."""
    fields = [sample.key, sample.image, sample.image_sha256, sample.code, sample.code_sha256]
    places = [sample.image_place, sample.code_place]
    return fields + places if any(places) else fields


def _planned(
    key: str,
    image: str,
    image_sha256: str,
    code: str | None,
    code_sha256: str | None,
    image_place: Sequence[Any] | None = None,
    code_place: Sequence[Any] | None = None,
) -> PlannedSample:
    places = [None if one is None else Place(*one) for one in (image_place, code_place)]
    return PlannedSample(key, image, image_sha256, code, code_sha256, *places)


def is_marked(text: str) -> bool:
    """Whether `text` begins as every plan does, and so was a plan even where it is damaged."""
    return text.startswith(json.dumps({"format": PLAN_FORMAT}, separators=(",", ":"))[:-1])


def parse_split(text: str) -> SplitSpec:
    """Reads `train=.8,val=.1,test=.1`, `train=rest,val=50,test=250` or `test=1`.

    A name has 1 to 32 characters of a-z, 0-9, _ and -, for it becomes a folder and a part of keys.
    A whole number from 2 on counts groups. A share (1 is all) is of what the counts leave; shares
    must add up to 1, or leave something to one `rest`. Raises `UserError`.
    """
    spec: dict[str, int | Decimal | None] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals or name in spec:
            raise UserError(f"--split {text}: write each split once, as in train=.8")
        if not re.fullmatch(r"[a-z0-9_-]{1,32}", name):
            raise UserError(
                f"--split {text}: {name[:40]!r}: name a split with 1 to 32 characters of a-z, 0-9, "
                "_ and -"
            )
        if value == "rest":
            spec[name] = None
        elif re.fullmatch(r"[0-9]{1,12}", value) and int(value) >= 2:
            spec[name] = int(value)
        elif re.fullmatch(r"[0-9]*\.?[0-9]+|1\.", value) and 0 < Decimal(value) <= 1:
            spec[name] = Decimal(value)
        else:
            raise UserError(
                f"--split {text}: {name}={value}: write a share up to 1, a number of groups from "
                "2 on, or `rest`"
            )
    share = sum((value for value in spec.values() if isinstance(value, Decimal)), Decimal(0))
    num_rests = sum(value is None for value in spec.values())
    if num_rests > 1 or (share != 1 if num_rests == 0 else share >= 1):
        raise UserError(
            f"--split {text}: the shares must add up to 1, or to less beside one `rest`"
        )
    return spec


def count_groups(spec: SplitSpec, num_groups: int) -> dict[str, int]:
    """How many of `num_groups` groups each split takes. Raises `UserError` for an empty split."""
    left = num_groups - sum(value for value in spec.values() if isinstance(value, int))
    shares = {
        name: int((value * max(left, 0)).to_integral_value())
        for name, value in spec.items()
        if isinstance(value, Decimal)
    }
    # What rounding and shares leave goes to the rest, or else to the largest share.
    taker = next((name for name, value in spec.items() if value is None), None)
    if taker is None:
        taker = max(shares, key=lambda name: shares[name])
    spare = left - sum(shares.values())
    counts = {}
    for name, value in spec.items():
        count = value if isinstance(value, int) else shares.get(name, 0)
        counts[name] = count + (spare if name == taker else 0)
        if counts[name] < 1:
            raise UserError(
                f"--split: nothing would be in {name!r}; there are {num_groups} groups of samples "
                "that share an image or a program: ask for less elsewhere"
            )
    return counts


@dataclass(frozen=True)
class Scan:
    """What is listed, as it was found. `counts` are of the words or characters of all records."""

    records: list[Record]
    skips: list[Skip]
    counts: collections.Counter[str]


def scan(root: str, listing: Listing, options: Options, workers: Workers | int) -> Scan:
    """Reads and hashes every listed sample; refuses what its header or its text rules out. Counts
    what `options.tokenizer` is trained on, word or character."""
    pieces = _pieces([pair.block for pair in listing.pairs])
    channels, tokenizer = options.image.channels, options.tokenizer
    chunks = [
        _Chunk(root, listing.pairs[start:stop], start, channels, tokenizer)
        for start, stop in pieces
    ]
    results = engines.run(
        _scan_chunk, chunks, workers, lambda chunk: f"scan from {chunk.pairs[0].image}", _without
    )
    shown = engines.progress(
        results,
        len(listing.pairs),
        "scanned",
        lambda done: len(done[1][0]),
        lambda done: _cost(done[1][0]),
    )
    counts: collections.Counter[str] = collections.Counter()
    found: list[Record | Skip] = []
    for _, (chunk, counted) in sorted(
        ((task.start, result) for task, result in shown), key=lambda row: row[0]
    ):
        found += chunk
        counts.update(counted)
    records = [one for one in found if isinstance(one, Record)]
    return Scan(records, [one for one in found if isinstance(one, Skip)], counts)


def train_tokenizer(
    root: str,
    found: Scan,
    training: Sequence[Record],
    options: Options,
    workers: Workers | int,
) -> str:
    """The `tokenizer.json` that `options` ask for, trained on the code of `training` alone, which
    are some of the records `found`."""
    if options.tokenizer == tokens.BPE:
        assert options.vocab_size is not None
        chunks = _code_chunks(root, training)
        with closing(engines.run(_read_codes, chunks, workers, _first_name)) as results:
            texts = (text for _, texts in results for text in texts)
            return tokens.train_bpe_tokenizer(texts, options.min_frequency, options.vocab_size)
    # Everything was counted at the scan: what is read again are the few others.
    trained = set(map(id, training))
    others = [record for record in found.records if id(record) not in trained]
    is_char = options.tokenizer == tokens.CHAR
    counts = found.counts.copy()
    count = _count_characters if is_char else _count_words
    for _, counted in engines.run(count, _code_chunks(root, others), workers, _first_name):
        counts.subtract(counted)
    train = tokens.train_char_tokenizer if is_char else tokens.train_word_tokenizer
    return train(counts, options.min_frequency, options.vocab_size)


def _code_chunks(root: str, records: Sequence[Record]) -> list[tuple[str, list[FileRead]]]:
    pairs = [one.pair for one in records if one.pair.code is not None]
    # Files of a block together and in their order, as they are quickest to read.
    pairs.sort(key=lambda pair: (pair.block or 0, pair.code_place or ()))
    files = [FileRead(str(pair.code), place=pair.code_place) for pair in pairs]
    return [(root, files[start:stop]) for start, stop in _pieces([pair.block for pair in pairs])]


def _pieces(blocks: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """Samples [start, stop) that make a task: `CHUNK` of them, or more to keep a block whole."""
    start = 0
    for at, block in enumerate(blocks):
        if at - start >= CHUNK and (block is None or block != blocks[at - 1]):
            yield start, at
            start = at
    if blocks:
        yield start, len(blocks)


def group_records(records: Sequence[Record]) -> list[list[Record]]:
    """Records that share an image or a program, directly or through others, form one group.

    So no image file and no sequence of words of one split is seen in another.
    """
    parents = list(range(len(records)))

    def root_of(at: int) -> int:
        while parents[at] != at:
            parents[at] = parents[parents[at]]
            at = parents[at]
        return at

    first: dict[str, int] = {}
    for at, record in enumerate(records):
        for content in _contents(record):
            other = root_of(first.setdefault(content, at))
            parents[root_of(at)] = other
    groups: dict[int, list[Record]] = {}
    for at, record in enumerate(records):
        groups.setdefault(root_of(at), []).append(record)
    return list(groups.values())


def deal(records: Sequence[Record], spec: SplitSpec, seed: int) -> dict[str, list[list[Record]]]:
    """Groups of records for each split, at random but for `seed` and the records' content.

    Names play no part: renaming files moves no sample to another split. Raises `UserError`.
    """
    groups = group_records(records)
    groups.sort(key=lambda group: min(_draw(seed, "split", record) for record in group))
    dealt, at = {}, 0
    for name, count in count_groups(spec, len(groups)).items():
        dealt[name] = groups[at : at + count]
        at += count
    return dealt


def keep_splits(
    records: Sequence[Record],
) -> tuple[dict[str, list[list[Record]]], list[Skip]]:
    """Groups of records for the splits that the source says, and what is dropped.

    No image and no program may be in two of them. Where one is, it stays in the split that is
    there to judge by: test before val before others before train, whose samples with it are
    skipped. Raises `UserError` for a split of which nothing is left.
    """
    by_split: dict[str, list[Record]] = {}
    for record in records:
        by_split.setdefault(str(record.pair.split), []).append(record)
    ranks = {"test": 0, "val": 1, "train": 3}
    judging = sorted(by_split, key=lambda name: (ranks.get(name, 2), name))
    dealt: dict[str, list[list[Record]]] = {}
    skips: list[Skip] = []
    seen: set[str] = set()
    for split in judging:
        kept = []
        for record in by_split[split]:
            if seen.isdisjoint(_contents(record)):
                kept.append(record)
            else:
                skips.append(Skip("duplicate_across_splits", record.pair.image))
        if not kept:
            raise UserError(
                f"--split: nothing would be in {split!r}; each of its samples shares an image or a "
                f"program with one of {' or '.join(dealt)}, as {skips[-1].name!r} does"
            )
        seen.update(content for record in kept for content in _contents(record))
        dealt[split] = group_records(kept)
    usual = [split for split in ("train", "val", "test") if split in dealt]
    return {split: dealt[split] for split in [*usual, *sorted(dealt.keys() - set(usual))]}, skips


def _contents(record: Record) -> list[str]:
    return [one for one in (record.image_sha256, record.code_hash) if one is not None]


def make_plan(
    options: Options,
    dealt: Mapping[str, Sequence[Sequence[Record]]],
    skips: Iterable[Skip],
    tokenizer_sha256: str | None,
) -> Plan:
    """Shuffles each split's samples and cuts them into shards of nearly equal counts.

    A shard is a fair sample of its split; of a source with blocks, it is some of them, shuffled
    inside and among each other. Shards keep to `options.shard_samples`, and to about
    `options.shard_bytes`, estimated from the sizes of the files or of the decoded images.
    """
    everyone = (one for groups in dealt.values() for group in groups for one in group)
    sizes = {(one.width, one.height) for one in everyone}
    image = options.image
    if image.fit == "none" and len(sizes) == 1:
        [(width, height)] = sizes
        image = dataclasses.replace(image, width=width, height=height)
    shards = []
    for split, groups in dealt.items():
        records = [record for group in groups for record in group]
        records.sort(key=lambda record: _place_in_order(options.seed, record))
        total_bytes = sum(_estimate_bytes(record, image) for record in records)
        num_shards = max(
            -(-len(records) // options.shard_samples), -(-total_bytes // options.shard_bytes)
        )
        num_shards = min(num_shards, len(records))
        for number in range(num_shards):
            start = number * len(records) // num_shards
            stop = (number + 1) * len(records) // num_shards
            samples = tuple(
                PlannedSample(
                    f"{split}-{at:09d}",
                    records[at].pair.image,
                    records[at].image_sha256,
                    records[at].pair.code,
                    records[at].code_sha256,
                    records[at].pair.image_place,
                    records[at].pair.code_place,
                )
                for at in range(start, stop)
            )
            shards.append(PlannedShard(f"{split}/{number:06d}.tar", samples))
    return Plan(
        options=options,
        image=image,
        tokenizer_sha256=tokenizer_sha256,
        shards=tuple(shards),
        skips=tuple(skips),
        num_groups={split: len(groups) for split, groups in dealt.items()},
    )


def estimate_bytes(dealt: Mapping[str, Sequence[Sequence[Record]]], image: ImagePolicy) -> int:
    """About what the shards will take together, by the sizes of files or of decoded images."""
    everyone = (one for groups in dealt.values() for group in groups for one in group)
    return sum(_estimate_bytes(record, image) for record in everyone)


def differences(old: Plan, new: Plan) -> list[str]:
    """What makes `new` another plan than `old`, in words a user knows: options, then inputs."""
    before, after = (_flat_options(plan.options) for plan in (old, new))
    changes = [
        f"{name} was {before[name]}, now {after[name]}"
        for name in before
        if before[name] != after[name]
    ]
    was, now = (_inputs(plan) for plan in (old, new))
    for verb, names in (
        ("new", sorted(now.keys() - was.keys())),
        ("gone", sorted(was.keys() - now.keys())),
        ("changed", sorted(name for name in was.keys() & now.keys() if was[name] != now[name])),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            changes.append(f"{verb}: {names[0]!r}{more}")
    return changes or ["the version of pixloom or of its libraries"]


@dataclass(frozen=True)
class _Chunk:
    """The listed pairs from the `start`-th on, some of them; `poison` are images to leave out."""

    root: str
    pairs: Sequence[RawPair]
    start: int
    channels: int
    tokenizer: str | None
    """What is counted is its: see `Options`."""
    poison: frozenset[str] = frozenset()


def _without(chunk: _Chunk, image: str) -> _Chunk | None:
    if all(pair.image != image for pair in chunk.pairs):
        return None
    return dataclasses.replace(chunk, poison=chunk.poison | {image})


def _scan_chunk(chunk: _Chunk) -> tuple[list[Record | Skip], collections.Counter[str]]:
    found: list[Record | Skip] = []
    counts: collections.Counter[str] = collections.Counter()
    with sources.reading(chunk.root, _files(chunk.pairs)) as read:
        for pair in chunk.pairs:
            if pair.image in chunk.poison:
                found.append(Skip(POISON, pair.image))
                continue
            engines.note(pair.image)
            with images.memory_explained(f"{chunk.root}/{pair.image}"):
                found.append(_scan_pair(read, pair, chunk, counts))
    return found, counts


def _cost(found: Sequence[Record | Skip]) -> tuple[int, int]:
    records = [one for one in found if isinstance(one, Record)]
    return sum(one.image_bytes + one.code_bytes for one in records), len(found) - len(records)


def _files(pairs: Iterable[RawPair]) -> Iterator[FileRead]:
    for pair in pairs:
        yield _image_file(pair)
        if pair.code is not None:
            yield _code_file(pair)


def _image_file(pair: RawPair) -> FileRead:
    return FileRead(pair.image, pair.image_bytes, images.MAX_FILE_BYTES, pair.image_place)


def _code_file(pair: RawPair) -> FileRead:
    return FileRead(str(pair.code), pair.code_bytes, MAX_CODE_BYTES, pair.code_place)


def _scan_pair(
    read: Reader, pair: RawPair, chunk: _Chunk, counts: collections.Counter[str]
) -> Record | Skip:
    try:
        data = read(_image_file(pair))
        width, height = images.read_size(data, channels=chunk.channels)
    except TooLargeError:
        return Skip("too_large", pair.image)
    except NoCellError:
        return Skip("no_image", pair.image)
    except FileNotFoundError:
        return Skip("missing_file", pair.image)
    except OSError:
        return Skip("unreadable", pair.image)
    except images.ImageRefused as refused:
        return Skip(refused.cause, pair.image)
    image = pair, hashlib.sha256(data).hexdigest(), len(data), width, height
    if pair.code is None:
        return Record(*image)
    try:
        code = read(_code_file(pair))
        text = read_code(code)
        found = tokens.words(text)
    except TooLargeError:
        return Skip("code_too_large", pair.code)
    except NoCellError:
        return Skip("no_code", pair.code)
    except OSError:
        return Skip("unreadable", pair.code)
    except UnicodeDecodeError:
        return Skip("code_not_utf8", pair.code)
    if not found:
        return Skip("code_empty", pair.code)
    if chunk.tokenizer in (tokens.WORD, tokens.CHAR):
        counts.update(found if chunk.tokenizer == tokens.WORD else text)
    code_hash = hashlib.sha256("\0".join(found).encode()).hexdigest()
    return Record(*image, hashlib.sha256(code).hexdigest(), len(code), code_hash)


def read_code(data: bytes) -> str:
    """The text of a code file, without a byte order mark. Raises `UnicodeDecodeError`."""
    return data.decode("utf-8-sig")


def _first_name(task: tuple[str, Sequence[FileRead]]) -> str:
    return task[1][0].name


def _count_words(task: tuple[str, Sequence[FileRead]]) -> collections.Counter[str]:
    return collections.Counter(word for code in _codes(*task) for word in tokens.words(code))


def _count_characters(task: tuple[str, Sequence[FileRead]]) -> collections.Counter[str]:
    return collections.Counter(one for code in _codes(*task) for one in code)


def _read_codes(task: tuple[str, Sequence[FileRead]]) -> list[str]:
    return list(_codes(*task))


def _codes(root: str, files: Sequence[FileRead]) -> Iterator[str]:
    with sources.reading(root, files) as read:
        for file in files:
            engines.note(file.name)
            try:
                yield read_code(read(file))
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file.name!r}: changed while it was packed; pack again"
                ) from error


def _draw(seed: int, purpose: str, record: Record) -> bytes:
    content = f"{purpose}/{seed}/{record.image_sha256}/{record.code_sha256}"
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


def _place_in_order(seed: int, record: Record) -> tuple[bytes, bytes, str, tuple[Any, ...]]:
    pair = record.pair
    block = b""
    if pair.block is not None:
        name = f"block/{seed}/{pair.block}"
        block = hashlib.blake2b(name.encode(), digest_size=16).digest()
    # The last two tell copies apart.
    return block, _draw(seed, "order", record), pair.image, pair.code_place or ()


def _estimate_bytes(record: Record, image: ImagePolicy) -> int:
    num_members = 2 if record.pair.code is None else 4
    if image.encode == "keep":
        pixels_bytes = record.image_bytes
    else:
        # Encoders take a half or less of the raw pixels; a picture of text takes far less. Arrays
        # are not encoded.
        width, height = image.width or record.width, image.height or record.height
        pixels_bytes = width * height * image.channels // (1 if image.encode == "npy" else 2)
    return pixels_bytes + 2 * record.code_bytes + num_members * 2 * TAR_BLOCK_BYTES


def _policy(body: dict[str, Any]) -> ImagePolicy:
    return ImagePolicy(**{**body, "background": tuple(body["background"])})


def _flat_options(options: Options) -> dict[str, str]:
    flat = {**dataclasses.asdict(options), **dataclasses.asdict(options.image)}
    del flat["image"]
    width, height = flat.pop("width"), flat.pop("height")
    flat["size"] = None if width is None else f"{width}x{height}"
    return {"--" + name.replace("_", "-"): str(value) for name, value in flat.items()}


def _inputs(plan: Plan) -> dict[str, str]:
    inputs = {skip.name: skip.cause for skip in plan.skips}
    for shard in plan.shards:
        for sample in shard.samples:
            inputs[sample.image] = sample.image_sha256
            if sample.code is not None and sample.code_sha256 is not None:
                inputs[sample.code] = sample.code_sha256
    return inputs


def causes(skips: Iterable[Skip]) -> dict[str, int]:
    """Skips counted by cause, in alphabetical order."""
    return dict(sorted(collections.Counter(skip.cause for skip in skips).items()))
