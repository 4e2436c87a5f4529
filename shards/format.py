"""The contract of a packed dataset: file names, keys, members, index, receipt, manifest.

Everything here is pure: text in, values out. Who writes the files is `shards.pack`; who reads
them at training time is `pipeline.stream`. A field that is added, removed or read in another way
raises `FORMAT_VERSION`.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

FORMAT_VERSION = 1

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
TOKENIZER_NAME = "tokenizer.json"

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

IMAGE_EXTENSIONS = ("png", "jpg", "webp", "jpeg")
"""`pack` writes the first three; adopted shards have any, in any case, also after a name."""
TOKENS_EXTENSION = "tokens.npy"
TAR_BLOCK_BYTES = 512

Kind = Literal["pairs", "images"]


class FormatError(ValueError):
    """A file of a packed dataset is not what the format says; the message names the file."""


@dataclass(frozen=True)
class ImagePolicy:
    """How every image of a dataset was made. `width` and `height` are None when they differ."""

    width: int | None
    height: int | None
    channels: int
    fit: Literal["stretch", "pad", "crop", "none"]
    encode: Literal["keep", "png", "jpeg", "webp"]
    quality: int
    background: tuple[int, int, int]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer file beside the manifest. `longest` counts tokens with <bos> and <eos>."""

    file: str
    sha256: str
    vocab_size: int
    longest: int


@dataclass(frozen=True)
class ShardEntry:
    """One tar shard. `name` is relative to the dataset's root, as in `train/000000.tar`."""

    name: str
    samples: int
    bytes: int
    sha256: str

    @property
    def index_name(self) -> str:
        return self.name.removesuffix(".tar") + ".idx"

    @property
    def receipt_name(self) -> str:
        return self.name.removesuffix(".tar") + ".json"


