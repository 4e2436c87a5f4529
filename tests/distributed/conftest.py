"""Real processes over gloo, started one by one so that a test can kill exactly those it wants.

They are forked by a server that has imported torch: a process that starts anew, as launchers start
it, is the subject of other tests.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from faults.fork_server import ForkServer

from shards import pack, synth


class Job:
    """One process a rank. Output goes to a file a rank, shown when a job fails."""

    def __init__(
        self,
        module: str,
        words: list[str],
        world_size: int,
        logs: Path,
        environment: Mapping[str, str],
        server: ForkServer,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank-{rank}.log" for rank in range(world_size)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            rank_environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "ACCELERATE_USE_CPU": "true",
                **environment,
            }
            self.processes.append(server.start(words, rank_environment, log, module))

    def wait(self, timeout_s: float = 240) -> list[int]:
        """Exit statuses by rank; a rank that does not end in time fails the test."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            if not process.ends_within(max(0.1, deadline - time.monotonic())):
                pytest.fail(f"a rank hangs\n{self.output()}")
        return [process.wait() for process in self.processes]

    def succeed(self) -> None:
        assert self.wait() == [0] * len(self.processes), self.output()

    def kill(self, ranks: list[int] | None = None) -> None:
        """SIGKILL, to all ranks unless some are named."""
        killed = self.processes if ranks is None else [self.processes[rank] for rank in ranks]
        for process in killed:
            process.kill()
        for process in killed:
            process.wait()

    def alive(self) -> bool:
        return any(not process.ends_within(0) for process in self.processes)

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()}" for log in self.logs)


StartJob = Callable[..., Job]


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    with ForkServer() as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, fork_server: ForkServer) -> Iterator[StartJob]:
    """Starts `module` on `world_size` ranks; what still runs at the end is killed.

    `environment` is added to theirs, as a launcher would.
    """
    jobs: list[Job] = []

    def start_job(
        module: str,
        *words: object,
        world_size: int,
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        logs = tmp_path / f"job-{len(jobs)}"
        texts = [str(word) for word in words]
        jobs.append(Job(module, texts, world_size, logs, environment or {}, fork_server))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.kill()


@pytest.fixture(scope="session")
def screens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of screens: 29 of them (a prime) in the test split; small images."""
    folder = tmp_path_factory.mktemp("screens")
    assert synth.main([str(folder / "raw"), "--samples", "130", "--seed", "5"]) == 0
    words = "--size 80x48 --split train=rest,val=5,test=28 --shard-samples 29 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"


@pytest.fixture
def make_config(tmp_path: Path, screens: Path) -> Callable[..., Path]:
    """Writes the TOML file of a small run; keyword arguments are sections that add to it."""

    def write(name: str, model_name: str = "seq2seq", /, **sections: dict[str, Any]) -> Path:
        small: dict[str, dict[str, Any]] = {
            "run": {"seed": 11, "steps": 40, "log_every_steps": 1},
            "data": {"url": str(screens), "window": 16, "shift_px": 2},
            "batch": {"global_size": 8, "micro_size": 2},
            "model": {"name": model_name, "channels": [8, 16]}
            | (
                {"hidden_dim": 32, "embed_dim": 16}
                if model_name == "seq2seq"
                else {"latent_dim": 16}
            ),
            # 1e-3 is chaotic: rounding grows 5000 times in 40 steps, in undisturbed runs as well.
            "optim": {"lr": 3e-4, "warmup_steps": 5},
            "validate": {"every_steps": 1000, "batch_size": 4},
            "checkpoint": {"every_steps": 4, "keep_last": 3},
        }
        for section, values in sections.items():
            small[section] = {**small[section], **values}
        path = tmp_path / f"{name}.toml"
        path.write_text(
            "\n".join(
                f"[{section}]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items())
                for section, values in small.items()
            )
        )
        return path

    return write
