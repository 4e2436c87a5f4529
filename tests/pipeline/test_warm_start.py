"""Initial weights: torchvision's and our own fit by name and shape, and no file is ever run."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from pipeline.config import config_of_run
from pipeline.datasets import Datasets
from pipeline.export import write_export
from pipeline.models import AutoencoderConfig, Seq2Seq, Seq2SeqConfig, build_model
from pipeline.ranks import Ranks
from pipeline.warm_start import begin_from, warm_start
from shards.storage import UserError

BACKBONES = ("resnet18", "resnet50", "efficientnet_b0")
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def seq2seq(encoder: str, channels: int = 3) -> Seq2Seq:
    config = Seq2SeqConfig(encoder=encoder, embed_dim=8, latent_dim=8, hidden_dim=16)  # type: ignore[arg-type]
    torch.manual_seed(1)
    model = build_model(
        config, image_channels=channels, image_height=40, image_width=56, vocab_size=9
    )
    assert isinstance(model, Seq2Seq)
    return model


def classifier(name: str) -> nn.Module:
    """torchvision's own, with statistics as after some training."""
    torch.manual_seed(2)
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1)
            nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval()


def grid_of(model: nn.Module, image_BCHW: Tensor) -> Tensor:
    """The features of torchvision's model where its stride is 16."""
    feature_BFHW = (image_BCHW - MEAN[:, None, None]) / STD[:, None, None]
    if hasattr(model, "features"):
        return model.features[:6](feature_BFHW)  # type: ignore[index, operator, no-any-return]
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3"):
        feature_BFHW = getattr(model, name)(feature_BFHW)
    return feature_BFHW


def write(model: nn.Module, path: Path) -> Path:
    tensors = model.state_dict()
    if path.suffix == ".pth":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return path


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", BACKBONES)
def test_a_state_dict_of_torchvision_gives_torchvision_s_features(
    name: str, suffix: str, tmp_path: Path
) -> None:
    whole = classifier(name)
    model = seq2seq(name)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = warm_start(model, write(whole, tmp_path / f"weights{suffix}"))
    encoder = {name for name in before if name.startswith("encoder.")}
    assert set(report.taken) == encoder
    for key, tensor in model.state_dict().items():
        assert key in encoder or torch.equal(tensor, before[key]), key
    image_BCHW = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        expected_BFHW = grid_of(whole, image_BCHW)
        found_BFHW = model.eval().encoder(image_BCHW)
    assert found_BFHW.shape[2:] == (3, 4)
    torch.testing.assert_close(found_BFHW, expected_BFHW, rtol=1e-5, atol=1e-5)


def test_the_report_counts_and_names(tmp_path: Path) -> None:
    path = write(classifier("resnet18"), tmp_path / "weights.pth")
    report = warm_start(seq2seq("resnet18"), path)
    assert report.line == (
        f"initial weights: 75 of the 102 tensors of {path}, for 75 of the model's 96; left out: "
        "layer4.0.conv1.weight, layer4.0.bn1.weight, layer4.0.bn1.bias and 24 more"
    )


def test_grey_images_are_shown_in_three_channels() -> None:
    grey, colour = seq2seq("resnet18", channels=1).eval(), seq2seq("resnet18").eval()
    image_B1HW = torch.rand(2, 1, 40, 56)
    token_BT = torch.randint(0, 9, (2, 4))
    expected_BTV = colour(image_B1HW.expand(-1, 3, -1, -1), token_BT)
    torch.testing.assert_close(grey(image_B1HW, token_BT), expected_BTV)
    with pytest.raises(ValueError, match='"resnet18" takes images of 1 or 3 channels'):
        seq2seq("resnet18", channels=4)


@pytest.mark.parametrize("name", BACKBONES)
def test_gradients_reach_the_first_convolution_and_normalisation_stays(
    name: str, tmp_path: Path
) -> None:
    model = seq2seq(name).train()
    warm_start(model, write(classifier(name), tmp_path / "weights.safetensors"))
    frozen = {n: b.clone() for n, b in model.named_buffers()}
    assert any("running_var" in name for name in frozen)
    assert set(frozen) >= {n for n in model.state_dict() if "running_" in n}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(torch.rand(2, 3, 40, 56), torch.randint(0, 9, (2, 4))).square().sum().backward()
    first = next(model.encoder.parameters())
    assert first.shape[1:] in ((3, 7, 7), (3, 3, 3))
    assert first.grad is not None
    assert first.grad.abs().max() > 0
    optimizer.step()
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, frozen[key]), key


