"""How well the order shuffles, against a full shuffle and what others do.

    python tests/benchmarks/shuffle.py --out shuffle.png --peers-python PEERS/bin/python

Compared are a permutation of the whole split, pixloom's order, webdataset's shuffled shards with a
shuffled buffer (its own code, on ids; on one reader, and on eight whose batches are joined), and
mosaicml-streaming's `py1e` (its own code, run by `--peers-python`; skipped without). A sample's
original position is its place in manifest order, from 0 to 1. Means over the epochs of

    held        samples that lie in the shards or the buffer that must be at hand at any time
    neighbours  Spearman correlation of the original positions of samples k and k + 1: 0 is best
    shards      distinct shards in a batch
    spread      standard deviation of original positions within a batch: of all samples .289
    batches     variance of the batches' mean positions, over a full shuffle's: 1 is a full shuffle,
                below 1 each batch is more like the whole split than chance makes it, above 1 less
    companions  of the samples that one shares a batch with over all epochs, the share that are
                new ones, over a full shuffle's

`--out` draws original position against place in the epoch. `--json` prints one JSON object on
stdout's last line.
"""

import argparse
import itertools
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed pixloom

import matplotlib
import numpy as np
import webdataset
from numpy.typing import NDArray

from pipeline.order import Order

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Positions = NDArray[np.int64]


class Layout(NamedTuple):
    """A split and its batches."""

    samples: int
    per_shard: int
    global_size: int

    def __str__(self) -> str:
        return f"{self.samples} samples, shards of {self.per_shard}, batches of {self.global_size}"

    @property
    def shard_samples(self) -> list[int]:
        ends = [*range(self.per_shard, self.samples, self.per_shard), self.samples]
        return np.diff([0, *ends]).tolist()


class Method(NamedTuple):
    """A way to shuffle. `epoch` gives the samples' manifest positions, batch by batch."""

    name: str
    held: int
    epoch: Callable[[int], Positions]


LARGE = [Layout(500_000, 1000, 256), Layout(500_000, 10_000, 256)]
SMALL = [Layout(1200, 1200, 16), Layout(1200, 100, 16), Layout(5000, 1000, 64)]
READERS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the figures are worth is the caller's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3, help="to average over [3]")
    parser.add_argument("--peers-python", help="a Python that can import mosaicml-streaming")
    parser.add_argument("--out", type=Path, help="draw the picture into this PNG")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    rows, skipped, drawn = [], "", {}
    for layout in [*LARGE, *SMALL]:
        found = methods(layout)
        try:
            found += peers(layout, arguments.peers_python, arguments.epochs)
        except (OSError, subprocess.CalledProcessError) as error:
            skipped = f"mosaicml-streaming: {error}"
        full = found[0]
        reference = measure(layout, [full.epoch(epoch) for epoch in range(arguments.epochs)])
        for method in found:
            epochs = [method.epoch(epoch) for epoch in range(arguments.epochs)]
            drawn[layout, method.name] = epochs[0]
            figures = measure(layout, epochs)
            for name in ("batches", "companions"):
                figures[name] /= reference[name]
            rounded = {name: round(value, 3) for name, value in figures.items()}
            rows.append({**layout._asdict(), "method": method.name, "held": method.held, **rounded})
    result: dict[str, Any] = {
        "epochs": arguments.epochs,
        "rows": rows,
        "skipped": skipped,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "webdataset": webdataset.__version__,
    }
    if arguments.out:
        draw(drawn, arguments.out)
    print(json.dumps(result) if arguments.json else table(rows) + skipped)
    return 0


def methods(layout: Layout) -> list[Method]:
    """All but the peers that need a Python of their own."""

    def full(epoch: int) -> Positions:
        return np.random.default_rng(epoch).permutation(layout.samples)

    found = [Method("full shuffle", layout.samples, full)]
    if layout in LARGE:
        settings = [(1, 8192), (8, 1024), (8, 8192), (8, 32_768), (32, 1024), (32, 8192)]
        buffers = [1000, 10_000]
    else:
        settings = [(1, 8192), (2, 8192), (8, 8192)]
        buffers = [1000]
    found += [ours(layout, lanes, window) for lanes, window in settings]
    for buffer in buffers:
        found.append(buffered(layout, 1, buffer))
        if layout.samples // layout.per_shard >= READERS:  # else a reader has no shard
            found.append(buffered(layout, READERS, buffer))
    return found


def ours(layout: Layout, lanes: int, window: int) -> Method:
    order = Order(
        layout.shard_samples,
        seed=0,
        global_size=layout.global_size,
        micro_size=layout.global_size,
        lanes=lanes,
        window=window,
    )

    def epoch(number: int) -> Positions:
        first = number * order.steps_per_epoch
        steps = range(first, first + order.steps_per_epoch)
        ids = [order.samples_of(step) for step in steps]
        return np.concatenate([at.shard_G * layout.per_shard + at.index_G for at in ids])

    held = min(lanes * window, layout.samples)
    return Method(f"pixloom, lanes {lanes}, window {window}", held, epoch)


