"""The campaign of kills under streaming in short; 60 of them are in the benchmarks' results."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("stream_kills.py")


def test_whoever_is_killed_every_step_sees_the_samples_of_the_order() -> None:
    words = ["--kills", "4", "--steps", "24", "--seed", "1", "--json"]
    done = subprocess.run([sys.executable, SCRIPT, *words], stdout=subprocess.PIPE, check=False)
    result = json.loads(done.stdout.splitlines()[-1])
    print({key: value for key, value in result.items() if key != "violations"})
    assert result["violations"] == []
    assert done.returncode == 0
    assert sum(result["kills"].values()) >= 4
    assert result["runs_completed"] >= 1
    assert result["steps_compared"] > 24
    assert sum(result["faults"].values()) > 0
    # With room for all of them, each shard is downloaded once.
    assert 0 < result["downloads_undisturbed"] <= result["shards"]
    assert 0 < result["most_cached_bytes"] <= result["cache_bytes"]
