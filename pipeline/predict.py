"""What a trained model makes of images: code, or reconstructions. Of a run or of an export.

Images, on disk or on a store, go through the gate and the fitting that packing used
(`shards.images`), so an image gives the same pixels here as in its shard. One that is refused is
named, and the rest is done.

    python -m pipeline.predict RUN shot.png                 its code, on stdout
    python -m pipeline.predict EXPORT folder more.png       a line an image: FILE, tab, code
    python -m pipeline.predict RUN s3://bucket/screens --out codes --code-suffix .gui --html
                                                            files; FILE, tab, confidence on stdout
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
import functools
import io
import itertools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor, nn

from pipeline import web
from pipeline.build import autocast_of, dtype_of, fit_of, for_reading, new_decoding
from pipeline.config import Config, add_decoding_flags, with_decoding
from pipeline.decode import Decoding
from pipeline.export import CONFIG_NAME, open_run, read_export
from pipeline.fit import Fit, decode_fitted
from pipeline.grammar import Grammar
from pipeline.latents import LatentFile, Rows, latent_file
from pipeline.models import Autoencoder, Seq2Seq
from pipeline.tasks import AutoencoderTask, as_floats
from shards import arrays, engines, images, sources, storage, tokens
from shards.errors import redact
from shards.format import COLOUR_CHANNELS, TOKENIZER_NAME, ImagePolicy
from shards.images import ImageRefused
from shards.sources import IMAGE_SUFFIXES, FileRead, TooLargeError, image_suffixes
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
        settings = for_reading(settings)
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
        with autocast_of(self.settings, _device()):
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
        with autocast_of(self.settings, _device()):
            output = self.model(image_BCHW, for_loss=True)
        found_BCHW = output.reconstruction_BCHW.to(image_BCHW.dtype)
        found_BHWC = (found_BCHW * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        task = AutoencoderTask(self.model.config, image_BCHW.dtype)
        return found_BHWC, Rows.of(names, names, output, image_BCHW, task)

    def _floats(self, pixels: Sequence[NDArray[np.uint8]]) -> Tensor:
        image_BCHW = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).to(_device())
        return as_floats(image_BCHW, dtype_of(self.settings))


@dataclass(frozen=True)
class Source:
    """An image file, or what was named as one; `stem` is the path its output has under --out."""

    path: str
    """or URL"""
    stem: str
    root: str = ""
    """of one on a store: the folder that it was found in"""
    num_bytes: int | None = None
    """of one on a store, as its listing said"""


@dataclass(frozen=True)
class Prediction:
    """What came of one source: a refusal, or code, or an image with its error."""

    source: Source
    refused: str | None = None
    code: str | None = None
    """the best of `codes`"""
    codes: Sequence[Code] = ()
    not_web: str | None = None
    """why there is no page of the code, where one was asked for"""
    pixels: NDArray[np.uint8] | None = None
    mse: float | None = None
    score: float | None = None
    """of an autoencoder: the image's own loss"""
    latent: Rows | None = None
    """its row of --latents"""


def find_images(paths: Sequence[str], suffixes: Sequence[str] = IMAGE_SUFFIXES) -> list[Source]:
    """The files among `paths`, and those in their folders: sorted, at any depth.

    In folders, what is hidden, a link, or has none of the suffixes is passed over, and on a store
    names that a URL cannot hold.

    Raises:
        UserError: a protocol that is not supported, or a store that does not answer.
    """
    found: list[Source] = []
    for path in paths:
        list_ = _list_store if storage.is_remote(path) else _list_local
        inside = list_(path, suffixes)
        found += inside or [_named(path)]  # a file; or a folder without images, to be refused
    return found


def predict(
    trained: Trained, found: Sequence[Source], batch_size: int
) -> Generator[Prediction, None, None]:
    """One prediction a source: refusals as they are met, the others in their order, by batches."""
    waiting: list[tuple[Source, NDArray[np.uint8]]] = []
    for source, read in _readers(found, trained.suffixes):
        try:
            with images.memory_explained(source.path):
                waiting.append((source, trained.pixels(read())))
        except ImageRefused as refused:
            yield Prediction(source, refused=refused.cause)
        except OSError as error:
            yield Prediction(source, refused=error.strerror or str(error))
        if len(waiting) == batch_size:
            yield from _answers(trained, waiting)
            waiting = []
    if waiting:
        yield from _answers(trained, waiting)


