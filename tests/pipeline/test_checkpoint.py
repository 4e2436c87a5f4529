"""Checkpoints: committed last, verified, balanced, without pickle."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline import checkpoint
from pipeline.checkpoint import Meta
from pipeline.ranks import Ranks
from pipeline.state import TrainState
from shards.storage import UserError


def meta(step: int, **state: object) -> Meta:
    return Meta(TrainState(step=step, **state), {"run": {"seed": 1}}, "digest", {"torch": "2"})  # type: ignore[arg-type]


def network() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(72, 4))
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def saved(directory: Path, step: int = 3, **state: object) -> Path:
    model, optimizer = network()
    one_step(model, optimizer)
    tensors = checkpoint.tensors_of(model, optimizer)
    return checkpoint.save(directory, tensors, meta(step, **state), Ranks())


def test_what_is_restored_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = network()
    one_step(model, optimizer)
    path = checkpoint.save(tmp_path, checkpoint.tensors_of(model, optimizer), meta(3), Ranks())
    one_step(model, optimizer)
    again, its_optimizer = network()
    checkpoint.restore(again, its_optimizer, checkpoint.load_tensors(path))
    one_step(again, its_optimizer)
    expected = checkpoint.tensors_of(model, optimizer)
    found = checkpoint.tensors_of(again, its_optimizer)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
        assert tensor.stride() == found[name].stride(), name
    assert Meta.read(path) == meta(3)


def test_a_flipped_byte_anywhere_is_found(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert checkpoint.verify(path) == []
    for file in sorted(path.iterdir()):
        body = file.read_bytes()
        for place in {0, len(body) // 3, len(body) // 2, len(body) - 2}:
            damaged = bytearray(body)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            problems = checkpoint.verify(path)
            # White space of COMMIT.json is the one thing that a flip may change unseen.
            assert problems or json.loads(damaged) == json.loads(body), (file.name, place)
            file.write_bytes(body)
    (path / checkpoint.STATE_NAME).unlink()
    assert "state.json: missing" in checkpoint.verify(path)[0]


def test_a_save_that_was_killed_is_not_seen_and_is_cleared(tmp_path: Path) -> None:
    first = saved(tmp_path, step=3)
    torn = saved(tmp_path, step=6)
    (torn / checkpoint.COMMIT_NAME).unlink()
    (torn / "tensors-00001-of-00002.safetensors").write_bytes(b"left by another world size")
    assert checkpoint.committed(tmp_path) == [first]
    assert checkpoint.newest_valid(tmp_path) == first
    again = saved(tmp_path, step=6)
    assert checkpoint.verify(again) == []
    assert sorted(p.name for p in again.iterdir()) == [
        "COMMIT.json",
        "state.json",
        "tensors-00000-of-00001.safetensors",
    ]


def killed_before(number: int, work: Callable[[], object]) -> bool:
    """Does `work` in a forked child that SIGKILLs itself before its `number`-th access to the
    file system; whether it got that far."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, _: object) -> None:
            nonlocal seen
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


def test_a_kill_at_every_access_to_the_file_system_loses_nothing(tmp_path: Path) -> None:
    """Save over an older save of the same step, commit, prune: killed before each open, rename,
    remove. What was committed before stays or is replaced whole, and doing it again succeeds."""
    number, killed = 1, True
    while killed:
        directory = tmp_path / str(number)
        for step in (2, 4, 6):
            saved(directory, step=step)

        def work(directory: Path = directory) -> None:
            saved(directory, step=6)
            saved(directory, step=8)
            checkpoint.prune(directory, step=8, keep_last=1, best_step=4)

        killed = killed_before(number, work)
        newest = checkpoint.newest_valid(directory)
        assert newest is not None
        assert checkpoint.step_of(newest) in (4, 6, 8)
        assert all(not checkpoint.verify(path) for path in checkpoint.committed(directory))
        work()
        assert [checkpoint.step_of(p) for p in checkpoint.committed(directory)] == [4, 8]
        assert sorted(p.name for p in directory.iterdir()) == ["step-00000004", "step-00000008"]
        number += 1
    print(f"killed at {number - 2} places")
    assert number > 30


