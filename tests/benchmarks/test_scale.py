"""Nothing walks an epoch, or a dataset, to stand somewhere in it."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import scale


def test_a_billion_samples_cost_what_a_few_do_wherever_a_run_stands(tmp_path: Path) -> None:
    shards, large, small = 10**5, tmp_path / "large", tmp_path / "small"
    scale.write_manifest(large, 10**9, shards)
    scale.pack_files(small, 160)
    words = [sys.executable, scale.__file__]
    for what, url in ("ids", large), ("batch", small / "shards"), ("eviction", large):
        for place in "0.9", "0":
            words += ["--one", what, str(url), place]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for row in rows[:2]:
        # A permutation of the shards, and one window for each of eight lanes.
        assert row["drawn"] == shards + 8 * 8192
        assert row["grown_MB"] < 100
    for row in rows[2:4]:
        # A permutation of the 40 shards, and for each of two lanes a window of four shards'
        # samples, which lie in five shards at most.
        assert row["drawn"] == 40 + 2 * 4 * 4
        assert 0 < row["opened"] <= 2 * 5
    for row in rows[4:]:
        # 8192 samples each, as far as they lie in shards of four times what the cache holds.
        assert 200 < row["uses"] < 1.1 * 4 * 200 * 10_000 / 8192
        assert row["grown_MB"] < 20
