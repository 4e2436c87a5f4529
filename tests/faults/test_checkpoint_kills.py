"""The campaign of kills in short; 300 of them are in the benchmarks' results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("checkpoint_kills.py")


@pytest.mark.parametrize(
    ("words", "kills"),
    [(["--precisions", "fp64", "--fresh", "0"], 8), (["--same-world-size", "--fresh", "5"], 4)],
)
def test_every_kill_leaves_a_run_that_goes_on_exactly(
    words: list[str], kills: int, run_script: Callable[..., dict[str, Any]]
) -> None:
    result = run_script(SCRIPT, "--kills", kills, "--steps", 24, *words)
    assert result["kills"] >= kills
    assert result["runs_completed"] >= 1
