"""The other packers of `pack.py`, each used as its own documentation shows.

Runs under the Python of `pack.py --peers-python`, which need not have pixloom. Each makes of every
file a PNG of 256x256 as `image_of` does, the ids of its program by the tokenizer that it is given,
and the SHA-256 of the file.
"""

import functools
import hashlib
import io
import multiprocessing
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from children import serve
from PIL import Image

SIDE = 256
PACKAGES = {
    "litdata": "litdata",
    "mosaicml-streaming": "mosaicml-streaming",
    "webdataset": "webdataset",
}


def image_of(data: bytes) -> bytes:
    """The image work, as anyone would write it; the filter is that of `pixloom pack`."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    out = io.BytesIO()
    image.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(out, "PNG")
    return out.getvalue()


@functools.cache
def _tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def sample_of(path: str, tokenizer: str | None) -> dict[str, Any]:
    """What a sample holds: image, SHA-256, and where there is a program its text and ids."""
    data = Path(path).read_bytes()
    sample = {"image": image_of(data), "sha256": hashlib.sha256(data).hexdigest()}
    if tokenizer is not None:
        text = Path(path).with_suffix(".gui").read_text()
        ids = np.array(_tokenizer(tokenizer).encode(text).ids, np.uint16)
        sample |= {"text": text, "tokens": ids.tobytes()}
    return sample


def _litdata(paths: Sequence[str], out: Path, tokenizer: str | None, workers: int) -> None:
    import litdata

    litdata.optimize(
        fn=functools.partial(sample_of, tokenizer=tokenizer),
        inputs=list(paths),
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=workers,
    )


def _mosaicml(paths: Sequence[str], out: Path, tokenizer: str | None, workers: int) -> None:
    from streaming.base.util import merge_index

    if workers == 1:
        _mosaicml_part(paths, str(out), tokenizer)
        return
    parts = [(paths[at::workers], str(out / str(at)), tokenizer) for at in range(workers)]
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(_mosaicml_part, parts)
    merge_index(str(out), keep_local=True)


def _mosaicml_part(paths: Sequence[str], out: str, tokenizer: str | None) -> None:
    from streaming import MDSWriter

    columns = {"image": "bytes", "sha256": "str"}
    if tokenizer is not None:
        columns |= {"text": "str", "tokens": "bytes"}
    with MDSWriter(out=out, columns=columns, hashes=["sha1"]) as writer:
        for path in paths:
            writer.write(sample_of(path, tokenizer))


def _webdataset(paths: Sequence[str], out: Path, tokenizer: str | None, workers: int) -> None:
    parts = [(paths[at::workers], str(out), at, tokenizer) for at in range(workers)]
    if workers == 1:
        _webdataset_part(*parts[0])
        return
    with multiprocessing.Pool(workers) as pool:
        pool.starmap(_webdataset_part, parts)


def _webdataset_part(paths: Sequence[str], out: str, part: int, tokenizer: str | None) -> None:
    import webdataset as wds

    names = {"image": "png", "sha256": "txt", "text": "gui", "tokens": "bin"}
    with wds.ShardWriter(f"{out}/{part}-%06d.tar", maxcount=1000, verbose=0) as writer:
        for path in paths:
            sample = sample_of(path, tokenizer)
            members = {names[name]: value for name, value in sample.items()}
            writer.write({"__key__": Path(path).stem, **members})


PACKERS: dict[str, Callable[[Sequence[str], Path, str | None, int], None]] = {
    "litdata": _litdata,
    "mosaicml-streaming": _mosaicml,
    "webdataset": _webdataset,
}


def images_in(folder: Path) -> Iterable[Path]:
    """The images of a raw folder, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".png", ".jpg"))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import time

    name = request["name"]
    if request.get("do") == "version":
        from importlib import metadata  # here, for each worker process of ours would pay for it

        return {"version": metadata.version(PACKAGES[name])}
    out = Path(request["out"])
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start_s = time.perf_counter()
    paths = [str(path) for path in images_in(Path(request["raw"]))]
    PACKERS[name](paths, out, request["tokenizer"], request["workers"])
    return {"samples_per_s": len(paths) / (time.perf_counter() - start_s)}


if __name__ == "__main__":
    serve(_answer)
