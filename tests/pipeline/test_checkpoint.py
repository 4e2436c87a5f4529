"""Checkpoints: committed last, verified, balanced, without pickle."""

import itertools
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

from pipeline import checkpoint, dcp
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


def save(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Meta) -> Path:
    chunks = dcp.Stage().copy(dcp.owned(checkpoint.tensors_of(model, optimizer), 0, 1))
    return Path(checkpoint.save(str(directory), chunks, meta, Ranks()))


def saved(directory: Path, step: int = 3, **state: object) -> Path:
    model, optimizer = network()
    one_step(model, optimizer)
    return save(directory, model, optimizer, meta(step, **state))


def steps_of(directory: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.committed(str(directory))]


def newest_valid(directory: Path) -> int:
    valid = [p for p in checkpoint.committed(str(directory)) if not checkpoint.verify(p)]
    return checkpoint.step_of(valid[-1])


def test_what_is_restored_goes_on_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = network()
    one_step(model, optimizer)
    path = save(tmp_path, model, optimizer, meta(3))
    one_step(model, optimizer)
    again, its_optimizer = network()
    checkpoint.restore(path, again, its_optimizer)
    one_step(again, its_optimizer)
    expected = checkpoint.tensors_of(model, optimizer)
    found = checkpoint.tensors_of(again, its_optimizer)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
        assert tensor.stride() == found[name].stride(), name
    assert Meta.read(str(path)) == meta(3)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    """Each byte of each file in turn, COMMIT.json's white space too; one bit, then all eight."""
    linear = nn.Linear(3, 2)
    path = save(tmp_path, linear, torch.optim.SGD(linear.parameters()), meta(3))
    assert checkpoint.verify(str(path)) == []
    flips = 0
    for file in sorted(path.iterdir()):
        body = file.read_bytes()
        for place, mask in itertools.product(range(len(body)), (1, 0xFF)):
            damaged = bytearray(body)
            damaged[place] ^= mask
            file.write_bytes(damaged)
            problems = checkpoint.verify(str(path))
            assert problems, (file.name, place)
            assert "step-00000003" in problems[0]
            flips += 1
        file.write_bytes(body)
    assert checkpoint.verify(str(path)) == []
    print(f"{flips} flips found")
    (path / checkpoint.STATE_NAME).unlink()
    assert "state.json: missing" in checkpoint.verify(str(path))[0]


def test_a_save_that_was_killed_is_not_seen_and_is_cleared(tmp_path: Path) -> None:
    first = saved(tmp_path, step=3)
    torn = saved(tmp_path, step=6)
    (torn / checkpoint.COMMIT_NAME).unlink()
    (torn / "tensors-00001-of-00002.safetensors").write_bytes(b"left by another world size")
    assert checkpoint.committed(str(tmp_path)) == [str(first)]
    again = saved(tmp_path, step=6)
    assert checkpoint.verify(str(again)) == []
    names = sorted(p.name for p in again.iterdir())
    assert names[:2] == ["COMMIT.json", "state.json"]
    assert len(names) == 3
    assert names[2].startswith("tensors-00000-of-00001-")


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
            saved(directory, step=step, best_step=4)
        next((directory / "step-00000006").glob("tensors-*")).write_bytes(b"damaged")

        def work(directory: Path = directory) -> None:
            saved(directory, step=6, best_step=4)
            saved(directory, step=8, best_step=4)
            checkpoint.prune(str(directory), step=8, keep_last=1)

        killed = killed_before(number, work)
        assert newest_valid(directory) in (4, 6, 8)
        work()
        assert all(not checkpoint.verify(path) for path in checkpoint.committed(str(directory)))
        assert steps_of(directory) == [4, 8]
        assert sorted(p.name for p in directory.iterdir()) == ["step-00000004", "step-00000008"]
        number += 1
    print(f"killed at {number - 2} places")
    assert number > 30


def test_prune_keeps_the_newest_the_best_and_every_nth(tmp_path: Path) -> None:
    for step in (2, 4, 5, 6, 8, 10):
        saved(tmp_path, step=step, best_step=2)
    (tmp_path / "step-00000005" / checkpoint.COMMIT_NAME).unlink()
    checkpoint.prune(str(tmp_path), step=10, keep_last=2, keep_every=4)
    assert steps_of(tmp_path) == [2, 4, 8, 10]
    assert not (tmp_path / "step-00000005").exists(), "what a killed save left stays for ever"
    checkpoint.prune(str(tmp_path), step=10, keep_last=1)
    assert steps_of(tmp_path) == [2, 10]


