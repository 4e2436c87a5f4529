"""Image-to-code models on pix2code's web screens: what they reach, and what each choice is worth.

    python tests/benchmarks/web.py --work FOLDER                                    all cases
    python tests/benchmarks/web.py --work FOLDER --cases programs --seeds 0         one run
    python tests/benchmarks/web.py --work FOLDER --at-once 2                        two at a time

Packs the 1500 programs with splits of its own, trains each case with each seed in one process of
one thread (launch/configs/pix2code-web.toml, and the flags of `CASES`), and measures the best
checkpoint of the validation split on the test split: greedily, with the grammar's mask, and for the
first case by beam search. In the split `skeletons` no layout of the test split (a program, colours
ignored) is in training. FOLDER keeps everything: killed and started again, the campaign goes on
where it was, inside a run too. FOLDER/table.md and FOLDER/curves.png tell of all that is there.

`--json` prints one JSON object on stdout's last line.
"""

import argparse
import collections
import json
import random
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from runs import call, machine, trained  # noqa: E402

from pipeline.grammar import Grammar  # noqa: E402
from pipeline.runlog import read_rows  # noqa: E402

CONFIG = ROOT / "launch" / "configs" / "pix2code-web.toml"
SOURCE = ROOT.parent / "shared" / "data" / "pix2code-web" / "train"
SIZE = ["--size", "160x96"]
FEW = 200
PACKS: Mapping[str, Sequence[str]] = {
    "programs": ["--split", "train=rest,val=50,test=250"],
    "skeletons": ["--split", "folders"],
    "bpe": ["--split", "train=rest,val=50,test=250", "--tokenizer", "bpe", "--vocab-size", "512"],
    "few": ["--split", f"train={FEW},val=50,test=250,unused=rest"],
}
"""Flags of `pixloom pack` for each dataset."""
DECODINGS: Mapping[str, Sequence[str]] = {
    "greedy": ["--grammar", "web", "--no-mask"],
    "mask": ["--grammar", "web"],
    "beam 3": ["--grammar", "web", "--no-mask", "--beam", "3"],
    "beam 5": ["--grammar", "web", "--no-mask", "--beam", "5"],
}
"""Flags of `pixloom validate`."""


@dataclass(frozen=True)
class Case:
    """Runs that differ by their seed alone."""

    title: str
    data: str
    flags: tuple[str, ...] = ()
    after: str = ""
    """the case from whose best checkpoint, of the same seed, it starts"""
    decodings: tuple[str, ...] = ("greedy", "mask")


FEW_FLAGS = ("--run.steps", "1200", "--validate.every_steps", "200")
TUNE_FLAGS = ("--run.steps", "400", "--optim.schedule", "linear", "--optim.warmup_steps", "50",
              "--optim.lr", "3e-4", "--validate.every_steps", "100")  # fmt: skip
