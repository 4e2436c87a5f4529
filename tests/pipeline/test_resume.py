"""Resuming: the newest checkpoint that verifies, and nothing in one that could run code."""

import json
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from servers import put
from torch import nn

from pipeline import checkpoint, dcp, resume
from pipeline.checkpoint import Meta
from pipeline.config import Config, config_of
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from pipeline.state import TrainState
from shards import storage
from shards.storage import UserError


class Parts:
    """A run of one linear layer, and what resuming it needs."""

    def __init__(self, folder: Path, url: str = "") -> None:
        sections = {
            "run": {"dir": str(folder), "steps": 9},
            "data": {"url": "nowhere"},
            "checkpoint": {"url": url},
        }
        self.config: Config = config_of(sections, "test")
        self.directory = resume.directory_of(self.config)
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.log = RunLog(folder, Ranks())

    def save(self, step: int) -> str:
        nn.init.constant_(self.model.weight, step)
        self.model(torch.ones(1, 3)).sum().backward()
        self.optimizer.step()
        tensors = checkpoint.tensors_of(self.model, self.optimizer)
        chunks = dcp.Stage().copy(dcp.owned(tensors, 0, 1))
        meta = Meta(TrainState(step=step), {}, "", {})
        return checkpoint.save(self.directory, chunks, meta, Ranks())

    def restore(self) -> TrainState:
        found = checkpoint.committed(self.directory)[::-1]
        state, _ = resume.restore_newest(
            found, self.config, Ranks(), self.log, self.model, self.optimizer
        )
        return state


@pytest.fixture
def parts(tmp_path: Path) -> Parts:
    return Parts(tmp_path)


