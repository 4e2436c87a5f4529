"""What a trained model makes of images: code, or reconstructions. Of a run or of an export.

Images go through the gate and the fitting that packing used (`shards.images`), so an image gives
the same pixels here as in its shard. One that is refused is named, and the rest is done.

    python -m pipeline.predict RUN shot.png                 its code, on stdout
    python -m pipeline.predict EXPORT folder more.png       a line an image: FILE, tab, code
    python -m pipeline.predict RUN folder --out codes --code-suffix .gui
    python -m pipeline.predict RUN folder --out rebuilt     autoencoder: PNGs; on stdout a line an
                                                            image: FILE, tab, mse, tab, score
                                                            (.npy of other than 1, 3, 4 channels)
    python -m pipeline.predict RUN folder --latents a.npz   its latents, see pipeline.latents

The score is the loss of the image alone (of a VAE, its negative ELBO) by values. An image that
scores far above those of a split, as `pixloom latents` lists them, is unlike what was trained on.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from pipeline.build import dtype_of, fit_of, new_decoding
from pipeline.config import Config, add_decoding_flags, with_decoding
from pipeline.decode import Decoding
from pipeline.export import CONFIG_NAME, open_run, read_export
from pipeline.fit import Fit, decode_fitted
from pipeline.grammar import Grammar
from pipeline.latents import LatentFile, Rows, latent_file
from pipeline.models import Autoencoder, Seq2Seq
from pipeline.tasks import AutoencoderTask, as_floats
from shards import arrays, engines, images, storage, tokens
from shards.format import COLOUR_CHANNELS, TOKENIZER_NAME, ImagePolicy
from shards.images import ImageRefused
from shards.sources import IMAGE_SUFFIXES, image_suffixes
from shards.storage import UserError


class Code(NamedTuple):
    """What a model reads off an image."""

    text: str
    score: float
    """log-probability"""

    @property
    def confidence(self) -> float:
        """The model's own probability of the whole code, in [0,1]."""
        return math.exp(self.score)


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, with what it takes to show it an image and to read its answer."""

    model: nn.Module
    settings: Config
    """its `model`, `optim.precision` and how to decode alone are meant"""
    image: ImagePolicy
    tokenizer: Tokenizer | None
    step: int
    fit: Fit | None = None
    """`data.size` and `data.fit`: how training scaled what was packed"""
    decoding: Decoding = Decoding()  # noqa: RUF009  frozen

    @classmethod
    def open(
        cls, folder: Path, which: str | None = None, flags: argparse.Namespace | None = None
    ) -> "Trained":
        """A run's checkpoint `which` (best, last, or a step's number; None is best), or an export;
        with `flags` of `add_decoding_flags` in place of how it was decoded in training.

        Raises:
            UserError: `folder` is neither, or is damaged; `which` for an export, which has one.
        """
        grammar = None
        if (folder / "config.toml").is_file():
            run = open_run(folder, which or "best")
            model, settings, image = run.model, run.config, run.data.image
            tokenizer_json, step = run.tokenizer_json, run.meta.state.step
        elif (folder / CONFIG_NAME).is_file():
            if which is not None:
                raise UserError(f"--checkpoint {which}: {folder} is an export, it holds one model")
            export = read_export(folder)
            model, settings, image = export.build_model(), export.settings, export.image
            tokenizer_json, step = export.tokenizer_json, export.step
            if export.grammar is not None and (flags is None or flags.grammar is None):
                grammar = Grammar.parse(export.grammar, f"{folder}: its grammar")
        else:
            found = "neither a run nor an export" if folder.is_dir() else "no such folder"
            raise UserError(f"{folder}: {found} (config.toml or {CONFIG_NAME} is missing)")
        tokenizer = None
        if tokenizer_json is not None:
            tokenizer = tokens.load_tokenizer(tokenizer_json, f"{folder}: its {TOKENIZER_NAME}")
        if flags is not None:
            settings = with_decoding(settings, flags)
        decoding = new_decoding(settings, tokenizer, grammar)
        fit = fit_of(settings.data, image)
        return cls(model.eval().to(_device()), settings, image, tokenizer, step, fit, decoding)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the files in a folder that may be images for this model."""
        return image_suffixes(self.image.channels)

    def pixels(self, data: bytes) -> NDArray[np.uint8]:
        """An image file's pixels as training would see them: uint8, (height, width, channels).

        Raises:
            ImageRefused: packing would not have taken it.
        """
        packed = images.fit_and_encode(data, self.image)
        if self.fit is not None:
            out_HWC = np.empty((self.fit.height, self.fit.width, self.image.channels), np.uint8)
            decode_fitted(packed.data, self.fit, out_HWC)
            return out_HWC
        size = (self.image.width, self.image.height)
        if self.image.fit == "none" and (packed.width, packed.height) != size:
            raise ImageRefused(
                f"{packed.width}x{packed.height} pixels, the model takes {size[0]}x{size[1]} and "
                "its dataset was packed without --size"
            )
        return images.decode(packed.data, self.image.channels)

    @torch.inference_mode()
    def codes(self, pixels: Sequence[NDArray[np.uint8]]) -> list[list[Code]]:
        """The likeliest codes of each image, best first; unknown words are `<unk>`."""
        model, tokenizer = self.model, self.tokenizer
        assert isinstance(model, Seq2Seq)
        assert tokenizer is not None
        with self._autocast():
            image_BCHW, length = self._floats(pixels), model.config.max_tokens
            found = self.decoding.hypotheses(model, image_BCHW, length)
        return [
            [Code(tokens.decode(tokenizer, one.tokens), one.score) for one in hypotheses]
            for hypotheses in found
        ]

    @torch.inference_mode()
    def reconstructions(
        self, names: Sequence[str], pixels: Sequence[NDArray[np.uint8]]
    ) -> tuple[NDArray[np.uint8], Rows]:
        """The images as the model gives them back (B, H, W, C), and their latents, mean squared
        errors in [0,1], unrounded, and scores."""
        assert isinstance(self.model, Autoencoder)
        image_BCHW = self._floats(pixels)
        with self._autocast():
            output = self.model(image_BCHW, for_loss=True)
        found_BCHW = output.reconstruction_BCHW.to(image_BCHW.dtype)
        found_BHWC = (found_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        task = AutoencoderTask(self.model.config, image_BCHW.dtype)
        return found_BHWC, Rows.of(names, names, output, image_BCHW, task)

    def _floats(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        image_BCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(_device())
        return as_floats(image_BCHW, dtype_of(self.settings))

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        """As in validation; but fp16, which needs a GPU, is fp32 without one."""
        kind = _device().type
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.optim.precision)
        if dtype is None or (dtype is torch.float16 and kind == "cpu"):
            return contextlib.nullcontext()
        return torch.autocast(kind, dtype=dtype)


@dataclass(frozen=True)
class Source:
    """An image file, or what was named as one; `stem` is the path its output has under --out."""

    path: Path
    stem: str


@dataclass(frozen=True)
class Prediction:
    """What came of one source: a refusal, or code, or an image with its error."""

    source: Source
    refused: str | None = None
    code: str | None = None
    """the best of `codes`"""
    codes: Sequence[Code] = ()
    pixels: NDArray[np.uint8] | None = None
    mse: float | None = None
    score: float | None = None
    """of an autoencoder: the image's own loss"""
    latent: Rows | None = None
    """its row of --latents"""


def find_images(paths: Sequence[Path], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Source]:
    """The files among `paths`, and those in their folders: sorted, at any depth.

    In folders, what is hidden, a link, or has none of the suffixes is passed over.
    """
    found: list[Source] = []
    for path in paths:
        names = sorted(_walk(path, suffixes), key=os.fsencode) if _is_folder(path) else []
        found += [Source(path / name, name.removesuffix(Path(name).suffix)) for name in names]
        if not names:  # a file; or a folder without images, to be refused as one
            found.append(Source(path, path.stem))
    return found


def predict(
    trained: Trained, sources: Sequence[Source], batch_size: int
) -> Generator[Prediction, None, None]:
    """One prediction a source: refusals as they are met, the others in their order, by batches."""
    waiting: list[tuple[Source, NDArray[np.uint8]]] = []
    for number, source in enumerate(sources, 1):
        try:
            with images.memory_explained(str(source.path)):
                data = _read(source.path, trained.suffixes)
                waiting.append((source, trained.pixels(data)))
        except ImageRefused as refused:
            yield Prediction(source, refused=refused.cause)
        except OSError as error:
            yield Prediction(source, refused=error.strerror or str(error))
        if waiting and (len(waiting) == batch_size or number == len(sources)):
            batch = [pixels for _, pixels in waiting]
            if isinstance(trained.model, Seq2Seq):
                for (one, _), codes in zip(waiting, trained.codes(batch), strict=True):
                    yield Prediction(one, code=codes[0].text, codes=codes)
            else:
                names = [_shown(one.path) for one, _ in waiting]
                rebuilt, rows = trained.reconstructions(names, batch)
                for (one, _), pixels, row in zip(waiting, rebuilt, rows.each(), strict=True):
                    mse, score = float(row.mse_B), float(row.score_B)
                    yield Prediction(one, pixels=pixels, mse=mse, score=score, latent=row)
            waiting = []


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom predict`."""
    parser = argparse.ArgumentParser(
        prog="pixloom predict",
        description="Code of images, or their reconstructions, by a trained model.",
    )
    add = parser.add_argument
    add("run", metavar="RUN_OR_EXPORT", type=Path, help="folder of a run or of an export")
    add("images", metavar="IMAGE", type=Path, nargs="+", help="image files, and folders of them")
    add("--out", metavar="FOLDER", type=Path, help="write a file an image (autoencoder: needed)")
    add("--latents", metavar="FILE", type=Path, help="autoencoder: write latents, *.parquet, *.npz")
    add("--code-suffix", default=".txt", help="of the files of code under --out [.txt]")
    add("--overwrite", action="store_true", help="replace files that are already under --out")
    add("--checkpoint", help="of a run: best, last, or a step's number [best]")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time [32]")
    add_decoding_flags(parser)
    add("--n-best", type=int, default=1, metavar="N", help="with --json: the N best of --beam [1]")
    add("--json", action="store_true", help="one JSON object on stdout")
    return storage.command("predict", lambda: _predict(parser.parse_args(argv)))


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
    if not re.fullmatch(r"\.\w+", arguments.code_suffix):
        raise UserError(f"--code-suffix {arguments.code_suffix}: write one as in .gui")
    trained = Trained.open(arguments.run, arguments.checkpoint, arguments)
    writes_code = isinstance(trained.model, Seq2Seq)
    if not 1 <= arguments.n_best <= trained.decoding.beam:
        raise UserError(
            f"--n-best {arguments.n_best}: at least 1, and at most --beam, which is "
            f"{trained.decoding.beam}"
        )
    if arguments.n_best > 1 and not arguments.json:
        raise UserError(f"--n-best {arguments.n_best}: give --json, which has a place for them")
    sources = find_images(arguments.images, trained.suffixes)
    outputs: dict[Source, Path] = {}
    if arguments.out is not None:
        picture = ".png" if trained.image.channels in COLOUR_CHANNELS else ".npy"
        suffix = arguments.code_suffix if writes_code else picture
        outputs = _outputs(sources, arguments.out, suffix, arguments.overwrite)
    elif not writes_code and arguments.latents is None:
        raise UserError("--out FOLDER is needed: an autoencoder's answers are images; or --latents")

    done: list[Prediction] = []
    with contextlib.ExitStack() as stack:
        latents = _latents(trained, arguments, stack)
        found = predict(trained, sources, arguments.batch_size)
        stack.enter_context(contextlib.closing(found))
        for prediction in engines.progress(found, len(sources), "predicted", lambda _: 1):
            if prediction.refused is not None:
                name = _shown(prediction.source.path)
                print(f"pixloom predict: {name}: {prediction.refused}", file=sys.stderr)
            else:
                if latents is not None and prediction.latent is not None:
                    latents.add(prediction.latent)
                if outputs:
                    _write(prediction, outputs[prediction.source])
            # Its pixels and its latent are let go of.
            done.append(dataclasses.replace(prediction, pixels=None, latent=None))
    # Only now: while a progress bar is shown, it would draw what goes to stdout.
    places = {source: place for place, source in enumerate(sources)}
    done.sort(key=lambda prediction: places[prediction.source])
    if arguments.json:
        print(json.dumps(_json(trained, done, outputs, arguments.n_best)))
    else:
        alone = len(arguments.images) == 1 and not arguments.images[0].is_dir()
        for prediction in done:
            if prediction.mse is not None:
                numbers = f"{prediction.mse:.6g}\t{prediction.score:.6g}"
                print(f"{_shown(prediction.source.path)}\t{numbers}")
            elif prediction.code is not None and not outputs:
                line = " ".join(prediction.code.split())
                shown = f"{_shown(prediction.source.path)}\t{line}"
                print(_ended(prediction.code if alone else shown), end="")
    num_done = sum(prediction.refused is None for prediction in done)
    if outputs:
        print(f"{num_done} of {len(done)} images: {arguments.out}", file=sys.stderr)
    return 0 if num_done == len(done) else 1


def _latents(
    trained: Trained, arguments: argparse.Namespace, stack: contextlib.ExitStack
) -> LatentFile | None:
    """The file that --latents names, complete when `stack` ends. Raises `UserError`."""
    path: Path | None = arguments.latents
    if path is None:
        return None
    if not isinstance(trained.model, Autoencoder):
        raise UserError(f"--latents: {arguments.run} writes code; latents are autoencoders'")
    if path.exists() and not arguments.overwrite:
        raise UserError(f"{_shown(path)}: is already there; give --overwrite to replace it")
    return stack.enter_context(latent_file(path, trained.model.latent_shape))


def _outputs(
    sources: Sequence[Source], out: Path, suffix: str, overwrite: bool
) -> dict[Source, Path]:
    """Where each source's output goes. Raises `UserError` before anything is lost."""
    inputs = {source.path.resolve() for source in sources}
    outputs: dict[Source, Path] = {}
    owners: dict[Path, Source] = {}
    for source in sources:
        path = out / f"{source.stem}{suffix}"
        other = owners.setdefault(path, source)
        if other is not source:
            raise UserError(
                f"{_shown(other.path)} and {_shown(source.path)} would both be written to "
                f"{_shown(path)}; give them apart"
            )
        if path.resolve() in inputs:
            raise UserError(f"{_shown(path)}: is one of the images; choose another --out")
        if path.exists() and not overwrite:
            raise UserError(f"{_shown(path)}: is already there; give --overwrite to replace it")
        outputs[source] = path
    with storage.explained(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    return outputs


def _write(prediction: Prediction, path: Path) -> None:
    with storage.explained(_shown(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if prediction.code is not None:
            path.write_bytes(_ended(prediction.code).encode())
        elif prediction.pixels is not None:
            pixels = prediction.pixels
            if path.suffix == ".npy":
                path.write_bytes(arrays.to_npy(pixels))
            else:
                picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
                picture.save(path, "PNG")


def _ended(code: str) -> str:
    """With a line end: characters and byte pairs may have predicted it, words never do."""
    return code if code.endswith("\n") else code + "\n"


def _json(
    trained: Trained, done: Sequence[Prediction], outputs: dict[Source, Path], n_best: int
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for prediction in done:
        row: dict[str, Any] = {"image": str(prediction.source.path)}
        for name in ("refused", "code", "mse", "score"):
            if getattr(prediction, name) is not None:
                row[name] = getattr(prediction, name)
        if prediction.codes:
            row |= _scores(prediction.codes[0])
        if n_best > 1:
            some = prediction.codes[:n_best]
            row["n_best"] = [{"code": one.text, **_scores(one)} for one in some]
        if outputs and prediction.refused is None:
            row["file"] = str(outputs[prediction.source])
        rows.append(row)
    return {"model": trained.settings.model.name, "step": trained.step, "images": rows}


def _scores(code: Code) -> dict[str, float]:
    return {"score": code.score, "confidence": code.confidence}


def _read(path: Path, suffixes: Sequence[str]) -> bytes:
    """The file's bytes. Raises OSError, and `ImageRefused` for what it is no use to read."""
    if path.is_dir():
        next(path.iterdir(), None)  # raises where one may not look
        raise ImageRefused(f"no images there; looked for {' '.join(suffixes)}")
    if path.exists() and not path.is_file():
        raise ImageRefused("not a file")
    if path.stat().st_size > images.MAX_FILE_BYTES:
        raise ImageRefused("too_large")
    return path.read_bytes()


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # what is wrong with it is said when it is read
        return False


def _walk(root: Path, suffixes: Sequence[str]) -> Iterator[str]:
    closed: list[str] = []
    for folder, folders, names in os.walk(root, onerror=lambda e: closed.append(e.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            is_image = path.suffix.lower() in suffixes and not name.startswith(".")
            if is_image and not path.is_symlink():
                yield str(path.relative_to(root))
    yield from (str(Path(folder).relative_to(root)) for folder in closed)


def _shown(path: Path) -> str:
    """A path as it is typed, unless that would break a line or cannot be printed."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
