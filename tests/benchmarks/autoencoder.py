"""The autoencoder against PCA on CIFAR-10: same training images, same latent size, unseen images.

    python tests/benchmarks/autoencoder.py --work FOLDER                 all sizes, then a VAE
    python tests/benchmarks/autoencoder.py --work FOLDER --latents 128   one of them

Packs the images, fits PCA by an eigendecomposition of their covariance (with the mean taken off,
its reconstructions cut to [0,1]), trains launch/configs/cifar10.toml at each size in one process,
and measures both on the test split. FOLDER keeps everything: killed and started again, the
campaign goes on where it was, inside a run too. It ends with FOLDER/table.md, FOLDER/grid.png and,
of the VAE, FOLDER/vae-samples.png.

`--json` prints one JSON object on stdout's last line. Exit status 1: PCA was better somewhere.
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from runs import call, machine, trained  # noqa: E402

from pipeline.build import open_split  # noqa: E402
from pipeline.config import config_of, read_toml  # noqa: E402
from pipeline.datasets import Datasets  # noqa: E402
from pipeline.export import open_run  # noqa: E402
from pipeline.latents import spread  # noqa: E402
from pipeline.metrics import psnr  # noqa: E402
from pipeline.models import Autoencoder  # noqa: E402
from pipeline.runlog import read_rows  # noqa: E402
from pipeline.ssim import ssim  # noqa: E402
from pipeline.stream import ValidationPlans  # noqa: E402

CONFIG = ROOT / "launch" / "configs" / "cifar10.toml"
SOURCE = ROOT.parent / "shared" / "data" / "cifar10-train-20k.tar"
VAE = ["--model.variational", "true", "--model.kl_weight", 0.02, "--model.kl_warmup", 0.2]
COLUMNS = 12


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 when PCA has the smaller error at some size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder to work in, kept")
    parser.add_argument("--source", type=Path, default=SOURCE, help="tar of a folder of images")
    parser.add_argument("--latents", default="16,64,128,256", help="sizes [16,64,128,256]")
    parser.add_argument("--vae", type=int, default=64, help="latent size of the VAE; 0: none [64]")
    parser.add_argument("--epochs", type=int, help="train so many epochs [the configuration's]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the runs [0]")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args(argv)
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    pack(arguments.source, work)
    train, test = (images_of(work, split) for split in ("train", "test"))
    mean, basis = pca(train, work)

    rows: list[dict[str, Any]] = []
    pictures = {"original": test}
    for size in map(int, arguments.latents.split(",")):
        found = with_pca(test, mean, basis[:, :size])
        run = run_of(work, f"latent-{size}", size, arguments)
        rows.append({"latent": size, "pca": figures(found, test), "ours": measured(run)})
        pictures[f"PCA {size}"] = found
        pictures[f"ours {size}"] = reconstructed(run, test)
    result: dict[str, Any] = {"rows": rows, **machine(), "seed": arguments.seed}
    (work / "table.md").write_text(table(rows))
    draw(pictures, work / "grid.png")
    if arguments.vae:
        run = run_of(work, f"vae-{arguments.vae}", arguments.vae, arguments, *VAE)
        call("-m", "pipeline.latents", run, "--samples", work / "vae-samples.png")
        result["vae"] = {"latent": arguments.vae, **measured(run)}
    print(table(rows), file=sys.stderr)
    if arguments.json:
        print(json.dumps(result))
    return int(not all(row["ours"]["mse"] < row["pca"]["mse"] for row in rows))


def pack(source: Path, work: Path) -> None:
    raw = work / "raw"
    if not (work / "shards" / "manifest.json").is_file():
        with tarfile.open(source) as archive:
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
                archive.extraction_filter = tarfile.data_filter
            archive.extractall(raw)
        words = ["--kind", "images", "--split", "train=rest,val=1000,test=1000"]
        call("-m", "shards.pack", raw, work / "shards", *words)


def images_of(work: Path, split: str) -> NDArray[np.float32]:
    """A split's images in [0,1]: (samples, channels, height, width)."""
    sections = read_toml(str(CONFIG)) | {"data": {"url": str(work / "shards")}}
    config = config_of(sections, str(CONFIG))
    dataset = open_split(config, Datasets.of(config.data), split)
    plans = ValidationPlans(dataset.reader.shard_samples, 500)
    images = np.concatenate([dataset[plan].image_BCHW.numpy() for plan in plans])
    return images.astype(np.float32) / 255


