"""From a folder to shards: our packer, other packers and the ceiling, in turn.

    python tests/benchmarks/pack.py --peers-python VENV/bin/python --json
    python tests/benchmarks/pack.py --samples 60 --rounds 1 --workers 1     ours and the ceiling

Two data sets: `screens` (screenshots and their programs) and `cifar` (JPEG files of 32x32). All
packers do the same work: decode, scale to 256x256 (Lanczos), encode as PNG, ids of the program,
SHA-256 of the file. Ours also reads everything once before, for the splits, and trains the
tokenizer; the others are given it. The rows of one round run one after the other, each packer in
a process of its own, whose imports are not measured; what its worker processes do at their start
is. The disk is not: raw files and code are in the page cache. Ours cuts 32 shards. A figure is the
median over `--rounds`, in samples a second, a ratio that of the rounds' own ratios; ours and the
ceiling run twice a round, one right after the other and back again.

`over_fastest_peer` is ours divided by the fastest other packer, at the number of workers where
this is lowest. `of_ceiling` is ours divided by the ceiling, at its lowest too: the ceiling is our
image work on bytes that are already in memory, in as many processes, nothing written.
`memory_MB` is the most that all our processes together used, for all samples and for half.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from children import CEILING, OURS, Child, one_round, serve, summary  # noqa: E402
from pack_peers import PACKAGES, SIDE, images_in  # noqa: E402

from shards import engines, images, pack  # noqa: E402

DATA = ROOT.parent / "shared" / "data"
POLICY = images.make_policy(
    size=(SIDE, SIDE), fit=None, encode=None, channels=3, quality=90, background=(255, 255, 255)
)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the ratios are worth is the caller's business."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--peers-python", type=Path, help="Python of a venv that has the other packers")
    add("--peers", default=",".join(PACKAGES), help="which of them [all]")
    add("--kinds", default="screens,cifar", help="data sets [screens,cifar]")
    add("--workers", default="1,2", help="numbers of worker processes [1,2]")
    add("--rounds", type=int, default=3, help="times that every row is measured [3]")
    add("--samples", type=int, default=1500, help="screens; four times as many of cifar [1500]")
    add("--data", type=Path, default=DATA, help="folder with the real data (else it is drawn)")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.serve:
        serve(_answer)
        return 0
    # Where it is set, no compiled modules are kept, and every worker process compiles them anew.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if arguments.peers_python is None:
        print(
            "no other packers: give --peers-python VENV/bin/python of a venv with\n"
            f"    pip install torch torchvision tokenizers {' '.join(PACKAGES.values())}",
            file=sys.stderr,
        )
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(Path(temporary), arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        _show(result)
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, in `folder`."""
    workers = [int(number) for number in arguments.workers.split(",")]
    # The ceiling is to have what our workers have: without it, it may take twice the time.
    tuned = {"GLIBC_TUNABLES": engines.TUNABLES}
    ours = Child(sys.executable, str(Path(__file__)), "--serve", added=tuned)
    children = {OURS: ours, CEILING: ours}
    versions = {}
    for name in arguments.peers.split(",") if arguments.peers_python else []:
        peers = Path(__file__).with_name("pack_peers.py")
        children[name] = Child(str(arguments.peers_python), str(peers))
        versions[name] = children[name].ask(name=name, do="version")["version"]
    result: dict[str, Any] = {}
    for kind in arguments.kinds.split(","):
        samples = arguments.samples * (4 if kind == "cifar" else 1)
        raw = folder / kind
        _make(kind, samples, raw, arguments.data)
        request: dict[str, Any] = {"raw": str(raw), "out": str(folder / "out"), "tokenizer": None}
        request["memory"] = False
        watched = {**request, "name": OURS, "workers": max(workers), "memory": True}
        # Also what loads code and fills the page cache.
        memory = {"all": ours.ask(**watched)["memory_MB"]}
        if kind == "screens":
            tokenizer = folder / "tokenizer.json"
            shutil.copyfile(folder / "out" / "tokenizer.json", tokenizer)
            request["tokenizer"] = str(tokenizer)
        speeds: dict[tuple[str, int], list[float]] = {}
        for turn in range(arguments.rounds):
            for number in workers:
                ask = functools.partial(_ask, children, request, number)
                for name, found in one_round(children, turn, ask).items():
                    speeds.setdefault((name, number), []).append(found["samples_per_s"])
        for path in list(images_in(raw))[::2]:
            path.unlink()
            path.with_suffix(".gui").unlink(missing_ok=True)
        memory["half"] = ours.ask(**watched)["memory_MB"]
        result[kind] = {
            **summary("packer", "samples_per_s", speeds, list(versions)),
            "memory_MB": memory,
        }
        shutil.rmtree(raw)
    for child in children.values():
        child.close()
    return {
        **result,
        "rounds": arguments.rounds,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "peers": versions,
    }


