"""Two nodes as two network namespaces on one machine, each with a cache and a line of its own."""

import contextlib
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import FaultyProxy, Server, put_tree

from shards import pack

ROOT = Path(__file__).parents[2]
CLONE_NEWNET = 0x40000000
NUM_SAMPLES, SHARD_SAMPLES, LANES, GLOBAL_SIZE = 256, 8, 4, 8
STEPS = NUM_SAMPLES // GLOBAL_SIZE
"""one epoch"""


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two namespaces joined by a cable, 10.213.7.1 and 10.213.7.2."""
    names = [f"pixloom-{os.getpid()}-{node}" for node in range(2)]
    cable = [f"px{os.getpid()}n{node}" for node in range(2)]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in names:
            ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespace can be made here: {error}")
    try:
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for node, name in enumerate(names):
            ip("link", "set", cable[node], "netns", name)
            ip("-n", name, "link", "set", cable[node], "name", "cable")
            ip("-n", name, "address", "add", f"10.213.7.{node + 1}/24", "dev", "cable")
            for device in ("cable", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Sockets that this thread makes in the block belong to `namespace`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as own:
        with Path("/run/netns", namespace).open() as other:
            assert libc.setns(other.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            assert libc.setns(own.fileno(), CLONE_NEWNET) == 0


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """256 small images in 32 shards: a lane of a quarter ends where a shard ends."""
    raw, out = tmp_path / "raw", tmp_path / "pictures"
    raw.mkdir()
    for number in range(NUM_SAMPLES):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(raw / f"{number:03d}.png")
    words = ["--size", "16x16", "--split", "train=1", "--shard-samples", str(SHARD_SAMPLES)]
    assert pack.main([str(raw), str(out), *words, "--workers", "0"]) == 0
    return out


def digests(run: Path) -> dict[int, str]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["order_digest"] for row in rows if "order_digest" in row}


def test_each_node_downloads_its_own_lanes_and_the_order_is_one_node_s(
    namespaces: list[str],
    pictures: Path,
    seaweedfs: Server,
    tmp_path: Path,
    make_config: Callable[..., Path],
) -> None:
    url = f"{seaweedfs.url}/pictures"
    put_tree(pictures, url)
    config = make_config(
        "small",
        "autoencoder",
        run={"steps": STEPS},
        data={"lanes": LANES, "window": 16, "workers": 1, "shift_px": 0},
        batch={"global_size": GLOBAL_SIZE, "micro_size": 2},
        checkpoint={"every_steps": STEPS},
    )

    def words(data: str, run: Path) -> list[str]:
        flags = ["--config", str(config), "--data.url", data, "--run.dir", str(run)]
        return [sys.executable, "-W", "error", "-m", "pipeline.train", *flags]

    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        words(str(pictures), tmp_path / "one"), cwd=ROOT, env=environment, check=True, timeout=120
    )

    with contextlib.ExitStack() as stack:
        proxies = []
        for name in namespaces:
            proxy = FaultyProxy(seaweedfs.endpoint, listening=inside(name))
            proxies.append(stack.enter_context(proxy))
        processes = []
        for rank in range(4):
            node = rank // 2
            added = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank % 2),
                "GROUP_RANK": str(node),
                "WORLD_SIZE": "4",
                "LOCAL_WORLD_SIZE": "2",
                "GROUP_WORLD_SIZE": "2",
                "MASTER_ADDR": "10.213.7.1",
                "MASTER_PORT": "29512",
                "GLOO_SOCKET_IFNAME": "cable",
                **seaweedfs.through(proxies[node]).environment,
            }
            enter = ["nsenter", f"--net=/run/netns/{namespaces[node]}"]
            flags = ["--data.cache_dir", str(tmp_path / f"cache-{node}")]
            processes.append(
                subprocess.Popen(
                    [*enter, *words(url, tmp_path / "two"), *flags],
                    cwd=ROOT,
                    env=environment | added,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            said = [process.communicate(timeout=180)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * 4, "\n".join(said)
        downloads = [
            {path.rpartition("/")[2]: n for path, n in p.gets.items() if path.endswith(".tar")}
            for p in proxies
        ]
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert set(downloads[0]).isdisjoint(downloads[1])
    assert [set(node.values()) for node in downloads] == [{1}, {1}], "each shard once"
    assert sum(map(len, downloads)) == NUM_SAMPLES // SHARD_SAMPLES
