"""One trained model as a folder of three files, which other programs can read.

    FOLDER/model.safetensors   the model's state dict under its own names
           tokenizer.json      of a seq2seq model: the dataset's, byte for byte
           config.json         what else it takes to use the model, and the hashes; written last

`safetensors.torch.load_file` and `model.load_state_dict` are all that reading the weights takes.
A folder without config.json is what a killed export left. Nothing in it says where the run or its
dataset lay.

    pixloom checkpoint export RUN --out FOLDER
"""

import argparse
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pipeline import __version__, checkpoint
from pipeline.build import dtype_of, image_shape, load_model
from pipeline.config import Config, config_of, config_of_run, to_dict
from pipeline.datasets import Datasets
from pipeline.dcp import write_tensors
from pipeline.grammar import Grammar
from pipeline.models import Seq2SeqConfig, build_model
from pipeline.runlog import read_rows
from pipeline.state import TrainState
from pipeline.tasks import build_task
from shards import storage
from shards.format import TOKENIZER_NAME, ImagePolicy
from shards.storage import UserError

EXPORT_FORMAT = "pixloom export"
EXPORT_VERSION = 1
CONFIG_NAME = "config.json"
MODEL_NAME = "model.safetensors"

# They say where things lie, and how a run was started; what they say means nothing elsewhere.
_LEFT_OUT = frozenset(
    {"run.dir", "run.resume", "run.init", "data.url", "data.urls", "checkpoint.url"}
)


@dataclass(frozen=True)
class Export:
    """A trained model, as `read_export` found it in `folder`."""

    folder: Path
    config: Mapping[str, Mapping[str, Any]]
    """the run's configuration, without what names a place"""
    settings: Config
    """its `model`, `optim.precision` and how to decode are the run's; the rest is a placeholder"""
    image: ImagePolicy
    """how an image becomes one that the model takes, see `shards.images.fit_and_encode`"""
    vocab_size: int | None
    tokenizer_json: str | None
    grammar: str | None
    """the text of validate.grammar"""
    data_digest: str
    step: int
    metrics: Mapping[str, float]
    """of the validation split at this step, as far as they are known"""
    versions: Mapping[str, str]
    """of pixloom and torch, when it was exported"""

    def build_model(self) -> nn.Module:
        """The model with its weights, on the CPU, in training mode as any new module.

        Raises:
            UserError: the file cannot be read, or its tensors are not the model's.
        """
        path = self.folder / MODEL_NAME
        channels, height, width = image_shape(self.settings.data, self.image, str(path))
        try:
            model = build_model(
                self.settings.model,
                image_channels=channels,
                image_height=height,
                image_width=width,
                vocab_size=self.vocab_size,
            )
            model.to(dtype=dtype_of(self.settings))
            model.load_state_dict(load_file(path))
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            text = " ".join(str(error).split())  # torch names every tensor on a line of its own
            raise UserError(f"{path}: not the tensors of this model ({text[:300]})") from error
        return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, with what of its datasets it takes to use it."""

    config: Config
    data: Datasets
    chosen: str
    """the checkpoint, as `checkpoint.choose` names it"""
    meta: checkpoint.Meta
    model: nn.Module
    tokenizer_json: str | None
    """of a seq2seq model, as the manifest's hash says it was"""


def open_run(run: Path, which: str) -> TrainedRun:
    """A run's checkpoint: `best`, `last`, or a step's number. The model is on the CPU.

    Raises:
        UserError: no such run or checkpoint; its dataset is not there, or another one.
    """
    config = config_of_run(run)
    chosen = checkpoint.choose(run, which)
    meta = checkpoint.Meta.read(chosen)
    data = Datasets.of(config.data)
    if meta.data_digest != data.data_digest:
        raise UserError(
            f"{data.label}: another dataset (digest {data.data_digest[:12]}) than the "
            f"run was trained on ({meta.data_digest[:12]}); put that one back"
        )
    text = None
    if isinstance(config.model, Seq2SeqConfig) and data.tokenizer is not None:
        url = storage.join(data.roots[0], data.tokenizer.file)
        text = storage.read_text(url)
        if hashlib.sha256(text.encode()).hexdigest() != data.tokenizer.sha256:
            raise UserError(f"{url}: not the tokenizer that the manifest names; pack again")
    return TrainedRun(config, data, chosen, meta, load_model(config, data, chosen), text)


