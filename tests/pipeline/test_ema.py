"""Averaged weights: their arithmetic, that a run is judged and used by them, and resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pipeline import checkpoint, validate
from pipeline.build import load_model
from pipeline.config import config_of_run
from pipeline.datasets import Datasets
from pipeline.ema import Ema
from pipeline.export import write_export
from pipeline.predict import Trained

WORDS = """
--run.steps 6 --batch.global_size 8 --batch.micro_size 4 --checkpoint.every_steps 1
--checkpoint.keep_last 9 --model.channels 4,8 --model.hidden_dim 8 --model.embed_dim 4
--optim.lr 1e-2 --optim.ema_decay 0.25 --validate.every_steps 6 --optim.schedule onecycle
--optim.warmup_steps 2 --model.sampling_share 0.5 --model.sampling_start 0
"""


def test_the_average_by_hand_and_the_model_as_it_was() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, 0.5)
    expected = 1.0
    for num_updates, (value, decay) in enumerate(
        [(2.0, 2 / 11), (3.0, 3 / 12), (4.0, 4 / 13), *[(5.0, 0.5)] * 9], start=1
    ):
        if num_updates > 3:
            decay = min(0.5, (1 + num_updates) / (10 + num_updates))
        nn.init.constant_(model.weight, value)
        ema.update(num_updates)
        expected = decay * expected + (1 - decay) * value
        assert ema.average["weight"].item() == pytest.approx(expected)
    with ema.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 5.0
    assert ema.average["weight"].item() == pytest.approx(expected)
    assert Ema(model, 0.0).average == {}


@pytest.fixture(scope="module")
def run(
    screens: Path,
    tmp_path_factory: pytest.TempPathFactory,
    train_small: Callable[[Path, Path, str], Path],
) -> Path:
    return train_small(tmp_path_factory.mktemp("ema") / "run", screens, WORDS)


def tensors_by_step(run: Path) -> dict[int, dict[str, Tensor]]:
    found = checkpoint.committed(str(run / "checkpoints"))
    return {checkpoint.step_of(path): checkpoint.load_tensors(path) for path in found}


def parts(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {n.removeprefix(kind): tensor for n, tensor in tensors.items() if n.startswith(kind)}


def test_checkpoints_hold_the_average_of_what_they_held_before(run: Path) -> None:
    steps = tensors_by_step(run)
    assert sorted(steps) == [1, 2, 3, 4, 5, 6]
    for step in range(2, 7):
        decay = min(0.25, (1 + step) / (10 + step))
        weights, before = parts(steps[step], "model/"), parts(steps[step - 1], "ema/")
        average = parts(steps[step], "ema/")
        assert average.keys() == weights.keys()
        for name, tensor in average.items():
            assert torch.equal(tensor, before[name].lerp(weights[name], 1 - decay)), name
        assert not torch.equal(average["head.weight"], weights["head.weight"])


def test_it_is_what_is_validated_exported_and_used(run: Path, tmp_path: Path) -> None:
    average = parts(tensors_by_step(run)[6], "ema/")
    config = config_of_run(run)
    data = Datasets.of(config.data)
    exported = write_export(run, "last", tmp_path / "export")
    for model in (
        load_model(config, data, checkpoint.choose(run, "last")),
        exported.build_model(),
        Trained.open(run).model.cpu(),
    ):
        assert all(torch.equal(t, average[name]) for name, t in model.state_dict().items())
    logged = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert validate.main([str(run), "--split", "val"]) == 0
    found = json.loads((run / "validate-val.json").read_text())
    assert found["loss"] == logged["loss"]
    assert exported.metrics["loss"] == logged["loss"]


def test_a_run_that_resumes_is_the_run_that_never_stopped(
    run: Path, screens: Path, tmp_path: Path, train_small: Callable[[Path, Path, str], Path]
) -> None:
    """Bit for bit: weights, averages, moments; with tokens sampled along the way."""
    shutil.copytree(run, tmp_path / "resumed")
    for path in checkpoint.committed(str(tmp_path / "resumed" / "checkpoints"))[3:]:
        shutil.rmtree(path)
    resumed = train_small(tmp_path / "resumed", screens, WORDS)
    expected, found = (tensors_by_step(one)[6] for one in (run, resumed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    losses = [
        [json.loads(line)["loss"] for line in (one / "metrics.jsonl").read_text().splitlines()]
        for one in (run, resumed)
    ]
    assert losses[0] == losses[1]


def test_averages_that_are_missing_are_named(
    screens: Path, screens_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of_run(screens_run)
    model = load_model(config, Datasets.of(config.data), checkpoint.choose(screens_run, "last"))
    folder = Path(checkpoint.choose(screens_run, "last"))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(checkpoint.UserError, match=r"tensor ema/\S+ does not fit the model"):
        checkpoint.restore(folder, model, optimizer, Ema(model, 0.9))