CASES = {
    "programs": Case("LSTM, attention", "programs", decodings=tuple(DECODINGS)),
    "skeletons": Case("LSTM, attention; unseen layouts", "skeletons"),
    "vector": Case(
        "LSTM, vector memory", "programs",
        ("--model.memory", "vector"),
    ),
    # Its steps take half as long again.
    "transformer": Case(
        "Transformer, two layers", "programs",
        ("--model.decoder", "transformer", "--model.num_layers", "2"),
    ),
    "gru": Case("GRU, attention", "programs", ("--model.decoder", "gru")),
    # A third more tokens an image; with 8 heads one seed of three never saw every button.
    "bpe": Case("LSTM, 16 heads; byte pairs", "bpe", ("--model.num_heads", "16")),
    "few": Case(f"{FEW} programs", "few", FEW_FLAGS),
    "few-sampling": Case(
        f"{FEW} programs, scheduled sampling", "few",
        (*FEW_FLAGS, "--model.sampling_share", "0.25"),
    ),
    "few-longer": Case(f"{FEW} programs, then 400 steps more", "few", TUNE_FLAGS, after="few"),
    "few-risk": Case(
        f"{FEW} programs, then 400 steps of minimum risk", "few",
        (*TUNE_FLAGS, "--model.risk_weight", "1"), after="few",
    ),
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the figures are worth is the reader's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder to work in, kept")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder of png and gui files")
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)} [all]")
    parser.add_argument("--seeds", default="0,1,2", help="seeds of the runs [0,1,2]")
    parser.add_argument("--at-once", type=int, default=1, help="runs at a time [1]")
    parser.add_argument("--steps", type=int, help="train so many steps [the configuration's]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    names = arguments.cases.split(",")
    for name in names:
        if name not in CASES:
            parser.error(f"--cases {name}: choose of {', '.join(CASES)}")
    work: Path = arguments.work.resolve()
    (work / "logs").mkdir(parents=True, exist_ok=True)
    for data in dict.fromkeys(CASES[name].data for name in names):
        pack(data, arguments.source.resolve(), work)

    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    # Those that start from another case's end come when that is there.
    first = dict.fromkeys(CASES[name].after or name for name in names)
    for round_ in (first, [name for name in names if name not in first]):
        jobs = [(name, seed) for name in round_ for seed in seeds]
        with ThreadPoolExecutor(arguments.at_once) as pool:
            list(pool.map(lambda job: measure(job[0], job[1], work, arguments.steps), jobs))
    found = results(work)
    text = table(found)
    (work / "table.md").write_text(text)
    draw(work, found)
    print(text, file=sys.stderr)
    if arguments.json:
        print(json.dumps({"cases": found, **machine()}))
    return 0


def pack(data: str, source: Path, work: Path) -> None:
    if (work / "shards" / data / "manifest.json").is_file():
        return
    if data == "skeletons":
        source = by_skeleton(source, work / "by-skeleton")
    words = [*SIZE, *PACKS[data], "--overwrite"]
    call("-m", "shards.pack", source, work / "shards" / data, *words)


def by_skeleton(source: Path, out: Path) -> Path:
    """Copies the samples into OUT/train, val and test: layouts drawn at random until the test split
    has 250 distinct programs and val has 50, so that none is in two of them."""
    grammar = Grammar.open("web")
    layouts: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sorted(source.glob("*.gui")):
        layouts[" ".join(grammar.skeleton(path.read_text()))].append(path)
    order = sorted(layouts)
    random.Random(0).shuffle(order)
    wanted = {"test": 250, "val": 50}
    programs: dict[str, set[str]] = collections.defaultdict(set)
    for layout in order:
        split = next((s for s, number in wanted.items() if len(programs[s]) < number), "train")
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        for path in layouts[layout]:
            programs[split].add(" ".join(path.read_text().split()))
            for each in (path, path.with_suffix(".png")):
                shutil.copyfile(each, folder / each.name)
    return out


def measure(name: str, seed: int, work: Path, steps: int | None) -> None:
    """Leaves the metrics of the test split, by decoding, in the run's test.json."""
    case = CASES[name]
    run, log = work / "runs" / f"{name}-{seed}", work / "logs" / f"{name}-{seed}.log"
    words: list[object] = ["--config", CONFIG, "--data.url", work / "shards" / case.data]
    words += ["--run.seed", seed, "--batch.micro_size", 16, *case.flags]
    if steps:
        words += ["--run.steps", steps, "--optim.schedule", "constant", "--optim.warmup_steps", 0]
    if case.after:
        start = work / "exports" / f"{case.after}-{seed}"
        if not (start / "config.json").is_file():
            before = work / "runs" / f"{case.after}-{seed}"
            export = ["-m", "pipeline.checkpoint", "export", before, "--out", start]
            call(*export, "--overwrite", log=log)
        words += ["--run.init", start]
    say(f"{name}, seed {seed}: training")
    trained(run, *words, log=log)
    kept = run / "test.json"
    figures: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    for decoding in case.decodings:
        if decoding not in figures:
            flags = DECODINGS[decoding]
            validate = ["-m", "pipeline.validate", run, "--split", "test", "--json", *flags]
            figures[decoding] = json.loads(call(*validate, log=log).splitlines()[-1])
            kept.write_text(json.dumps(figures, indent=1))
    say(f"{name}, seed {seed}: exact {figures['greedy']['exact_match']:.4f}")


def say(line: str) -> None:
    sys.stderr.write(line + "\n")  # at once, unlike print: threads talk at the same time
    sys.stderr.flush()


def results(work: Path) -> dict[str, list[dict[str, Any]]]:
    """What is measured in the folder: of each case, its seeds, minutes and metrics."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name in CASES:
        for path in sorted((work / "runs").glob(f"{name}-[0-9]*/test.json")):
            seconds = json.loads(path.with_name("seconds.json").read_text())
            seed = int(path.parent.name.removeprefix(f"{name}-"))
            test = json.loads(path.read_text())
            found.setdefault(name, []).append({"seed": seed, "seconds": seconds, "test": test})
    return found


COLUMNS = ("exact_match", "token_error_rate", "positional_error", "bleu4", "validity",
           "skeleton_match")  # fmt: skip


def table(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A row for each case and way to decode: means over the seeds, of exact match each one too."""
    lines = [
        f"| model | decoding | {' | '.join(name.replace('_', ' ') for name in COLUMNS)} "
        "| exact match by seed | minutes |",
        "|---" * (len(COLUMNS) + 4) + "|",
    ]
    for name, results in found.items():
        minutes = statistics.mean(result["seconds"] for result in results) / 60
        for decoding in CASES[name].decodings:
            rows = [result["test"][decoding] for result in results]
            means = [statistics.mean(row[column] for row in rows) for column in COLUMNS]
            each = ", ".join(f"{row['exact_match']:.3f}" for row in rows)
            figures = " | ".join(f"{mean:.4f}" for mean in means)
            lines.append(
                f"| {CASES[name].title} | {decoding} | {figures} | {each} | {minutes:.1f} |"
            )
    return "\n".join(lines) + "\n"


def draw(work: Path, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Exact match of the validation split over the steps, a line for each run."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for number, (name, runs) in enumerate(found.items()):
        for place, run in enumerate(runs):
            rows = read_rows(work / "runs" / f"{name}-{run['seed']}")
            points = [(row["step"], row["exact_match"]) for row in rows if "split" in row]
            label = None if place else CASES[name].title
            axes.plot(*zip(*points, strict=True), f"C{number}", marker=".", label=label)
    axes.set(xlabel="step", ylabel="exact match, validation, greedy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(work / "curves.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