def write_export(run: Path, which: str, folder: Path, *, overwrite: bool = False) -> Export:
    """Exports a run's checkpoint (`best`, `last`, or a step's number) to `folder`.

    Raises:
        UserError: as `open_run`; or `folder` holds something else, and no `overwrite`.
    """
    trained = open_run(run, which)
    config, data, state = trained.config, trained.data, trained.meta.state
    tokenizer_json = trained.tokenizer_json
    vocab_size = data.tokenizer.vocab_size if tokenizer_json and data.tokenizer else None
    body: dict[str, Any] = {
        "format": EXPORT_FORMAT,
        "version": EXPORT_VERSION,
        "image": dataclasses.asdict(data.image),
        "vocab_size": vocab_size,
        "grammar": Grammar.open(config.validate.grammar).text if config.validate.grammar else None,
        "data_digest": data.data_digest,
        "step": state.step,
        "metrics": _metrics_at(run, config, state),
        "versions": {"pixloom": __version__, "torch": str(torch.__version__)},
        "config": _without_places(to_dict(config)),
    }
    with storage.exclusive(str(folder)) as scratch, storage.explained(str(folder)):
        own = trained.model.state_dict()
        tensors = {name: tensor.contiguous() for name, tensor in own.items()}
        write_tensors(tensors, scratch / MODEL_NAME, {"format": "pt"})
        files = [MODEL_NAME]
        if tokenizer_json is not None:
            (scratch / TOKENIZER_NAME).write_bytes(tokenizer_json.encode())
            files.append(TOKENIZER_NAME)
        body["files"] = {
            name: {
                "sha256": checkpoint.sha256_of(scratch / name),
                "bytes": (scratch / name).stat().st_size,
            }
            for name in files
        }
        body["digest"] = _digest_of(body)
        text = json.dumps(body, indent=1) + "\n"
        if not _holds(folder, text):
            _clear(folder, overwrite)
            for name in files:
                storage.publish(scratch / name, str(folder / name))
            storage.publish_text(text, str(folder / CONFIG_NAME))
    return read_export(folder)


