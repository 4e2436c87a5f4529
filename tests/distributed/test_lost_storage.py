"""Where storage fails under a run: a full disk, a bucket behind a bad line, a bucket lost."""

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import FaultyProxy, Server, s3_client

from pipeline import checkpoint


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with room for one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def steps_of(directory: str | Path) -> list[int]:
    return [checkpoint.step_of(found) for found in checkpoint.committed(str(directory))]


def test_a_full_disk_costs_checkpoints_not_the_run(
    start: Callable[..., Any], make_config: Callable[..., Path], small_disk: Path
) -> None:
    """Log and checkpoints lie on it, as they do by default."""
    config = make_config("run", checkpoint={"keep_last": 1, "every_steps": 16})
    run = small_disk / "run"
    directory = run / "checkpoints"
    words = ["--config", config, "--run.dir", run]
    job = start("pipeline.train", *words, world_size=2)
    assert job.wait() == [2, 2], job.output()
    output = job.output()
    assert "step 40/40" in output, "the run did not go on"
    assert output.count("warning: the checkpoint of step 32 could not be saved: ") == 1
    assert re.search(r"error: the checkpoint of step 40 could not be saved: .*space", output)
    assert "Traceback" not in output
    assert steps_of(directory) == [16]
    assert checkpoint.verify(checkpoint.path_of(str(directory), 16)) == []
    assert [path.name for path in directory.iterdir()] == ["step-00000016"]

    stopped = start("pipeline.train", *words, "--checkpoint.on_error", "stop", world_size=2)
    assert stopped.wait() == [2, 2]
    assert "step 40/40" not in stopped.output()
    assert steps_of(directory) == [16]

    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    start("pipeline.train", *words, world_size=1).succeed()
    assert steps_of(directory)[-1] == 40
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    assert [row["step"] for row in rows if "split" not in row] == list(range(1, 41))


def test_a_run_lives_in_a_bucket(
    start: Callable[..., Any],
    make_config: Callable[..., Path],
    tmp_path: Path,
    seaweedfs: Server,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two ranks save through resets, refusals and lost replies, three go on; equal to local."""
    config = make_config("run")
    url = f"{seaweedfs.url}/checkpoints"
    words = ["--config", config, "--run.steps", 8]
    start("pipeline.train", *words, "--run.dir", tmp_path / "local", world_size=2).succeed()
    run = tmp_path / "run"
    words += ["--run.dir", run, "--checkpoint.url", url]
    with FaultyProxy(seaweedfs.endpoint, seed=1) as proxy:
        environment = seaweedfs.through(proxy).environment
        for fault in ("unavailable", "reset", "lost_reply", "cut_reply"):
            proxy.inject(fault, 0.07)
        stopped = [*words, "--checkpoint.every_steps", 2]
        start(
            "tests.distributed.stop_at", 5, *stopped, world_size=2, environment=environment
        ).succeed()
        start("pipeline.train", *words, world_size=3, environment=environment).succeed()
        assert proxy.counts.total() > 5
    assert steps_of(url) == [4, 5, 8]
    assert checkpoint.main(["verify", str(run)]) == 0
    assert "verified" in capsys.readouterr().out
    local = checkpoint.load_tensors(checkpoint.committed(str(tmp_path / "local/checkpoints"))[-1])
    remote = checkpoint.load_tensors(checkpoint.committed(url)[-1])
    assert local.keys() == remote.keys()
    for name, tensor in local.items():
        assert torch.allclose(tensor, remote[name], rtol=1e-4, atol=1e-6), name
    assert not [path for path in run.rglob("*") if path.is_file() and path.suffix != ".toml"
                and path.name not in ("metrics.jsonl", ".lock")]  # fmt: skip
    client = s3_client(seaweedfs)
    left = client.list_multipart_uploads(Bucket=url.split("/")[2]).get("Uploads", [])
    assert left == []


def test_an_upload_that_dies_commits_nothing_and_leaves_nothing(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path, seaweedfs: Server
) -> None:
    """Killed while both ranks upload files of several parts; the next save clears what is left."""
    url, client = f"{seaweedfs.url}/dies", s3_client(seaweedfs)
    bucket = {"Bucket": url.split("/")[2]}
    config = make_config("run", model={"hidden_dim": 512, "latent_dim": 1024})
    words = ["--config", config, "--run.dir", tmp_path / "run", "--run.steps", 4]
    words += ["--checkpoint.url", url, "--checkpoint.every_steps", 2]
    with FaultyProxy(seaweedfs.endpoint) as proxy:
        proxy.inject("stall", on={"part"})
        environment = seaweedfs.through(proxy).environment
        job = start("pipeline.train", *words, world_size=2, environment=environment)
        while proxy.stalled < 2:
            assert job.alive(), job.output()
            time.sleep(0.01)
        job.kill()
    left = client.list_multipart_uploads(**bucket).get("Uploads", [])
    assert left, "the kill came too late to show anything"
    assert steps_of(url) == []
    start("pipeline.train", *words, world_size=1).succeed()
    assert steps_of(url) == [2, 4]
    assert client.list_multipart_uploads(**bucket).get("Uploads", []) == []
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".safetensors"]


def test_a_bucket_that_is_lost_under_way(
    start: Callable[..., Any], make_config: Callable[..., Path], tmp_path: Path, seaweedfs: Server
) -> None:
    url = f"{seaweedfs.url}/lost"
    config = make_config("run", checkpoint={"every_steps": 16, "url": url})
    words = ["--config", config, "--run.dir", tmp_path / "run"]
    with FaultyProxy(seaweedfs.endpoint) as proxy:
        environment = {
            **seaweedfs.through(proxy).environment,
            "PIXLOOM_STORAGE_CONNECT_S": "1",
            "PIXLOOM_STORAGE_DEADLINE_S": "5",
        }
        job = start("pipeline.train", *words, world_size=2, environment=environment)
        while not steps_of(url):
            assert job.alive(), job.output()
            time.sleep(0.01)
    assert job.wait() == [2, 2], job.output()
    output = job.output()
    assert "step 40/40" in output, "the run did not go on"
    assert "warning: the checkpoint of step 32 could not be saved" in output
    assert "error: the checkpoint of step 40 could not be saved" in output
    assert "Traceback" not in output
    assert steps_of(url) == [16]
    assert checkpoint.verify(checkpoint.path_of(url, 16)) == []
    start("pipeline.train", *words, world_size=1).succeed()
    assert steps_of(url)[-1] == 40
