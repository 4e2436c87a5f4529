"""Latents of a split: rows that match validation, and pictures of what they say."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from pipeline import latents, predict, validate
from pipeline.batch import RawSample
from pipeline.latents import Encoder, Neighbours
from pipeline.stream import SampleReader
from shards.storage import load_manifest


def call(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    capsys.readouterr()
    status = latents.main([*map(str, words), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out or "{}"), captured.err


def metrics_of(run: Path, split: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert validate.main([str(run), "--split", split, "--json"]) == 0
    metrics: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return metrics


def test_rows_are_the_split_in_order_and_their_means_its_metrics(
    precise_run: tuple[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    precision, run = precise_run
    metrics = metrics_of(run, "train", capsys)
    words = [run, "--split", "train", "--out"]
    status, row, _ = call(capsys, *words, tmp_path / "a.npz")
    assert status == 0
    total = load_manifest(str(pictures)).num_samples("train")
    assert (row["samples"], row["latent_shape"]) == (total, [16])
    with np.load(tmp_path / "a.npz", allow_pickle=False) as saved:
        arrays = {name: saved[name] for name in saved}
    assert arrays["latent"].shape == (total, 16)
    assert arrays["latent"].dtype == np.float32
    assert float(arrays["mse"].mean()) == pytest.approx(metrics["mse"], rel=1e-6)
    assert float(arrays["score"].mean()) == pytest.approx(metrics["loss"], rel=1e-6)

    encoder = Encoder.open(run, "best", "train")
    reader = encoder.dataset.reader
    places = [(shard, at) for shard, n in enumerate(reader.shard_samples) for at in range(n)]
    assert arrays["key"].tolist() == [reader.key(*place) for place in places]
    assert len(set(arrays["key"].tolist())) == total
    for name in arrays["source"].tolist():
        assert (pictures.parent / "raw" / name).is_file()
    picked = [total - 1, 3]
    found = encoder.at(picked).rows.latent_BD.numpy()
    # In bf16, the products of another batch size may round otherwise.
    atol = 0.0 if precision == "fp32" else 0.02 * float(np.abs(arrays["latent"]).max())
    np.testing.assert_allclose(found, arrays["latent"][picked], rtol=1e-5, atol=atol)

    assert call(capsys, *words, tmp_path / "a.parquet", "--workers", 2)[0] == 0
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["key", "source", "mse", "score", "latent"]
    for name in ("key", "source", "mse", "score"):
        assert table[name].to_pylist() == arrays[name].tolist()
    assert np.array_equal(np.stack(table["latent"].to_numpy()), arrays["latent"])
    assert json.loads(table.schema.metadata[b"latent_shape"]) == [16]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.parquet"]


def test_pictures_show_samples_of_the_split(
    pictures_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    between, nearest = tmp_path / "between.png", tmp_path / "new" / "nearest.png"
    words = [pictures_run, "--split", "train", "--interpolate", between]
    assert call(capsys, *words, "--neighbours", nearest, "--distance", "cosine")[0] == 0
    encoder = Encoder.open(pictures_run, "best", "train")
    first = encoder.at([0]).image_BCHW[0].permute(1, 2, 0).numpy()
    height, width, _ = first.shape
    for path in (between, nearest):
        with Image.open(path) as picture:
            scale = -(-64 // max(height, width))
            cell = picture.crop((4, 4, 4 + scale * width, 4 + scale * height))
        assert np.array_equal(np.asarray(cell)[::scale, ::scale], first)


def test_pictures_do_not_read_samples_for_the_names_of_their_sources(
    pictures_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reads = []
    read = SampleReader.read

    def counted(self: SampleReader, shard: int, index: int) -> RawSample:
        reads.append((shard, index))
        return read(self, shard, index)

    monkeypatch.setattr(SampleReader, "read", counted)
    words = [pictures_run, "--split", "test", "--neighbours", tmp_path / "nearest.png"]
    status, row, _ = call(capsys, *words)
    assert status == 0
    queries, nearest = row["samples"], row["samples"] - 1  # of so few, all
    assert queries == 8
    assert len(reads) == row["samples"] + queries + queries * nearest


def test_what_is_between_two_latents_ends_in_them() -> None:
    first_BD, last_BD = torch.randn(3, 5), torch.randn(3, 5)
    found_BPD = latents.interpolated(first_BD, last_BD, 4)
    assert found_BPD.shape == (3, 4, 5)
    torch.testing.assert_close(found_BPD[:, 0], first_BD)
    torch.testing.assert_close(found_BPD[:, -1], last_BD)
    torch.testing.assert_close(found_BPD[:, 1], first_BD + (last_BD - first_BD) / 3)


@pytest.mark.parametrize("distance", ["euclid", "cosine"])
@pytest.mark.parametrize("size", [1, 7, 40])
def test_neighbours_are_those_of_a_full_search(distance: latents.Distance, size: int) -> None:
    torch.manual_seed(0)
    latent_BD = torch.randn(40, 6)
    latent_BD[20:] = latent_BD[:20]  # each has an equal elsewhere
    queries = [3, 25, 39]
    nearest = Neighbours(latent_BD[queries], queries, 5, distance)
    for first in range(0, 40, size):
        nearest.add(first, latent_BD[first : first + size])
    for row, query in enumerate(queries):
        one, all_ = latent_BD[query].double(), latent_BD.double()
        if distance == "euclid":
            expected = (all_ - one).norm(dim=1)
        else:
            expected = 1 - (all_ @ one) / (all_.norm(dim=1) * one.norm())
        order = sorted((round(float(expected[at]), 9), at) for at in range(40) if at != query)
        assert nearest.position_QK[row].tolist()[0] == (query + 20) % 40
        found = [round(value, 9) for value in nearest.distance_QK[row].tolist()]
        assert found == pytest.approx([value for value, _ in order[:5]], abs=1e-7)
        assert query not in nearest.position_QK[row]


def test_a_variational_map_is_drawn_from_and_scored_by_its_elbo(
    pictures: Path,
    train_small: Callable[[Path, Path, str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = """
    --run.steps 4 --batch.global_size 8 --batch.micro_size 8 --validate.batch_size 3
    --model.name autoencoder --model.channels 4,8 --model.latent map --model.latent_dim 2
    --model.variational true --model.kl_warmup 0.5
    """
    run = train_small(tmp_path / "run", pictures, words)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    elbo = rows[-1]["negative_elbo"]
    assert elbo == pytest.approx(rows[-1]["reconstruction_error"] + rows[-1]["kl"])
    drawn = [tmp_path / f"{name}.png" for name in "abc"]
    for path, seed in zip(drawn, (0, 0, 1), strict=True):
        words_of = [run, "--samples", path, "--seed", seed, "--out", tmp_path / "val.npz"]
        status, row, _ = call(capsys, *words_of)
        assert status == 0
    assert row["latent_shape"] == [2, 8, 12]
    with np.load(tmp_path / "val.npz") as saved:
        assert saved["latent"].shape == (row["samples"], 2, 8, 12)
        assert float(saved["score"].mean()) * 3 * 32 * 48 == pytest.approx(elbo, rel=1e-5)
    assert drawn[0].read_bytes() == drawn[1].read_bytes() != drawn[2].read_bytes()


def test_mistakes_are_one_line(
    pictures_run: Path, screens_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, message in [
        ([pictures_run], "nothing to do"),
        ([pictures_run, "--samples", tmp_path / "a.png"], "model.variational = false"),
        ([pictures_run, "--out", tmp_path / "a.csv"], "write one of *.parquet, *.npz"),
        ([pictures_run, "--out", tmp_path / "a.npz", "--split", "dev"], "no split 'dev'"),
        ([screens_run, "--out", tmp_path / "a.npz"], "model.name = seq2seq"),
        ([pictures_run, "--out", tmp_path / "a.npz", "--workers", -1], "--workers -1: 0 for none"),
    ]:
        status, _, err = call(capsys, *words)
        assert status == 2
        assert message in err
        assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_predict_gives_the_same_rows_for_files(
    precise_run: tuple[str, Path],
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, run = precise_run
    words = [run, "--split", "test", "--out", tmp_path / "split.npz"]
    assert call(capsys, *words)[0] == 0
    with np.load(tmp_path / "split.npz") as saved:
        expected = {name: saved[name] for name in saved}
    files = [str(pictures.parent / "raw" / name) for name in expected["source"].tolist()]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"none")
    flags = ["--latents", str(tmp_path / "files.npz"), "--json"]
    capsys.readouterr()
    assert predict.main([str(run), str(broken), *files, *flags]) == 1
    rows = json.loads(capsys.readouterr().out)["images"][1:]
    assert [row["score"] for row in rows] == pytest.approx(expected["score"].tolist(), rel=1e-5)
    with np.load(tmp_path / "files.npz") as saved:
        assert saved["key"].tolist() == files
        np.testing.assert_allclose(saved["latent"], expected["latent"], rtol=1e-5)
    assert predict.main([str(run), *files, *flags]) == 2
    assert "give --overwrite" in capsys.readouterr().err


def test_mistakes_name_the_flag_that_was_given(
    pictures_run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    csv, parquet = str(tmp_path / "a.csv"), str(tmp_path / "a.parquet")
    words = [str(pictures_run), str(pictures.parent / "raw" / "000000.png"), "--latents"]
    capsys.readouterr()
    assert predict.main([*words, csv]) == 2
    assert f"--latents {csv}: write one of *.parquet, *.npz" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert predict.main([*words, parquet]) == 2
    assert f"--latents {parquet}: pyarrow is needed" in capsys.readouterr().err
    status, _, err = call(capsys, pictures_run, "--out", parquet)
    assert (status, f"--out {parquet}: pyarrow is needed" in err) == (2, True)