def buffered(layout: Layout, readers: int, buffer: int) -> Method:
    """webdataset, shards dealt to `readers` processes as `split_by_node` does."""
    shards = np.arange(layout.samples // layout.per_shard)

    def stream(epoch: int, reader: int) -> Iterator[int]:
        urls = webdataset.SimpleShardList([f"{shard}.tar" for shard in shards], seed=epoch)
        mine = [int(row["url"].removesuffix(".tar")) for row in urls][reader::readers]
        ids = (
            position
            for shard in mine
            for position in range(shard * layout.per_shard, (shard + 1) * layout.per_shard)
        )
        shuffle = webdataset.filters.shuffle(buffer, rng=random.Random(f"{epoch} {reader}"))
        yield from shuffle(ids)

    def epoch(number: int) -> Positions:
        parts = [np.fromiter(stream(number, reader), np.int64) for reader in range(readers)]
        each = layout.global_size // readers
        steps = min(len(part) for part in parts) // each
        return np.stack([part[: steps * each].reshape(steps, each) for part in parts], 1).ravel()

    held = min(readers * buffer, layout.samples)
    return Method(f"webdataset, {readers} x buffer {buffer}", held, epoch)


PEER = """
import json, sys
import numpy as np
from streaming.base.shuffle import get_shuffle
out, sizes, blocks, epochs = json.loads(sys.argv[1])
for block in blocks:
    found = [get_shuffle("py1e", np.array(sizes), 1, 0, epoch, block) for epoch in range(epochs)]
    np.save(f"{out}/{block}.npy", np.stack(found))
"""


def peers(layout: Layout, python: str | None, epochs: int) -> list[Method]:
    """mosaicml-streaming on one canonical node: with its default block, and with one that holds
    as many samples as pixloom's default."""
    if python is None:
        raise FileNotFoundError("no --peers-python")
    blocks = [1 << 18, 8 * 8192]
    with tempfile.TemporaryDirectory() as folder:
        words = json.dumps([folder, layout.shard_samples, blocks, epochs])
        subprocess.run([python, "-c", PEER, words], check=True, stdout=sys.stderr)
        found = {block: np.load(Path(folder, f"{block}.npy")) for block in blocks}
    return [
        Method(f"streaming py1e, block {block}", min(block, layout.samples), rows.__getitem__)
        for block, rows in found.items()
    ]


def measure(layout: Layout, epochs: Sequence[Positions]) -> dict[str, float]:
    """Means over the epochs; `batches` and `companions` still absolute."""
    found = []
    steps = min(len(positions) for positions in epochs) // layout.global_size
    batches_EBG = np.stack(
        [positions[: steps * layout.global_size].reshape(steps, -1) for positions in epochs]
    )
    for batches_BG in batches_EBG:
        flat = batches_BG.ravel()
        shards_BG = np.sort(batches_BG // layout.per_shard)
        found.append(
            {
                # Positions are their own ranks, but for the few samples that an epoch leaves out.
                "neighbours": float(np.corrcoef(flat[:-1], flat[1:])[0, 1]),
                "shards": float((np.diff(shards_BG) > 0).sum(1).mean() + 1),
                "spread": float(batches_BG.std(1).mean() / layout.samples),
                "batches": float(batches_BG.mean(1).var()),
            }
        )
    means = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    return {**means, "companions": companions(batches_EBG, layout.samples)}


def companions(batches_EBG: Positions, samples: int, watched: int = 200) -> float:
    """Mean over some samples: distinct others in its batches, of all others in its batches."""
    size = batches_EBG.shape[2]
    shares = []
    for sample in np.random.default_rng(0).choice(samples, watched, replace=False):
        places = np.argwhere(batches_EBG == sample)
        if len(places):
            others = np.concatenate([batches_EBG[epoch, step] for epoch, step, _ in places])
            shares.append((len(np.unique(others)) - 1) / (len(places) * (size - 1)))
    return float(np.mean(shares))


def table(rows: Sequence[dict[str, Any]]) -> str:
    names = ("held", "neighbours", "shards", "spread", "batches", "companions")
    lines = []
    for row in rows:
        layout = Layout(row["samples"], row["per_shard"], row["global_size"])
        title = f"\n| {layout} | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
        if title not in lines:
            lines.append(title)
        lines.append(f"| {row['method']} | {' | '.join(f'{row[name]}' for name in names)} |")
    return "\n".join(lines) + "\n"


def draw(drawn: dict[tuple[Layout, str], Positions], out: Path) -> None:
    """Small multiples: for each large layout, a picture for each method."""
    names = [name for layout, name in drawn if layout == LARGE[0]]
    columns = -(-len(names) // 2)
    figure = plt.figure(figsize=(1.9 * columns, 4.9 * len(LARGE)), layout="constrained")
    parts = figure.subfigures(len(LARGE), 1)
    for part, layout in zip(parts, LARGE, strict=True):
        part.suptitle(str(layout))
        part.supxlabel("place in the epoch")
        part.supylabel("original position")
        grid = part.subplots(2, columns, sharex=True, sharey=True)
        for axes, name in itertools.zip_longest(grid.flat, names):
            if name is None:
                axes.set_axis_off()
                continue
            positions = drawn[layout, name]
            place = np.sort(np.random.default_rng(0).choice(len(positions), 6000, replace=False))
            axes.plot(place / len(positions), positions[place] / layout.samples, ",", color="C0")
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 1], yticks=[0, 1])
            axes.set_title(name.replace(", ", "\n", 1), fontsize=8)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
