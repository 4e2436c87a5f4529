"""The benchmark of streaming still runs: its smallest form, ours and the ceiling alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_smallest_form_runs(tmp_path: Path) -> None:
    words = [
        "--json",
        "--images",
        "32",
        "--rounds",
        "1",
        "--workers",
        "0,1",
        "--memory-epochs",
        "2",
    ]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("stream.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "give --peers-python" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for kind in ("jpeg", "png"):
        found = result[kind]
        assert found["over_fastest_peer"] is None
        assert found["of_ceiling"] == pytest.approx(min(found["of_ceiling_by_workers"].values()))
        rows = {(row["loader"], row["workers"]): row["images_per_s"] for row in found["rows"]}
        assert set(rows) == {(name, n) for name in ("pixloom", "ceiling") for n in (0, 1)}
        assert all(speed > 0 for speed in rows.values())
        assert found["first_batch_s"] > 0
        assert found["first_batch_at_90_s"] > 0
        assert found["worker_MB"] > 0