def _answers(
    trained: Trained, read: Sequence[tuple[Source, NDArray[np.uint8]]]
) -> Iterator[Prediction]:
    """What the model makes of one batch."""
    batch = [pixels for _, pixels in read]
    if isinstance(trained.model, Seq2Seq):
        for (one, _), codes in zip(read, trained.codes(batch), strict=True):
            yield Prediction(one, code=codes[0].text, codes=codes)
    else:
        names = [_shown(one.path) for one, _ in read]
        rebuilt, rows = trained.reconstructions(names, batch)
        for (one, _), pixels, row in zip(read, rebuilt, rows.each(), strict=True):
            mse, score = float(row.mse_B), float(row.score_B)
            yield Prediction(one, pixels=pixels, mse=mse, score=score, latent=row)


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom predict`."""
    parser = argparse.ArgumentParser(
        prog="pixloom predict",
        description="Code of images, or their reconstructions, by a trained model.",
    )
    add = parser.add_argument
    add("run", metavar="RUN_OR_EXPORT", type=Path, help="folder of a run or of an export")
    add("images", metavar="IMAGE", nargs="+",
        help="image files, and folders of them; also s3://, gs:// and abfs:// URLs")  # fmt: skip
    add("--out", metavar="FOLDER",
        help="write a file an image (autoencoder: this or --latents is needed)")  # fmt: skip
    add("--latents", metavar="FILE", type=Path, help="autoencoder: write latents, *.parquet, *.npz")
    add("--code-suffix", help="of the files of code under --out [.txt]")
    add("--html", action="store_true",
        help="of pix2code's web programs: write the page beside the code")  # fmt: skip
    add("--overwrite", action="store_true",
        help="replace files of --out and --latents that are already there")  # fmt: skip
    add("--checkpoint", help="of a run: best, last, or a step's number [best]")
    add("--batch-size", type=int, default=32, metavar="N", help="images at a time [32]")
    add_decoding_flags(parser)
    add("--n-best", type=int, default=1, metavar="N", help="with --json: the N best of --beam [1]")
    add("--json", action="store_true", help="one JSON object on stdout")
    return storage.command("predict", lambda: _predict(parser.parse_args(argv)))


def _predict(arguments: argparse.Namespace) -> int:
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: must be at least 1")
    if arguments.code_suffix is not None and not re.fullmatch(r"\.\w+", arguments.code_suffix):
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
    for flag, given in (("--html", arguments.html), ("--code-suffix", arguments.code_suffix)):
        if given and not (writes_code and arguments.out is not None):
            raise UserError(f"{flag}: needs --out FOLDER, and a model that writes code")
    if arguments.html and arguments.code_suffix == ".html":
        raise UserError("--html: the page would replace the code; give another --code-suffix")
    found = _once(find_images(arguments.images, trained.suffixes))
    outputs: dict[Source, Path] = {}
    if arguments.out is not None:
        picture = ".png" if trained.image.channels in COLOUR_CHANNELS else ".npy"
        suffix = arguments.code_suffix or ".txt" if writes_code else picture
        suffixes = [suffix, ".html"] if arguments.html else [suffix]
        outputs = _outputs(found, storage.local_path(arguments.out), suffixes, arguments.overwrite)
    elif not writes_code and arguments.latents is None:
        raise UserError("--out FOLDER is needed: an autoencoder's answers are images; or --latents")

    alone = [source.path for source in found] == [_named(one).path for one in arguments.images]
    alone = alone and len(found) == 1
    done: list[Prediction] = []
    stdout = sys.stdout  # a progress bar puts itself in its place, to draw what is printed
    try:
        with contextlib.ExitStack() as stack:
            latents = _latents(trained, arguments, stack)
            predictions = predict(trained, found, arguments.batch_size)
            stack.enter_context(contextlib.closing(predictions))
            if arguments.json or not stdout.isatty():  # else the lines are progress enough
                predictions = engines.progress(predictions, len(found), "predicted", lambda _: 1)
                stack.enter_context(contextlib.closing(predictions))
            for prediction in predictions:
                if outputs and prediction.refused is None:
                    prediction = _write(prediction, outputs[prediction.source], arguments.html)
                problem = prediction.refused or prediction.not_web
                if problem is not None:
                    name = _shown(prediction.source.path)
                    print(f"pixloom predict: {name}: {problem}", file=sys.stderr)
                if latents is not None and prediction.latent is not None:
                    latents.add(prediction.latent)
                # Its pixels and its latent are let go of.
                done.append(dataclasses.replace(prediction, pixels=None, latent=None))
                if not arguments.json:
                    _say(_line(prediction, alone=alone, is_written=bool(outputs)), stdout)
    finally:
        # Also of what was done before an error or Ctrl-C.
        if arguments.json and done:
            places = {source: place for place, source in enumerate(found)}
            done.sort(key=lambda prediction: places[prediction.source])
            _say(json.dumps(_json(trained, done, outputs, arguments.n_best)) + "\n", stdout)
    num_done = sum(one.refused is None and one.not_web is None for one in done)
    if outputs:
        print(f"{num_done} of {len(done)} images: {arguments.out}", file=sys.stderr)
    return 0 if num_done == len(done) else 1


def _once(found: Sequence[Source]) -> list[Source]:
    """Without those that were named before, of which a line tells."""
    first: dict[tuple[str, str], Source] = {}
    again: list[Source] = []
    for source in found:
        if first.setdefault((source.path, source.stem), source) is not source:
            again.append(source)
    if again:
        line = f"{_shown(again[0].path)}: named more than once, predicted once"
        more = f"; and so are {len(again) - 1} others" if len(again) > 1 else ""
        print(f"pixloom predict: {line}{more}", file=sys.stderr)
    return list(first.values())


def _latents(
    trained: Trained, arguments: argparse.Namespace, stack: contextlib.ExitStack
) -> LatentFile | None:
    """The file that --latents names, complete when `stack` ends. Raises `UserError`."""
    path: Path | None = arguments.latents
    if path is None:
        return None
    if not isinstance(trained.model, Autoencoder):
        raise UserError(f"--latents: {arguments.run} writes code; latents are autoencoders'")
    _check_free(path, arguments.overwrite)
    return stack.enter_context(latent_file(path, trained.model.latent_shape, "--latents"))


def _check_free(path: Path, overwrite: bool) -> None:
    """Raises `UserError` when something is there that is to stay."""
    with storage.explained(_shown(path)):
        if path.exists() and not overwrite:
            raise UserError(f"{_shown(path)}: is already there; give --overwrite to replace it")


def _outputs(
    found: Sequence[Source], out: Path, suffixes: Sequence[str], overwrite: bool
) -> dict[Source, Path]:
    """Where each source's output goes, that with the first of `suffixes`.

    Raises `UserError` before anything is lost.
    """
    # Not by `Path.resolve`, to which links in a circle are an error.
    inputs = {os.path.realpath(source.path) for source in found if not source.root}
    outputs: dict[Source, Path] = {}
    owners: dict[Path, Source] = {}
    for source, suffix in itertools.product(found, suffixes):
        path = out / f"{source.stem}{suffix}"
        other = owners.setdefault(path, source)
        if other is not source:
            raise UserError(
                f"{_shown(other.path)} and {_shown(source.path)} would both be written to "
                f"{_shown(path)}; give them apart"
            )
        if os.path.realpath(path) in inputs:
            raise UserError(f"{_shown(path)}: is one of the images; choose another --out")
        _check_free(path, overwrite)
        outputs.setdefault(source, path)
    with storage.explained(str(out)):
        out.mkdir(parents=True, exist_ok=True)
    return outputs


def _write(prediction: Prediction, path: Path, as_web: bool) -> Prediction:
    """Writes the output, and the page of a code `as_web`."""
    not_web = None
    if prediction.code is not None:
        _put(_ended(prediction.code).encode(), path)
    elif prediction.pixels is not None:
        pixels = prediction.pixels
        _put(arrays.to_npy(pixels) if path.suffix == ".npy" else _to_png(pixels), path)
    if as_web and prediction.code is not None:
        html = path.with_suffix(".html")
        try:
            _put(web.render(prediction.code, path.name).encode(), html)
        except web.WebError as error:
            with storage.explained(_shown(html)):
                html.unlink(missing_ok=True)  # of another code
            not_web = f"no HTML, the code is not a web program: {error}"
    return dataclasses.replace(prediction, not_web=not_web)


def _put(data: bytes, path: Path) -> None:
    """Writes a file, which a kill leaves whole or as it was. Raises `UserError`.

    It is not forced to the disk: it can be predicted again.
    """
    temporary = path.with_name(f".{os.getpid()}{storage.SCRATCH_NAME}")
    with storage.explained(_shown(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _to_png(pixels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    images.to_picture(pixels).save(out, "PNG")
    return out.getvalue()


def _line(prediction: Prediction, *, alone: bool, is_written: bool) -> str:
    """What stdout is told, if anything: one line, or all of a code that was asked for `alone`."""
    name = _shown(prediction.source.path)
    if prediction.mse is not None:
        return f"{name}\t{prediction.mse:.6g}\t{prediction.score:.6g}\n"
    if prediction.code is None:
        return ""
    if is_written:
        return f"{name}\t{prediction.codes[0].confidence:.6g}\n"
    return _ended(prediction.code) if alone else f"{name}\t{' '.join(prediction.code.split())}\n"


def _say(text: str, stdout: TextIO) -> None:
    """Prints it now. Raises `UserError` when nobody reads it, or the disk is full."""
    try:
        print(text, end="", file=stdout, flush=True)
    except OSError as error:
        # What is left in its buffer would fail once more, aloud, when the process ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
        raise UserError(f"stdout: {error.strerror}") from error


def _ended(code: str) -> str:
    """With a line end: characters and byte pairs may have predicted it, words never do."""
    return code if code.endswith("\n") else code + "\n"


def _json(
    trained: Trained, done: Sequence[Prediction], outputs: dict[Source, Path], n_best: int
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for prediction in done:
        row: dict[str, Any] = {"image": redact(prediction.source.path)}
        for name in ("refused", "code", "not_web", "mse", "score"):
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


def _readers(
    found: Sequence[Source], suffixes: Sequence[str]
) -> Iterator[tuple[Source, Callable[[], bytes]]]:
    """Each source with what reads it, to be called before the next is asked for.

    From a store they are read ahead. Reading raises OSError, and `ImageRefused` for what it is no
    use to read; `UserError` when the store does not answer.
    """
    for root, group in itertools.groupby(found, key=lambda source: source.root):
        if not root:
            yield from ((one, functools.partial(_read, Path(one.path), suffixes)) for one in group)
            continue
        files = [
            (one, FileRead(one.path.removeprefix(root), one.num_bytes, images.MAX_FILE_BYTES))
            for one in group
        ]
        with sources.reading(root, [file for _, file in files]) as read:
            for one, file in files:
                yield one, functools.partial(_read_stored, one.path, suffixes, read, file)


def _read_stored(url: str, suffixes: Sequence[str], read: sources.Reader, file: FileRead) -> bytes:
    try:
        return read(file)
    except TooLargeError as error:
        raise ImageRefused("too_large") from error
    except FileNotFoundError as error:
        if storage.list_files(url):
            raise _no_images(suffixes) from error
        raise


def _no_images(suffixes: Sequence[str]) -> ImageRefused:
    return ImageRefused(f"no images there; looked for {' '.join(suffixes)}")


def _read(path: Path, suffixes: Sequence[str]) -> bytes:
    """The file's bytes. Raises OSError, and `ImageRefused` for what it is no use to read."""
    if path.is_dir():
        next(path.iterdir(), None)  # raises where one may not look
        raise _no_images(suffixes)
    if path.exists() and not path.is_file():
        raise ImageRefused("not a file")
    if path.stat().st_size > images.MAX_FILE_BYTES:
        raise ImageRefused("too_large")
    return path.read_bytes()


def _named(path: str) -> Source:
    """What is called so, be it there or not."""
    if storage.is_remote(path):
        root, _, name = path.rstrip("/").rpartition("/")
        return Source(f"{root}/{name}", _stem(name), root + "/")
    local = storage.local_path(path)
    return Source(str(local), local.stem)


def _list_local(path: str, suffixes: Sequence[str]) -> list[Source]:
    folder = storage.local_path(path)
    try:
        is_folder = folder.is_dir()
    except OSError:  # what is wrong with it is said when it is read
        is_folder = False
    names = sorted(_walk(folder, suffixes), key=os.fsencode) if is_folder else []
    return [Source(str(folder / name), _stem(name)) for name in names]


def _list_store(url: str, suffixes: Sequence[str]) -> list[Source]:
    root = url.rstrip("/") + "/"
    return [
        Source(root + name, _stem(name), root, num_bytes)
        for name, num_bytes in storage.list_files(url).items()
        if _is_image(name, suffixes)
        and not any(part.startswith(".") or not part for part in name.split("/"))
        and not set("?#\\\0") & set(name)
    ]


def _stem(name: str) -> str:
    return name.removesuffix(Path(name).suffix)


def _is_image(name: str, suffixes: Sequence[str]) -> bool:
    return Path(name).suffix.lower() in suffixes


def _walk(root: Path, suffixes: Sequence[str]) -> Iterator[str]:
    closed: list[str] = []
    for folder, folders, names in os.walk(root, onerror=lambda e: closed.append(e.filename)):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(folder) / name
            if _is_image(name, suffixes) and not name.startswith(".") and not path.is_symlink():
                yield str(path.relative_to(root))
    yield from (str(Path(folder).relative_to(root)) for folder in closed)


def _shown(path: str | Path) -> str:
    """A path as it is typed, unless that would break a line or cannot be printed."""
    text = redact(str(path))
    return text if text.isprintable() else ascii(text)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


if __name__ == "__main__":
    sys.exit(main())
