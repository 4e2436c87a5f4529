"""From tar bytes to normalised batches: our loader, other loaders and the ceiling, in turn.

    python tests/benchmarks/stream.py --peers-python VENV/bin/python --json
    python tests/benchmarks/stream.py --images 96 --rounds 1 --workers 0     ours and the ceiling

Data sets are `jpeg` (photograph-like, 500x375, about 50 kB, as in ImageNet), `png` (screenshots,
1200x690) and, on demand, `jpeg_1024` (1024x768, about 200 kB, as in Open Images); every loader
makes shuffled float32 batches of 32, 224x224, normalised, of the same files, which are in the page
cache. The rows of one round run one after the other, each loader in a process of its own that waits
meanwhile; a figure is the median over `--rounds`, in images a second, a ratio that of the rounds'
own ratios. Other loaders read an epoch a round, without its first three batches. Ours and the
ceiling run for `--seconds` each, in slices of 0.3 s in turn, in new processes every four: where its
memory happens to lie makes one and the same process slower or faster by hundredths.

`over_fastest_peer` is ours divided by the fastest other loader, at the number of workers where
this is lowest. `of_ceiling` is ours divided by the ceiling, at its lowest too: the ceiling is the
same decoding, scaling and normalising of bytes that are already in memory, in as many processes
(one, for 0 workers) of as many threads, and without any loader. Every process has the threads that
PyTorch gives it, which ours decodes with; `--one-thread` is for one in each. `images_per_cpu_s` is
by CPU time, without workers: other work on the machine hardly changes it; threads that wait do.
`first_batch_s` is from `Loader(...)` to the first batch, `first_batch_at_90_s` after a state at 90%
of the epoch was loaded; no file is in the page cache then. `--memory-epochs N` also reads N epochs
and says by how many MB a worker grew after the second. litdata stores JPEG files as they are and
gives tensors, which are scaled as tensors (its fastest way); of PNG files it stores the pixels, so
that it decodes nothing.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import psutil  # noqa: E402
from children import (  # noqa: E402
    CEILING,
    OURS,
    Child,
    Counts,
    in_slices,
    means,
    rotated,
    serve,
    summary,
)
from stream_peers import BATCH, FILES, MEAN, PACKAGES, SIDE, STD  # noqa: E402

from pipeline.batch import Batch, RawSample, assemble  # noqa: E402
from pipeline.fit import Fit  # noqa: E402
from pipeline.loader import Loader  # noqa: E402
from pipeline.stream import decoding_threads  # noqa: E402
from pipeline.threads import Threads  # noqa: E402

PHOTOGRAPHS = {"jpeg": (500, 375), "jpeg_1024": (1024, 768)}
"""(width, height) in pixels"""
_START_S = 4.0
"""seconds that a process of ours, or of the ceiling, runs with its workers"""
Figures = dict[str, float]
SCREENS = ROOT.parent / "shared" / "data" / "pix2code-web" / "train"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the ratios are worth is the caller's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peers-python", type=Path, help="Python of a venv that has the other loaders")
    add("--peers", default=",".join(PACKAGES), help="which of them [all]")
    add("--kinds", default="jpeg,png", help="of jpeg, png and jpeg_1024 [jpeg,png]")
    add("--workers", default="0,1,2", help="numbers of loader processes [0,1,2]")
    add("--rounds", type=int, default=5, help="times that every row is measured [5]")
    add("--seconds", type=float, default=20, help="of ours and of the ceiling in a round [20]")
    add("--images", type=int, default=1536, help="images of the jpeg set; others: half [1536]")
    add("--screens", type=Path, default=SCREENS, help="folder of screenshots (else they are drawn)")
    add("--one-thread", action="store_true", help="for all, as under torchrun [torch's default]")
    add("--memory-epochs", type=int, default=0, metavar="N", help="watch memory for N epochs [0]")
    add("--keep", type=Path, help="folder for the data, kept for the next call [a temporary one]")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve(_answer)
        return 0
    if arguments.peers_python is None:
        *packages, last = PACKAGES.values()  # it wants another fsspec than they do, and pip says so
        print(
            f"no other loaders: give --peers-python VENV/bin/python of a venv with\n"
            f"    pip install torch torchvision {' '.join(packages)}\n"
            f"    pip install {last}",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(arguments.keep or Path(temporary), arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, with the data in `folder`."""
    kinds, workers = arguments.kinds.split(","), [int(n) for n in arguments.workers.split(",")]

    def start(*words: str) -> Child:
        return Child(*words, one_thread=arguments.one_thread)

    def ourselves() -> Child:
        return start(sys.executable, __file__, "--serve")

    peers, versions = {}, {}
    for name in arguments.peers.split(",") if arguments.peers_python else []:
        child = start(str(arguments.peers_python), str(Path(__file__).with_name("stream_peers.py")))
        versions[name] = child.ask(name=name, do="version")["version"]
        peers[name] = child
    result: dict[str, Any] = {}
    for kind in kinds:
        count = arguments.images if kind == "jpeg" else max(BATCH, arguments.images // 2)
        data = folder / f"{kind}-{count}"
        _make(kind, count, data, arguments.screens)
        request: dict[str, Any] = {"folder": str(data), "shards": str(data / "shards")}
        request["batches"] = count // BATCH
        for name, child in peers.items():  # formats are converted, code is loaded
            child.ask(**{**request, "name": name, "workers": workers[0], "batches": 1})
        speeds: dict[tuple[str, int], list[float]] = {}
        cpu_speeds: dict[str, list[float]] = {}
        for turn, number in itertools.product(range(arguments.rounds), workers):
            ours = functools.partial(_in_turn, ourselves, request, kind, number, arguments.seconds)
            found = ours() if turn % 2 == 0 else {}
            for name in rotated(list(peers), turn):
                found[name] = _ask(peers[name], request, kind, number, name)
            found |= ours() if turn % 2 else {}
            for name, figures in found.items():
                speeds.setdefault((name, number), []).append(figures["images_per_s"])
                if number == 0:
                    cpu_speeds.setdefault(name, []).append(figures["images_per_cpu_s"])
        result[kind] = summary("loader", "images_per_s", speeds, list(versions))
        result[kind]["images_per_cpu_s"] = {
            name: round(statistics.median(found), 1) for name, found in cpu_speeds.items()
        }
        result[kind]["bytes_per_image"] = round(
            sum(path.stat().st_size for path in (data / "raw").iterdir()) / count
        )
        with contextlib.closing(ourselves()) as child:
            result[kind].update(child.ask(**request, name=OURS, do="first", workers=0))
            if arguments.memory_epochs:
                epochs = arguments.memory_epochs
                result[kind].update(child.ask(**request, name=OURS, do="memory", epochs=epochs))
    for child in peers.values():
        child.close()
    return {
        **result,
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "peers": versions,
    }


def _ask(
    child: Child, request: Mapping[str, Any], kind: str, workers: int, name: str
) -> dict[str, float]:
    _into_page_cache(Path(request["folder"]) / FILES[name])
    found = child.ask(**request, name=name, workers=workers)
    print(f"{kind} {name} {workers}: {found['images_per_s']:.0f}", file=sys.stderr)
    return found


def _in_turn(
    start: Callable[[], Child],
    request: Mapping[str, Any],
    kind: str,
    workers: int,
    seconds: float,
) -> dict[str, dict[str, float]]:
    """Ours and the ceiling, of which every start weighs the same."""
    starts = max(1, round(seconds / _START_S))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (OURS, CEILING)}
    words = {**request, "workers": workers}
    for _ in range(starts):
        pair = {name: start() for name in found}
        _into_page_cache(Path(request["shards"]))
        folder = Path(request["folder"])
        for name, one in in_slices(pair, words, seconds=seconds / starts, folder=folder).items():
            found[name].append({**one, "images_per_s": one["batches_per_s"] * BATCH})
            pair[name].close()
        ours, ceiling = (found[name][-1]["images_per_s"] for name in found)
        print(f"{kind} {workers}: {ours:.0f}, ceiling {ceiling:.0f}", file=sys.stderr)
    return means(found)