def pca(train: NDArray[np.float32], work: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and components as columns, those of the largest variance first."""
    path = work / "pca.npz"
    if not path.is_file():
        flat = train.reshape(len(train), -1)
        mean = flat.mean(0, dtype=np.float64).astype(np.float32)
        centred = flat - mean
        _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
        scratch = work / "pca.part.npz"
        np.savez(scratch, mean=mean, basis=vectors[:, ::-1].astype(np.float32))
        scratch.replace(path)
    with np.load(path) as saved:
        return saved["mean"], saved["basis"]


def with_pca(
    images: NDArray[np.float32], mean: NDArray[np.float32], basis: NDArray[np.float32]
) -> NDArray[np.float32]:
    centred = images.reshape(len(images), -1) - mean
    found = mean + (centred @ basis) @ basis.T
    return found.clip(0, 1).reshape(images.shape).astype(np.float32)


def figures(found: NDArray[np.float32], images: NDArray[np.float32]) -> dict[str, float]:
    """The metrics that validation has, of reconstructions made elsewhere."""
    one, two = torch.from_numpy(found).double(), torch.from_numpy(images).double()
    mse_B = (one - two).square().flatten(1).mean(1)
    return {
        "mse": float(mse_B.mean()),
        "psnr_of_mean_mse": psnr(float(mse_B.mean())),
        "mean_psnr": float(np.mean([psnr(mse) for mse in mse_B.tolist()])),
        "ssim": float(ssim(one, two).mean()),
    }


def run_of(work: Path, name: str, size: int, arguments: argparse.Namespace, *words: object) -> Path:
    """A run that is at its end, measured on the test split."""
    run = work / f"{name}-seed-{arguments.seed}"
    length = ["--run.epochs", arguments.epochs, "--run.steps", 0] if arguments.epochs else []
    trained(
        run, "--config", CONFIG, "--data.url", work / "shards", "--run.seed", arguments.seed,
        "--model.latent_dim", size,
        "--batch.micro_size", 64,  # one process has no need of smaller ones
        *length, *words,
    )  # fmt: skip
    if not (run / "validate-test.json").is_file():
        call("-m", "pipeline.validate", run, "--split", "test")
    return run


def measured(run: Path) -> dict[str, float]:
    """The test metrics of a run, and the seconds that its steps took, by its log.

    Without validation and start.
    """
    metrics: dict[str, Any] = json.loads((run / "validate-test.json").read_text())
    speed = {row["step"]: row["samples_per_s"] for row in read_rows(run) if "samples_per_s" in row}
    steps = sorted(speed)
    batch = read_toml(str(run / "config.toml"))["batch"]["global_size"]
    seconds = sum(
        (step - before) * batch / speed[step]
        for before, step in zip([0, *steps], steps, strict=False)
    )
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    return {**numbers, "steps": steps[-1], "train_s": round(seconds, 1)}


def reconstructed(run: Path, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of those that the grid shows."""
    model = open_run(run, "best").model.eval()
    assert isinstance(model, Autoencoder)
    with torch.inference_mode():
        shown = torch.from_numpy(images[spread(COLUMNS, len(images))])
        found = np.zeros_like(images)
        found[spread(COLUMNS, len(images))] = model(shown).numpy()
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| latent | MSE, PCA | MSE, ours | of PCA's | PSNR of the mean MSE, PCA / ours |"
        " mean PSNR, PCA / ours | SSIM, PCA / ours | steps | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        one, two = row["pca"], row["ours"]
        lines.append(
            f"| {row['latent']} | {one['mse']:.5f} | {two['mse']:.5f} "
            f"| {two['mse'] / one['mse']:.2f} "
            f"| {one['psnr_of_mean_mse']:.2f} / {two['psnr_of_mean_mse']:.2f} dB "
            f"| {one['mean_psnr']:.2f} / {two['mean_psnr']:.2f} dB "
            f"| {one['ssim']:.3f} / {two['ssim']:.3f} "
            f"| {two['steps']} | {two['train_s'] / 60:.1f} |"
        )
    return "\n".join(lines) + "\n"


def draw(pictures: dict[str, NDArray[np.float32]], path: Path) -> None:
    """A row for each way to reconstruct, a column for each of some test images."""
    size = (COLUMNS * 0.9 + 1.2, len(pictures) * 0.9)
    figure, grid = plt.subplots(len(pictures), COLUMNS, figsize=size, layout="constrained")
    for cells, (name, images) in zip(grid, pictures.items(), strict=True):
        for axes, position in zip(cells, spread(COLUMNS, len(images)), strict=True):
            axes.imshow(images[position].transpose(1, 2, 0))
            axes.set_xticks([])
            axes.set_yticks([])
        cells[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
