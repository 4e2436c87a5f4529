"""Exports: three plain files that stand alone, committed last, checked before use."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline import checkpoint, export
from pipeline.export import Export, read_export, write_export
from pipeline.models import AutoencoderConfig, Seq2SeqConfig, build_model
from shards import storage
from shards.storage import UserError, load_manifest


@pytest.fixture(scope="module")
def exported(screens_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return write_export(screens_run, "last", tmp_path_factory.mktemp("export") / "out")


@pytest.fixture
def copied(exported: Export, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.folder, tmp_path / "copy"))


def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def body_of(folder: Path) -> dict[str, object]:
    body: dict[str, object] = json.loads((folder / "config.json").read_text())
    return body


def test_other_programs_need_no_pixloom_to_read_it(exported: Export, screens_run: Path) -> None:
    body = body_of(exported.folder)
    settings, image = body["config"]["model"], body["image"]  # type: ignore[index]
    settings["channels"] = tuple(settings["channels"])
    model = build_model(
        Seq2SeqConfig(**settings),
        image_channels=image["channels"],  # type: ignore[index]
        image_height=image["height"],  # type: ignore[index]
        image_width=image["width"],  # type: ignore[index]
        vocab_size=body["vocab_size"],  # type: ignore[arg-type]
    )
    tensors = load_file(exported.folder / "model.safetensors")
    model.load_state_dict(tensors)
    trained = checkpoint.load_tensors(checkpoint.choose(screens_run, "last"))
    assert {f"model/{name}" for name in tensors} == {n for n in trained if n.startswith("model/")}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"model/{name}"]), name


def test_it_says_what_it_is(exported: Export, screens: Path) -> None:
    folder, manifest = exported.folder, load_manifest(str(screens))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    body = body_of(folder)
    assert (body["format"], body["version"], body["step"]) == ("pixloom export", 1, 60)
    assert body["config"]["optim"]["lr"] == 1e-2  # type: ignore[index]
    assert body["files"]["model.safetensors"]["sha256"] == hash_of(folder / "model.safetensors")  # type: ignore[index]
    assert (folder / "tokenizer.json").read_bytes() == (screens / "tokenizer.json").read_bytes()
    assert exported.image == manifest.image
    assert exported.data_digest == manifest.data_digest
    assert manifest.tokenizer is not None
    assert exported.vocab_size == manifest.tokenizer.vocab_size
    assert exported.metrics["samples"] == 5
    assert 0 < exported.metrics["token_accuracy"] < 1
    assert exported.versions.keys() == {"pixloom", "torch"}


def test_it_does_not_say_where_the_run_or_its_dataset_lay(
    exported: Export, screens_run: Path, screens: Path
) -> None:
    text = b"".join(path.read_bytes() for path in exported.folder.iterdir())
    for place in (screens_run, screens, screens.parent.parent):
        assert str(place).encode() not in text
    config = {
        "run": {"dir": "r", "init": "w.pth", "seed": 1},
        "data": {"url": "s3://key:secret@bucket", "mirror": "C:\\data", "lanes": 2},
    }
    assert export._without_places(config) == {"run": {"seed": 1}, "data": {"lanes": 2}}


def test_the_model_is_built_as_it_was(exported: Export, screens_run: Path) -> None:
    model = exported.build_model()
    tensors = checkpoint.load_tensors(checkpoint.choose(screens_run, "last"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[f"model/{name}"]), name


def test_an_autoencoder_s_has_no_tokenizer(pictures_run: Path, tmp_path: Path) -> None:
    found = write_export(pictures_run, "best", tmp_path / "out")
    names = sorted(path.name for path in found.folder.iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert isinstance(found.settings.model, AutoencoderConfig)
    assert (found.vocab_size, found.tokenizer_json) == (None, None)
    assert found.image.encode == "jpeg"
    found.build_model()


def test_any_damage_is_found_and_named(copied: Path) -> None:
    for file in sorted(copied.iterdir()):
        body = file.read_bytes()
        for place in (0, len(body) // 2, len(body) - 3):
            damaged = bytearray(body)
            damaged[place] ^= 1
            file.write_bytes(damaged)
            with pytest.raises(UserError, match=file.name):
                read_export(copied)
        file.unlink()
        with pytest.raises(UserError, match=file.name):
            read_export(copied)
        file.write_bytes(body)
    read_export(copied)


def test_tensors_of_another_model_are_one_line(copied: Path) -> None:
    body = json.loads((copied / "config.json").read_text())
    body["config"]["model"]["hidden_dim"] = 64
    body["digest"] = export._digest_of(body)
    (copied / "config.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match="not the tensors of this model") as caught:
        read_export(copied).build_model()
    assert "\n" not in str(caught.value)


def test_names_in_the_file_lead_nowhere(copied: Path) -> None:
    body = json.loads((copied / "config.json").read_text())
    body["files"]["../secret"] = body["files"].pop("tokenizer.json")
    body["digest"] = export._digest_of(body)
    (copied / "config.json").write_text(json.dumps(body))
    with pytest.raises(UserError, match=r"expected \['model"):
        read_export(copied)


def test_another_export_is_replaced_only_when_asked(
    screens_run: Path, copied: Path, exported: Export
) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in copied.iterdir()}
    write_export(screens_run, "60", copied)
    with pytest.raises(UserError, match="holds another export; give --overwrite"):
        write_export(screens_run, "30", copied)
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in copied.iterdir()}
    assert write_export(screens_run, "30", copied, overwrite=True).step == 30
    assert hash_of(copied / "model.safetensors") != hash_of(exported.folder / "model.safetensors")


def test_what_is_not_an_export_is_never_replaced(screens_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": []}')
    with pytest.raises(UserError, match=r"config\.json: not of a pixloom export"):
        write_export(screens_run, "last", tmp_path, overwrite=True)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model.safetensors").write_text("someone's")
    with pytest.raises(UserError, match=r"holds model\.safetensors, of an export that was killed"):
        write_export(screens_run, "last", tmp_path)
    assert (tmp_path / "model.safetensors").read_text() == "someone's"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_export_that_breaks_off_is_none(
    number: int, screens_run: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even over an older one: its config.json is gone before the first file is replaced."""
    publish, seen = storage.publish, []

    def breaking(scratch: Path, destination: str) -> None:
        seen.append(destination)
        if len(seen) == number:
            raise KeyboardInterrupt
        publish(scratch, destination)

    monkeypatch.setattr(storage, "publish", breaking)
    with pytest.raises(KeyboardInterrupt):
        write_export(screens_run, "30", copied, overwrite=True)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        read_export(copied)
    assert write_export(screens_run, "30", copied, overwrite=True).step == 30
    assert len(list(copied.iterdir())) == 3


def test_another_dataset_than_the_run_s_is_refused(
    screens_run: Path, screens: Path, tmp_path: Path
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(screens_run, run)
    shutil.copytree(screens, data)
    manifest = load_manifest(str(data))
    splits = {name: shards for name, shards in manifest.splits.items() if name != "test"}
    manifest = dataclasses.replace(manifest, splits=splits)
    (data / "manifest.json").write_text(manifest.to_json())
    text = (run / "config.toml").read_text().replace(str(screens), str(data))
    (run / "config.toml").write_text(text)
    with pytest.raises(UserError, match="another dataset"):
        write_export(run, "last", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(screens_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["export", str(screens_run), "--out", str(tmp_path / "out"), "--checkpoint"]
    assert checkpoint.main([*words, "30", "--json"]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["step"], row["export"]) == (30, str(tmp_path / "out"))
    assert checkpoint.main([*words, "31"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("pixloom checkpoint: error: ")
    assert "no checkpoint of step 31; it has 30, 60" in err
    assert len(err.splitlines()) == 1