def _ask(
    children: Mapping[str, Child], request: Mapping[str, Any], workers: int, name: str
) -> dict[str, Any]:
    raw = Path(request["raw"])
    for path in raw.iterdir():  # some machines empty the page cache within seconds
        path.read_bytes()
    found = children[name].ask(**request, name=name, workers=workers)
    print(f"{raw.name} {name} {workers}: {found['samples_per_s']:.1f}", file=sys.stderr)
    return found


# What the child of ours does.


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    raw, out, workers = Path(request["raw"]), Path(request["out"]), request["workers"]
    shutil.rmtree(out, ignore_errors=True)
    if request["name"] == CEILING:
        return _ceiling(raw, workers)
    kind = "pairs" if any(raw.glob("*.gui")) else "images"
    words = [str(raw), str(out), "--kind", kind, "--size", f"{SIDE}x{SIDE}", "--json"]
    num_samples = sum(1 for _ in images_in(raw))
    # A task is a shard: a few of them for each worker.
    words += ["--split", "train=1", "--workers", str(workers)]
    words += ["--shard-samples", str(-(-num_samples // 32))]
    subprocess.run([sys.executable, "-c", "import shards.pack"], check=True, cwd=ROOT)
    # To look at the memory takes time.
    with _memory() if request["memory"] else contextlib.nullcontext([0.0]) as most_MB:
        start_s = time.perf_counter()
        if pack.main(words) != 0:
            raise RuntimeError("pack failed")
        duration_s = time.perf_counter() - start_s
    return {"samples_per_s": num_samples / duration_s, "memory_MB": round(most_MB[0])}


def _ceiling(raw: Path, workers: int) -> dict[str, Any]:
    data = [path.read_bytes() for path in images_in(raw)]
    if workers == 1:
        return {"samples_per_s": _encode_all(data)}
    parts = [data[at::workers] for at in range(workers)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return {"samples_per_s": sum(pool.map(_encode_all, parts, chunksize=1))}


def _encode_all(data: list[bytes]) -> float:
    """Samples a second of one process, with our image work."""
    start_s = time.perf_counter()
    for one in data:
        images.fit_and_encode(one, POLICY)
    return len(data) / (time.perf_counter() - start_s)


@contextlib.contextmanager
def _memory() -> Iterator[list[float]]:
    """The most private memory of this process and its children together, in MB."""
    import psutil  # here, for the worker processes import this module too

    most_MB, over = [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.1):
            used = 0
            for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
                with contextlib.suppress(psutil.Error):
                    used += process.memory_full_info().uss
            most_MB[0] = max(most_MB[0], used / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most_MB
    finally:
        over.set()
        thread.join()


# The data.


def _make(kind: str, count: int, raw: Path, data: Path) -> None:
    """`count` images in `raw`, of `screens` with their programs; real ones where there are some."""
    raw.mkdir(parents=True)
    if kind == "cifar" and (data / "cifar10-train-20k.tar").is_file():
        with tarfile.open(data / "cifar10-train-20k.tar") as tar:
            files = (member for member in tar if member.isfile())
            for number, member in zip(range(count), files, strict=False):
                file = tar.extractfile(member)
                assert file is not None
                (raw / f"{number:05d}.jpg").write_bytes(file.read())
    elif kind == "screens" and (data / "pix2code-web" / "train").is_dir():
        for path in sorted((data / "pix2code-web" / "train").glob("*.png"))[:count]:
            shutil.copyfile(path, raw / path.name)
            shutil.copyfile(path.with_suffix(".gui"), raw / f"{path.stem}.gui")
    else:
        words = [sys.executable, "-m", "shards.synth", str(raw), "--samples", str(count)]
        subprocess.run(words, check=True, cwd=ROOT, stdout=sys.stderr)
        if kind == "cifar":
            for path in raw.glob("*.gui"):
                path.unlink()


def _show(result: dict[str, Any]) -> None:
    for kind in ("screens", "cifar"):
        for row in result.get(kind, {}).get("rows", []):
            spread = f"({row['lowest']:.1f} to {row['highest']:.1f})"
            print(
                f"{kind:8} {row['workers']} workers  {row['packer']:20} "
                f"{row['samples_per_s']:8.1f} samples/s {spread}"
            )
        for name, value in result.get(kind, {}).items():
            if name != "rows":
                print(f"{kind:8} {name:30} {value}")


if __name__ == "__main__":
    sys.exit(main())
