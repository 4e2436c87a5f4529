"""The short form of tests/benchmarks/real_input.py: real data through the whole path.

The figures that count are those of the long form, in tests/benchmarks/RESULTS.md.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"


def real_input(task: str, source: Path, steps: int) -> dict[str, Any]:
    if not source.exists():
        assert not os.environ.get("CI"), f"{source} is missing, and CI must not pass without it"
        pytest.skip(f"the real data {source} is not here")
    script = ROOT / "tests" / "benchmarks" / "real_input.py"
    done = subprocess.run(
        [sys.executable, script, task, source, "--steps", str(steps), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result)
    return result


def test_cifar_images_are_reconstructed_better_than_by_their_mean() -> None:
    result = real_input("cifar", DATA / "cifar10-train-20k.tar", steps=200)
    assert result["samples"] == 2000
    assert result["mse"] < 0.02  # the mean image of CIFAR-10 has .0612


def test_web_screens_are_packed_by_program_and_learnt() -> None:
    result = real_input("web", DATA / "pix2code-web" / "train", steps=120)
    assert result["samples"] >= 250
    assert result["token_accuracy"] > 0.8  # .2 for the most frequent token everywhere
