"""How long training waits for a checkpoint, against `torch.save` of the same state by rank 0.

    python tests/benchmarks/checkpoint.py                two processes, 1 GB of model and optimizer

Each round does one of the two, then the other, into the same folder. `torch.save` is timed from
one barrier to the next, for all ranks wait for it; pixloom until the slowest rank may go on, and
apart from that until the checkpoint is committed. Memory is what a rank's resident set grows by
from before a saver is made until its first checkpoint is written, before the first `torch.save`.
`--json` prints one JSON object on stdout's last line.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import multiprocessing

sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not an installed pixloom

from pipeline import checkpoint
from pipeline.config import config_of
from pipeline.models import Seq2SeqConfig, build_model
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from pipeline.saver import Saver
from pipeline.state import TrainState
from pipeline.stop import StopRequest

MODEL = Seq2SeqConfig(hidden_dim=2048, latent_dim=2048, embed_dim=512)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; what the figures are worth is the caller's business."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda")
    parser.add_argument("--folder", type=Path, help="on the disk to measure [a temporary one]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = (port, arguments.processes, arguments.rounds, arguments.device, folder)
        multiprocessing.start_processes(  # type: ignore[no-untyped-call]
            measure, words, nprocs=arguments.processes, start_method="spawn"
        )
        result = json.loads(Path(folder, "result.json").read_text())
    if arguments.json:
        print(json.dumps(result))
    else:
        print("\n".join(f"{name:24} {value}" for name, value in result.items()))
    return 0


@dataclass
class Rounds:
    """Seconds of each round, the slowest rank's."""

    torch_save_s: list[float]
    blocked_s: list[float]
    committed_s: list[float]


def measure(rank: int, port: int, world_size: int, rounds: int, device: str, folder: str) -> None:
    """One rank's part; rank 0 writes FOLDER/result.json."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    torch.manual_seed(0)
    model = build_model(MODEL, image_channels=3, image_height=96, image_width=160, vocab_size=512)
    model.to(where)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    tensors = checkpoint.tensors_of(model, optimizer)
    state_bytes = sum(tensor.nbytes for tensor in tensors.values())

    ranks, run = Ranks.of_run(), Path(folder)
    config = config_of(
        {
            "run": {"dir": folder, "steps": 1},
            "data": {"url": ""},
            "checkpoint": {"keep_last": 1},
        },
        "benchmark",
    )
    log = RunLog(run, ranks)
    times = Rounds([], [], [])

    def save(step: int) -> tuple[float, float]:
        meta = checkpoint.Meta(TrainState(step=step), {}, "", {})
        ranks.barrier()
        start_s = time.perf_counter()
        saver.save(checkpoint.tensors_of(model, optimizer), meta)
        blocked_s = time.perf_counter() - start_s
        saver.finish()
        return blocked_s, time.perf_counter() - start_s

    with Growth() as growth:
        saver = Saver(config, Ranks.of_run(), log, StopRequest(0), set(), tensors)
        first_blocked_s, _ = save(1)
    for step in range(2, rounds + 2):
        ranks.barrier()
        start_s = time.perf_counter()
        if rank == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, run / "plain.pt")
        ranks.barrier()
        times.torch_save_s.append(slowest(ranks, time.perf_counter() - start_s))
        if rank == 0:
            (run / "plain.pt").unlink()
        blocked_s, committed_s = save(step)
        times.blocked_s.append(slowest(ranks, blocked_s))
        times.committed_s.append(slowest(ranks, committed_s))
    grown = torch.zeros(world_size, dtype=torch.int64)
    grown[rank] = growth.peak_bytes
    ranks.sum(grown)
    first_blocked_s = slowest(ranks, first_blocked_s)
    if rank == 0:
        last = Path(checkpoint.committed(str(run / "checkpoints"))[-1])
        files = [path.stat().st_size for path in last.glob("tensors-*")]
        plain_s = statistics.median(times.torch_save_s)
        result: dict[str, Any] = {
            "state_GB": round(state_bytes / 1e9, 3),
            "of_torch_save": round(statistics.median(times.blocked_s) / plain_s, 4),
            "first_of_torch_save": round(first_blocked_s / plain_s, 4),
            "extra_memory_of_state": [round(b / state_bytes, 3) for b in grown.tolist()],
            "largest_over_smallest_file": round(max(files) / min(files), 4),
            "rounds": asdict(times),
            "processes": world_size,
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        }
        (run / "result.json").write_text(json.dumps(result))
    ranks.barrier()
    dist.destroy_process_group()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)


class Growth:
    """The most that this process's resident memory grew by inside the block."""

    def __enter__(self) -> "Growth":
        self.peak_bytes = 0
        self._process = psutil.Process()
        self._before_bytes = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            grown = self._process.memory_info().rss - self._before_bytes
            self.peak_bytes = max(self.peak_bytes, grown)


def slowest(ranks: Ranks, value_s: float) -> float:
    values = torch.zeros(ranks.world_size, dtype=torch.float64)
    values[ranks.rank] = value_s
    return float(ranks.sum(values).max())


if __name__ == "__main__":
    sys.exit(main())