def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path) -> None:
    first, second = saved(tmp_path, step=3), saved(tmp_path, step=6)
    (second / checkpoint.STATE_NAME).write_text("{}")
    lines: list[str] = []
    assert checkpoint.newest_valid(tmp_path, lines.append) == first
    assert "step-00000006 does not verify" in lines[0]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8):
        saved(tmp_path, step=step)
    (checkpoint.path_of(tmp_path, 5) / checkpoint.COMMIT_NAME).unlink()
    checkpoint.prune(tmp_path, step=8, keep_last=2, best_step=2)
    assert [checkpoint.step_of(p) for p in checkpoint.committed(tmp_path)] == [2, 6, 8]
    assert not checkpoint.path_of(tmp_path, 5).exists(), "what a killed save left stays for ever"


def test_prune_after_a_fall_back_keeps_what_was_just_saved(tmp_path: Path) -> None:
    for step in (9, 10, 3):
        saved(tmp_path, step=step)
    checkpoint.prune(tmp_path, step=3, keep_last=1, best_step=None)
    assert [checkpoint.step_of(p) for p in checkpoint.committed(tmp_path)] == [3, 9, 10]


def test_a_file_that_the_commit_does_not_name_is_not_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = checkpoint.load_tensors(path)
    stray = next(path.glob("tensors-*")).with_name("tensors-00009-of-00010.safetensors")
    stray.write_bytes(b"not even safetensors")
    assert checkpoint.verify(path) == []
    assert checkpoint.load_tensors(path).keys() == before.keys()


def test_choose_best_last_or_a_step(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        saved(directory, step=step, best_step=4)
    assert checkpoint.step_of(checkpoint.choose(tmp_path, "best")) == 4
    assert checkpoint.step_of(checkpoint.choose(tmp_path, "last")) == 6
    assert checkpoint.step_of(checkpoint.choose(tmp_path, "2")) == 2
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 2, 4, 6"):
        checkpoint.choose(tmp_path, "5")
    with pytest.raises(UserError, match="no committed checkpoint"):
        checkpoint.choose(tmp_path / "nowhere", "best")


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    tensors = checkpoint.load_tensors(saved(tmp_path))
    with pytest.raises(UserError, match=r"tensor weight does not fit"):
        checkpoint.restore(nn.Linear(72, 4), None, tensors)
    model, _ = network()
    with pytest.raises(UserError, match=r"lacks: model/more"):
        checkpoint.restore(model, None, {**tensors, "model/more": torch.ones(1)})


@given(st.dictionaries(st.text(min_size=1), st.integers(0, 10**6), min_size=1), st.integers(1, 9))
def test_partition_gives_each_tensor_to_one_rank_and_balances(
    sizes: dict[str, int], parts: int
) -> None:
    lists = checkpoint.partition(sizes, parts)
    assert sorted(name for names in lists for name in names) == sorted(sizes)
    totals = [sum(sizes[name] for name in names) for names in lists]
    assert max(totals) - min(totals) <= max(sizes.values())


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    for file in saved(tmp_path).iterdir():
        assert file.suffix in (".json", ".safetensors")
        assert not file.read_bytes().startswith((b"\x80", b"PK"))


def test_the_command_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "checkpoints", best_step=3)
    assert checkpoint.main(["ls", str(tmp_path)]) == 0
    assert "best" in capsys.readouterr().out
    assert checkpoint.main(["verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    (path / checkpoint.STATE_NAME).write_text("{}")
    assert checkpoint.main(["verify", str(tmp_path)]) == 1
    assert "sha256 differs" in capsys.readouterr().out
    assert checkpoint.main(["ls", str(tmp_path / "nowhere")]) == 2