def _into_page_cache(folder: Path) -> None:
    # What is measured is loading, not the disk: some machines empty the page cache within seconds.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


# What the child of ours does.


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if request.get("do") == "first":
        return _first_batches(request)
    if request.get("do") == "memory":
        return _memory(request)
    if request["name"] == CEILING:
        return _ceiling(request)
    with contextlib.closing(_ours(request)) as batches:
        return _counted(batches, request, 0)


def _counted(batches: Iterator[torch.Tensor], request: dict[str, Any], process: int) -> Figures:
    """Makes batches until nobody wants more."""
    counts = Counts(Path(request["counts"]))
    start_cpu_s = made = 0.0
    for made, _ in enumerate(batches):
        if made == 0:
            start_cpu_s = time.process_time()
        if not counts.add(process):
            break
    return {"images_per_cpu_s": made * BATCH / (time.process_time() - start_cpu_s)}


def _loader(request: dict[str, Any]) -> Loader:
    workers = request["workers"]
    return Loader(request["shards"], batch_size=BATCH, size=(SIDE, SIDE), workers=workers)


def _ours(request: dict[str, Any]) -> Generator[torch.Tensor]:
    for batch in _loader(request):
        yield batch.images(mean=MEAN, std=STD)


def _first_batches(request: dict[str, Any]) -> dict[str, Any]:
    times = []
    for share in (0.0, 0.9):
        for path in Path(request["shards"]).rglob("*.*"):
            with path.open() as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start_s = time.perf_counter()
        loader = _loader(request)
        state = {**loader.state_dict(), "step": int(loader.steps_per_epoch * share)}
        loader.load_state_dict(state)
        batches = iter(loader)
        next(batches).images(mean=MEAN, std=STD)
        times.append(round(time.perf_counter() - start_s, 4))
        batches.close()  # type: ignore[attr-defined]
    return {"first_batch_s": times[0], "first_batch_at_90_s": times[1]}


