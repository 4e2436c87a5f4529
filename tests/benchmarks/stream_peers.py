"""The other loaders of `stream.py`, each used as its own documentation shows.

Runs under the Python of `stream.py --peers-python`, which need not have pixloom. Every loader
gives shuffled batches of 32 float32 224x224 images, normalised.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from children import serve

BATCH = 32
SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PACKAGES = {
    "webdataset": "webdataset",
    "mosaicml-streaming": "mosaicml-streaming",
    "litdata": "litdata",
    "datasets": "datasets",
    "energon": "megatron-energon",
}
FILES = {
    "webdataset": "shards",
    "mosaicml-streaming": "mosaicml",
    "litdata": "litdata",
    "datasets": "raw",
    "energon": "energon",
}
"""where the files lie that each reads, in the folder of a data set"""
Batches = Iterable[Any]


def timed(batches: Batches, total: int) -> dict[str, float]:
    """Images a second of the last of `total` batches: of all but three, or the second half.

    And images a second of this process's own CPU time, which other work on the machine hardly
    changes; it counts all that is done where there are no workers.
    """
    warm_up = min(3, total // 2)
    start_s, start_cpu_s, seen = time.perf_counter(), time.process_time(), 0
    for seen, images_BCHW in enumerate(batches, 1):
        if seen == 1:
            assert tuple(images_BCHW.shape) == (BATCH, 3, SIDE, SIDE), images_BCHW.shape
        if seen == warm_up:
            start_s, start_cpu_s = time.perf_counter(), time.process_time()
        if seen == total:
            break
    if seen != total:
        raise RuntimeError(f"{seen} batches, {total} expected")
    images = (total - warm_up) * BATCH
    return {
        "images_per_s": images / (time.perf_counter() - start_s),
        "images_per_cpu_s": images / (time.process_time() - start_cpu_s),
    }


def transform(*, of_tensors: bool = False) -> Callable[[Any], Any]:
    """Resize, to float, normalise; of PIL images, or of uint8 tensors."""
    if of_tensors:
        from torch import float32
        from torchvision.transforms import v2

        return v2.Compose(
            [
                v2.Resize((SIDE, SIDE), antialias=True),
                v2.ToDtype(float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
    from torchvision import transforms

    return transforms.Compose(
        [
            transforms.Resize((SIDE, SIDE)),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )


class _Transformed:
    """`transform` as a picklable callable of PIL images or tensors, RGB."""

    def __init__(self) -> None:
        self.pil, self.tensor = transform(), transform(of_tensors=True)

    def __call__(self, image: Any) -> Any:
        if hasattr(image, "convert"):
            return self.pil(image.convert("RGB"))
        return self.tensor(image)


class _ImageOf:
    def __init__(self, change: Callable[[Any], Any]) -> None:
        self.change = change

    def __call__(self, sample: Any) -> Any:
        return self.change(sample["image"])


def _webdataset(folder: Path, shards: Path, workers: int) -> Iterator[Any]:
    import webdataset as wds

    urls = sorted(str(path) for path in (shards / "train").glob("*.tar"))
    dataset = (
        wds.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg;png", "__key__")
        .map_tuple(_Transformed(), str)
        .batched(BATCH, partial=False)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=workers)
    while True:
        for images_BCHW, _ in loader:
            yield images_BCHW


def _mosaicml(folder: Path, shards: Path, workers: int) -> Iterator[Any]:
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    local = folder / FILES["mosaicml-streaming"]
    if not local.exists():
        from PIL import Image

        paths = sorted((folder / "raw").iterdir())
        kind = "jpeg" if paths[0].suffix == ".jpg" else "png"
        with MDSWriter(out=str(local), columns={"image": kind, "name": "str"}) as out:
            for path in paths:
                out.write({"image": Image.open(path), "name": path.name})

    class Pictures(StreamingDataset):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(local=str(local), shuffle=True, batch_size=BATCH)
            self.transform = _Transformed()

        def __getitem__(self, index: int) -> Any:
            return self.transform(super().__getitem__(index)["image"])

    clean_stale_shared_memory()
    loader = DataLoader(Pictures(), batch_size=BATCH, num_workers=workers, drop_last=True)
    while True:
        yield from loader


def _read_image(path: str) -> dict[str, Any]:
    from PIL import Image

    return {"image": Image.open(path), "name": Path(path).name}


def _litdata(folder: Path, shards: Path, workers: int) -> Iterator[Any]:
    import litdata

    local = folder / FILES["litdata"]
    if not local.exists():
        litdata.optimize(
            fn=_read_image,
            inputs=[str(path) for path in sorted((folder / "raw").iterdir())],
            output_dir=str(local),
            chunk_bytes="64MB",
            num_workers=1,
        )

    dataset = litdata.StreamingDataset(
        str(local), shuffle=True, drop_last=True, transform=_ImageOf(_Transformed())
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    while True:
        for images_BCHW in loader:
            if len(images_BCHW) == BATCH:
                yield images_BCHW


def _datasets(folder: Path, shards: Path, workers: int) -> Iterator[Any]:
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    pictures = load_dataset(
        "imagefolder",
        data_dir=str(folder / FILES["datasets"]),
        split="train",
        cache_dir=str(folder / "datasets"),
        drop_labels=True,
    )
    change = _Transformed()

    def changed(examples: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": [change(image) for image in examples["image"]]}

    loader: Any = DataLoader(
        pictures.with_transform(changed),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    )
    while True:
        for batch in loader:
            yield batch["pixels"]


def _energon(folder: Path, shards: Path, workers: int) -> Iterator[Any]:
    from megatron import energon

    local = folder / FILES["energon"]
    if not local.exists():
        (local / "train").mkdir(parents=True)
        for path in (shards / "train").glob("*.tar"):
            shutil.copyfile(path, local / "train" / path.name)
        kind = next((folder / "raw").iterdir()).suffix[1:]
        words = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "ImageSample"]
        words += ["--field-map", json.dumps({"image": kind})]
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(local), *words]
        subprocess.run(command, check=True)

    class Pictures(energon.DefaultTaskEncoder):  # type: ignore[misc]
        decoder = energon.SampleDecoder(image_decode="pilrgb")
        change = _Transformed()

        @energon.stateless  # type: ignore[untyped-decorator]
        def encode_sample(self, sample: Any) -> Any:
            sample.image = self.change(sample.image)
            return sample

    dataset = energon.get_train_dataset(
        str(local),
        batch_size=BATCH,
        batch_drop_last=True,
        shuffle_buffer_size=1000,
        max_samples_per_sequence=100,
        task_encoder=Pictures(),
        worker_config=energon.WorkerConfig(rank=0, world_size=1, num_workers=workers),
    )
    # A pause of the whole machine sets its watchdog off, which writes every variable out; a worker
    # was killed for its memory then.
    for batch in energon.get_loader(dataset, watchdog_timeout_seconds=None):
        yield batch.image


LOADERS = {
    "webdataset": _webdataset,
    "mosaicml-streaming": _mosaicml,
    "litdata": _litdata,
    "datasets": _datasets,
    "energon": _energon,
}


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    name = request["name"]
    if request.get("do") == "version":
        return {"version": metadata.version(PACKAGES[name])}
    batches = LOADERS[name](Path(request["folder"]), Path(request["shards"]), request["workers"])
    try:
        return timed(batches, request["batches"])
    finally:
        batches.close()


if __name__ == "__main__":
    serve(_answer)
