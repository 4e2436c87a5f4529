"""Real data, end to end: pack, train on two CPU processes, validate on unseen samples.

    python tests/benchmarks/real_input.py web   ../shared/data/pix2code-web/train    exact match
    python tests/benchmarks/real_input.py cifar ../shared/data/cifar10-train-20k.tar MSE in [0, 1]

`--json` prints one JSON object on stdout's last line: the metrics of the test split, the seconds
of packing and training, the machine and the versions.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
CONFIGS = {"web": "pix2code-web.toml", "cifar": "cifar10.toml"}
PACK = {
    "web": ["--size", "160x96", "--split", "train=rest,val=50,test=250"],
    "cifar": ["--kind", "images", "--split", "train=rest,val=500,test=2000"],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the figures are worth is the caller's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(CONFIGS))
    parser.add_argument("source", type=Path, help="folder of images, or a tar of one")
    parser.add_argument("--steps", type=int, help="train so many steps [the configuration's]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the run [0]")
    parser.add_argument("--processes", type=int, default=2, help="training processes [2]")
    parser.add_argument("--keep", type=Path, help="folder to work in, kept [a temporary one]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        result = measure(folder, arguments)
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:22} {value}" for name, value in result.items()))
    return 0


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole path in `folder`; returns the metrics of the test split, with times."""
    source = arguments.source.resolve()
    if source.suffix == ".tar":
        with tarfile.open(source) as archive:
            archive.extractall(folder / "raw", filter="data")
        source = folder / "raw"
    task, run = arguments.task, folder / "run"
    start_s = time.perf_counter()
    call("-m", "shards.pack", source, folder / "shards", *PACK[task])
    packed_s = time.perf_counter()
    steps = ["--run.steps", arguments.steps] if arguments.steps else []
    call(
        "-m", "torch.distributed.run", "--nproc-per-node", arguments.processes,
        "-m", "pipeline.train", "--config", ROOT / "launch" / "configs" / CONFIGS[task],
        "--data.url", folder / "shards", "--run.dir", run, "--run.seed", arguments.seed, *steps,
    )  # fmt: skip
    trained_s = time.perf_counter()
    call("-m", "pipeline.validate", run, "--split", "test")
    metrics: dict[str, Any] = json.loads((run / "validate-test.json").read_text())
    return {
        "task": task,
        **metrics,
        "seed": arguments.seed,
        "processes": arguments.processes,
        "pack_s": round(packed_s - start_s, 1),
        "train_s": round(trained_s - packed_s, 1),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }


def call(*words: object) -> None:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, *map(str, words)],
        check=True,
        cwd=ROOT,
        env=environment,
        stdout=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