def test_every_flipped_byte_makes_resume_fall_back_and_say_so(
    parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    parts.save(4)
    older = {name: t.clone() for name, t in parts.model.state_dict().items()}
    newest = Path(parts.save(6))
    flips = 0
    for file in sorted(newest.iterdir()):
        body = file.read_bytes()
        for place in range(len(body)):
            damaged = bytearray(body)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            nn.init.zeros_(parts.model.weight)
            assert parts.restore().step == 4, (file.name, place)
            assert all(torch.equal(t, older[n]) for n, t in parts.model.state_dict().items())
            err = capsys.readouterr().err
            assert f"step-00000006 does not verify ({newest / file.name}" in err
            assert "resumed from step-00000004" in err
            flips += 1
        file.write_bytes(body)
    assert parts.restore().step == 6
    print(f"{flips} flips, each one passed over")


def test_nothing_that_verifies_is_an_error_and_nothing_is_touched(parts: Parts) -> None:
    newest = Path(parts.save(4))
    (newest / checkpoint.STATE_NAME).write_text("{}")
    with pytest.raises(UserError, match="none of its 1 checkpoints verifies; move them away"):
        parts.restore()
    assert newest.exists()


@pytest.mark.parametrize("store", ["seaweedfs", "moto", "fake_gcs", "azurite"])
def test_in_a_bucket_of_any_kind(
    store: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Saved, pruned, found, damaged and passed over, restored, without a trace on this disk."""
    server = request.getfixturevalue(store)
    url = f"{server.url}/runs/mine"
    parts = Parts(tmp_path, url)
    for step in (2, 4, 6):
        parts.save(step)
    expected = {name: t.clone() for name, t in parts.model.state_dict().items()}
    checkpoint.prune(url, step=6, keep_last=2)
    assert [checkpoint.step_of(found) for found in checkpoint.committed(url)] == [4, 6]
    nn.init.zeros_(parts.model.weight)
    assert parts.restore().step == 6
    assert all(torch.equal(t, expected[n]) for n, t in parts.model.state_dict().items())

    name = next(n for n in storage.list_files(url) if n.startswith("step-00000006/tensors-"))
    damaged = bytearray(storage.read_bytes(f"{url}/{name}"))
    damaged[-1] ^= 1
    put(f"{url}/{name}", bytes(damaged))
    assert parts.restore().step == 4
    assert "step-00000006 does not verify" in capsys.readouterr().err
    (tmp_path / "config.toml").write_text(f'[checkpoint]\nurl = "{url}"\n')
    assert checkpoint.main(["verify", str(tmp_path)]) == 1
    assert "sha256 differs" in capsys.readouterr().out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["config.toml"]

    monkeypatch.setenv("PIXLOOM_STORAGE_DEADLINE_S", "2")
    for variable, value in server.environment.items():  # nobody is there
        monkeypatch.setenv(variable, value.replace(server.endpoint, "http://127.0.0.1:9"))
    with pytest.raises(UserError, match=r"runs/mine"):
        parts.restore()
    assert checkpoint.main(["verify", str(tmp_path)]) == 2, "unreachable is not damaged"


class Canary:
    """Unpickling one leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[tuple[bytes, Path]]:
    """A pickle, and the file that its unpickling makes. Ends by showing that it does."""
    path = tmp_path / "canary"
    body = pickle.dumps(Canary(path))
    yield body, path
    assert not path.exists(), "a pickle was executed"
    pickle.loads(body)
    assert path.exists(), "the canary is dead"


def recommit(folder: Path) -> None:
    """What somebody who can write to the folder would do: a commit that fits its files."""
    commit = folder / checkpoint.COMMIT_NAME
    body = json.loads(commit.read_text())
    body.pop("digest")
    for path in folder.iterdir():
        if path != commit:
            sha256 = checkpoint.sha256_of(path)
            body["files"][path.name] = {"sha256": sha256, "bytes": path.stat().st_size}
    commit.write_text(checkpoint._commit_text(body))


def test_no_pickle_in_a_checkpoint_is_ever_executed(
    parts: Parts, canary: tuple[bytes, Path], tmp_path: Path
) -> None:
    """In place of each file, beside them under the names that other software unpickles, and as a
    tensor's bytes and a header's text; each also under a commit that verifies."""
    body, _ = canary
    unpickled: list[str] = []

    def watch(event: str, words: tuple[object, ...]) -> None:
        if event == "pickle.find_class" and watching:
            unpickled.append(str(words))

    watching = True
    sys.addaudithook(watch)
    beside = [".metadata", "__0_0.distcp", "model.pt", "pytorch_model.bin", "optimizer.bin",
              "random_states_0.pkl", "custom_checkpoint_0.pkl", "scheduler.bin", "state.pkl",
              "more.safetensors"]  # fmt: skip
    names = ["COMMIT.json", "state.json", "tensors", "tensor's bytes", "header", *beside]
    for number, name in enumerate(names):
        for committed in (False, True):
            run = Parts(tmp_path / f"{number}-{committed}")
            folder = Path(run.save(4))
            tensors = next(folder.glob("tensors-*"))
            if name == "tensor's bytes":
                values = torch.frombuffer(bytearray(body), dtype=torch.uint8)
                save_file({"model/weight": values}, tensors)
            elif name == "header":
                text = body.hex()
                save_file({"model/weight": torch.ones(2, 3)}, tensors, {"chunks": text, "a": text})
            else:
                (tensors if name == "tensors" else folder / name).write_bytes(body)
            if committed and name != "COMMIT.json":
                recommit(folder)
            checkpoint.verify(str(folder))
            outcomes = []
            for load in (
                run.restore,
                lambda folder=folder: checkpoint.load_tensors(str(folder)),
                lambda folder=folder: Meta.read(str(folder)),
                lambda run=run: checkpoint.choose(Path(run.config.run.dir), "last"),
            ):
                try:
                    load()
                    outcomes.append("loaded")
                except UserError:
                    outcomes.append("refused")
            stray = name in beside and name != "more.safetensors"
            assert (outcomes == ["loaded"] * 4) == (stray or (name in beside and not committed)), (
                name, committed, outcomes,
            )  # fmt: skip
    watching = False
    assert unpickled == []
