"""The README's commands, run as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import cli
from shards import pack, synth

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_verb_is_in_the_readme_and_the_other_way_round() -> None:
    table = README.split("| verb | |")[1].split("\n\n")[0]
    named = set(re.findall(r"^\| `([a-z]+)", table, re.MULTILINE))
    assert named == set(cli.VERBS)


def test_files_that_the_readme_names_exist() -> None:
    for name in re.findall(r"launch/[\w./-]+\.(?:sh|yaml|toml|png)", README):
        assert (ROOT / name).is_file(), name


def test_the_commands_on_your_data(tmp_path: Path) -> None:
    """Every command of "Use it on your data", on a few screens and steps; two CPU processes
    stand in for the node of GPUs."""
    section = README.split("## Use it on your data")[1]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    assert block is not None
    commands = block.group(1).replace("\\\n", " ").splitlines()
    commands = [line for line in commands if line and not line.startswith(("#", "pip install"))]
    assert len(commands) == 9
    assert synth.main([str(tmp_path / "my-screens"), "--samples", "120", "--seed", "9"]) == 0
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command in commands:
        command = command.replace("node.yaml", "cpu2.yaml")
        if "pipeline.train" in command:
            command += " --run.steps 3"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-4000:]}"
    for name in ("sheet.png", "runs/mine/validate-test.json", "runs/mine/report.html"):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "codes").glob("*.gui"))) == 120


def test_the_loop_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python block, on a few screens, with a step that trains nothing."""
    section = README.split("## In your own training loop")[1]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    assert synth.main([str(tmp_path / "raw"), "--samples", "40", "--seed", "9"]) == 0
    words = ["--size", "48x32", "--split", "train=1", "--workers", "0"]
    assert pack.main([str(tmp_path / "raw"), str(tmp_path / "shards" / "mine"), *words]) == 0
    shapes = []

    def train_step(image_BCHW: torch.Tensor, token_BT: torch.Tensor) -> None:
        shapes.append((image_BCHW.dtype, *image_BCHW.shape, len(token_BT)))

    monkeypatch.chdir(tmp_path)
    exec(block.group(1), {"train_step": train_step, "torch": torch})
    assert shapes == [(torch.float32, 8, 3, 224, 224, 8)] * 100
    assert torch.load("state.pt", weights_only=True)["loader"]["step"] == 100