def test_prune_keeps_the_best_that_there_is_when_a_better_one_could_not_be_saved(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "checkpoints"
    for step, best in ((1, 1), (2, 2), (3, 2), (6, 4), (8, 4)):
        saved(directory, step=step, best_step=best)
    checkpoint.prune(str(directory), step=8, keep_last=1)
    assert steps_of(directory) == [2, 8]
    assert checkpoint.step_of(checkpoint.choose(tmp_path, "best")) == 2


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (8, 9, 10, 12):
        saved(tmp_path, step=step)
    checkpoint.prune(str(tmp_path), step=12, keep_last=2, damaged={10})
    assert steps_of(tmp_path) == [9, 12]


def test_a_good_checkpoint_of_the_same_step_is_not_written_again(tmp_path: Path) -> None:
    first = saved(tmp_path, step=4)
    before = sorted((p.name, p.stat().st_mtime_ns) for p in first.iterdir())
    saved(tmp_path, step=4)
    assert sorted((p.name, p.stat().st_mtime_ns) for p in first.iterdir()) == before
    saved(tmp_path, step=4, order_digest="of another run")
    assert sorted((p.name, p.stat().st_mtime_ns) for p in first.iterdir()) != before


def test_a_file_that_cannot_be_read_is_a_problem_not_a_traceback(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (path / checkpoint.STATE_NAME).unlink()
    (path / checkpoint.STATE_NAME).mkdir()
    assert checkpoint.verify(str(path)) == [f"{path}/state.json: Is a directory"]
    (path / checkpoint.COMMIT_NAME).unlink()
    (path / checkpoint.COMMIT_NAME).mkdir()
    assert "COMMIT.json: Is a directory" in checkpoint.verify(str(path))[0]


def test_files_can_be_read_by_whom_any_other_file_can(tmp_path: Path) -> None:
    modes = {path.name[:6]: path.stat().st_mode for path in saved(tmp_path).iterdir()}
    assert modes["tensor"] == modes["state."] == modes["COMMIT"]


def test_prune_after_a_fall_back_keeps_what_was_just_saved(tmp_path: Path) -> None:
    for step in (9, 10, 3):
        saved(tmp_path, step=step)
    checkpoint.prune(str(tmp_path), step=3, keep_last=1)
    assert steps_of(tmp_path) == [3, 9, 10]


def test_a_file_that_the_commit_does_not_name_is_not_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path)
    before = checkpoint.load_tensors(str(path))
    stray = next(path.glob("tensors-*")).with_name("tensors-00009-of-00010.safetensors")
    stray.write_bytes(b"not even safetensors")
    assert checkpoint.verify(str(path)) == []
    assert checkpoint.load_tensors(str(path)).keys() == before.keys()


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
    path = saved(tmp_path)
    model, _ = network()
    model[0] = nn.Conv2d(3, 9, 3)  # type: ignore[index]
    with pytest.raises(UserError, match=r"tensor model/0\.weight does not fit"):
        checkpoint.restore(path, model, None)
    with pytest.raises(UserError, match=r"lacks: model/"):
        checkpoint.restore(path, nn.Linear(72, 4), None)


@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.integers(0, 300)).map(lambda t: (t[0], t[0] * t[1])),
        max_size=12,
    ),
    st.integers(1, 9),
)
def test_each_row_is_one_ranks_and_bytes_are_balanced(
    sizes: list[tuple[int, int]], world_size: int
) -> None:
    named = {str(number): size for number, size in enumerate(sizes)}
    shares = [dcp.cut(named, rank, world_size) for rank in range(world_size)]
    loads = [0] * world_size
    for name, (rows, num_bytes) in named.items():
        seen = []
        for rank, share in enumerate(shares):
            start, stop = share.get(name, (0, 0))
            seen += range(start, stop)
            loads[rank] += num_bytes * (stop - start) // max(rows, 1)
        assert seen == (list(range(rows)) if num_bytes else [])
    widest = max((num_bytes // rows for rows, num_bytes in sizes if rows), default=0)
    assert max(loads) - min(loads) <= 2 * widest + 2


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
