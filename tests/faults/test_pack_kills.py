"""The campaign against `pixloom pack` in short; all of it is in the benchmarks' results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("pack_kills.py")


@pytest.mark.parametrize(
    "words", [["--kills", "0", "--every", "6"], ["--kills", "6", "--every", "0"]]
)
def test_every_kill_and_failure_leaves_a_pack_that_goes_on_to_the_same_bytes(
    words: list[str],
) -> None:
    if "0" in words[1] and shutil.which("strace") is None and not os.environ.get("CI"):
        pytest.skip("strace is not installed")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--json", *words], stdout=subprocess.PIPE, check=False
    )
    result = json.loads(done.stdout.splitlines()[-1])
    print({key: value for key, value in result.items() if key != "violations"})
    assert result["violations"] == []
    assert done.returncode == 0
    assert result["kills_at_calls"] + sum(result["kills"].values()) >= 6
    assert result["packs_completed"] >= ("6" in words[1])
