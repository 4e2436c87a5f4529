"""The packed datasets that a run reads: one, or several that are mixed, and how they fit together.

They share one numbering of shards: those of the first, then those of the second, and so on.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.cache import NodeCache, node_cache
from pipeline.config import DataConfig
from pipeline.mixture import Mixture
from pipeline.order import Order
from pipeline.stream import Shard
from shards import storage
from shards.errors import redact
from shards.format import TOKENIZER_NAME, ImagePolicy, Kind, Manifest, TokenizerEntry
from shards.storage import UserError

_IMAGE_SIZE = "image size"


@dataclass(frozen=True)
class Datasets:
    """Packed datasets of one kind, image size and tokenizer, opened."""

    roots: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @classmethod
    def of(cls, config: DataConfig) -> "Datasets":
        """Those that a configuration names. Raises as `open`."""
        return cls.open(config.urls or (config.url,), any_size=bool(config.size))

    @classmethod
    def open(cls, roots: Sequence[str], *, any_size: bool = False) -> "Datasets":
        """The datasets at these roots, in this order; with `any_size` their images may differ.

        Raises:
            UserError, FormatError: one is not there or damaged, or two of them do not fit together.
        """
        opened = cls(tuple(roots), tuple(storage.load_manifest(root) for root in roots))
        first = opened.manifests[0]
        for root, manifest in zip(opened.roots, opened.manifests, strict=True):
            for name, (one, other) in _differences(first, manifest).items():
                if any_size and name == _IMAGE_SIZE:
                    continue
                how = (
                    f"pack it with --tokenizer {storage.join(roots[0], TOKENIZER_NAME)}"
                    if name == "tokenizer"
                    else "pack them alike"
                )
                raise UserError(f"{roots[0]} and {root}: {name} {one} and {other}; {how}")
        return opened

    @property
    def label(self) -> str:
        """The roots, for messages."""
        return ", ".join(self.roots)

    @property
    def names(self) -> tuple[str, ...]:
        """The end of each root: as many of its parts as tell all of them apart."""
        parts = [redact(root).rstrip("/").split("/") for root in self.roots]
        depths = range(1, max(map(len, parts)) + 1)
        names = [tuple("/".join(part[-depth:]) for part in parts) for depth in depths]
        return next((some for some in names if len(set(some)) == len(some)), self.roots)

    @property
    def data_digest(self) -> str:
        """Of one dataset, its manifest's; of several, SHA-256 over theirs, in order."""
        digests = [manifest.data_digest for manifest in self.manifests]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    @property
    def kind(self) -> Kind:
        return self.manifests[0].kind

    @property
    def image(self) -> ImagePolicy:
        """How images were made; of several datasets, those of the first."""
        return self.manifests[0].image

    @property
    def tokenizer(self) -> TokenizerEntry | None:
        """All have the same; `longest` is that of all datasets."""
        entries = [manifest.tokenizer for manifest in self.manifests]
        lengths = [entry.longest for entry in entries if entry is not None]
        first = entries[0]
        return dataclasses.replace(first, longest=max(lengths)) if first is not None else None

    @property
    def splits(self) -> list[str]:
        """The splits that any of the datasets has, sorted."""
        return sorted({split for manifest in self.manifests for split in manifest.splits})

    def shards(self, split: str) -> list[Shard]:
        """A split's shards, of every dataset that has it."""
        return [
            Shard(root, entry, number)
            for number, (root, manifest) in enumerate(zip(self.roots, self.manifests, strict=True))
            for entry in manifest.splits.get(split, ())
        ]

    def open_shards(self, split: str, *, lanes: int, window: int) -> int:
        """How many shards a reader of the training order had better keep open.

        A lane reads a window's samples at random: all its shards stay open, in every lane.
        """
        return sum(
            (lanes or 8) * (2 + math.ceil(window * len(shards) / manifest.num_samples(split)))
            for manifest in self.manifests
            if (shards := manifest.splits.get(split))
        )

    def order(self, split: str, weights: Sequence[float] = (), **layout: int) -> Order:
        """The training order over a split; `layout` is what `Order` takes.

        Raises:
            UserError: a dataset lacks the split, or a size or a weight does not fit.
        """
        counts = {}
        for root, name, manifest in zip(self.roots, self.names, self.manifests, strict=True):
            if split not in manifest.splits:
                has = ", ".join(sorted(manifest.splits))
                raise UserError(
                    f"{root}: has no split {split!r}, but {has}; pack with --split {split}=..."
                )
            counts[name] = [shard.samples for shard in manifest.splits[split]]
        try:
            if len(counts) == 1:
                return Order(next(iter(counts.values())), **layout)
            return Mixture(counts, weights, **layout)
        except ValueError as error:
            raise UserError(f"{self.label}: {error}") from error

    def cache(self, folder: str, bound_bytes: int) -> NodeCache | None:
        """The node's cache, if one of the datasets lies on an object store. Raises `UserError`."""
        if not any(map(storage.is_remote, self.roots)):
            return None
        return node_cache(folder, bound_bytes)


def _differences(one: Manifest, other: Manifest) -> dict[str, tuple[str, str]]:
    """What keeps two datasets from being read in one run, by its name."""
    facts = []
    for manifest in (one, other):
        image, tokenizer = manifest.image, manifest.tokenizer
        facts.append(
            {
                "kind": manifest.kind,
                "image channels": str(image.channels),
                _IMAGE_SIZE: f"{image.width}x{image.height}",
                "tokenizer": tokenizer.sha256[:12] if tokenizer else "none",
            }
        )
    return {
        name: (mine, facts[1][name]) for name, mine in facts[0].items() if mine != facts[1][name]
    }
