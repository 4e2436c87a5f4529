"""What a user can get wrong about a run: one clear line, exit 2, and nothing is lost."""

import dataclasses
import json
import os
import re
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from accelerate.state import AcceleratorState

from pipeline import checkpoint, order, predict, report, train, validate
from pipeline.export import read_export
from pipeline.ranks import Ranks
from pipeline.runlog import RunLog
from shards import pack, synth
from shards.format import TAR_BLOCK_BYTES, parse_index
from shards.storage import load_manifest

TINY = """
--run.steps 3 --run.log_every_steps 1 --batch.global_size 4 --batch.micro_size 2
--model.channels 4,8 --model.hidden_dim 8 --model.embed_dim 4 --checkpoint.every_steps 2
"""
TWO_EPOCHS = 34
"""of the training split of `screens`, in steps"""


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)  # what another test's run set up


def run(folder: Path, data: Path, *flags: object) -> int:
    words = ["--run.dir", folder, "--data.url", data, *TINY.split(), *flags]
    return train.main([str(word) for word in words])


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digests(folder: Path) -> list[tuple[int, str]]:
    """The steps that a run tells of, and its digest after each."""
    rows = [row for row in rows_of(folder) if "order_digest" in row]
    return [(row["step"], row["order_digest"]) for row in rows]


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def trained(cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run(tmp_path / "run", screens) == 0
    capsys.readouterr()
    return tmp_path / "run"


def test_a_folder_without_manifest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", tmp_path) == 2
    line = error_line(capsys)
    assert line.startswith(f"pixloom train: error: {tmp_path}: no packed dataset")
    assert "pixloom pack" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch.global_size", 100], "fewer than one step of batch.global_size = 100"),
        (["--batch.micro_size", 3], "batch.micro_size = 3 does not divide batch.global_size = 4"),
        (["--data.lanes", 3], "data.lanes = 3 does not divide"),
        (["--optim.lrr", 1], "did you mean --optim.lr?"),
        (
            ["--run.resume", "/nowhere"],
            "/nowhere: no checkpoint; one is RUN/checkpoints/step-00001200",
        ),
        (["--validate.metric", "exactmatch"], "validate.metric = exactmatch: choose one of loss, "),
        (["--model.max_tokens", 9], "model.max_tokens = 9 would cut them short"),
        (["--model.encoder", "efficientnet_b0"], "with random weights it sees nothing; set run.i"),
    ],
)
def test_what_does_not_fit(
    flags: list[object],
    message: str,
    screens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(tmp_path / "run", screens, *flags) == 2
    assert message in error_line(capsys)


def test_more_processes_than_microbatches(
    screens: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(tmp_path / "run", screens) == 2
    assert "3 processes, but batch.global_size / batch.micro_size = 2" in error_line(capsys)


def test_code_is_needed_to_learn_code(
    cpu: None, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", pictures) == 2
    assert "this dataset has no tokenizer" in error_line(capsys)


def test_another_configuration_or_dataset_than_the_checkpoint_s(
    trained: Path, pictures: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    assert run(trained, screens, "--optim.lr", 0.5) == 2
    assert "optim.lr: 0.001 -> 0.5" in error_line(capsys)
    other = tmp_path / "other"
    shutil.copytree(screens, other)
    text = (other / "manifest.json").read_text()
    manifest = load_manifest(str(other))
    splits = {name: shards for name, shards in manifest.splits.items() if name != "val"}
    manifest = dataclasses.replace(manifest, splits=splits)
    (other / "manifest.json").write_text(manifest.to_json())
    assert text != manifest.to_json()
    assert run(trained, other) == 2
    assert "was trained on another dataset" in error_line(capsys)
    assert run(trained, screens, "--run.resume", "never") == 2
    assert "run.resume = never" in error_line(capsys)
    assert before == {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}


def test_a_complete_run_finds_nothing_to_do(
    trained: Path, screens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "metrics.jsonl").read_text()
    assert run(trained, screens) == 0
    assert "resumed from step-00000003" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_text() == before


def test_order_proves_offline_what_the_run_saw(
    trained: Path, screens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "split" not in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    for row in steps:
        words = [
            "--config",
            trained / "config.toml",
            "--step",
            row["step"] - 1,
            "--digest",
            "--json",
        ]
        assert order.main([str(word) for word in words]) == 0
        proof = json.loads(capsys.readouterr().out)
        assert proof["order_digest"] == row["order_digest"]
        assert len(set(proof["keys"])) == 4
    sizes = ["--batch.global_size", "4", "--batch.micro_size", "2"]
    assert order.main(["--data.url", str(screens), *sizes, "--step", "0", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["keys"]) == 4
    assert order.main(["--config", str(trained / "config.toml"), "--step", "-1"]) == 2
    assert "--step -1" in error_line(capsys)


def test_validate_names_what_is_missing(
    trained: Path,
    screens: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert validate.main([str(trained), "--split", "tset"]) == 2
    assert "no split 'tset'; it has test, train, val" in error_line(capsys)
    assert validate.main([str(trained), "--data.url", str(pictures)]) == 2
    line = error_line(capsys)
    assert f"{pictures}: no tokenizer; pack images and code with --tokenizer {screens}" in line
    words = [screens.parent / "raw", tmp_path / "chars", "--size", "48x32", "--tokenizer", "char"]
    assert pack.main([*map(str, words), "--workers", "0"]) == 0
    capsys.readouterr()
    assert validate.main([str(trained), "--data.url", str(tmp_path / "chars")]) == 2
    assert "packed with another tokenizer than" in error_line(capsys)
    assert validate.main([str(trained), "--workers", "-1"]) == 2
    assert "--workers -1: 0 for none, or a number of them" in error_line(capsys)
    assert validate.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in error_line(capsys)


def test_validate_on_another_dataset_of_the_same_tokenizer(
    trained: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "more"
    assert synth.main([str(raw), "--samples", "9", "--seed", "77"]) == 0
    words = ["--size", "48x32", "--split", "test=1", "--tokenizer", str(screens / "tokenizer.json")]
    assert pack.main([str(raw), str(out), *words, "--workers", "0"]) == 0
    capsys.readouterr()
    words = ["--split", "test", "--data.url", str(out), "--json"]
    assert validate.main([str(trained), *words]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["samples"] == 9


def test_an_autoencoder_needs_no_code_to_be_validated(
    pictures_run: Path,
    pictures: Path,
    screens: Path,
    tmp_path: Path,
    cpu: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trained on images alone and validated on images with code, and the other way round."""
    on_pairs = tmp_path / "run"
    flags = "--run.steps 1 --model.name autoencoder --model.latent_dim 4 --batch.micro_size 4"
    words = ["--batch.global_size", "4", "--model.channels", "4", *flags.split()]
    places = ["--run.dir", str(on_pairs), "--data.url", str(screens)]
    assert train.main([*places, *words]) == 0
    for run_folder, data in ((pictures_run, screens), (on_pairs, pictures)):
        capsys.readouterr()
        words = ["--split", "test", "--data.url", str(data), "--json"]
        assert validate.main([str(run_folder), *words]) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert row["samples"] == load_manifest(str(data)).num_samples("test")
        assert row["mse"] > 0


def test_damaged_samples_stop_the_run_unless_allowed(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(screens, copy)
    manifest = load_manifest(str(copy))
    for entry in manifest.splits["train"]:
        path = copy / entry.name
        body = bytearray(path.read_bytes())
        for place in range(0, len(body), 4096):
            body[place] ^= 1
        path.write_bytes(body)
    assert run(tmp_path / "stops", copy) == 2
    captured = capsys.readouterr().err
    assert "damaged samples (named above), data.max_bad allows 0" in captured
    assert "train/000000.tar train-" in captured
    assert "CRC-32 differs" in captured
    assert run(tmp_path / "goes", copy, "--data.max_bad", 1000, "--validate.every_steps", 9) == 0
    rows = rows_of(tmp_path / "goes")
    ledger = (tmp_path / "goes/damaged.txt").read_text().splitlines()
    told = [row["bad_samples"] for row in rows if "bad_samples" in row]
    assert len(ledger) == len(set(ledger)) == told[-1] > 0
    assert all("/train/00000" in line and "CRC-32 differs" in line for line in ledger)
    assert run(tmp_path / "clean", screens) == 0
    assert digests(tmp_path / "goes") == digests(tmp_path / "clean"), "damage shifted the order"


@pytest.fixture(scope="module")
def whole_run(
    screens: Path, train_small: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Two epochs that nothing disturbs."""
    words = f"{TINY} --run.steps {TWO_EPOCHS} --checkpoint.every_steps 99"
    return train_small(tmp_path_factory.mktemp("whole") / "run", screens, words)


def damage(root: Path, how: str) -> set[str]:
    """Damages the longest training shard; the samples that this costs, as a ledger names them."""
    entries = load_manifest(str(root)).splits["train"]
    entry = max(entries, key=lambda entry: entry.bytes)
    other = (root / next(each for each in entries if each != entry).name).read_bytes()
    tar, text = root / entry.name, (root / entry.index_name).read_text()
    lost = spans = parse_index(text, entry.index_name)
    if how == "a bit flipped":
        body = bytearray(tar.read_bytes())
        body[spans[3].members[1].offset + 99] ^= 4
        tar.write_bytes(body)
        lost = spans[3:4]
    elif how.startswith("cut"):
        number = how.endswith("inside a sample")
        os.truncate(tar, spans[3].members[number].offset - TAR_BLOCK_BYTES)
        with tarfile.open(tar) as archive:  # to which nothing seems to be missing
            before = sum(len(span.members) for span in spans[:3])
            assert len(archive.getnames()) == before + number
        lost = spans[3:]
    elif how == "missing":
        tar.unlink()
    elif how == "replaced":
        tar.write_bytes(other)
    else:
        assert how == "replaced by one as long"
        tar.write_bytes(other.ljust(entry.bytes, b"\0"))
    return {f"{root}/{entry.name} {span.key}" for span in lost}


@pytest.mark.parametrize(
    "how",
    [
        "a bit flipped",
        "cut between samples",
        "cut inside a sample",
        "missing",
        "replaced",
        "replaced by one as long",
    ],
)
def test_whatever_happens_to_a_shard_no_epoch_is_shorter(
    how: str,
    cpu: None,
    screens: Path,
    whole_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy, folder = tmp_path / "copy", tmp_path / "run"
    shutil.copytree(screens, copy)
    lost = damage(copy, how)
    flags = ["--run.steps", TWO_EPOCHS, "--validate.every_steps", 99, "--checkpoint.every_steps", 9]
    assert run(folder, copy, *flags, "--data.max_bad", len(lost) - 1) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if "error: " in line]
    told = f"{len(lost)} damaged samples (named above), data.max_bad allows {len(lost) - 1}"
    assert told in error
    told_of = [line.split(": ")[2] for line in lines if "its place has weight 0" in line]
    assert sorted(told_of) == sorted(lost)

    # What the checkpoints know of them is not counted again, nor in the second epoch.
    assert run(folder, copy, *flags, "--data.max_bad", len(lost)) == 0
    ledger = (folder / "damaged.txt").read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in ledger) == sorted(lost)
    assert digests(folder) == digests(whole_run)
    assert [step for step, _ in digests(folder)] == list(range(1, TWO_EPOCHS + 1))
    last = [row for row in rows_of(folder) if "order_digest" in row][-1]
    assert last["bad_samples"] == len(lost)


def test_a_damaged_sample_counts_once_and_stays_known_to_a_resumed_run(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(screens, copy)
    with (copy / load_manifest(str(copy)).splits["train"][0].name).open("r+b") as file:
        file.seek(1024)
        file.write(b"damage")
    flags = ["--data.max_bad", 1, "--validate.every_steps", 99]
    assert run(tmp_path / "run", copy, *flags, "--run.steps", 12) == 0, "three epochs"
    assert capsys.readouterr().err.count("its place has weight 0") == 1
    ledger = tmp_path / "run/damaged.txt"
    (line,) = ledger.read_text().splitlines()
    ledger.unlink()
    newest = checkpoint.committed(str(tmp_path / "run/checkpoints"))[-1]
    assert list(checkpoint.Meta.read(newest).state.damaged.values()) == [line]
    assert run(tmp_path / "run", copy, *flags, "--run.steps", 12) == 0
    assert ledger.read_text() == f"{line}\n"


def test_the_ledger_knows_samples_wherever_the_dataset_lies(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "screens: one", tmp_path / "screens: two"
    shutil.copytree(screens, before)
    first, second, *_ = load_manifest(str(before)).splits["train"]
    for entry in first, second:
        with (before / entry.name).open("r+b") as file:
            file.seek(1024)
            file.write(b"damage")
    flags = ["--run.steps", 12, "--validate.every_steps", 99, "--checkpoint.every_steps", 6]
    assert run(tmp_path / "strict", before, *flags, "--data.max_bad", 1) == 2
    assert "2 damaged samples (named above), data.max_bad allows 1" in capsys.readouterr().err

    flags += ["--data.max_bad", 2]
    assert run(tmp_path / "run", before, *flags) == 0, "three epochs"
    ledger = tmp_path / "run/damaged.txt"
    told = ledger.read_text()
    assert len(told.splitlines()) == 2
    before.rename(after)
    shutil.rmtree(checkpoint.committed(str(tmp_path / "run/checkpoints"))[-1])
    assert run(tmp_path / "run", after, *flags) == 0
    assert "resumed from step-00000006" in capsys.readouterr().err
    assert ledger.read_text() == told


def test_early_stopping_stays_stopped(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--validate.every_steps", 1, "--validate.patience", 2, "--optim.lr", 1e-9]
    assert run(tmp_path / "run", screens, *flags, "--run.steps", 30) == 0
    assert "stopping early" in capsys.readouterr().err
    log = (tmp_path / "run/metrics.jsonl").read_text()
    assert json.loads(log.splitlines()[-1])["step"] < 30
    assert run(tmp_path / "run", screens, *flags, "--run.steps", 30) == 0
    assert "stopping early" in capsys.readouterr().err
    assert (tmp_path / "run/metrics.jsonl").read_text() == log


def test_a_damaged_state_is_passed_over_when_configurations_are_compared(
    trained: Path, screens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = Path(checkpoint.committed(str(trained / "checkpoints"))[-1]) / checkpoint.STATE_NAME
    newest.write_text(newest.read_text().replace('"lr": 0.001', '"lr": 0.003'))
    assert run(trained, screens) == 0
    err = capsys.readouterr().err
    assert "step-00000003 does not verify" in err
    assert "resumed from step-00000002" in err


def test_without_any_checkpoint_that_verifies_nothing_is_overwritten(
    trained: Path, screens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in checkpoint.committed(str(trained / "checkpoints")):
        next(Path(path).glob("tensors-*")).write_bytes(b"torn")
    log = (trained / "metrics.jsonl").read_text()
    assert run(trained, screens) == 2
    assert "none of its 2 checkpoints verifies; move them away" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_text() == log


def test_resume_from_a_path_begins_there_and_then_goes_on_by_itself(
    trained: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoint.committed(str(trained / "checkpoints"))[0]
    assert checkpoint.step_of(first) == 2
    for found in ("step-00000002", "step-00000003"):
        assert run(tmp_path / "branch", screens, "--run.resume", first) == 0
        assert f"resumed from {found}" in capsys.readouterr().err


def test_a_trailing_slash_is_no_other_checkpoint(
    trained: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = checkpoint.committed(str(trained / "checkpoints"))[0]
    assert run(tmp_path / "branch", screens, "--run.resume", f"{first}/") == 0
    assert "resumed from step-00000002" in capsys.readouterr().err


def test_checkpoints_elsewhere_are_not_forgotten(
    trained: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another checkpoint.url would begin anew, and cut the log down to nothing."""
    log = (trained / "metrics.jsonl").read_text()
    other = tmp_path / "other"
    assert run(trained, screens, "--checkpoint.url", other) == 2
    assert f"its checkpoints are in {trained / 'checkpoints'}, and" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_text() == log
    shutil.copytree(trained / "checkpoints", other)
    assert run(trained, screens, "--checkpoint.url", other) == 0
    assert "resumed from step-00000003" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_noticed_before_the_first_step(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", screens, "--checkpoint.url", "/proc/nope") == 2
    err = capsys.readouterr().err
    assert "/proc/nope" in err
    assert "step 1" not in err


def test_damage_in_the_validation_split_does_not_lose_what_was_trained(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(screens, copy)
    shard = copy / load_manifest(str(copy)).splits["val"][0].name
    body = bytearray(shard.read_bytes())
    body[1024] ^= 1
    shard.write_bytes(body)
    assert run(tmp_path / "run", copy, "--validate.every_steps", 1) == 2
    err = capsys.readouterr().err
    assert "val/000000.tar val-" in err
    assert "validation counted 4 samples, the manifest says 5" in err
    assert len(checkpoint.committed(str(tmp_path / "run" / "checkpoints"))) == 1


def test_validate_on_images_of_another_size(
    trained: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "larger"
    assert synth.main([str(raw), "--samples", "4", "--seed", "77"]) == 0
    words = ["--size", "64x32", "--split", "test=1", "--tokenizer", str(screens / "tokenizer.json")]
    assert pack.main([str(raw), str(out), *words, "--workers", "0"]) == 0
    capsys.readouterr()
    assert validate.main([str(trained), "--split", "test", "--data.url", str(out)]) == 2
    assert "images of CxHxW (3, 32, 64)" in error_line(capsys)


def test_half_precision_needs_a_gpu(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "run", screens, "--optim.precision", "fp16") == 2
    assert "fp16 needs a GPU" in capsys.readouterr().err
    assert run(tmp_path / "run", screens, "--optim.precision", "bf16") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, it is fp16")
def test_a_run_of_half_precision_is_validated_in_single_without_a_gpu(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(trained), "--split", "test", "--json"]
    assert validate.main(words) == 0
    expected = capsys.readouterr().out
    config = trained / "config.toml"
    single = config.read_text()
    config.write_text(single.replace('precision = "fp32"', 'precision = "fp16"'))
    assert config.read_text() != single
    assert validate.main(words) == 0
    captured = capsys.readouterr()
    assert captured.out == expected
    assert captured.err.startswith("pixloom: optim.precision = fp16 needs a GPU")
    assert len(captured.err.splitlines()) == 1


def test_what_decodes_in_training_has_the_precision_of_training(
    cpu: None, screens: Path, tmp_path: Path
) -> None:
    dtypes: set[torch.dtype] = set()

    def look(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Linear):
            dtypes.add(output.dtype)

    words = ("--optim.precision", "bf16", "--model.risk_weight", 1, "--model.risk_beam", 2)
    hook = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        assert run(tmp_path / "run", screens, *words, "--run.steps", 1) == 0
    finally:
        hook.remove()
    assert dtypes == {torch.bfloat16}


def test_the_speed_of_training_is_without_validation(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Ranks())
    log.count(10, 0.0)
    time.sleep(0.5)
    log.row({"step": 1, "split": "val"}, of=2)
    log.count(10, 0.0)
    assert log.speed()["samples_per_s"] > 100


def test_a_backbone_starts_from_torchvision_s_weights_and_trains(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = tmp_path / "resnet18.pth"
    weights = torchvision.models.resnet18(weights=None).state_dict()
    weights["bn1.running_mean"].uniform_()
    torch.save(weights, init)
    flags = ["--model.encoder", "resnet18", "--run.init", init, "--run.steps", 2]
    assert run(tmp_path / "run", screens, *flags) == 0
    assert f"pixloom: initial weights: 75 of the 102 tensors of {init}" in capsys.readouterr().err
    tensors = checkpoint.load_tensors(checkpoint.choose(tmp_path / "run", "last"))
    assert torch.equal(tensors["model/encoder.bn1.running_mean"], weights["bn1.running_mean"])
    assert not torch.equal(tensors["model/encoder.conv1.weight"], weights["conv1.weight"])
    assert "optimizer/encoder.bn1.weight/exp_avg" not in tensors

    init.unlink()  # a run with checkpoints needs it no more
    assert run(tmp_path / "run", screens, *flags) == 0
    err = capsys.readouterr().err
    assert "resumed from step-00000002" in err
    assert "initial weights" not in err
    assert run(tmp_path / "other", screens, *flags) == 2
    assert "run.init: " in capsys.readouterr().err
    assert run(tmp_path / "run", screens, *flags[:2], *flags[4:]) == 2
    assert f'run.init: "{init}" -> ""' in capsys.readouterr().err


def test_a_run_starts_from_an_export(
    trained: Path, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checkpoint.main(["export", str(trained), "--out", str(tmp_path / "export")]) == 0
    flags = ["--run.init", tmp_path / "export", "--run.steps", 1, "--optim.lr", 1e-30]
    assert run(tmp_path / "second", screens, *flags) == 0
    assert "left out" not in capsys.readouterr().err
    before = checkpoint.load_tensors(checkpoint.choose(trained, "best"))
    after = checkpoint.load_tensors(checkpoint.choose(tmp_path / "second", "last"))
    for name, tensor in before.items():
        assert not name.startswith("model/") or torch.equal(tensor, after[name]), name


def test_a_grammar_s_file_may_move_or_change(
    cpu: None, screens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run keeps its text, and everything that opens the run uses it."""
    own, folder = tmp_path / "own.ebnf", tmp_path / "run"
    text = 'code = "row {" (" text")+ " }" ;\n'
    own.write_text(text)
    assert run(folder, screens, "--validate.grammar", own) == 0
    assert (folder / "grammar.ebnf").read_text() == text
    image = str(screens.parent / "raw" / "000000.png")
    capsys.readouterr()
    assert predict.main([str(folder), image]) == 0
    code = capsys.readouterr().out
    assert re.fullmatch(r"row \{( text)+ \}\n", code)

    other = 'code = "header { btn-active }" ;\n'
    for change in (own.unlink, lambda: own.write_text(other)):
        change()
        capsys.readouterr()
        assert predict.main([str(folder), image]) == 0
        assert capsys.readouterr().out == code
        assert validate.main([str(folder), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["validity"] == 1
        assert report.main([str(folder), "--samples", "1"]) == 0
        words = ["export", str(folder), "--out", str(tmp_path / "export"), "--json"]
        assert checkpoint.main(words) == 0
        assert read_export(tmp_path / "export").grammar == text
    assert predict.main([str(folder), image, "--grammar", str(own)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "header { btn-active }"
    # Training goes by the file, and says that it is another one.
    assert run(folder, screens, "--validate.grammar", own) == 0
    assert f"{own}: another grammar than before" in capsys.readouterr().err
    assert (folder / "grammar.ebnf").read_text() == other


def test_a_backbone_needs_images_that_it_can_see(
    cpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "shards"
    assert synth.main([str(raw), "--samples", "9", "--seed", "1"]) == 0
    words = ["--size", "32x32", "--channels", "4", "--split", "train=1", "--workers", "0"]
    assert pack.main([str(raw), str(out), *words]) == 0
    capsys.readouterr()
    assert run(tmp_path / "run", out, "--model.encoder", "resnet18") == 2
    assert "takes images of 1 or 3 channels, and these have 4" in error_line(capsys)
