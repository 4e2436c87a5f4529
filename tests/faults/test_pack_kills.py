"""The campaign against `pixloom pack` in short; all of it is in the benchmarks' results."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("pack_kills.py")


def campaign(*words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", *words], stdout=subprocess.PIPE, check=False
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print({key: value for key, value in result.items() if key != "violations"})
    assert result["violations"] == []
    assert done.returncode == 0
    return result


def test_a_kill_or_a_failure_at_any_call_leaves_a_pack_that_goes_on_to_the_same_bytes() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    result = campaign("--kills", "0", "--every", "7")
    assert result["kills_at_calls"] >= 15
    assert result["failed_calls"] >= 20


def test_kills_of_processes_leave_a_pack_that_goes_on_to_the_same_bytes() -> None:
    result = campaign("--kills", "4", "--every", "0")
    assert sum(result["kills"].values()) == 4
    assert result["packs_completed"] >= 1