def test_initial_weights_are_those_of_the_seed() -> None:
    one, other = seq2seq("efficientnet_b0"), seq2seq("efficientnet_b0")
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_an_export_starts_another_run(screens_run: Path, tmp_path: Path) -> None:
    export = write_export(screens_run, "last", tmp_path / "export")
    trained = export.build_model()
    for path in (export.folder, export.folder / "model.safetensors"):
        model = export.build_model()
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        report = warm_start(model, path)
        assert (len(report.taken), report.left_out) == (len(model.state_dict()), ())
        assert "left out" not in report.line
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained.state_dict()[name]), name
    (export.folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: sha256 differs"):
        warm_start(trained, export.folder)


def test_an_export_with_another_tokenizer_gives_nothing_that_is_a_token_s(
    screens_run: Path, tmp_path: Path
) -> None:
    export = write_export(screens_run, "last", tmp_path / "export")
    entry = Datasets.of(config_of_run(screens_run).data).tokenizer
    assert entry is not None
    assert warm_start(export.build_model(), export.folder, entry).left_out == ()
    other = replace(entry, sha256="0" * 64)
    model = export.build_model()
    report = warm_start(model, export.folder, other)
    assert set(report.left_out) == {"embedding.weight", "head.weight", "head.bias"}
    assert set(report.taken) == set(model.state_dict()) - set(report.left_out)
    assert "left out: " in report.line


def test_what_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tensors = {
        "0.weight": torch.ones(4, 3, dtype=torch.float16),
        "0.bias": torch.ones(4, dtype=torch.int64),
        "1.weight": torch.ones(2, 5),
        "1.bias": torch.ones(2).to_sparse(),
    }
    torch.save(tensors, tmp_path / "weights.pt")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = warm_start(model, tmp_path / "weights.pt")
    assert (report.taken, report.left_out) == (("0.weight",), ("0.bias", "1.weight", "1.bias"))
    assert torch.equal(model[0].weight, torch.ones(4, 3))
    for name in report.left_out:
        assert torch.equal(model.state_dict()[name], before[name])


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("forced", [False, True])
def test_no_pickle_is_run(forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if forced:  # torch's own switch against weights_only
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary = Canary(tmp_path / "sung")
    honest = nn.Linear(2, 2).state_dict()
    for name in ("plain.pth", "plain.pt", "plain.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps({**honest, "weight": canary}))
    torch.save({**honest, "more": canary}, tmp_path / "zip.pth")
    (tmp_path / "zip.safetensors").write_bytes((tmp_path / "zip.pth").read_bytes())
    torch.save(canary, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    names = ["plain.pth", "plain.pt", "plain.safetensors", "zip.pth", "zip.safetensors", "old.pth"]
    for name in names:
        model = nn.Linear(2, 2)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match=f"{name}: not a file of tensors alone") as caught:
            warm_start(model, tmp_path / name)
        assert "\n" not in str(caught.value)
        assert not canary.path.exists(), name
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    pickle.loads((tmp_path / "plain.pth").read_bytes())
    assert canary.path.exists(), "the canary sings when it is let out"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.pth", None, "no such file or folder"),
        ("weights.npz", b"PK", "name an export's folder, a .safetensors file, or a .pth"),
        ("weights.pth", b"", "not a file of tensors alone"),
        ("weights.safetensors", b"\xff" * 64, "not a file of tensors alone"),
        ("list.pth", [torch.ones(1)], "not a state dict of named tensors"),
        ("nested.pth", {"model": {"weight": torch.ones(2, 2)}}, "not a state dict of named"),
        ("empty.pth", {}, "none of its 0 tensors fits"),
        ("other.pth", {"weight": torch.ones(3)}, r"none of its 1 tensors fits.*\(it has weight; t"),
    ],
)
def test_a_file_that_is_of_no_use_is_one_line(
    name: str, content: object, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=rf"^run\.init: {path}: .*{message}") as caught:
        warm_start(nn.Linear(2, 2), path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no export \(config\.json is missing\)"):
        warm_start(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize("name", BACKBONES)
def test_torchvision_s_own_weights_come_from_its_cache(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    url = torchvision.models.get_model_weights(name).DEFAULT.url
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    whole = classifier(name)
    write(whole, cache / url.rpartition("/")[2])
    model = seq2seq(name)
    report = begin_from("torchvision", model.config, model, Ranks())
    assert f" tensors of torchvision's {report.source.split()[1]}, for" in report.line
    for key, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key]), key


def test_without_network_or_cache_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody is there
    model = seq2seq("resnet18")
    with pytest.raises(
        UserError, match=r"cannot be had \(URLError\); .* set run\.init to a copy"
    ) as caught:
        begin_from("torchvision", model.config, model, Ranks())
    assert f"{tmp_path}/hub/checkpoints/resnet18-" in str(caught.value)
    assert "\n" not in str(caught.value)
    (tmp_path / "hub/checkpoints").mkdir(parents=True, exist_ok=True)
    file = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    canary = Canary(tmp_path / "sung")
    (tmp_path / "hub/checkpoints" / file).write_bytes(pickle.dumps({"conv1.weight": canary}))
    with pytest.raises(UserError, match="cannot be had"):
        begin_from("torchvision", model.config, model, Ranks())
    assert not canary.path.exists()


def test_a_model_without_an_encoder_of_torchvision_s() -> None:
    for config in (Seq2SeqConfig(), AutoencoderConfig()):
        with pytest.raises(UserError, match=r"set model\.encoder = resnet18"):
            begin_from("torchvision", config, nn.Linear(1, 1), Ranks())
