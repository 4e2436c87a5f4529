"""Images scaled as they are read: the geometry, the error against Pillow, and one size for all
that a run does."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image, ImageOps

from pipeline import build, export, predict, train
from pipeline.config import MAY_CHANGE, config_of, config_of_run
from pipeline.datasets import Datasets
from pipeline.fit import Fit, decode_fitted
from pipeline.loader import Loader
from pipeline.order import validation_batches
from pipeline.stream import BatchPlan
from shards import pack
from shards.storage import UserError

GREEN = (10, 200, 30)


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
    rough = rng.integers(-20, 21, (size[1], size[0], 1))
    return Image.fromarray((np.asarray(smooth).astype(int) + rough).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def fitted(data: bytes, fit: Fit, channels: int = 3) -> np.ndarray:
    out = np.full((fit.height, fit.width, channels), 99, np.uint8)
    decode_fitted(data, fit, out)
    return out


def difference(one: np.ndarray, other: Any) -> np.ndarray:
    return np.abs(one.astype(int) - np.asarray(other).astype(int))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("size", [(300, 200), (64, 48), (20, 90), (7, 5)])
def test_stretching_is_pillow_s_bilinear_within_one_level(size: tuple[int, int], mode: str) -> None:
    image = picture(size).convert(mode)
    found = fitted(encoded(image), Fit(48, 64), len(mode))
    expected = image.resize((64, 48), Image.Resampling.BILINEAR)
    assert difference(found.squeeze(), expected).max() <= 1


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 48), (50, 48)])
def test_cropping_keeps_the_middle(size: tuple[int, int]) -> None:
    image = picture(size)
    found = fitted(encoded(image), Fit(48, 64, "crop"))
    expected = ImageOps.fit(image, (64, 48), Image.Resampling.BILINEAR)
    # Pillow cuts between pixels, we at them: half a pixel of the original apart.
    assert difference(found, expected).mean() < 4


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (64, 48), (50, 20)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_padding_keeps_all_and_paints_the_rest(size: tuple[int, int], kind: str) -> None:
    data = encoded(picture(size), kind)
    image = Image.open(io.BytesIO(data))
    found = fitted(data, Fit(48, 64, "pad", GREEN))
    expected = ImageOps.pad(image, (64, 48), Image.Resampling.BILINEAR, color=GREEN)
    assert difference(found, expected).mean() < 2
    painted = (np.asarray(expected) == GREEN).all(-1)
    assert (found[painted] == GREEN).all()
    assert (found[~painted] != GREEN).any(-1).mean() > 0.99


def test_a_jpeg_scaled_while_decoding_looks_like_one_scaled_after_it() -> None:
    image = picture((1000, 750))
    full = np.asarray(Image.open(io.BytesIO(encoded(image, "JPEG", quality=90))))
    for fit in (Fit(224, 224), Fit(100, 100, "crop"), Fit(90, 200, "pad")):
        found = fitted(encoded(image, "JPEG", quality=90), fit)
        expected = fitted(encoded(Image.fromarray(full)), fit)
        # On pixels rougher than a photograph's, where the two filters differ most.
        assert 0 < difference(found, expected).mean() < 2
        assert difference(found, expected).max() < 16


def test_the_pixels_depend_on_nothing_else() -> None:
    data = encoded(picture((500, 375)), "JPEG")
    alone = fitted(data, Fit(100, 120))
    rows = np.zeros((3, 100, 120, 3), np.uint8)
    decode_fitted(encoded(picture((33, 44))), Fit(100, 120), rows[0])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        decode_fitted(data, Fit(100, 120), rows[1])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(rows[1], alone)
    assert not rows[2].any()


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of twenty sizes, JPEG, PNG and WEBP, packed as they are."""
    folder = tmp_path_factory.mktemp("differing")
    (folder / "raw").mkdir()
    for number in range(20):
        image = picture((60 + 9 * number, 200 - 7 * number), number)
        kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")][number % 3]
        image.save(folder / "raw" / f"{number:02}.{suffix}", kind)
    words = "--kind images --split train=.7,test=.3 --workers 0"
    assert pack.main([str(folder / "raw"), str(folder / "shards"), *words.split()]) == 0
    return folder / "shards"


