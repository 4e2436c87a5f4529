"""Images of five channels, from `.npy` files to a trained model and back."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pipeline import predict, report, validate
from pipeline.export import write_export
from pipeline.fit import Fit, FitKind, decode_fitted
from pipeline.loader import Loader
from pipeline.predict import Trained
from shards import arrays, pack
from shards.storage import load_manifest

TrainSmall = Callable[[Path, Path, str], Path]


def picture(number: int, size: tuple[int, int] = (40, 28)) -> np.ndarray:
    """Smooth uint8 (height, width, 5)."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    bands = [np.sin(rows / (2 + at) + number) + np.cos(columns / (3 + number)) for at in range(5)]
    return (np.stack(bands, axis=2) * 60 + 128).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Twenty-four arrays and TIFFs, and the dataset of them; sizes differ."""
    folder = tmp_path_factory.mktemp("arrays")
    (folder / "raw").mkdir()
    for number in range(24):
        pixels = picture(number, (40 + number, 28))
        if number % 2:
            np.save(folder / "raw" / f"{number:02}.npy", pixels)
        else:
            path = folder / "raw" / f"{number:02}.tif"
            options = {"planarconfig": "contig", "photometric": "minisblack"}
            tifffile.imwrite(path, pixels, **options)  # type: ignore[arg-type]
    words = "--channels 5 --split train=rest,val=4,test=4 --shard-samples 7 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "raw", folder / "shards"


def test_five_channels_are_trained_validated_and_predicted(
    folders: tuple[Path, Path],
    tmp_path: Path,
    train_small: TrainSmall,
    capsys: pytest.CaptureFixture[str],
) -> None:
    raw, shards = folders
    words = """
    --data.size 16x12 --data.fit pad --run.steps 2 --batch.global_size 8 --batch.micro_size 4
    --validate.every_steps 2 --model.name autoencoder --model.channels 4,8 --model.latent_dim 4
    """
    run = train_small(tmp_path / "run", shards, words)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert validate.main([str(run), "--split", "test", "--json"]) == 0
    exported = write_export(run, "best", tmp_path / "export").folder
    one = raw / "01.npy"
    for trained in (run, exported):
        out = tmp_path / f"out-{trained.name}"
        capsys.readouterr()
        assert predict.main([str(trained), str(raw), "--out", str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["images"]
        assert len(found) == 24
        rebuilt = np.load(out / "01.npy")
        assert (rebuilt.shape, rebuilt.dtype) == ((12, 16, 5), np.uint8)
        error = (rebuilt - Trained.open(trained).pixels(one.read_bytes()).astype(float)) / 255
        [mse] = [row["mse"] for row in found if row["image"] == str(one)]
        assert np.mean(error**2) == pytest.approx(mse, rel=0.02)
    Image.new("RGB", (40, 28)).save(tmp_path / "rgb.png")
    words_to = [str(run), str(tmp_path / "rgb.png"), "--out", str(tmp_path / "none")]
    assert predict.main(words_to) == 1
    assert "rgb.png: unsupported_format" in capsys.readouterr().err
    assert report.main([str(run), "--split", "test", "--out", str(tmp_path / "report.html")]) == 0


@pytest.mark.parametrize("kind", ["stretch", "crop", "pad"])
def test_every_channel_is_fitted_as_a_grey_image_is(kind: FitKind) -> None:
    pixels = picture(3)
    fit = Fit(20, 20, kind, (10, 200, 30))
    found = np.empty((20, 20, 5), np.uint8)
    decode_fitted(arrays.to_npy(pixels), fit, found)
    for at, value in enumerate(arrays.backgrounds(5, fit.background)):
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels[:, :, at])).save(out, "PNG")
        alone = np.empty((20, 20, 1), np.uint8)
        decode_fitted(out.getvalue(), Fit(20, 20, kind, (value,) * 3), alone)
        assert np.abs(found[:, :, at].astype(int) - alone[:, :, 0]).max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_five_channels(folders: tuple[Path, Path], workers: int) -> None:
    _, shards = folders
    assert load_manifest(str(shards)).image.width is None
    loader = Loader(str(shards), batch_size=4, size=(16, 12), workers=workers, epochs=1, seed=3)
    batches = list(loader)
    assert len(batches) == 4
    for batch in batches:
        assert batch.bad == ()
        assert batch.image_BCHW.shape == (4, 5, 12, 16)
        floats = batch.images(mean=[0.5] * 5, std=[0.25] * 5)
        expected = (batch.image_BCHW.double() / 255 - 0.5) / 0.25
        assert torch.allclose(floats.double(), expected, atol=1e-5)
