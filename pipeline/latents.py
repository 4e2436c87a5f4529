"""What an autoencoder made of a split: latents as a file, and what the latent space looks like.

One pass over the split, batch by batch, in manifest order; no latent and no image stays in memory.

    python -m pipeline.latents RUN --split test --out latents.parquet
    python -m pipeline.latents RUN --out latents.npz --neighbours nearest.png --distance cosine
    python -m pipeline.latents RUN --interpolate between.png --samples drawn.png

A row of the file has the sample's `key` and the name of its `source` file (empty where the dataset
has none), its `latent` as float32 (of a variational model, the mean; a map is laid out channel by
channel), `mse` in [0,1], and `score`, the loss of this image alone: an image whose score is far in
the upper tail of these is unlike those that the model was trained on.

Tensor names carry their shape: B batch, Q queries, K nearest found so far, C channels, H height,
W width, D latent, as long as it is.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.batch import Batch
from pipeline.build import autocast_of, dtype_of, for_reading, open_split
from pipeline.config import Config
from pipeline.export import open_run
from pipeline.models import Autoencoder
from pipeline.models.autoencoder import Output
from pipeline.order import samples_at, shard_starts
from pipeline.rng import torch_seed
from pipeline.stream import BatchDataset, BatchPlan, ValidationPlans, make_loader
from pipeline.tasks import AutoencoderTask, prepare_images
from shards import engines, storage
from shards.images import to_picture
from shards.storage import UserError

Distance = Literal["euclid", "cosine"]

_PAIRS, _PLACES_BETWEEN = 8, 8
_QUERIES, _NEAREST = 10, 8
_SAMPLE_ROWS, _SAMPLE_COLUMNS = 8, 12
_MIN_CELL_PX, _GAP_PX = 64, 4
_ROWS_OF_GROUP = 4096


@dataclass(frozen=True)
class Encoder:
    """An autoencoder in eval mode, with the split it is shown."""

    model: Autoencoder
    task: AutoencoderTask
    dataset: BatchDataset
    device: torch.device
    config: Config

    @classmethod
    def open(cls, run: Path, which: str, split: str) -> "Encoder":
        """A run's checkpoint, and a split of its dataset.

        Raises:
            UserError: as `export.open_run`; no such split; or the model is no autoencoder.
        """
        trained = open_run(run, which)
        config = for_reading(trained.config)
        if not isinstance(trained.model, Autoencoder):
            raise UserError(
                f"{run}: of model.name = {config.model.name}; latents are autoencoders'"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(
            trained.model.eval().to(device),
            AutoencoderTask(trained.model.config, dtype_of(config)),
            open_split(config, trained.data, split),
            device,
            config,
        )

    @property
    def num_samples(self) -> int:
        return sum(self.dataset.reader.shard_samples)

    def passes(self, workers: int, *, with_sources: bool) -> Generator["Encoded", None, None]:
        """Every sample once, in order, and once more for its source's name where that is wanted.

        Raises:
            UserError: a sample cannot be read; it is named.
        """
        batch_size = self.config.validate.batch_size
        plans = ValidationPlans(self.dataset.reader.shard_samples, batch_size)
        loader = make_loader(self.dataset, plans, workers=workers, pin=self.device.type == "cuda")
        for plan, batch in zip(plans, loader, strict=True):
            yield self.encode(plan, batch, with_sources=with_sources)

    def at(self, positions: Sequence[int]) -> "Encoded":
        """The samples at these positions of the split, as one batch."""
        starts = shard_starts(self.dataset.reader.shard_samples)
        ids = samples_at(starts, np.asarray(positions, dtype=np.int64))
        plan = BatchPlan(0, 0, 0, ids)
        return self.encode(plan, self.dataset[plan])

    @torch.inference_mode()
    def encode(self, plan: BatchPlan, batch: Batch, *, with_sources: bool = False) -> "Encoded":
        """What the model makes of a batch. Raises `UserError`."""
        if batch.bad:
            raise UserError(f"{batch.bad[0]}; run `pixloom verify` on the dataset")
        image_BCHW = prepare_images(batch.to(self.device), self.task.dtype)
        with autocast_of(self.config, self.device):
            output = self.model(image_BCHW, for_loss=True)
        places = zip(plan.ids.shard_G, plan.ids.index_G, strict=True)
        sources = tuple(self._source(*place) if with_sources else "" for place in places)
        return Encoded(
            batch.image_BCHW, Rows.of(batch.keys, sources, output, image_BCHW, self.task)
        )

    @torch.inference_mode()
    def decode(self, latent_BD: Tensor) -> Tensor:
        """uint8 images of latents as rows."""
        latent_BD = latent_BD.reshape(len(latent_BD), *self.model.latent_shape)
        latent_BD = latent_BD.to(self.device, self.task.dtype)
        with autocast_of(self.config, self.device):
            found_BCHW = self.model.decode(latent_BD)
        return (found_BCHW.to(self.task.dtype) * 255).round().to(torch.uint8).cpu()

    def _source(self, shard: int, index: int) -> str:
        members = self.dataset.reader.read(shard, index).members
        try:
            source = json.loads(bytes(members["json"]))["source"]
        except (KeyError, TypeError, ValueError):  # of a dataset that another tool wrote
            return ""
        # A name that is not UTF-8 has its bytes in it, which no column of text takes.
        return (
            source.encode("utf-8", "backslashreplace").decode() if isinstance(source, str) else ""
        )


@dataclass(frozen=True)
class Rows:
    """What is told of some images; all on the CPU."""

    keys: tuple[str, ...]
    sources: tuple[str, ...]
    """empty where they are not known, or were not asked for"""
    latent_BD: Tensor
    """float32"""
    mse_B: Tensor
    score_B: Tensor

    @classmethod
    def of(
        cls,
        keys: Sequence[str],
        sources: Sequence[str],
        output: Output,
        image_BCHW: Tensor,
        task: AutoencoderTask,
    ) -> "Rows":
        """Those of images in [0,1], from what the model made of them in eval mode."""
        error_BCHW = (output.reconstruction_BCHW.to(image_BCHW.dtype) - image_BCHW).double()
        return cls(
            tuple(keys),
            tuple(sources),
            output.mean_BD.flatten(1).float().cpu(),
            error_BCHW.square().flatten(1).mean(1).cpu(),
            task.scores(output, image_BCHW).double().cpu(),
        )

    def each(self) -> Iterator["Rows"]:
        """One by one."""
        for row in range(len(self.keys)):
            one = slice(row, row + 1)
            yield Rows(
                self.keys[one], self.sources[one],
                self.latent_BD[one], self.mse_B[one], self.score_B[one],
            )  # fmt: skip


class Encoded(NamedTuple):
    """A batch of a split: uint8 images on the CPU, and what the model makes of them."""

    image_BCHW: Tensor
    rows: Rows


class LatentFile(Protocol):
    """Rows to a file that grows batch by batch."""

    def add(self, rows: Rows) -> None: ...


@contextlib.contextmanager
def latent_file(path: Path, latent_shape: Sequence[int], flag: str) -> Iterator[LatentFile]:
    """A new file of latents, Parquet or npz by its suffix; it appears, whole, when the block ends.
    Errors name `flag`.

    Raises:
        UserError: another suffix, no pyarrow for Parquet, or it cannot be written.
    """
    kinds: dict[str, type[_Parquet] | type[_Npz]] = {".parquet": _Parquet, ".npz": _Npz}
    kind = kinds.get(path.suffix)
    if kind is None:
        raise UserError(
            f"{flag} {path}: write one of {', '.join(f'*{suffix}' for suffix in kinds)}"
        )
    with storage.explained(str(path)), tempfile.TemporaryDirectory(prefix="pixloom-") as folder:
        scratch = Path(folder, "latents")
        try:
            rows = kind(scratch, tuple(latent_shape))
        except ImportError as error:
            raise UserError(
                f"{flag} {path}: pyarrow is needed to write it; pip install 'pixloom[parquet]', "
                "or write *.npz"
            ) from error
        with contextlib.closing(rows):
            yield rows
            rows.finish()
        storage.publish(scratch, str(path))


class _Parquet:
    """Columns key, source, mse, score, latent (a fixed-size list), a row group a few batches."""

    def __init__(self, path: Path, latent_shape: tuple[int, ...]) -> None:
        import pyarrow as pa
        import pyarrow.parquet

        self._pa, self._size = pa, int(np.prod(latent_shape))
        self._schema = pa.schema(
            [
                ("key", pa.string()),
                ("source", pa.string()),
                ("mse", pa.float64()),
                ("score", pa.float64()),
                ("latent", pa.list_(pa.float32(), self._size)),
            ],
            metadata={"latent_shape": json.dumps(latent_shape)},
        )
        self._writer = pa.parquet.ParquetWriter(path, self._schema)
        self._waiting: list[Any] = []

    def add(self, rows: Rows) -> None:
        pa = self._pa
        latent = pa.array(rows.latent_BD.numpy().reshape(-1))
        columns = [
            list(rows.keys),
            list(rows.sources),
            rows.mse_B.numpy(),
            rows.score_B.numpy(),
            pa.FixedSizeListArray.from_arrays(latent, self._size),
        ]
        self._waiting.append(pa.record_batch(columns, schema=self._schema))
        if sum(batch.num_rows for batch in self._waiting) >= _ROWS_OF_GROUP:
            self._flush()

    def finish(self) -> None:
        self._flush()

    def close(self) -> None:
        self._writer.close()

    def _flush(self) -> None:
        if self._waiting:
            self._writer.write_table(self._pa.Table.from_batches(self._waiting))
            self._waiting = []


class _Npz:
    """Arrays key, source, mse, score, latent (of the latent's own shape), and nothing pickled.

    Latents wait in a file of their own; the rest, a few numbers a sample, in memory.
    """

    def __init__(self, path: Path, latent_shape: tuple[int, ...]) -> None:
        self._path, self._latent_shape = path, latent_shape
        self._raw_path = path.with_name("raw")
        self._raw = self._raw_path.open("wb")
        self._keys: list[str] = []
        self._sources: list[str] = []
        self._numbers: list[NDArray[np.float64]] = []

    def add(self, rows: Rows) -> None:
        self._raw.write(rows.latent_BD.numpy().tobytes())
        self._keys += rows.keys
        self._sources += rows.sources
        self._numbers.append(torch.stack([rows.mse_B, rows.score_B]).numpy())

    def finish(self) -> None:
        self._raw.close()
        mse, score = np.concatenate([np.empty((2, 0)), *self._numbers], axis=1)
        shape = (len(self._keys), *self._latent_shape)
        latent: NDArray[np.float32] = (
            np.memmap(self._raw_path, np.float32, "r", shape=shape)
            if self._keys
            else np.empty(shape, np.float32)
        )
        with self._path.open("wb") as file:
            np.savez(
                file,
                key=np.array(self._keys, np.str_),
                source=np.array(self._sources, np.str_),
                mse=mse,
                score=score,
                latent=latent,
            )

    def close(self) -> None:
        self._raw.close()


class Neighbours:
    """The nearest of all samples of a split to a few of them, as they stream by."""

    def __init__(
        self, query_QD: Tensor, positions: Sequence[int], num_nearest: int, distance: Distance
    ) -> None:
        self._query_QD, self._metric = query_QD.double(), distance
        self._own_Q1 = torch.tensor(positions)[:, None]
        self._num_nearest = num_nearest
        self.distance_QK = torch.empty(len(positions), 0, dtype=torch.float64)
        self.position_QK = torch.empty(len(positions), 0, dtype=torch.int64)

    def add(self, first: int, latent_BD: Tensor) -> None:
        """The samples from position `first` on. A query is not its own neighbour."""
        found_QB = distances(self._query_QD, latent_BD.double(), self._metric)
        position_QB = torch.arange(first, first + len(latent_BD)).expand_as(found_QB)
        found_QB = found_QB.masked_fill(position_QB == self._own_Q1, torch.inf)
        distance = torch.cat([self.distance_QK, found_QB], dim=1)
        position = torch.cat([self.position_QK, position_QB], dim=1)
        # Stable: of equals the first in the split comes first, whatever the batches were.
        order = distance.argsort(dim=1, stable=True)[:, : self._num_nearest]
        self.distance_QK = distance.gather(1, order)
        self.position_QK = position.gather(1, order)


def distances(query_QD: Tensor, latent_BD: Tensor, distance: Distance) -> Tensor:
    """`distance_QB`: Euclidean; or 1 less the cosine of the angle, in [0, 2]."""
    if distance == "euclid":
        return torch.cdist(query_QD, latent_BD, compute_mode="donot_use_mm_for_euclid_dist")
    query_QD, latent_BD = (
        torch.nn.functional.normalize(one, dim=1) for one in (query_QD, latent_BD)
    )
    return 1 - query_QD @ latent_BD.T


def interpolated(first_BD: Tensor, last_BD: Tensor, num_places: int) -> Tensor:
    """`latent_BPD` on the straight lines between pairs of latents, both ends among them."""
    share_P1 = torch.linspace(0, 1, num_places, dtype=first_BD.dtype)[:, None]
    return torch.lerp(first_BD[:, None], last_BD[:, None], share_P1)


def sheet(rows: Sequence[Sequence[Tensor]]) -> Image.Image:
    """Rows of uint8 images (C, H, W), enlarged where they are small, in columns.

    Of other channel counts than 1, 3 and 4, the first three are shown, or the first.
    """
    _, height, width = rows[0][0].shape
    scale = max(1, -(-_MIN_CELL_PX // max(height, width)))
    step_x, step_y = width * scale + _GAP_PX, height * scale + _GAP_PX
    size = (max(map(len, rows)) * step_x + _GAP_PX, len(rows) * step_y + _GAP_PX)
    canvas = Image.new("RGB", size, "white")
    for row, images in enumerate(rows):
        for column, image_CHW in enumerate(images):
            cell = to_picture(image_CHW.permute(1, 2, 0).numpy())
            cell = cell.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            place = (_GAP_PX + column * step_x, _GAP_PX + row * step_y)
            canvas.paste(cell.convert("RGB"), place, cell if cell.mode == "RGBA" else None)
    return canvas


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` positions, or all, evenly apart."""
    count = min(count, total)
    return [at * total // count for at in range(count)]


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom latents`."""
    parser = argparse.ArgumentParser(
        prog="pixloom latents",
        description="Latents of a split as a file, and pictures of the latent space.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="the run's folder")
    add("--split", default="val", help="split of the dataset [val]")
    add("--checkpoint", default="best", help="best, last, or a step's number [best]")
    add("--out", metavar="FILE", type=Path,
        help="write each sample's key, source, mse, score, latent: *.parquet or *.npz")  # fmt: skip
    add("--interpolate", metavar="PNG", type=Path,
        help="draw images decoded between pairs of samples, which are at the two ends")  # fmt: skip
    add("--neighbours", metavar="PNG", type=Path,
        help="draw some samples, each with the nearest others of the split, in order")  # fmt: skip
    add("--distance", choices=["euclid", "cosine"], default="euclid",
        help="what is near, in the latent space [euclid]")  # fmt: skip
    add("--samples", metavar="PNG", type=Path,
        help="of a variational model: draw images decoded from N(0,1)")  # fmt: skip
    add("--seed", type=int, default=0, help="of --samples [0]")
    add("--workers", type=int, default=0, help="loader processes [0]")
    add("--json", action="store_true", help="one JSON object on stdout")
    return storage.command("latents", lambda: _latents(parser.parse_args(argv)))


def _latents(arguments: argparse.Namespace) -> int:
    wanted = ("out", "interpolate", "neighbours", "samples")
    files = {name: getattr(arguments, name) for name in wanted if getattr(arguments, name)}
    if not files:
        raise UserError(f"nothing to do: give one of {', '.join(f'--{name}' for name in wanted)}")
    if arguments.workers < 0:
        raise UserError(f"--workers {arguments.workers}: 0 for none, or a number of them")
    encoder = Encoder.open(arguments.run, arguments.checkpoint, arguments.split)
    if arguments.samples and not encoder.model.config.variational:
        raise UserError(
            f"--samples: {arguments.run} has model.variational = false, and the latents of a plain "
            "autoencoder follow no known distribution; train with model.variational = true"
        )
    if arguments.out or arguments.neighbours:
        _stream(encoder, arguments)
    if arguments.interpolate:
        _publish(_interpolation(encoder), arguments.interpolate)
    if arguments.samples:
        _publish(_samples(encoder, arguments.seed), arguments.samples)
    row = {
        "split": arguments.split,
        "samples": encoder.num_samples,
        "latent_shape": list(encoder.model.latent_shape),
        "files": [str(path) for path in files.values()],
    }
    if arguments.json:
        print(json.dumps(row))
    else:
        print("\n".join(f"{name:12} {value}" for name, value in row.items()))
    return 0


def _stream(encoder: Encoder, arguments: argparse.Namespace) -> None:
    """The pass over the split, for the file and for the neighbours."""
    total = encoder.num_samples
    queries = spread(_QUERIES, total)
    asked = encoder.at(queries) if arguments.neighbours else None
    nearest = (
        Neighbours(asked.rows.latent_BD, queries, min(_NEAREST, total - 1), arguments.distance)
        if asked is not None
        else None
    )
    with contextlib.ExitStack() as stack:
        file = None
        if arguments.out:
            file = stack.enter_context(
                latent_file(arguments.out, encoder.model.latent_shape, "--out")
            )
        passes = encoder.passes(arguments.workers, with_sources=file is not None)
        encoded = contextlib.closing(passes)
        done = 0
        for _, rows in engines.progress(
            stack.enter_context(encoded), total, "encoded", lambda one: len(one.rows.keys)
        ):
            if file is not None:
                file.add(rows)
            if nearest is not None:
                nearest.add(done, rows.latent_BD)
            done += len(rows.keys)
        if done != total:
            raise UserError(f"{arguments.run}: {done} samples read, the manifest says {total}")
    if asked is not None and nearest is not None:
        lines = []
        for image_CHW, positions in zip(
            asked.image_BCHW, nearest.position_QK.tolist(), strict=True
        ):
            found = list(encoder.at(positions).image_BCHW) if positions else []
            lines.append([image_CHW, *found])
        _publish(sheet(lines), arguments.neighbours)


def _interpolation(encoder: Encoder) -> Image.Image:
    ends = encoder.at(spread(2 * _PAIRS, encoder.num_samples))
    half = len(ends.image_BCHW) // 2
    if not half:
        raise UserError("--interpolate: the split has one sample, two make a pair")
    first, last = ends.rows.latent_BD[:half], ends.rows.latent_BD[half : 2 * half]
    between = interpolated(first, last, _PLACES_BETWEEN)
    decoded = encoder.decode(between.flatten(0, 1))
    return sheet(
        [
            [
                ends.image_BCHW[row],
                *decoded[row * _PLACES_BETWEEN : (row + 1) * _PLACES_BETWEEN],
                ends.image_BCHW[half + row],
            ]
            for row in range(half)
        ]
    )


def _samples(encoder: Encoder, seed: int) -> Image.Image:
    generator = torch.Generator().manual_seed(torch_seed(seed, "samples"))
    count = _SAMPLE_ROWS * _SAMPLE_COLUMNS
    size = int(np.prod(encoder.model.latent_shape))
    drawn = encoder.decode(torch.randn(count, size, generator=generator))
    return sheet([list(row) for row in drawn.chunk(_SAMPLE_ROWS)])


def _publish(picture: Image.Image, path: Path) -> None:
    with storage.explained(str(path)), tempfile.TemporaryDirectory(prefix="pixloom-") as folder:
        scratch = Path(folder, "picture.png")
        picture.save(scratch, "PNG")
        storage.publish(scratch, str(path))


if __name__ == "__main__":
    sys.exit(main())
