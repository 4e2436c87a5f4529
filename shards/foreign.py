"""Shards made by another tool: one pass over a tar, and what training can use of it.

Samples are found by WebDataset's rules: the key ends at the first dot of a member's base name, and
the members of a sample are neighbours. How a tar is read is the subject of `shards.tarfiles`.
Nothing is written here: `shards.index` does that, and `shards.verify` compares.
"""

import collections
import dataclasses
import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import BinaryIO
from urllib.parse import quote

from tokenizers import Tokenizer

from shards import images, tokens
from shards.format import (
    BOS,
    EOS,
    TOKENS_EXTENSION,
    FormatError,
    Kind,
    Member,
    SampleSpan,
)
from shards.plan import read_code
from shards.sources import MAX_CODE_BYTES, Skip
from shards.tarfiles import Entry, TarReader, split_name, walk, why_unused
from shards.tokens import CHAR, WORD

ADOPTION_FORMAT = "pixloom adoption"
ADOPTION_VERSION = 1

MAX_EXAMPLES = 3
"""Names kept of what is skipped for one cause, for messages."""

_UNFIT_FOR_INDEX = re.compile(r"[\s%\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Adoption:
    """What was decided before a shard was read, kept as `plan.json`: the shards and what to use."""

    kind: Kind
    image_extensions: tuple[str, ...]
    """In lower case, as all extensions here; several for files of different formats."""
    code_extension: str | None
    """Of the text; None for images alone, and where there are tokens and no text."""
    tokenizer: str | None
    """`word` or `char`, to be trained; or the SHA-256 of a given file, whose ids the members
    `tokens.npy` then hold. None for images alone."""
    channels: int
    splits: Mapping[str, tuple[str, ...]]
    """Names of shards in the order of the manifest."""

    @cached_property
    def plan_hash(self) -> str:
        """SHA-256 over everything here."""
        body = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(body.encode()).hexdigest()

    @property
    def shards(self) -> list[str]:
        return [name for names in self.splits.values() for name in names]

    @property
    def has_given_tokens(self) -> bool:
        """Whether members `tokens.npy` are of this dataset's tokenizer."""
        return self.tokenizer not in (None, WORD, CHAR)

    def to_json(self) -> str:
        head = {"format": ADOPTION_FORMAT, "version": ADOPTION_VERSION}
        body = {**head, "plan_hash": self.plan_hash, **dataclasses.asdict(self)}
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Adoption":
        """Raises `FormatError` naming `where` when the text is no adoption of this version."""
        try:
            body = json.loads(text)
            if body.pop("format") != ADOPTION_FORMAT or body.pop("version") != ADOPTION_VERSION:
                raise FormatError(f"{where}: not written by this version of `pixloom index`")
            claimed = body.pop("plan_hash")
            splits = {split: tuple(names) for split, names in body.pop("splits").items()}
            extensions = tuple(body.pop("image_extensions"))
            adoption = cls(**body, splits=splits, image_extensions=extensions)
            if not all(type(name) is str for name in adoption.shards):
                raise TypeError("a shard's name is no text")
            plan_hash = adoption.plan_hash
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"{where}: damaged ({error!r})") from error
        if plan_hash != claimed:
            raise FormatError(f"{where}: its own hash does not match; it was edited")
        return adoption