def _memory(request: dict[str, Any]) -> dict[str, Any]:
    """Private memory of the one worker, after the second epoch and after the last."""
    loader = _loader({**request, "workers": 1})
    used_MB = {}
    known = {child.pid for child in psutil.Process().children()}
    for batch in loader:
        if (batch.step + 1) % loader.steps_per_epoch == 0:
            epoch = (batch.step + 1) // loader.steps_per_epoch
            (worker,) = (c for c in psutil.Process().children() if c.pid not in known)
            used_MB[epoch] = worker.memory_full_info().uss / 1e6
            if epoch == request["epochs"]:
                break
    first, last = used_MB[min(2, request["epochs"])], used_MB[request["epochs"]]
    return {"worker_MB": round(first, 1), "worker_grew_MB": round(last - first, 1)}


def _ceiling(request: dict[str, Any]) -> Figures:
    processes = max(1, request["workers"])
    request = {**request, "threads": decoding_threads(request["workers"])}
    if processes == 1:
        return _decode_all(request, 0)
    context = multiprocessing.get_context("fork")
    with context.Pool(processes, torch.set_num_threads, (1,)) as pool:  # as loaders' workers
        tasks = [(request, process) for process in range(processes)]
        parts = pool.starmap(_decode_all, tasks, chunksize=1)
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def _decode_all(request: dict[str, Any], process: int) -> Figures:
    """What a loader cannot do without, and nothing else."""
    samples = [
        RawSample(path.name, path.name, {path.suffix[1:]: memoryview(path.read_bytes())})
        for path in sorted((Path(request["folder"]) / "raw").iterdir())
    ]
    fit = Fit(SIDE, SIDE)

    def batches(threads: Threads) -> Iterator[torch.Tensor]:
        first = 0
        while True:
            batch = _assembled(samples[first : first + BATCH], fit, threads)
            yield batch.images(mean=MEAN, std=STD)
            first = (first + BATCH) % (len(samples) - BATCH + 1)

    with contextlib.closing(Threads(request["threads"])) as threads:
        return _counted(batches(threads), request, process)


def _assembled(samples: list[RawSample], fit: Fit, threads: Threads) -> Batch:
    keys, places = [sample.key for sample in samples], range(len(samples))
    return assemble(
        samples, keys=keys, augment_keys=places, image_CHW=(3, SIDE, SIDE), fit=fit,
        with_tokens=False, step=0, micro=0, first_place=0, threads=threads,
    )  # fmt: skip