@dataclass(frozen=True)
class Manifest:
    """The commit of a dataset: written last, and only when every receipt was checked again."""

    kind: Kind
    splits: Mapping[str, tuple[ShardEntry, ...]]
    image: ImagePolicy
    tokenizer: TokenizerEntry | None
    skips: Mapping[str, int]
    plan_hash: str
    selection: str = ""
    """Of adopted shards: SHA-256 over what is used of them. Only there is it in the file."""

    @property
    def data_digest(self) -> str:
        """SHA-256 over what training can see: the shards of every split and the tokenizer."""
        lines = [
            f"{split} {shard.name} {shard.samples} {shard.sha256}"
            for split, shards in sorted(self.splits.items())
            for shard in shards
        ]
        if self.tokenizer is not None:
            lines.append(f"tokenizer {self.tokenizer.sha256}")
        if self.selection:
            lines.append(f"selection {self.selection}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])

    def to_json(self) -> str:
        head = {"format": "pixloom", "version": FORMAT_VERSION}
        body = {**head, **dataclasses.asdict(self), "data_digest": self.data_digest}
        if not self.selection:
            del body["selection"]
        return json.dumps({**body, "manifest_sha256": _digest(body)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Raises `FormatError` naming `where` when the text is no manifest of this version."""
        try:
            body = _object(text, where)
            if body.get("format") != "pixloom":
                raise FormatError(f"{where}: not a pixloom manifest")
            if body["version"] != FORMAT_VERSION:
                raise FormatError(
                    f"{where}: format version {body['version']}, this pixloom reads "
                    f"{FORMAT_VERSION}; pack the dataset again or install the other version"
                )
            claimed = body.pop("manifest_sha256", None)
            image, tokenizer = body["image"], body["tokenizer"]
            manifest = cls(
                kind=body["kind"],
                splits={
                    str(split): tuple(_shard_entry(shard) for shard in shards)
                    for split, shards in body["splits"].items()
                },
                image=ImagePolicy(**{**image, "background": tuple(image["background"])}),
                tokenizer=TokenizerEntry(**tokenizer) if tokenizer is not None else None,
                skips=_skips(body["skips"]),
                plan_hash=str(body["plan_hash"]),
                selection=str(body.get("selection", "")),
            )
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{where}: damaged manifest ({error!r})") from error
        if claimed != _digest(body) or body.get("data_digest") != manifest.data_digest:
            raise FormatError(
                f"{where}: the manifest's own digest does not match; it was edited: run "
                "`pixloom pack` again"
            )
        return manifest


@dataclass(frozen=True)
class Receipt:
    """The commit of one shard. `crc32` is of a sample's bytes in the tar, see `SampleSpan`."""

    shard: ShardEntry
    crc32: tuple[int, ...]
    num_tokens: tuple[int, ...]
    """Tokens of each sample with <bos> and <eos>; empty for images alone."""
    skips: Mapping[str, int]
    plan_hash: str

    def to_json(self) -> str:
        body = {"version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(body, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Receipt":
        """Raises `FormatError` naming `where` when the text is no receipt of this version."""
        try:
            body = _object(text, where)
            if body["version"] != FORMAT_VERSION:
                raise FormatError(f"{where}: receipt of another format version")
            receipt = cls(
                shard=_shard_entry(body["shard"]),
                crc32=tuple(_count(number) for number in body["crc32"]),
                num_tokens=tuple(_count(number) for number in body["num_tokens"]),
                skips=_skips(body["skips"]),
                plan_hash=str(body["plan_hash"]),
            )
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{where}: damaged receipt ({error!r})") from error
        if len(receipt.crc32) != receipt.shard.samples:
            raise FormatError(f"{where}: damaged receipt (crc32 of another number of samples)")
        return receipt


@dataclass(frozen=True, slots=True)
class Member:
    """One file inside a shard: `offset` is that of its data, not of its tar header, in bytes."""

    extension: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SampleSpan:
    """One sample of a shard: its members are adjacent, so one read of the span fetches all.

    The span runs from the first member's header to the end of the last member's data. A sample's
    CRC-32 is taken over exactly these bytes.
    """

    key: str
    members: tuple[Member, ...]

    @property
    def offset(self) -> int:
        return self.members[0].offset - TAR_BLOCK_BYTES

    @property
    def size(self) -> int:
        return self.members[-1].offset + self.members[-1].size - self.offset


def image_extension(extensions: Iterable[str]) -> str | None:
    """The one among a sample's extensions that is its image's, as `png`, `JPG` or `left.jpeg`."""
    return next((one for one in extensions if _is_image(one)), None)


def code_extension(extensions: Iterable[str]) -> str | None:
    """The one among the extensions of a sample of a pair that is its code's.

    `pack` writes `txt`. The index of an adopted shard lists the text that was chosen, and no
    other member beside image and tokens.
    """
    others = [one for one in extensions if one != TOKENS_EXTENSION and not _is_image(one)]
    return next((one for one in others if one == "txt" or len(others) == 1), None)


def _is_image(extension: str) -> bool:
    return extension.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def format_index(spans: Iterable[SampleSpan]) -> str:
    """DALI's wds2idx text index, version 1.2: a line a sample, `ext offset size name` a member."""
    lines = [
        " ".join(
            f"{member.extension} {member.offset} {member.size} {span.key}.{member.extension}"
            for member in span.members
        )
        for span in spans
    ]
    return "\n".join([f"v1.2 {len(lines)}", *lines]) + "\n"


def parse_index(text: str, where: str) -> list[SampleSpan]:
    """The inverse of `format_index`. Raises `FormatError` naming `where`."""
    head, *lines = text.splitlines() or [""]
    if head != f"v1.2 {len(lines)}":
        raise FormatError(f"{where}: not a complete v1.2 index (first line {head[:40]!r})")
    spans = []
    for line in lines:
        words = line.split(" ")
        if len(words) % 4 or not words[0]:
            raise FormatError(f"{where}: damaged index line {line[:80]!r}")
        try:
            members = tuple(
                Member(words[at], int(words[at + 1]), int(words[at + 2]))
                for at in range(0, len(words), 4)
            )
        except ValueError as error:
            raise FormatError(f"{where}: damaged index line {line[:80]!r}") from error
        key = words[3].removesuffix("." + words[0])
        if any(member.offset < TAR_BLOCK_BYTES or member.size < 0 for member in members):
            raise FormatError(f"{where}: sample {key}: offset or size out of range")
        spans.append(SampleSpan(key, members))
    return spans


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _shard_entry(body: Mapping[str, Any]) -> ShardEntry:
    entry = ShardEntry(**body)
    for number in (entry.samples, entry.bytes):
        _count(number)
    return entry


def _skips(body: Mapping[str, Any]) -> dict[str, int]:
    return {str(cause): _count(number) for cause, number in body.items()}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise FormatError(f"{where}: not a JSON object")
    return body