def differences(old: Adoption, new: Adoption) -> list[str]:
    """What a user would call the difference, as in `code_extension was tex, now txt`."""
    before, after = (dataclasses.asdict(one) for one in (old, new))
    changes = [
        f"{name} was {before[name]}, now {after[name]}"
        for name in before
        if name != "splits" and before[name] != after[name]
    ]
    was, now = set(old.shards), set(new.shards)
    for verb, names in (("new", now - was), ("gone", was - now)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            changes.append(f"{verb}: {min(names)}{more}")
    return changes or ["shards are in other splits"]


def is_adoption(text: str) -> bool:
    """Whether `text` begins as every adoption does, and so was one even where it is damaged."""
    return text.startswith(f'{{\n "format": "{ADOPTION_FORMAT}"')


@dataclass(frozen=True)
class Scan:
    """What one pass over a shard found. `spans`, `crc32` and `num_tokens` go together."""

    num_bytes: int
    sha256: str
    spans: tuple[SampleSpan, ...]
    crc32: tuple[int, ...]
    num_tokens: tuple[int, ...]
    """With <bos> and <eos>; empty for images alone."""
    skips: Mapping[str, int]
    """What is left out, by cause: samples, and members that are no files or not safe."""
    examples: tuple[Skip, ...]
    sizes: frozenset[tuple[int, int]]
    """(width, height) of the images, upright, in pixels; only two of them where they differ."""
    counts: Mapping[str, int]
    """How often each word or character occurs, for a tokenizer that is to be trained."""
    num_other_members: int
    """Members without a key or an extension, which WebDataset ignores too."""


def scan(file: BinaryIO, where: str, adoption: Adoption, tokenizer_json: str | None = None) -> Scan:
    """Reads a shard once, from its beginning; in memory is one sample's image and text.

    `tokenizer_json` is the given tokenizer; without it, tokens are counted as the one to be
    trained will make them. Raises `FormatError` naming `where` and the byte for a tar that is
    damaged or cut.
    """
    source = TarReader(file, where)
    found = _Samples(adoption, tokenizer_json, where)
    for entry in walk(source):
        cause = why_unused(entry)
        if cause == "unnamed":
            found.num_other_members += 1
        elif not cause:
            found.add(source, entry, *split_name(entry.name))
        elif cause != "ignored":
            found.skip(cause, entry.name)
    found.finish()
    return Scan(
        num_bytes=source.position,
        sha256=source.sha256.hexdigest(),
        spans=tuple(found.spans),
        crc32=tuple(found.crc32),
        num_tokens=tuple(found.num_tokens),
        skips=dict(sorted((+found.skips).items())),
        examples=tuple(found.examples),
        sizes=frozenset(found.sizes),
        counts=found.counts,
        num_other_members=found.num_other_members,
    )


def index_key(key: str) -> str:
    """The key as the index has it: what would end a word there, and %, as %XX of its UTF-8."""
    return _UNFIT_FOR_INDEX.sub(
        lambda match: quote(match[0], safe="", errors="surrogateescape"), key
    )


@dataclass
class _Run:
    """Neighbouring members of one key: those that training reads, and what was found in them."""

    key: str
    members: list[Member] = field(default_factory=list)
    extensions: list[str] = field(default_factory=list)
    crc32: int = 0
    """From the first used member's header to the last one's end."""
    cause: str = ""
    """Why the sample cannot be used; the first that was found."""
    size: tuple[int, int] | None = None
    num_images: int = 0
    code: str | None = None
    token_ids: list[int] | None = None


class _Samples:
    """Gathers members into samples, and refuses what training could not use."""

    def __init__(self, adoption: Adoption, tokenizer_json: str | None, where: str) -> None:
        self._adoption = adoption
        self._tokenizer = _load(tokenizer_json) if tokenizer_json is not None else None
        self._where = where
        self._run: _Run | None = None
        self._seen: dict[str, str] = {}
        self.spans: list[SampleSpan] = []
        self.crc32: list[int] = []
        self.num_tokens: list[int] = []
        self.skips: collections.Counter[str] = collections.Counter()
        self.examples: list[Skip] = []
        self.sizes: set[tuple[int, int]] = set()
        self.counts: collections.Counter[str] = collections.Counter()
        self.num_other_members = 0

    def skip(self, cause: str, name: str) -> None:
        self.skips[cause] += 1
        if self.skips[cause] <= MAX_EXAMPLES:
            self.examples.append(Skip(cause, f"{self._where}: {name}"))

    def add(self, source: TarReader, entry: Entry, key: str, extension: str) -> None:
        """Takes the member at which `source` stands."""
        if self._run is None or self._run.key != key:
            self.finish()
            self._run = _Run(key)
        run, lower = self._run, extension.lower()
        is_image = lower in self._adoption.image_extensions
        is_code = lower == self._adoption.code_extension
        is_tokens = extension == TOKENS_EXTENSION and self._adoption.has_given_tokens
        if not (is_image or is_code or is_tokens):
            return
        if lower in run.extensions:
            run.cause = run.cause or "duplicate_member"
        if not run.members:
            source.crc32 = zlib.crc32(entry.header)
        limit = images.MAX_FILE_BYTES if is_image else MAX_CODE_BYTES
        data = source.read(entry.size) if entry.size <= limit else None
        source.skip_to(entry.offset + entry.size)
        run.crc32 = source.crc32
        run.members.append(Member(extension, entry.offset, entry.size))
        run.extensions.append(lower)
        run.num_images += is_image
        if data is None:
            run.cause = run.cause or ("too_large" if is_image else "code_too_large")
        elif is_image:
            try:
                run.size = images.read_size(data, images.SHARD_FORMATS, self._adoption.channels)
            except images.ImageRefused as refused:
                run.cause = run.cause or refused.cause
        elif is_code:
            try:
                run.code = read_code(data)
            except UnicodeDecodeError:
                run.cause = run.cause or "code_not_utf8"
        else:
            try:
                run.token_ids = tokens.from_npy(data, entry.name).tolist()
            except FormatError:
                run.cause = run.cause or "bad_tokens"

    def finish(self) -> None:
        """Ends the sample at hand: it is indexed, or skipped with one cause."""
        run, self._run = self._run, None
        if run is None:
            return
        before = self._seen.get(run.key)
        if before is None:
            cause = self._judge(run)
            self._seen[run.key] = cause
        elif before in ("no_image", "no_code", "not_adjacent"):
            # Its other half was there, elsewhere.
            self.skips[before] -= 1
            self.skips["not_adjacent"] += 1
            self._seen[run.key] = cause = "not_adjacent"
        else:
            cause = "duplicate_key"
        if cause:
            self.skip(cause, run.key)
            return
        assert run.size is not None
        self.spans.append(SampleSpan(index_key(run.key), tuple(run.members)))
        self.crc32.append(run.crc32)
        if len(self.sizes) < 2:
            self.sizes.add(run.size)

    def _judge(self, run: _Run) -> str:
        """Why a sample cannot be used, or nothing; then its tokens are counted."""
        if run.cause or run.num_images != 1:
            return run.cause or ("no_image" if not run.num_images else "several_images")
        if self._adoption.kind == "images":
            return ""
        ids, code, tokenizer = run.token_ids, run.code, self._tokenizer
        if ids is not None and tokenizer is not None:
            if len(ids) < 3 or ids[0] != BOS or ids[-1] != EOS:
                return "bad_tokens"
            if max(ids) >= tokenizer.get_vocab_size():
                return "bad_tokens"
            self.num_tokens.append(len(ids))
            return ""
        if code is None:
            return "no_code"
        if tokenizer is not None:
            count = len(tokens.encode(tokenizer, code)) - 2
        else:
            words = tokens.words(code) if self._adoption.tokenizer == WORD else list(code)
            self.counts.update(words)
            count = len(words)
        if not count:
            return "code_empty"
        self.num_tokens.append(count + 2)
        return ""


@lru_cache(maxsize=1)
def _load(tokenizer_json: str) -> Tokenizer:
    return tokens.load_tokenizer(tokenizer_json, "the dataset's tokenizer")