# The data.


def _make(kind: str, count: int, folder: Path, screens: Path) -> None:
    """`raw/` with `count` files, and `shards/` that hold them byte for byte, in eight shards."""
    if (folder / "shards" / "manifest.json").is_file():
        return
    raw = folder / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    found = sorted(screens.glob("*.png")) if screens.is_dir() else []
    for number in range(count):
        path = raw / f"{number:05d}.{'jpg' if kind in PHOTOGRAPHS else 'png'}"
        random = np.random.default_rng(number)
        if kind in PHOTOGRAPHS:
            Image.fromarray(photograph(random, *PHOTOGRAPHS[kind])).save(path, quality=83)
        elif number < len(found):
            with Image.open(found[number]) as image:
                image.convert("RGB").crop((0, 0, 1200, 690)).save(path)
        else:
            screenshot(random).save(path)
    words = ["--kind", "images", "--split", "train=1", "--shard-samples", str(-(-count // 8))]
    words += ["--workers", "0"]
    subprocess.run(
        [sys.executable, "-m", "shards.pack", raw, folder / "shards", *words],
        check=True,
        cwd=ROOT,
        stdout=sys.stderr,
    )


def photograph(
    random: np.random.Generator, width: int = 500, height: int = 375
) -> NDArray[np.uint8]:
    """Noise with the spectrum of photographs, under a dozen flat ellipses: (height, width, 3)."""
    across, down = np.fft.rfftfreq(width), np.fft.fftfreq(height)[:, None]
    frequency = np.maximum(np.hypot(across, down), 1 / width)

    def noise(power: float) -> NDArray[np.float64]:
        spectrum = random.normal(size=frequency.shape) + 1j * random.normal(size=frequency.shape)
        field = np.fft.irfft2(spectrum / frequency**power, (height, width))
        field -= field.mean()
        field /= field.std()
        return field

    y, x = np.mgrid[:height, :width]
    light = 128 + 45 * noise(1.35)
    for _ in range(12):
        at_y, at_x = random.uniform(0, height), random.uniform(0, width)
        ry, rx = random.uniform(15, 90, size=2)
        inside = ((y - at_y) / ry) ** 2 + ((x - at_x) / rx) ** 2 < 1
        light = np.where(inside, 0.6 * light + random.uniform(0, 110) + 6 * noise(0.9), light)
    blue, red = 25 * noise(1.7), 25 * noise(1.7)
    rgb = np.stack([light + 1.4 * red, light - 0.34 * blue - 0.71 * red, light + 1.77 * blue], -1)
    return np.clip(rgb, 0, 255).astype(np.uint8)


def screenshot(random: np.random.Generator) -> Image.Image:
    """Boxes, buttons and lines of text, 1200x690."""
    image = Image.new("RGB", (1200, 690), "white")
    draw = ImageDraw.Draw(image)
    for row in range(4):
        for column in range(4):
            x, y = 20 + 295 * column, 20 + 165 * row
            draw.rectangle((x, y, x + 280, y + 150), fill=(238, 238, 238), outline=(200, 200, 200))
            draw.rectangle(
                (x + 10, y + 110, x + 110, y + 140), fill=tuple(random.integers(60, 220, 3))
            )
            for line in range(5):
                words = "".join(map(chr, random.integers(97, 123, 40)))
                draw.text((x + 10, y + 10 + 18 * line), words, fill="black")
    return image


def _show(result: dict[str, Any]) -> None:
    for kind in ("jpeg", "jpeg_1024", "png"):
        for row in result.get(kind, {}).get("rows", []):
            spread = f"({row['lowest']:.0f} to {row['highest']:.0f})"
            print(
                f"{kind:9} {row['workers']} workers  {row['loader']:20} "
                f"{row['images_per_s']:8.0f} images/s {spread}"
            )
        for name, value in result.get(kind, {}).items():
            if name != "rows":
                print(f"{kind:9} {name:30} {value}")


if __name__ == "__main__":
    sys.exit(main())
