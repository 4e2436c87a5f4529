"""The demo: shard, train on several processes, kill, resume on another number, validate.

    bash launch/demo.sh        the same, after installing

A second call re-uses what is there. Every command is printed before it runs.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

CONFIG = Path(__file__).parent / "configs" / "demo.toml"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every stage; returns the exit status of the first that fails."""
    parser = argparse.ArgumentParser(prog="demo.sh", description="The whole path, once.")
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="folder to work in [demo]")
    folder: Path = parser.parse_args(argv).dir
    try:
        run(folder)
    except subprocess.CalledProcessError as error:
        print(f"demo: this command failed with status {error.returncode}:\n  {_shown(error.cmd)}")
        return 1
    return 0


def run(folder: Path) -> None:
    """Data, shards, a run that is killed and resumed, metrics, pictures."""
    screens, shards, training = folder / "screens", folder / "shards", folder / "run"
    _say("1. Draw 1500 screens with their code, and pack them into shards")
    _call("-m", "shards.synth", screens, "--samples", 1500, "--seed", 0)
    _call("-m", "shards.pack", screens, shards, "--size", "160x96",
          "--split", "train=rest,val=50,test=150", "--shard-samples", 256)  # fmt: skip
    _call("-m", "shards.verify", shards)

    gpus = torch.cuda.device_count()
    config = tomllib.loads(CONFIG.read_text())
    # One GPU has no other number of processes to go on with: NCCL wants a GPU for each.
    many = min(gpus, config["batch"]["global_size"]) or 2
    other = max(1, many - 1) if gpus else 3
    total = config["run"]["steps"]
    done = _last_commit(training)
    if done < total:
        _say(f"2. Train on {many} process(es); SIGKILL all of them halfway")
        if done < total // 2:
            _train_and_kill(training, shards, many, at_step=total // 2)
        done = _last_commit(training)
        _say(f"3. Resume from step {done}, on {other} process(es)")
        subprocess.run(_training(training, shards, other), env=_environment(), check=True)
    else:
        _say(f"2. The run in {training} is complete ({done} steps): nothing to train")

    _say("4. Validate on the test split: programs that training never saw")
    _call("-m", "pipeline.validate", training, "--split", "test")
    result = json.loads((training / "validate-test.json").read_text())
    _say("5. Show what came of it")
    _call("-m", "shards.show", shards, "--out", folder / "sheet.png")
    _call("-m", "pipeline.report", training, "--split", "test", "--out", folder / "report.html")
    print(
        f"\nexact match on {result['samples']:.0f} unseen programs: {result['exact_match']:.3f}\n\n"
        "Look at\n"
        f"  {folder / 'report.html'}          all of it on one page: open it in a browser\n"
        f"  {folder / 'sheet.png'}            what was packed\n"
        f"  {training / 'metrics.jsonl'}    one row a logged step, across the kill\n"
        f"  {training / 'checkpoints'}      committed checkpoints, safetensors and JSON\n"
        f"  {shards / 'manifest.json'}  what the dataset is"
    )


def _train_and_kill(training: Path, shards: Path, processes: int, at_step: int) -> None:
    """Starts training, waits until a checkpoint behind it and `at_step` is logged, kills all."""
    launcher = subprocess.Popen(_training(training, shards, processes), env=_environment())
    try:
        while launcher.poll() is None and _last_row(training).get("step", 0) < at_step:
            time.sleep(0.2)
        if launcher.poll():
            raise subprocess.CalledProcessError(launcher.returncode, launcher.args)
    finally:
        # The launcher first, or it would see its workers die and clean up.
        tree = [psutil.Process(launcher.pid)] if launcher.poll() is None else []
        tree += [child for process in tree for child in process.children(recursive=True)]
        for process in tree:
            os.kill(process.pid, signal.SIGKILL)
        psutil.wait_procs(tree)
    print(f"\n*** SIGKILL to {len(tree)} processes after step {_last_row(training)['step']} ***")


def _training(training: Path, shards: Path, processes: int) -> list[str]:
    several = ["--multi_gpu"] if processes > 1 else []
    # A microbatch for every process: the largest size of which there are enough in a step.
    batch = tomllib.loads(CONFIG.read_text())["batch"]
    most = min(batch["micro_size"], batch["global_size"] // max(torch.cuda.device_count(), 1))
    micro_size = max(d for d in range(1, most + 1) if batch["global_size"] % d == 0)
    command = [
        shutil.which("accelerate") or "accelerate", "launch", *several,
        "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0",
        "-m", "pipeline.train", "--config", str(CONFIG),
        "--run.dir", str(training), "--data.url", str(shards),
        "--batch.micro_size", str(micro_size),
    ]  # fmt: skip
    print(f"$ {'' if torch.cuda.is_available() else 'ACCELERATE_USE_CPU=true '}{_shown(command)}")
    return command


def _environment() -> dict[str, str]:
    return {**os.environ, **({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})}


def _last_commit(training: Path) -> int:
    """The step of the newest committed checkpoint, or 0."""
    commits = training.glob("checkpoints/step-*/COMMIT.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in commits), default=0)


def _last_row(training: Path) -> dict[str, Any]:
    try:
        lines = (training / "metrics.jsonl").read_text().splitlines()
        row: dict[str, Any] = json.loads(lines[-1])
    except (OSError, IndexError, ValueError):
        return {}
    return row


def _call(*words: object) -> None:
    print(f"$ {_shown(['python', *map(str, words)])}", flush=True)
    subprocess.run([sys.executable, *map(str, words)], check=True)


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)


def _shown(command: Sequence[str]) -> str:
    return " ".join(Path(word).name if word.endswith("/accelerate") else word for word in command)


if __name__ == "__main__":
    sys.exit(main())
