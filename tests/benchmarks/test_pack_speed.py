"""The benchmark of packing still runs: its smallest form, ours and the ceiling alone."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_smallest_form_runs(tmp_path: Path) -> None:
    words = ["--json", "--samples", "24", "--rounds", "1", "--workers", "1", "--data", tmp_path]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("pack.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "give --peers-python" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for kind in ("screens", "cifar"):
        found = result[kind]
        assert found["over_fastest_peer"] is None
        assert {row["packer"] for row in found["rows"]} == {"pixloom", "ceiling"}
        assert all(row["samples_per_s"] > 0 for row in found["rows"])
        assert 0 < found["of_ceiling"] < 2
        assert found["memory_MB"]["all"] > 0