def test_images_of_differing_size_need_data_size(differing: Path) -> None:
    sections = {"run": {"dir": "-", "steps": 1}, "data": {"url": str(differing)}}
    data = Datasets.open([str(differing)])
    with pytest.raises(UserError, match=r"images differ in size; set data\.size = WxH"):
        build.open_split(config_of(sections, "test"), data, "train")
    with pytest.raises(UserError, match=r"images differ in size; give size = \(width, height\)"):
        Loader(str(differing), batch_size=4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"size": "224"}, r"data\.size = '224': write WxH in pixels"),
        ({"size": "0x4"}, r"data\.size = '0x4'"),
        ({"size": "99999x99999"}, r"data\.size = 99999x99999: more than \d+ pixels"),
        ({"fit": "crop"}, r"data\.fit = crop: needs data\.size"),
        ({"size": "4x4", "fit": "none"}, r"data\.fit = 'none': choose one of stretch, crop, pad"),
    ],
)
def test_a_size_that_is_none_is_refused(data: dict[str, str], message: str) -> None:
    sections = {"run": {"dir": "-", "steps": 1}, "data": {"url": "-", **data}}
    with pytest.raises(UserError, match=message):
        config_of(sections, "test")


def test_neither_key_may_change_on_resume() -> None:
    assert not {"data.size", "data.fit"} & MAY_CHANGE


@pytest.fixture(scope="module")
def run(differing: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = """
    --run.steps 3 --batch.global_size 4 --batch.micro_size 4 --validate.every_steps 3
    --model.name autoencoder --model.channels 8,16 --model.latent_dim 8
    --data.size 48x32 --data.fit crop
    """
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)  # what another run set up
        places = ["--run.dir", str(folder), "--data.url", str(differing)]
        assert train.main([*places, *words.split()]) == 0
    return folder


def test_prediction_and_export_fit_images_as_training_did(
    run: Path, differing: Path, tmp_path: Path
) -> None:
    dataset = build.open_split(config_of_run(run), Datasets.open([str(differing)]), "test")
    assert dataset.image_CHW == (3, 32, 48)
    ids = next(validation_batches(dataset.reader.shard_samples, 99))
    batch = dataset[BatchPlan(step=0, micro=0, first_place=0, ids=ids)]
    assert not batch.bad
    exported = export.write_export(run, "last", tmp_path / "export")
    for trained in (
        predict.Trained.open(run, "last"),
        predict.Trained.open(exported.folder),
    ):
        for place, at in enumerate(zip(ids.shard_G, ids.index_G, strict=True)):
            members = dataset.reader.read(*at).members
            raw = differing.parent / "raw" / json.loads(bytes(members["json"]))["source"]
            pixels = trained.pixels(raw.read_bytes())
            assert np.array_equal(pixels, batch.image_BCHW[place].permute(1, 2, 0).numpy())
        assert trained.reconstructions(["one"], [pixels])[0][0].shape == (32, 48, 3)


def test_an_export_without_the_keys_is_of_the_packed_size(
    pictures_run: Path, tmp_path: Path
) -> None:
    """As exports were before there was data.size."""
    folder = export.write_export(pictures_run, "last", tmp_path / "export").folder
    body = json.loads((folder / export.CONFIG_NAME).read_text())
    for name in ("size", "fit"):
        del body["config"]["data"][name]
    body["digest"] = export._digest_of(body)
    (folder / export.CONFIG_NAME).write_text(json.dumps(body))
    trained = predict.Trained.open(folder)
    assert trained.fit is None
    assert trained.pixels(encoded(picture((90, 90)))).shape == (32, 48, 3)
