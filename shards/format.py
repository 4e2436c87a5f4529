"""The contract of a packed dataset: file names, keys, members, index, receipt, manifest.

Everything here is pure: text in, values out. Who writes the files is `shards.pack`; who reads
them at training time is `pipeline.stream`. A field that is added, removed or read in another way
raises `FORMAT_VERSION`.

A sample's members, in the order of their names: `KEY.json` (source and size), the image as
`KEY.png`, `.jpg` or `.webp`, and for pairs `KEY.tokens.npy` and `KEY.txt`. An image of other than
1, 3 or 4 channels is `KEY.image.npy`: version 1.0 of NumPy's format, of uint8, (height, width,
channels) in C order; the header takes 128 bytes.
"""

import contextlib
import dataclasses
import gc
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any, Literal, NamedTuple, get_args

from shards.limits import MAX_PIXELS, MAX_SIDE

FORMAT_VERSION = 1
ARRAY_FORMAT_VERSION = 2
"""Of manifests of images that are arrays alone: older versions of pixloom find no image there."""

MANIFEST_NAME = "manifest.json"
PLAN_NAME = "plan.json"
TOKENIZER_NAME = "tokenizer.json"

PAD, BOS, EOS, UNK = 0, 1, 2, 3
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

IMAGE_EXTENSIONS = ("png", "jpg", "webp", "jpeg")
"""`pack` writes the first three; adopted shards have any, in any case, also after a name."""
ARRAY_EXTENSION = "image.npy"
ARRAY_EXTENSIONS = (ARRAY_EXTENSION, "npy")
"""Of images of many channels. `pack` writes the first; adopted shards have any, as above."""
TOKENS_EXTENSION = "tokens.npy"
COLOUR_CHANNELS = (1, 3, 4)
"""Of grey, RGB and RGBA images; those of any other number of channels are arrays."""
MAX_CHANNELS = 64
TAR_BLOCK_BYTES = 512

_FILE = re.compile(
    r"plan\.json|manifest\.json|tokenizer\.json|[a-z0-9_-]{1,32}/[0-9]{6,}\.(tar|idx|json)"
)

Kind = Literal["pairs", "images"]
Fit = Literal["stretch", "pad", "crop", "none"]
Encoding = Literal["keep", "png", "jpeg", "webp", "npy"]
_FITS, _ENCODINGS = get_args(Fit), get_args(Encoding)


class FormatError(ValueError):
    """A file of a packed dataset is not what the format says; the message names the file."""


@dataclass(frozen=True)
class ImagePolicy:
    """How every image of a dataset was made. `width` and `height` are None when they differ.

    `encode` is `npy` where the members are arrays: of other than 1, 3 or 4 channels, or adopted.
    """

    width: int | None
    height: int | None
    channels: int
    fit: Fit
    encode: Encoding
    quality: int
    background: tuple[int, int, int]


@dataclass(frozen=True)
class TokenizerEntry:
    """The tokenizer file beside the manifest. `longest` counts tokens with <bos> and <eos>."""

    file: str
    sha256: str
    vocab_size: int
    longest: int


