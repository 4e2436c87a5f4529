"""The packed datasets that a run reads: one, or several that are mixed, and how they fit together.

They share one numbering of shards: those of the first, then those of the second, and so on.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.config import DataConfig
from pipeline.stream import Shard
from shards import storage
from shards.errors import redact
from shards.format import TOKENIZER_NAME, ImagePolicy, Kind, Manifest, TokenizerEntry
from shards.storage import UserError


@dataclass(frozen=True)
class Datasets:
    """Packed datasets of one kind, image size and tokenizer, opened."""

    roots: tuple[str, ...]
    manifests: tuple[Manifest, ...]

    @classmethod
    def of(cls, config: DataConfig) -> "Datasets":
        """Those that a configuration names. Raises as `open`."""
        return cls.open(config.urls or (config.url,))

    @classmethod
    def open(cls, roots: Sequence[str]) -> "Datasets":
        """The datasets at these roots, in this order.

        Raises:
            UserError, FormatError: one is not there or damaged, or two of them do not fit together.
        """
        opened = cls(tuple(roots), tuple(storage.load_manifest(root) for root in roots))
        first = opened.manifests[0]
        for root, manifest in zip(opened.roots, opened.manifests, strict=True):
            for name, (one, other) in _differences(first, manifest).items():
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


def _differences(one: Manifest, other: Manifest) -> dict[str, tuple[str, str]]:
    """What keeps two datasets from being read in one run, by its name."""
    facts = []
    for manifest in (one, other):
        image, tokenizer = manifest.image, manifest.tokenizer
        facts.append(
            {
                "kind": manifest.kind,
                "image channels": str(image.channels),
                "image size": f"{image.width}x{image.height}",
                "tokenizer": tokenizer.sha256[:12] if tokenizer else "none",
            }
        )
    return {
        name: (mine, facts[1][name]) for name, mine in facts[0].items() if mine != facts[1][name]
    }
