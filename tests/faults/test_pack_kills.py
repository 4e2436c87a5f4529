"""The campaign against `pixloom pack` in short; all of it is in the benchmarks' results."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("pack_kills.py")


RunScript = Callable[..., dict[str, Any]]


def test_a_kill_or_a_failure_at_any_call_leaves_a_pack_that_goes_on_to_the_same_bytes(
    run_script: RunScript,
) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    result = run_script(SCRIPT, "--kills", 0, "--every", 7)
    assert result["kills_at_calls"] >= 15
    assert result["failed_calls"] >= 20


def test_kills_of_processes_leave_a_pack_that_goes_on_to_the_same_bytes(
    run_script: RunScript,
) -> None:
    result = run_script(SCRIPT, "--kills", 4, "--every", 0)
    assert sum(result["kills"].values()) == 4
    assert result["packs_completed"] >= 1
