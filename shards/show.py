"""A packed dataset as one picture: samples with their code, and what the numbers look like.

Reads only what the picture needs: indexes and receipts of all shards, and the shards of one split
until there are samples enough.
"""

import argparse
import collections
import io
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tokenizers import Tokenizer

from shards import images, storage, tokens
from shards.format import (
    BOS,
    EOS,
    PAD,
    TOKENIZER_NAME,
    TOKENS_EXTENSION,
    Manifest,
    Receipt,
    SampleSpan,
    ShardEntry,
    code_extension,
    image_extension,
    parse_index,
)
from shards.storage import UserError, command, join

MAX_COUNTED_SAMPLES = 5000
CODE_LINES = 9
CODE_HEIGHT = 1.45
CODE_COLUMNS = 56

INK, FAINT, GRID = "#22303c", "#6b7a88", "#dfe5ea"
BLUE, ORANGE, GREEN = "#3b76c4", "#e8913a", "#4c9f70"
SPLIT_COLOURS = (BLUE, ORANGE, GREEN, "#9467bd", "#c44e52")


@dataclass(frozen=True)
class Shown:
    """One sample of the sheet; `image` is uint8, (height, width, channels)."""

    key: str
    image: NDArray[np.uint8]
    code: str | None


@dataclass(frozen=True)
class Statistics:
    image_bytes: list[int]
    num_tokens: list[int]
    top_tokens: list[tuple[str, int]]
    num_counted: int


