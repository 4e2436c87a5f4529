"""The benchmark of beam search still runs: its smallest form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_smallest_form_runs(tmp_path: Path) -> None:
    words = ["--screens", "6", "--beam", "3", "--max-tokens", "16", "--rounds", "1", "--json"]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("beam.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["screens"] == 6
    assert result["mean_tokens"] == 16
    ways = ("batched", "one_by_one", "masked", "greedy", "encode")
    assert all(result[f"{name}_s"] > 0 for name in ways)
    assert result["speedup"] == pytest.approx(result["one_by_one_s"] / result["batched_s"], rel=0.2)