class ShardEntry(NamedTuple):
    """One tar shard. `name` is relative to the dataset's root, as in `train/000000.tar`.

    A tuple, for a manifest may hold 100,000 of them and each start of a run makes them all.
    """

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
        return _sha256(_data_lines(self.splits, self.tokenizer, self.selection))

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.splits[split])

    def to_json(self) -> str:
        body = {
            "format": "pixloom",
            "version": ARRAY_FORMAT_VERSION if self.image.encode == "npy" else FORMAT_VERSION,
            "kind": self.kind,
            "splits": self.splits,
            "image": dataclasses.asdict(self.image),
            "tokenizer": dataclasses.asdict(self.tokenizer) if self.tokenizer else None,
            "skips": self.skips,
            "plan_hash": self.plan_hash,
            "data_digest": self.data_digest,
        }
        if self.selection:
            body["selection"] = self.selection
        own = _sha256(_canonical(body))
        body["splits"] = {
            split: [shard._asdict() for shard in shards] for split, shards in self.splits.items()
        }
        return json.dumps({**body, "manifest_sha256": own}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Manifest":
        """Raises `FormatError` naming `where` when the text is no manifest of this version."""
        try:
            with _no_garbage_collection():
                body = _object(text, where)
            if body.get("format") != "pixloom":
                raise FormatError(f"{where}: not a pixloom manifest")
            if body["version"] not in (FORMAT_VERSION, ARRAY_FORMAT_VERSION):
                raise FormatError(
                    f"{where}: format version {body['version']}, this pixloom reads up to "
                    f"{ARRAY_FORMAT_VERSION}; pack the dataset again or install the other version"
                )
            claimed = body.pop("manifest_sha256", None)
            image, tokenizer = body["image"], body["tokenizer"]
            manifest = cls(
                kind=body["kind"],
                splits={split: _shard_entries(shards) for split, shards in body["splits"].items()},
                image=_image_policy(image),
                tokenizer=_tokenizer_entry(tokenizer) if tokenizer is not None else None,
                skips=_skips(body["skips"]),
                plan_hash=str(body["plan_hash"]),
                selection=str(body.get("selection", "")),
            )
            if manifest.kind not in get_args(Kind):
                raise ValueError(f"{manifest.kind!r} is no kind of dataset")
            own = _sha256(_canonical({**body, "splits": manifest.splits}))
        except FormatError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise FormatError(f"{where}: damaged manifest ({error!r})") from error
        if claimed != own or body.get("data_digest") != manifest.data_digest:
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
        body = {"version": FORMAT_VERSION, **vars(self), "shard": self.shard._asdict()}
        return json.dumps(body, separators=(",", ":")) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> "Receipt":
        """Raises `FormatError` naming `where` when the text is no receipt of this version."""
        try:
            body = _object(text, where)
            if body["version"] != FORMAT_VERSION:
                raise FormatError(f"{where}: receipt of another format version")
            receipt = cls(
                shard=_shard_entries([body["shard"]])[0],
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


def is_file_name(name: str) -> bool:
    """Whether `name`, relative to the root, is such as `pack` gives to the files of a dataset."""
    return _FILE.fullmatch(name) is not None


def image_extension(extensions: Iterable[str]) -> str | None:
    """The one among a sample's extensions that is its image's, as `png`, `JPG`, `left.jpeg` or
    `image.npy`."""
    return next((one for one in extensions if _is_image(one)), None)


def code_extension(extensions: Iterable[str]) -> str | None:
    """The one among the extensions of a sample of a pair that is its code's.

    `pack` writes `txt`. The index of an adopted shard lists the text that was chosen, and no
    other member beside image and tokens.
    """
    others = [one for one in extensions if one != TOKENS_EXTENSION and not _is_image(one)]
    return next((one for one in others if one == "txt" or len(others) == 1), None)


def _is_image(extension: str) -> bool:
    last = extension.rpartition(".")[2].lower()
    return last in IMAGE_EXTENSIONS or (last == "npy" and extension != TOKENS_EXTENSION)


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


def parse_index(text: str, where: str, num_bytes: int | None = None) -> list[SampleSpan]:
    """The inverse of `format_index`, of a shard of `num_bytes` where that is known.

    Raises `FormatError` naming `where`, also for members that overlap or do not lie in the shard:
    readers take the memory that an index asks for.
    """
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
        end = 0
        for member in members:
            if member.offset < end + TAR_BLOCK_BYTES or member.size < 0:
                raise FormatError(f"{where}: sample {key!r}: offset or size out of range")
            end = member.offset + member.size
        if num_bytes is not None and end > num_bytes:
            raise FormatError(f"{where}: sample {key!r}: ends behind the shard's {num_bytes} bytes")
        spans.append(SampleSpan(key, members))
    return spans


_BLOCK = 4096
"""Shards whose text is made at a time: that of all of them is longer than they are themselves."""


def _sha256(pieces: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece.encode())
    return digest.hexdigest()


def _data_lines(
    splits: Mapping[str, Sequence[ShardEntry]], tokenizer: TokenizerEntry | None, selection: str
) -> Iterator[str]:
    """Lines of text in pieces, with line ends between them only."""
    between = ""
    for split, shards in sorted(splits.items()):
        for first in range(0, len(shards), _BLOCK):
            block = shards[first : first + _BLOCK]
            lines = [f"{split} {name} {samples} {sha256}" for name, samples, _, sha256 in block]
            yield between + "\n".join(lines)
            between = "\n"
    if tokenizer is not None:
        yield f"{between}tokenizer {tokenizer.sha256}"
        between = "\n"
    if selection:
        yield f"{between}selection {selection}"


def _canonical(body: Mapping[str, Any]) -> Iterator[str]:
    """`body`, whose `splits` hold `ShardEntry`s, as JSON with sorted keys and no spaces.

    The text of the shards is made here and in blocks: `json` would need each as a dictionary, and
    take twice the time and all of the text at once.
    """
    yield "{"
    for place, name in enumerate(sorted(body)):
        yield f"{',' if place else ''}{json.dumps(name)}:"
        if name == "splits":
            yield from _canonical_splits(body[name])
        else:
            yield json.dumps(body[name], sort_keys=True, separators=(",", ":"))
    yield "}"


def _canonical_splits(splits: Mapping[str, Sequence[ShardEntry]]) -> Iterator[str]:
    text = encode_basestring_ascii
    yield "{"
    for place, split in enumerate(sorted(splits)):
        yield f"{',' if place else ''}{text(split)}:["
        for first in range(0, len(splits[split]), _BLOCK):
            block = splits[split][first : first + _BLOCK]
            items = [
                f'{{"bytes":{size},"name":{text(name)},"samples":{samples},"sha256":{text(sha256)}}}'
                for name, samples, size, sha256 in block
            ]
            yield ("," if first else "") + ",".join(items)
        yield "]"
    yield "}"


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For making many objects that all stay: the collector would walk them again and again, which
    took longer than making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _shard_entry(body: dict[str, Any]) -> Any:
    """What JSON objects become: a shard, as soon as it is read, for dictionaries take three times
    the memory. Only shards have `bytes`; any other object stays as it is."""
    return ShardEntry(**body) if "bytes" in body else body


def _shard_entries(shards: Iterable[Any]) -> tuple[ShardEntry, ...]:
    """Raises `TypeError` or `ValueError` when one is no shard."""
    entries = tuple(shards)
    for entry in entries:
        if type(entry) is not ShardEntry:
            raise TypeError(f"{entry!r} is no shard")
        if type(entry.samples) is not int or type(entry.bytes) is not int:
            raise TypeError(f"{entry!r} has a count that is none")
        if type(entry.name) is not str or type(entry.sha256) is not str:
            raise TypeError(f"{entry!r} has a text that is none")
        if entry.samples < 0 or entry.bytes < 0:
            raise ValueError(f"{entry!r} has a count below 0")
        if entry.samples > entry.bytes or entry.bytes >= 2**63:
            raise ValueError(f"{entry!r} has a count that cannot be")
        if not entry.name.isprintable():
            raise ValueError(f"{entry!r} has a name that cannot be shown")
    return entries


def _image_policy(body: Mapping[str, Any]) -> ImagePolicy:
    """Raises `TypeError` or `ValueError` when it is none."""
    policy = ImagePolicy(**{**body, "background": tuple(body["background"])})
    for number in (policy.quality, *policy.background):
        _count(number)
    if policy.width is not None or policy.height is not None:
        width, height = _count(policy.width), _count(policy.height)
        if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE and width * height <= MAX_PIXELS):
            raise ValueError(f"{width}x{height}: not a size that images may have")
    if not 1 <= _count(policy.channels) <= MAX_CHANNELS:
        raise ValueError(f"{policy.channels} channels")
    if policy.channels not in COLOUR_CHANNELS and policy.encode != "npy":
        raise ValueError(f"{policy.channels} channels as {policy.encode}")
    if policy.fit not in _FITS or policy.encode not in _ENCODINGS or len(policy.background) != 3:
        raise ValueError(f"{policy!r} is no policy")
    return policy


def _tokenizer_entry(body: Mapping[str, Any]) -> TokenizerEntry:
    """Raises `TypeError` or `ValueError` when it is none."""
    entry = TokenizerEntry(**body)
    _count(entry.vocab_size)
    _count(entry.longest)
    if type(entry.file) is not str or type(entry.sha256) is not str:
        raise TypeError(f"{entry!r} names no file")
    return entry


def _skips(body: Mapping[str, Any]) -> dict[str, int]:
    return {str(cause): _count(number) for cause, number in body.items()}


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        body = json.loads(text, object_hook=_shard_entry)
    except RecursionError as error:
        raise FormatError(f"{where}: lists in lists, too many to be read") from error
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error})") from error
    if not isinstance(body, dict):
        raise FormatError(f"{where}: not a JSON object")
    return body