def draw_sheet(root: str, split: str | None, num_samples: int) -> Figure:
    """The contact sheet of `split`, or of the first one, as a figure.

    Raises `UserError` for a split that is not there, `FormatError` for a damaged dataset.
    """
    manifest = storage.load_manifest(root)
    split = split or next(iter(manifest.splits))
    if split not in manifest.splits:
        raise UserError(f"--split {split}: {root} has {', '.join(manifest.splits)}")
    shown = _read_samples(root, manifest, split, min(num_samples, manifest.num_samples(split)))
    statistics = _read_statistics(root, manifest, split)
    pairs = manifest.kind == "pairs"
    columns = 4 if pairs else 12
    rows = -(-len(shown) // columns)
    cell_width = 14 / columns
    aspect = float(np.median([one.image.shape[0] / one.image.shape[1] for one in shown]))
    image_height = min(cell_width * aspect, 3.2)
    cell_height = image_height + (CODE_HEIGHT if pairs else 0.12)
    panel_rows = 2 if pairs else 1
    height = 1.1 + rows * cell_height + 0.55 + panel_rows * 2.7
    figure = Figure(figsize=(14.6, height), facecolor="white", dpi=110)
    _draw_title(figure, root, manifest, split, height)
    samples_top = 1 - 1.0 / height
    samples_bottom = samples_top - rows * cell_height / height
    grid = figure.add_gridspec(
        rows, columns, left=0.02, right=0.98, top=samples_top, bottom=samples_bottom,
        wspace=0.06 if pairs else 0.04, hspace=0.0,
    )  # fmt: skip
    for at, one in enumerate(shown):
        cell = grid[at // columns, at % columns].subgridspec(
            2 if pairs else 1,
            1,
            height_ratios=(image_height, CODE_HEIGHT) if pairs else (1,),
            hspace=0.02,
        )
        _draw_image(figure.add_subplot(cell[0]), one)
        if one.code is not None:
            _draw_code(figure.add_subplot(cell[1]), one.code)
    panels = figure.add_gridspec(
        panel_rows, 3, left=0.06, right=0.975, top=samples_bottom - 0.6 / height,
        bottom=0.5 / height, wspace=0.24, hspace=0.45,
    )  # fmt: skip
    _draw_splits(figure.add_subplot(panels[0, 0]), manifest)
    _draw_image_bytes(figure.add_subplot(panels[0, 1]), statistics, split)
    _draw_skips(figure.add_subplot(panels[0, 2]), manifest)
    if pairs:
        _draw_lengths(figure.add_subplot(panels[1, 0]), statistics, split)
        _draw_tokens(figure.add_subplot(panels[1, 1:]), statistics)
    return figure


def _read_index(root: str, entry: ShardEntry) -> list[SampleSpan]:
    text = storage.read_text(join(root, entry.index_name))
    return parse_index(text, entry.index_name, entry.bytes)


def _read_samples(root: str, manifest: Manifest, split: str, count: int) -> list[Shown]:
    """`count` samples spread evenly over the first shards, which are fair samples themselves."""
    shown: list[Shown] = []
    for entry in manifest.splits[split]:
        spans = _read_index(root, entry)
        tar = storage.read_bytes(join(root, entry.name))
        wanted = min(count - len(shown), len(spans))
        for at in range(wanted):
            members = _members(tar, spans[at * len(spans) // wanted])
            found = image_extension(members)
            if found is None:
                raise UserError(f"{entry.index_name}: a sample without an image; index again")
            try:
                image = images.decode(members[found], manifest.image.channels)
            except images.ImageRefused as refused:
                raise UserError(
                    f"{entry.name}: an image does not decode ({refused.cause}); run "
                    f"`pixloom verify {root}`"
                ) from refused
            text = code_extension(members) if manifest.kind == "pairs" else None
            code = members[text].decode("utf-8-sig", "replace") if text is not None else None
            shown.append(Shown(spans[at * len(spans) // wanted].key, image, code))
        if len(shown) >= count:
            break
    return shown


def _read_statistics(root: str, manifest: Manifest, split: str) -> Statistics:
    image_bytes: list[int] = []
    num_tokens: list[int] = []
    counts: collections.Counter[int] = collections.Counter()
    num_counted = 0
    tokenizer = None
    if manifest.tokenizer is not None:
        url = join(root, TOKENIZER_NAME)
        tokenizer = tokens.load_tokenizer(storage.read_text(url), url)
    for entry in manifest.splits[split]:
        spans = _read_index(root, entry)
        image_bytes += [
            member.size
            for span in spans
            for member in span.members
            if image_extension([member.extension]) is not None
        ]
        receipt = storage.read_text(join(root, entry.receipt_name))
        num_tokens += Receipt.from_json(receipt, entry.receipt_name).num_tokens
        if tokenizer is not None and num_counted < MAX_COUNTED_SAMPLES:
            tar = storage.read_bytes(join(root, entry.name))
            for span in spans[: MAX_COUNTED_SAMPLES - num_counted]:
                counts.update(_token_ids(_members(tar, span), tokenizer, span.key))
                num_counted += 1
    top: list[tuple[str, int]] = []
    if tokenizer is not None:
        top = [
            (tokens.decode(tokenizer, [one]), number)
            for one, number in counts.most_common(23)
            if one not in (PAD, BOS, EOS)
        ]
    return Statistics(image_bytes, num_tokens, top[:20], num_counted)


def _token_ids(members: dict[str, bytes], tokenizer: Tokenizer, where: str) -> list[int]:
    code = code_extension(members)
    if TOKENS_EXTENSION in members or code is None:
        return list(tokens.from_npy(members[TOKENS_EXTENSION], where).tolist())
    return tokens.encode(tokenizer, members[code].decode("utf-8-sig", "replace"))


def _members(tar: bytes, span: SampleSpan) -> dict[str, bytes]:
    return {one.extension: tar[one.offset : one.offset + one.size] for one in span.members}


def _draw_title(figure: Figure, root: str, manifest: Manifest, split: str, height: float) -> None:
    policy = manifest.image
    total = sum(manifest.num_samples(name) for name in manifest.splits)
    size = "sizes kept" if policy.width is None else f"{policy.width}x{policy.height}"
    names = {1: "grey", 3: "RGB", 4: "RGBA"}
    channels = names.get(policy.channels, f"in {policy.channels} channels")
    facts = [f"{total:,} samples", f"{size} {channels}"]
    if manifest.tokenizer is not None:
        facts.append(f"vocabulary of {manifest.tokenizer.vocab_size:,}")
        facts.append(f"up to {manifest.tokenizer.longest:,} tokens")
    facts += [f"split shown: {split}", f"digest {manifest.data_digest[:12]}"]
    name = Path(root.rstrip("/")).name or root
    figure.text(0.02, 1 - 0.42 / height, name, size=19, weight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.74 / height, "   ".join(facts), size=10.5, color=FAINT, va="center")


def _draw_image(axes: Axes, one: Shown) -> None:
    image = images.viewable(one.image)
    grey = image.shape[2] == 1
    axes.imshow(
        image[:, :, 0] if grey else image,
        cmap="gray" if grey else None,
        vmin=0,
        vmax=255,
        interpolation="nearest" if max(one.image.shape) < 100 else "antialiased",
    )
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=GRID, linewidth=0.8)


def _draw_code(axes: Axes, code: str) -> None:
    axes.axis("off")
    axes.text(
        0.0,
        0.98,
        "\n".join(shorten_code(code, CODE_COLUMNS, CODE_LINES)),
        family="monospace",
        size=6.6,
        color=INK,
        va="top",
        linespacing=1.3,
        transform=axes.transAxes,
        parse_math=False,
    )


def shorten_code(code: str, columns: int, lines: int) -> list[str]:
    """`code` as at most `lines` lines of at most `columns` characters, its white space folded."""
    text = "".join(one if one.isprintable() else " " for one in " ".join(code.split()))
    wrapped = textwrap.wrap(text, columns, break_on_hyphens=False) or [""]
    if len(wrapped) > lines:
        wrapped = wrapped[:lines]
        wrapped[-1] = wrapped[-1][: columns - 4] + " ..."
    return wrapped


def _panel(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", size=10.5, weight="bold", color=INK, pad=8)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=0)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set(visible=side == "bottom", color=GRID)


def _draw_splits(axes: Axes, manifest: Manifest) -> None:
    names = list(manifest.splits)
    counts = [manifest.num_samples(name) for name in names]
    colours = [SPLIT_COLOURS[at % len(SPLIT_COLOURS)] for at in range(len(names))]
    bars = axes.barh(names[::-1], counts[::-1], color=colours[::-1], height=0.6)
    axes.bar_label(bars, [f"{count:,}" for count in counts[::-1]], padding=4, size=9, color=INK)
    axes.margins(x=0.16)
    _panel(axes, "Samples per split")
    axes.grid(False)
    axes.tick_params(labelbottom=False, labelsize=9.5, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)


def _draw_image_bytes(axes: Axes, statistics: Statistics, split: str) -> None:
    kilobytes = np.asarray(statistics.image_bytes) / 1000
    axes.hist(kilobytes, bins=36, color=BLUE, edgecolor="white", linewidth=0.4)
    _panel(axes, f"Image file size in {split}, kB (mean {kilobytes.mean():.1f})")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_lengths(axes: Axes, statistics: Statistics, split: str) -> None:
    lengths = np.asarray(statistics.num_tokens)
    low, high = int(lengths.min()), int(lengths.max())
    bins = np.linspace(low - 0.5, high + 0.5, min(high - low + 1, 48) + 1)
    axes.hist(lengths, bins=bins.tolist(), color=GREEN, edgecolor="white", linewidth=0.4)
    _panel(axes, f"Tokens per sample in {split} (median {np.median(lengths):.0f}, longest {high})")
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_tokens(axes: Axes, statistics: Statistics) -> None:
    names = [
        name if name.isprintable() and " " not in name else ascii(name)
        for name, _ in statistics.top_tokens
    ]
    counts = [count for _, count in statistics.top_tokens]
    axes.bar(range(len(names)), counts, color=ORANGE, width=0.7)
    labels = [name if len(name) <= 14 else name[:13] + "." for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=32, ha="right", parse_math=False)
    _panel(axes, f"Most frequent tokens in {statistics.num_counted:,} samples")
    axes.tick_params(axis="x", labelcolor=INK, labelsize=8)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def _draw_skips(axes: Axes, manifest: Manifest) -> None:
    causes = sorted(manifest.skips.items(), key=lambda row: (-row[1], row[0]))[:8]
    if not causes:
        _panel(axes, "Files skipped while packing")
        axes.grid(False)
        axes.set(xticks=[], yticks=[])
        axes.spines["bottom"].set_visible(False)
        axes.text(0.0, 0.82, "none", size=11, color=FAINT, transform=axes.transAxes)
        return
    names = [cause.replace("_", " ") for cause, _ in causes][::-1]
    bars = axes.barh(names, [count for _, count in causes][::-1], color="#c44e52", height=0.6)
    axes.bar_label(bars, padding=4, size=9, color=INK)
    axes.margins(x=0.16)
    _panel(axes, "Files skipped while packing, by cause")
    axes.grid(False)
    axes.tick_params(labelbottom=False, labelcolor=INK)
    axes.spines["bottom"].set_visible(False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="pixloom show",
        description="Draw a packed dataset as one picture: samples with their code, samples per "
        "split, file sizes, token lengths, frequent tokens, skips.",
    )
    parser.add_argument("url", metavar="URL", help="folder of the packed dataset")
    parser.add_argument("--out", required=True, metavar="sheet.png", help="picture to write")
    parser.add_argument("--split", help="whose samples to show (default: the first)")
    parser.add_argument(
        "--samples", type=int, metavar="N", help="samples to show (default: 12, or 72 without code)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object as the last line")
    args = parser.parse_args(argv)
    if args.samples is not None and not 1 <= args.samples <= 600:
        parser.error("--samples: choose 1 to 600")
    if not args.out.lower().endswith(".png"):
        parser.error("--out: the picture is a PNG, name it so")

    def action() -> int:
        kind = storage.load_manifest(args.url).kind
        num_samples = args.samples or (12 if kind == "pairs" else 72)
        figure = draw_sheet(args.url, args.split, num_samples)
        data: Any = io.BytesIO()
        figure.savefig(data, format="png", metadata={"Software": None})
        target = storage.local_path(args.out)
        with storage.explained(args.out):
            target.write_bytes(data.getvalue())
        print(json.dumps({"out": args.out, "samples": num_samples}) if args.json else args.out)
        return 0

    return command("show", action)


if __name__ == "__main__":
    sys.exit(main())
