"""Short forms of tests/benchmarks/web.py and autoencoder.py: real data through the whole path.

The figures that count are those of the long forms, in tests/benchmarks/RESULTS.md.
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


def campaign(script: str, work: Path, source: Path, *words: object) -> dict[str, Any]:
    if not source.exists():
        assert not os.environ.get("CI"), f"{source} is missing, and CI must not pass without it"
        pytest.skip(f"the real data {source} is not here")
    path = ROOT / "tests" / "benchmarks" / script
    command = [sys.executable, path, "--work", work, "--source", source, "--json", *words]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode in (0, 1)  # 1: so short a training may be worse than PCA
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(result)
    return result


def test_cifar_images_are_reconstructed_better_than_by_their_mean(tmp_path: Path) -> None:
    words = ("--latents", 64, "--vae", 0, "--epochs", 1)
    result = campaign("autoencoder.py", tmp_path, DATA / "cifar10-train-20k.tar", *words)
    (row,) = result["rows"]
    assert row["pca"]["mse"] == pytest.approx(0.0080, abs=5e-4)
    assert row["ours"]["samples"] == 1000
    assert row["ours"]["mse"] < 0.02  # the mean image of CIFAR-10 has .0612
    assert (tmp_path / "table.md").is_file()
    assert (tmp_path / "grid.png").is_file()


def test_web_screens_are_packed_by_layout_and_learnt(tmp_path: Path) -> None:
    words = ("--cases", "skeletons", "--seeds", 0, "--steps", 100)
    result = campaign("web.py", tmp_path, DATA / "pix2code-web" / "train", *words)
    (run,) = result["cases"]["skeletons"]
    assert run["test"]["greedy"]["samples"] >= 250
    assert run["test"]["greedy"]["token_accuracy"] > 0.7  # .2 for the commonest everywhere
    assert run["test"]["mask"]["validity"] == 1
    assert "unseen layouts" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "curves.png").is_file()
