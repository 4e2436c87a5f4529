"""The benchmark of packing still runs: its smallest form, ours and the ceiling alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_the_smallest_form_runs(
    run_script: Callable[..., dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--samples", 24, "--rounds", 1, "--workers", 1, "--data", tmp_path)
    result = run_script(Path(__file__).with_name("pack.py"), *words)
    assert "give --peers-python" in capfd.readouterr().err
    for kind in ("screens", "cifar"):
        found = result[kind]
        assert found["over_fastest_peer"] is None
        assert {row["packer"] for row in found["rows"]} == {"pixloom", "ceiling"}
        assert all(row["samples_per_s"] > 0 for row in found["rows"])
        assert 0 < found["of_ceiling"] < 2
        assert found["memory_MB"]["all"] > 0
