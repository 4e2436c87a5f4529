"""What it takes to stand anywhere in a very large dataset: 1e9 samples in 1e5 shards.

    python tests/benchmarks/scale.py

Fresh processes in turn, one at the beginning of the epoch and one at 90% of it, each from the
manifest on disk to the ids of its first global batch: reading and checking the manifest is
counted, imports are not. Then the same from a small dataset of real files to the first decoded
batch. `first_s` is the wall clock's, `first_cpu_s` the processor's, for other work on the machine;
memory is the most that was resident, less what was after the imports. `drawn` counts the random
numbers that a process drew, `opened` the shards of which it opened a file: both would grow with the
place in the epoch if anything walked it. `eviction` is the first choice of what to evict from a
cache of 200 shards of the large dataset that were all used, and are needed in the next epoch only;
`uses` counts the windows that it looked at. `--json` prints one JSON object on stdout's last line.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed pixloom

import psutil
from numpy.typing import NDArray

from pipeline import rng
from pipeline.build import open_split, order_of
from pipeline.cache import CachedFile, Need, Outlook, Schedule, choose_victims
from pipeline.config import Config, config_of
from pipeline.datasets import Datasets
from pipeline.order import ShardUse
from pipeline.stream import TrainPlans, make_loader
from shards import pack, synth
from shards.format import MANIFEST_NAME, ImagePolicy, Manifest, ShardEntry

PLACES = (0.0, 0.9)
FURTHER_BATCHES = 300
CACHED_SHARDS = 200


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the figures are worth is the caller's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10**9, help="of the synthetic manifest")
    parser.add_argument("--shards", type=int, default=10**5, help="of the synthetic manifest")
    parser.add_argument("--files", type=int, default=1000, help="samples of the real dataset")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--one",
        nargs=3,
        metavar=("WHAT", "URL", "PLACE"),
        action="append",
        help="measure ids, eviction or batch of a dataset, in this process",
    )
    arguments = parser.parse_args(argv)
    if arguments.one:
        for what, url, place in arguments.one:
            print(json.dumps(MEASURES[what](url, float(place))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        large, small = Path(folder, "large"), Path(folder, "small")
        write_manifest(large, arguments.samples, arguments.shards)
        pack_files(small, arguments.files)
        result = {
            "samples": arguments.samples,
            "shards": arguments.shards,
            "manifest_MB": round((large / MANIFEST_NAME).stat().st_size / 1e6, 1),
            "ids": compared("ids", large, arguments.rounds),
            "eviction": compared("eviction", large, arguments.rounds),
            "files": arguments.files,
            "batch": compared("batch", small / "shards", arguments.rounds),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        }
    if arguments.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=2))
    return 0


def write_manifest(folder: Path, samples: int, shards: int) -> None:
    """A manifest of shards that do not exist, of sizes that differ."""
    folder.mkdir()
    starts = [place * samples // shards for place in range(shards + 1)]
    entries = [
        ShardEntry(f"train/{k:06d}.tar", stop - start, 20_000 * (stop - start) + 512 * k, sha256(k))
        for k, (start, stop) in enumerate(itertools.pairwise(starts))
    ]
    image = ImagePolicy(64, 64, 3, "pad", "jpeg", 90, (255, 255, 255))
    manifest = Manifest("images", {"train": tuple(entries)}, image, None, {}, sha256(-1))
    (folder / MANIFEST_NAME).write_text(manifest.to_json())


def sha256(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def pack_files(folder: Path, samples: int) -> None:
    """A dataset of real files, about 40 shards."""
    words = f"--size 48x32 --split train=1 --shard-samples {-(-samples // 40)} --workers 0"
    with contextlib.redirect_stdout(sys.stderr):
        synth.main([str(folder / "raw"), "--samples", str(samples), "--seed", "0"])
        pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()])


def compared(what: str, url: Path, rounds: int) -> dict[str, Any]:
    """Medians of fresh processes, in turn at the two places, and the ratio of their times."""
    words = [sys.executable, __file__, "--one", what, str(url)]
    seen: dict[float, list[dict[str, float]]] = {place: [] for place in PLACES}
    for _ in range(rounds):
        for place in PLACES:
            done = subprocess.run([*words, str(place)], check=True, stdout=subprocess.PIPE)
            seen[place].append(json.loads(done.stdout.splitlines()[-1]))
    at = {
        f"at_{place:.0%}": {
            name: round(statistics.median(row[name] for row in rows), 4) for name in rows[0]
        }
        for place, rows in seen.items()
    }
    ratios = {
        f"ratio_of_{name}": round(
            statistics.median(row[name] for row in seen[PLACES[1]])
            / statistics.median(row[name] for row in seen[PLACES[0]]),
            3,
        )
        for name in ("first_s", "first_cpu_s")
    }
    return {**at, **ratios}


def config_for(url: str, sizes: dict[str, int], data: dict[str, int]) -> Config:
    sections = {
        "run": {"dir": ".", "steps": 1},
        "data": {"url": url, "workers": 0, **data},
        "batch": sizes,
    }
    return config_of(sections, "benchmark")


def first_ids(url: str, place: float) -> dict[str, float]:
    """From the manifest to the ids of a batch; then those of further batches."""
    config = config_for(url, {"global_size": 256, "micro_size": 32}, {})
    counted = Counted(url)
    data = Datasets.of(config.data)
    loaded_s = counted.passed_s()
    order = order_of(config, data)
    step = int(place * order.steps_per_epoch)
    order.samples_of(step)
    figures = {"load_s": loaded_s, **counted.figures()}
    started_s = time.perf_counter()
    for further in range(1, FURTHER_BATCHES + 1):
        order.samples_of(step + further)
    each_s = (time.perf_counter() - started_s) / FURTHER_BATCHES
    return {**figures, "each_further_ms": 1000 * each_s, "all_MB": counted.grown_bytes() / 1e6}


def first_batch(url: str, place: float) -> dict[str, float]:
    """From the manifest to a decoded batch."""
    counted = Counted(url)
    data = Datasets.open([url])
    sizes = {"global_size": 16, "micro_size": 16}
    # five windows a lane: neither place is so near a window's end that a batch takes two
    four_shards = 4 * data.manifests[0].splits["train"][0].samples
    config = config_for(url, sizes, {"lanes": 2, "window": four_shards})
    order = order_of(config, data)
    train = open_split(config, data, "train")
    step = int(place * order.steps_per_epoch)
    plans = TrainPlans(order, order.micros_of(0, 1), step, order.steps_per_epoch)
    batch = next(make_loader(train, plans, workers=0, pin=False))
    if batch.step != step:
        raise RuntimeError(f"asked for step {step}, got {batch.step}")
    return counted.figures()


def first_eviction(url: str, place: float) -> dict[str, float]:
    """Which of the shards that a node has used goes first."""
    config = config_for(url, {"global_size": 256, "micro_size": 32}, {})
    data = Datasets.of(config.data)
    order = order_of(config, data)
    shards = [shard._replace(root="s3://bucket/large") for shard in data.shards("train")]
    plans = TrainPlans(order, order.micros_of(0, 1), 0, 100 * order.steps_per_epoch)
    cached: set[int] = set()
    num_uses, stop = 0, int(place * order.steps_per_epoch)
    for use in plans.uses(stop):
        cached.update(use.shards)
        stop = use.last_step + 1
        if len(cached) >= CACHED_SHARDS:
            break

    def counted_uses(step: int) -> Iterator[ShardUse]:
        nonlocal num_uses
        for use in plans.uses(step):
            num_uses += 1
            yield use

    schedule = Schedule(shards, counted_uses, step=stop, slack_steps=1)
    room_bytes = sum(shards[number].entry.bytes for number in cached)
    outlook = Outlook()
    counted = Counted(url)
    outlook.follow([schedule], room_bytes)
    files = []
    for number in cached:
        entry = shards[number].entry
        need, lingers = outlook.of(entry.sha256)
        files.append(CachedFile(entry.name, entry.bytes, 0.0, need, lingers, is_own=True))
    if not choose_victims(files, 1, Need(0, stop), now_s=0.0, speculative=True):
        raise RuntimeError("nothing could be evicted")
    return {**counted.figures(), "uses": num_uses}


class Counted:
    """Counts and times from its making on."""

    def __init__(self, url: str) -> None:
        self.drawn = 0
        self.opened: set[str] = set()
        draw = rng.raw_uint64

        def count_drawn(stream_key: int, count: int) -> NDArray[Any]:
            self.drawn += count
            return draw(stream_key, count)

        def count_opened(event: str, words: tuple[Any, ...]) -> None:
            if event == "open" and str(words[0]).startswith(f"{url}/train/"):
                self.opened.add(Path(words[0]).stem)

        rng.raw_uint64 = count_drawn
        sys.addaudithook(count_opened)
        with contextlib.suppress(OSError):  # forbidden: then the peak may be of before
            Path("/proc/self/clear_refs").write_text("5")
        self._before_bytes = psutil.Process().memory_info().rss
        self._start_s, self._start_cpu_s = time.perf_counter(), time.process_time()

    def passed_s(self) -> float:
        return time.perf_counter() - self._start_s

    def grown_bytes(self) -> int:
        status = Path("/proc/self/status").read_text()
        peak_kB = int(status.partition("VmHWM:")[2].split()[0])
        return 1024 * peak_kB - self._before_bytes

    def figures(self) -> dict[str, float]:
        return {
            "first_s": self.passed_s(),
            "first_cpu_s": time.process_time() - self._start_cpu_s,
            "grown_MB": self.grown_bytes() / 1e6,
            "drawn": self.drawn,
            "opened": len(self.opened),
        }


MEASURES = {"ids": first_ids, "eviction": first_eviction, "batch": first_batch}

if __name__ == "__main__":
    sys.exit(main())
