"""The benchmark of streaming still runs: its smallest form, ours and the ceiling alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_the_smallest_form_runs(
    run_script: Callable[..., dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    words = ("--images", 32, "--rounds", 1, "--workers", "0,1", "--memory-epochs", 2)
    result = run_script(Path(__file__).with_name("stream.py"), *words, "--seconds", 0.5)
    assert "give --peers-python" in capfd.readouterr().err
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
