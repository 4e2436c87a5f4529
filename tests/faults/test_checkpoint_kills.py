"""The campaign of kills in short; 300 of them are in the benchmarks' results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("checkpoint_kills.py")


@pytest.mark.parametrize(
    ("words", "kills"), [(["--fresh", "0"], 8), (["--same-world-size", "--fresh", "5"], 4)]
)
def test_every_kill_leaves_a_run_that_goes_on_exactly(words: list[str], kills: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", str(kills), "--steps", "24", "--json", *words],
        stdout=subprocess.PIPE,
        check=False,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print({key: value for key, value in result.items() if key != "violations"})
    assert result["violations"] == []
    assert done.returncode == 0
    assert result["kills"] >= kills
    assert result["runs_completed"] >= 1
