"""Trainings that a benchmark compares: each a run of its own, gone on with when it was killed."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
STOPPED, INTERRUPTED = 75, 130  # what training ends with when it was asked to stop, or by Ctrl-C


def call(*words: object, log: Path | None = None) -> str:
    """`python WORDS`, with one thread and no GPU; returns its stdout, and shows it on stderr or in
    `log`.

    Raises:
        SystemExit: it failed, or was asked to stop.
    """
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    out = log.open("a") if log else sys.stderr
    try:
        done = subprocess.run(
            command, check=False, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=out,
            text=True,
        )  # fmt: skip
        out.write(done.stdout)
    finally:
        if log:
            out.close()
    if done.returncode in (STOPPED, INTERRUPTED, -signal.SIGINT, -signal.SIGTERM):
        raise SystemExit("stopped; start again with the same --work to go on")
    if done.returncode:
        raise SystemExit(
            f"{words[1]}: exit status {done.returncode}{f', see {log}' if log else ''}"
        )
    return done.stdout


def trained(run: Path, *words: object, log: Path | None = None) -> float:
    """Trains `run` to its end, unless it is there; returns the seconds that took, wall clock, with
    start, validations and checkpoints, over all its lives that ended by themselves.

    Raises:
        SystemExit: it failed or was stopped; or its end was reached with other words.
    """
    spent, done, said = run / "seconds.json", run / "done", " ".join(map(str, words))
    seconds: float = json.loads(spent.read_text()) if spent.is_file() else 0.0
    if done.is_file() and done.read_text() != said:
        raise SystemExit(f"{run}: was trained with {done.read_text()}; give another --work")
    if not done.is_file():
        start_s = time.perf_counter()
        try:
            call("-m", "pipeline.train", *words, "--run.dir", run, log=log)
            done.write_text(said)
        finally:
            seconds += time.perf_counter() - start_s
            if run.is_dir():
                spent.write_text(json.dumps(seconds))
    return seconds


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
