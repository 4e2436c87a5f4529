"""A run as one picture: its curves, and samples of a split beside what the model makes of them.

python -m pipeline.report RUN --split test --out RUN/report.png
"""

import argparse
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from tokenizers import Tokenizer
from torch import Tensor

from pipeline import checkpoint
from pipeline.batch import Batch
from pipeline.build import dtype_of, load_model, open_split
from pipeline.config import config_of_run
from pipeline.datasets import Datasets
from pipeline.decode import greedy
from pipeline.metrics import HIGHER_IS_BETTER
from pipeline.models import Autoencoder, Seq2Seq
from pipeline.order import validation_batches
from pipeline.stream import BatchPlan
from pipeline.tasks import build_task, prepare_images, references
from shards import storage, tokens
from shards.format import TOKENIZER_NAME
from shards.images import viewable

_INK, _FAINT, _GOOD, _WRONG = "#24292f", "#8b949e", "#1a7f37", "#cf222e"
_SAMPLES = 6
_TEXT_LINES = 46


def draw(run: Path, split: str, which: str, out: Path) -> None:
    """Writes the picture to `out` (PNG). Raises `UserError` when the run has no checkpoint."""
    config = config_of_run(run)
    data = Datasets.of(config.data)
    chosen = checkpoint.choose(run, which)
    model = load_model(config, data, chosen).eval()
    dataset = open_split(config, data, split)
    counts = dataset.reader.shard_samples
    ids = next(validation_batches(counts, _SAMPLES))
    batch = dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    figure = plt.figure(figsize=(12, 9), facecolor="white", layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 2.9))
    metric = config.validate.metric or build_task(config.model).metric
    _draw_curves(upper, rows, metric)
    images = prepare_images(batch, dtype_of(config))
    with torch.inference_mode():
        if isinstance(model, Seq2Seq):
            codes = greedy(model, images, config.model.max_tokens)  # type: ignore[union-attr]
            url = storage.join(data.roots[0], TOKENIZER_NAME)
            tokenizer = tokens.load_tokenizer(storage.read_text(url), url)
            _draw_codes(lower, batch, codes, tokenizer)
        else:
            assert isinstance(model, Autoencoder)
            _draw_reconstructions(lower, images, model(images))
    lower.suptitle(
        f"{split} split, checkpoint {checkpoint.name_of(chosen)}",
        x=0.01,
        ha="left",
        fontsize=10,
        color=_FAINT,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)


def _draw_curves(figure: Any, rows: Sequence[dict[str, Any]], metric: str) -> None:
    left, right = figure.subplots(1, 2)
    steps = [row for row in rows if "split" not in row]
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="#0969da", lw=1)
    left.set_yscale("log")
    _label(left, "training loss")
    checks = [row for row in rows if "split" in row]
    right.plot(
        [r["step"] for r in checks], [r[metric] for r in checks], color=_GOOD, lw=1.5, marker="."
    )
    if metric in HIGHER_IS_BETTER:
        right.set_ylim(-0.02, 1.02)
    best = f"  (last {checks[-1][metric]:.4g})" if checks else ""
    _label(right, f"validation {metric}{best}")


def _label(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.set_xlabel("step", fontsize=8, color=_FAINT)
    axes.tick_params(labelsize=8, colors=_FAINT)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_codes(
    figure: Any, batch: Batch, codes: Sequence[Sequence[int]], tokenizer: Tokenizer
) -> None:
    """Screens with the predicted code beneath; tokens that differ from the truth in red."""
    grid = figure.subplots(2, len(codes), height_ratios=(1, 3.9), squeeze=False)
    truths = references(batch)
    for column, (guess, truth) in enumerate(zip(codes, truths, strict=True)):
        image, text = grid[0][column], grid[1][column]
        image.imshow(
            viewable(batch.image_BCHW[column].permute(1, 2, 0).numpy()),
            cmap="gray",
            vmin=0,
            vmax=255,
        )
        image.set_xticks([])
        image.set_yticks([])
        for spine in image.spines.values():
            spine.set_color("#d0d7de")
        right = list(guess) == truth
        verdict, colour = ("exact", _GOOD) if right else ("differs", _WRONG)
        image.set_title(verdict, loc="left", fontsize=9, color=colour)
        text.axis("off")
        text.set_xlim(0, 1)
        text.set_ylim(-_TEXT_LINES, 0)
        texts = [tokens.decode(tokenizer, [token]) for token in guess]
        lines = _text_lines(texts) if tokens.keeps_white_space(tokenizer) else _lines(texts)
        matcher = difflib.SequenceMatcher(a=truth, b=list(guess), autojunk=False)
        wrong = {
            place
            for tag, _, _, start, stop in matcher.get_opcodes()
            if tag != "equal"
            for place in range(start, stop)
        }
        for row, line in enumerate(lines[:_TEXT_LINES]):
            for x, place, token in line:
                text.text(
                    x, -row - 0.5, token, fontsize=6, family="monospace", va="center",
                    color=_WRONG if place in wrong else _INK, parse_math=False,
                )  # fmt: skip


def _lines(texts: Sequence[str], width: int = 41) -> list[list[tuple[float, int, str]]]:
    """Tokens laid out in lines, as (x in [0, 1], place, token); braces set the indentation."""
    lines: list[list[tuple[float, int, str]]] = [[]]
    depth, column = 0, 0.0
    for place, token in enumerate(texts):
        closing = token == "}"
        depth = max(0, depth - closing)
        full = column + len(token) > width and token != ","
        if closing or full or (lines[-1] and lines[-1][-1][2] in "{}"):
            lines.append([])
        if not lines[-1]:
            column = 1.5 * depth
        elif token != ",":
            column += 1
        lines[-1].append((column / width, place, token))
        column += len(token)
        depth += token == "{"
    return [line for line in lines if line]


def _text_lines(texts: Sequence[str], width: int = 41) -> list[list[tuple[float, int, str]]]:
    """The same for tokens that have their white space in them; a token may run over lines."""
    lines: list[list[tuple[float, int, str]]] = [[]]
    column = 0
    for place, token in enumerate(texts):
        for number, piece in enumerate(token.expandtabs(2).split("\n")):
            if number or column + len(piece) > width:
                lines.append([])
                column = 0
            if piece.strip():
                shown = "".join(one if one.isprintable() else " " for one in piece)
                lines[-1].append((column / width, place, shown))
            column += len(piece)
    return [line for line in lines if line]


def _draw_reconstructions(figure: Any, images: Tensor, reconstructions: Tensor) -> None:
    grid = figure.subplots(2, len(images), squeeze=False)
    for row, (name, pictures) in enumerate(
        (("image", images), ("reconstruction", reconstructions))
    ):
        for column, picture in enumerate(pictures):
            axes = grid[row][column]
            shown = viewable(picture.permute(1, 2, 0).cpu().numpy())
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
            if column == 0:
                axes.set_ylabel(name, fontsize=9, color=_INK)


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom report`."""
    parser = argparse.ArgumentParser(
        prog="pixloom report", description="Draw a run: curves, and samples beside predictions."
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--split", default="val", help="split of the dataset [val]")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or a step's number [best]"
    )
    parser.add_argument("--out", type=Path, help="PNG to write [RUN/report.png]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")

    def action() -> int:
        arguments = parser.parse_args(argv)
        out = arguments.out or arguments.run / "report.png"
        draw(arguments.run, arguments.split, arguments.checkpoint, out)
        print(json.dumps({"picture": str(out)}) if arguments.json else out)
        return 0

    return storage.command("report", action)


if __name__ == "__main__":
    sys.exit(main())