def read_export(folder: Path) -> Export:
    """What an export holds, every hash of it checked.

    Raises:
        UserError: no export of this version, or a damaged one; the message names the file.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{folder}: no export ({CONFIG_NAME} is missing)")
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.get("format") != EXPORT_FORMAT:
            raise UserError(f"{path}: not of a pixloom export")
        if body["version"] != EXPORT_VERSION:
            raise UserError(
                f"{path}: export version {body['version']}, this pixloom reads {EXPORT_VERSION}"
            )
        if body["digest"] != _digest_of(body):
            raise UserError(f"{path}: its own digest does not match; it was edited")
        for name in _files_of(body):
            if checkpoint.sha256_of(folder / name) != body["files"][name]["sha256"]:
                raise UserError(f"{folder / name}: sha256 differs from {CONFIG_NAME}")
        data = body["config"].get("data", {})
        settings = {
            "run": {"dir": "", "steps": 1},
            "data": {
                "url": ".",
                **{name: data[name] for name in ("size", "fit") if name in data},
            },
            "model": body["config"]["model"],
            "optim": {"precision": body["config"]["optim"]["precision"]},
            "validate": {
                name: value
                for name, value in body["config"].get("validate", {}).items()
                if name in ("beam", "length_penalty", "mask")
            },
        }
        if body.get("grammar"):
            settings["validate"]["grammar"] = "its own"
        image = body["image"]
        return Export(
            folder=folder,
            config=body["config"],
            settings=config_of(settings, str(path)),
            image=ImagePolicy(**{**image, "background": tuple(image["background"])}),
            vocab_size=body["vocab_size"],
            tokenizer_json=(folder / TOKENIZER_NAME).read_text(encoding="utf-8")
            if TOKENIZER_NAME in body["files"]
            else None,
            grammar=body.get("grammar"),
            data_digest=body["data_digest"],
            step=body["step"],
            metrics=body["metrics"],
            versions=body["versions"],
        )
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; export the run again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r}); export the run again") from error


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `run_export` reads."""
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--checkpoint", default="best", help="best, last, or a step's number [best]"
    )
    parser.add_argument(
        "--out", metavar="FOLDER", type=Path, required=True, help="folder to write, new or empty"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace another export that lies there"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run_export(arguments: argparse.Namespace) -> int:
    """Writes the export that was asked for, and says so; returns the exit status."""
    export = write_export(
        arguments.run, arguments.checkpoint, arguments.out, overwrite=arguments.overwrite
    )
    size = (export.folder / MODEL_NAME).stat().st_size
    row = {"export": str(export.folder), "step": export.step, "bytes": size, **export.metrics}
    if arguments.json:
        print(json.dumps(row))
    else:
        name = export.settings.model.name
        print(f"{export.folder}: {name} of step {export.step}, {size / 1e6:.2f} MB")
    return 0


def _without_places(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The configuration less every key that names a place, and every other text with a slash."""
    return {
        section: {
            name: value
            for name, value in body.items()
            if f"{section}.{name}" not in _LEFT_OUT
            and not (isinstance(value, str) and ("/" in value or "\\" in value))
        }
        for section, body in config.items()
    }


def _metrics_at(run: Path, config: Config, state: TrainState) -> dict[str, float]:
    """The validation metrics of a step: its row in metrics.jsonl, or the one the state holds."""
    found: dict[str, Any] = {}
    if state.best_step == state.step and state.best_metric is not None:
        found = {config.validate.metric or build_task(config.model).metric: state.best_metric}
    for row in read_rows(run):
        if row.get("split") == "val" and row["step"] == state.step:
            found = row
    return {
        name: value
        for name, value in found.items()
        if name not in ("step", "epoch")
        and isinstance(value, int | float)
        and math.isfinite(value)  # JSON has no others
    }


def _holds(folder: Path, text: str) -> bool:
    """Whether this very export is already there, whole."""
    try:
        read_export(folder)
        return (folder / CONFIG_NAME).read_text(encoding="utf-8") == text
    except UserError:
        return False


def _clear(folder: Path, overwrite: bool) -> None:
    """Makes room in `folder`, whose config.json goes first. Raises `UserError`."""
    config = folder / CONFIG_NAME
    found = [name for name in (CONFIG_NAME, MODEL_NAME, TOKENIZER_NAME) if (folder / name).exists()]
    if config.exists() and not _is_marked(config):
        raise UserError(f"{config}: not of a pixloom export; choose another --out")
    if found and not overwrite:
        what = "another export" if config.exists() else f"{found[0]}, of an export that was killed"
        raise UserError(f"{folder}: holds {what}; give --overwrite to replace it, or another --out")
    for name in found:
        storage.remove(str(folder / name))
    if found:
        storage.sync(folder)


def _is_marked(config: Path) -> bool:
    try:
        return bool(json.loads(config.read_text(encoding="utf-8"))["format"] == EXPORT_FORMAT)
    except (ValueError, KeyError, TypeError):
        return False


def _files_of(body: Mapping[str, Any]) -> list[str]:
    """The files that config.json names: these names alone, for none may lead elsewhere."""
    needed = {MODEL_NAME, TOKENIZER_NAME} if body["vocab_size"] is not None else {MODEL_NAME}
    if set(body["files"]) != needed:
        raise ValueError(f"files {sorted(body['files'])}, expected {sorted(needed)}")
    return sorted(needed)


def _digest_of(body: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in body.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
