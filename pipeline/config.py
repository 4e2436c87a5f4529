"""The whole configuration of a run: frozen dataclasses, read from TOML and flags alike.

A TOML file and flags go through one reader: `--optim.lr 1e-3` is `lr = 1e-3` under `[optim]` and
wins over it. An unknown key is an error that names the nearest one. Each class checks itself;
what needs the dataset is checked in `pipeline.build`.
"""

import argparse
import ast
import contextlib
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import re
import textwrap
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.grammar import BUILT_IN
from pipeline.models import AutoencoderConfig, ModelConfig, Seq2SeqConfig
from shards.images import MAX_PIXELS
from shards.storage import UserError


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    dir: str
    """folder of the run: config.toml, metrics.jsonl, checkpoints/"""
    seed: int = 0
    """seed of the order, the augmentation, the dropout and the initial weights"""
    steps: int = 0
    """optimizer steps to train; 0: use run.epochs"""
    epochs: int = 0
    """epochs to train; 0: use run.steps"""
    resume: str = "auto"
    """auto: newest checkpoint that verifies; never: refuse a folder with any; or a PATH"""
    init: str = ""
    """initial weights: torchvision, for its own of model.encoder; an export's folder or its
    model.safetensors; or a state dict of torchvision (.safetensors, or .pth read with
    weights_only=True); used when the run has no checkpoint"""
    max_time_s: float = 0.0
    """seconds after which to finish the step, save and stop; 0: no limit"""
    deterministic: bool = False
    """ask for deterministic CUDA kernels (the CPU's are already)"""
    log_every_steps: int = 10
    """a row of metrics.jsonl every so many steps"""

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.epochs > 0):
            raise ValueError("run.steps, run.epochs: set exactly one of them above 0")
        _at_least("run.steps", self.steps, 0)
        _at_least("run.epochs", self.epochs, 0)
        _at_least("run.max_time_s", self.max_time_s, 0)
        _at_least("run.log_every_steps", self.log_every_steps, 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    url: str = ""
    """root of a packed dataset (where manifest.json lies)"""
    urls: tuple[str, ...] = ()
    """in place of data.url: roots of several datasets, to be mixed"""
    weights: tuple[float, ...] = ()
    """what part of the samples is drawn from each of data.urls, in any unit; default: by size"""
    lanes: int = 0
    """streams read side by side; divides batch.global_size; 0: its largest divisor up to 8"""
    window: int = 8192
    """samples of a lane that are shuffled together"""
    workers: int = 0
    """loader processes a rank; any number gives the same order; they share out OMP_NUM_THREADS"""
    size: str = ""
    """WxH in pixels: scale every image to it when it is read; default: the size they were packed
    with"""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """with data.size: ignore the aspect ratio; cut the longer side; or fill up with background"""
    shift_px: int = 0
    """augmentation: move each training image by up to so many pixels along both axes"""
    cache_dir: str = ""
    """folder of this node for shards of object stores; default: one in the system's temp folder"""
    cache_bytes: int = 0
    """most bytes in data.cache_dir; 0: nine tenths of what it holds and the disk has free"""
    max_bad: int = 0
    """damaged training samples (each keeps its place, with weight 0) before the run stops"""

    def __post_init__(self) -> None:
        if bool(self.url) == bool(self.urls):
            raise ValueError(
                "data.url, data.urls: set exactly one of them, to the root of a packed dataset, or "
                "to those of several"
            )
        for url in self.urls:
            if self.urls.count(url) > 1:
                raise ValueError(f"data.urls: {url} is there twice; give it a weight instead")
        if self.weights and len(self.weights) != len(self.urls):
            raise ValueError(
                f"data.weights: {len(self.weights)} of them for {len(self.urls)} of data.urls; "
                "give one for each, or none"
            )
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError("data.weights: each must be above 0 and finite")
        if self.size:
            parse_size(self.size)
        elif self.fit != "stretch":
            raise ValueError(f"data.fit = {self.fit}: needs data.size = WxH")
        _at_least("data.lanes", self.lanes, 0)
        _at_least("data.window", self.window, 1)
        _at_least("data.workers", self.workers, 0)
        _at_least("data.shift_px", self.shift_px, 0)
        _at_least("data.cache_bytes", self.cache_bytes, 0)
        _at_least("data.max_bad", self.max_bad, 0)


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    global_size: int = 32
    """samples of an optimizer step, over all processes"""
    micro_size: int = 8
    """samples of one forward pass; the rest of a rank's share is accumulated"""

    def __post_init__(self) -> None:
        _at_least("batch.global_size", self.global_size, 1)
        _at_least("batch.micro_size", self.micro_size, 1)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "sgd"] = "adamw"
    """adamw, or sgd with momentum 0.9"""
    lr: float = 1e-3
    """peak learning rate"""
    schedule: Literal["constant", "cosine", "linear", "wsd", "onecycle"] = "cosine"
    """after the warm-up: stay; decay to 0 at the last step; or stay, then decay (wsd); onecycle: up
    from lr / 25 and down to nearly 0 along cosines"""
    decay_steps: int = 0
    """wsd: steps of linear decay to 0 at the end"""
    beta2: float = 0.999
    """adamw: decay of the running mean of squared gradients, in [0, 1)"""
    warmup_steps: int = 0
    """steps of linear warm-up from 0; onecycle needs them: three tenths of the run are usual"""
    weight_decay: float = 0.01
    """decoupled weight decay (adamw), on matrices and kernels only"""
    clip_norm: float = 1.0
    """largest norm of the gradient; 0: no clipping"""
    ema_decay: float = 0.0
    """exponential moving average of the weights, in [0, 1): what it keeps of itself in a step, as
    0.999; it is then what is validated, exported and used to predict; 0: none"""
    precision: Literal["fp32", "bf16", "fp16", "fp64"] = "fp32"
    """bf16, fp16: autocast; fp64: everything, for proofs"""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr = {self.lr}: must be above 0 and finite")
        if (self.schedule == "wsd") != (self.decay_steps > 0):
            raise ValueError("optim.decay_steps: belongs to optim.schedule = wsd, which needs it")
        _at_least("optim.warmup_steps", self.warmup_steps, 0)
        _at_least("optim.decay_steps", self.decay_steps, 0)
        if self.schedule == "onecycle" and not self.warmup_steps:
            raise ValueError("optim.schedule = onecycle: needs optim.warmup_steps above 0")
        for key in ("beta2", "ema_decay"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"optim.{key} = {getattr(self, key)}: must be in [0, 1)")
        _at_least("optim.weight_decay", self.weight_decay, 0)
        _at_least("optim.clip_norm", self.clip_norm, 0)


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    every_steps: int = 0
    """steps between validations; 0: once an epoch"""
    batch_size: int = 32
    """samples of a validation batch; fixed, so that any number of processes adds the same sums"""
    metric: str = ""
    """what says which checkpoint is best; default: exact_match (seq2seq), mse (autoencoder)"""
    patience: int = 0
    """stop after so many validations without a better metric; 0: never"""
    beam: int = 1
    """seq2seq: hypotheses that beam search keeps; 1: greedy"""
    length_penalty: float = 0.0
    """with validate.beam: log-probabilities are divided by ((5 + tokens) / 6) to this power; above
    0 it favours longer codes"""
    grammar: str = ""
    """seq2seq: web (the language of pix2code's web screens), or a FILE; adds validity to the
    metrics, and skeleton_match if it has @skeleton"""
    mask: bool = True
    """with validate.grammar: write nothing that it does not take; false: only measure"""

    def __post_init__(self) -> None:
        _at_least("validate.every_steps", self.every_steps, 0)
        _at_least("validate.batch_size", self.batch_size, 1)
        _at_least("validate.patience", self.patience, 0)
        _at_least("validate.beam", self.beam, 1)
        _at_least("validate.length_penalty", self.length_penalty, 0)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0
    """steps between checkpoints; 0: once an epoch (the last step is always saved)"""
    keep_last: int = 2
    """newest checkpoints to keep; the best one is kept besides"""
    keep_every_steps: int = 0
    """keep those of every n-th step for ever; 0: none"""
    url: str = ""
    """folder or bucket (s3://...) seen by all nodes; default: `checkpoints` in run.dir"""
    on_error: Literal["warn", "stop"] = "warn"
    """a checkpoint that cannot be saved: go on training, or stop the run"""

    def __post_init__(self) -> None:
        _at_least("checkpoint.every_steps", self.every_steps, 0)
        _at_least("checkpoint.keep_last", self.keep_last, 1)
        _at_least("checkpoint.keep_every_steps", self.keep_every_steps, 0)


@dataclass(frozen=True, kw_only=True)
class Config:
    run: RunConfig
    data: DataConfig
    batch: BatchConfig
    model: ModelConfig
    optim: OptimConfig
    validate: ValidateConfig
    checkpoint: CheckpointConfig


CONFIG_NAME = "config.toml"
"""the configuration of a run, in its folder"""

GRAMMAR_NAME = "grammar.ebnf"
"""in a run's folder: the text of the FILE that validate.grammar named when training began"""

# Keys that a resumed run may change: none of them reaches the samples, the arithmetic or the
# schedule. Everything else is refused with the difference.
MAY_CHANGE = frozenset(
    {
        "run.dir",
        "run.resume",
        "run.max_time_s",
        "run.log_every_steps",
        "data.url",
        "data.urls",
        "data.workers",
        "data.cache_dir",
        "data.cache_bytes",
        "data.max_bad",
        "validate.patience",
        "validate.beam",
        "validate.length_penalty",
        "validate.grammar",
        "validate.mask",
        "checkpoint.every_steps",
        "checkpoint.keep_last",
        "checkpoint.keep_every_steps",
        "checkpoint.url",
        "checkpoint.on_error",
    }
)

_MODELS: dict[str, type[ModelConfig]] = {
    "seq2seq": Seq2SeqConfig,
    "autoencoder": AutoencoderConfig,
}
_SECTIONS: dict[str, type] = {
    field.name: field.type for field in dataclasses.fields(Config) if isinstance(field.type, type)
}


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of `data.size`. Raises ValueError naming the key."""
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise ValueError(f"data.size = {text!r}: write WxH in pixels, as 224x224")
    width, height = int(found[1]), int(found[2])
    if width * height > MAX_PIXELS:
        raise ValueError(f"data.size = {text}: more than {MAX_PIXELS} pixels")
    return width, height


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Adds `--config FILE` and one flag for every key to a command's parser."""
    parser.add_argument("--config", metavar="FILE", help="TOML file; flags win over it")
    for key, kinds in _keys().items():
        helps = dict.fromkeys(_help_of(kind)[key.split(".")[1]] for kind in kinds)
        parser.add_argument(
            f"--{key}",
            dest=key,
            metavar="VALUE",
            default=None,
            help=" | ".join(helps).replace("%", "%%"),
        )


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `with_decoding` reads: flags for the keys of `[validate]` about decoding."""
    add = parser.add_argument
    add("--beam", type=int, metavar="N", help="validate.beam [the run's]")
    add("--length-penalty", type=float, metavar="A", help="validate.length_penalty [the run's]")
    add("--grammar", metavar="NAME", help="validate.grammar: web, or a file [the run's]")
    add("--mask", action=argparse.BooleanOptionalAction,
        help="write only what the grammar takes [with --grammar; else as the run]")  # fmt: skip


def with_decoding(config: Config, arguments: argparse.Namespace) -> Config:
    """The configuration, flags of `add_decoding_flags` in place of its keys.

    Raises:
        UserError: a value out of range, or a flag that would change nothing.
    """
    given = {
        name: value
        for name in ("beam", "length_penalty", "grammar", "mask")
        if (value := getattr(arguments, name)) is not None
    }
    if "grammar" in given:
        given.setdefault("mask", True)  # also where the run only measured
    try:
        wanted = dataclasses.replace(config.validate, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    # Of flags alone: a configuration may hold for later what nothing makes use of now.
    mask = "--mask" if arguments.mask else "--no-mask"
    for flag, is_given, has_use, need in (
        ("--length-penalty", bool(arguments.length_penalty), wanted.beam > 1, "--beam above 1"),
        (mask, arguments.mask is not None, bool(wanted.grammar), "--grammar"),
    ):
        if is_given and not isinstance(config.model, Seq2SeqConfig):
            raise UserError(f"{flag}: model.name = {config.model.name} writes no code")
        if is_given and not has_use:
            raise UserError(f"{flag}: changes nothing without {need}")
    return dataclasses.replace(config, validate=wanted)


def parse_flags(parser: argparse.ArgumentParser, argv: typing.Sequence[str] | None) -> Any:
    """`parser.parse_args`, but an unknown `--section.key` names the nearest key.

    Raises:
        UserError: an unknown flag.
    """
    arguments, unknown = parser.parse_known_args(argv)
    for word in unknown:
        flag = word.split("=")[0]
        if flag.startswith("--"):
            raise UserError(f"unknown flag {flag}{_nearest(flag[2:], list(_keys()), '--')}")
        raise UserError(f"unexpected argument {word!r}")
    return arguments


def config_from(arguments: argparse.Namespace) -> Config:
    """The configuration of a parsed command line: the file, then the flags.

    Raises:
        UserError: unreadable file, unknown key, wrong type, or a value out of range.
    """
    sections: dict[str, dict[str, Any]] = {}
    if arguments.config is not None:
        sections = read_toml(arguments.config)
    for key in _keys():
        value = getattr(arguments, key)
        if value is not None:
            section, name = key.split(".")
            body = sections.setdefault(section, {})
            if isinstance(body, dict):  # else `config_of` names the section
                body[name] = _Flag(value)
    return config_of(sections, arguments.config or "flags")


def read_toml(path: str) -> dict[str, dict[str, Any]]:
    """The sections of a TOML file, unchecked. Raises `UserError` naming the file."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the configuration ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file ({error})") from error


def config_of(sections: Mapping[str, Any], where: str) -> Config:
    """A checked `Config` from nested mappings, as TOML or JSON give them.

    Raises:
        UserError: names `where` and the key.
    """
    known_sections = [field.name for field in dataclasses.fields(Config)]
    for section, body in sections.items():
        if section not in known_sections:
            raise UserError(
                f"{where}: unknown section [{section}]{_nearest(section, known_sections)}"
            )
        if not isinstance(body, Mapping):
            raise UserError(f"{where}: {section} is a section; write [{section}]")
    name = sections.get("model", {}).get("name", "seq2seq")
    name = name.text if isinstance(name, _Flag) else name
    model = _MODELS.get(name) if isinstance(name, str) else None
    if model is None:
        raise UserError(f"{where}: model.name = {name!r}: choose one of {', '.join(_MODELS)}")
    kinds = {**_SECTIONS, "model": model}
    try:
        built = {
            section: _build(kinds[section], section, sections.get(section, {}), where)
            for section in known_sections
        }
        return Config(**built)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def config_of_run(run: Path) -> Config:
    """The configuration that a run's folder holds; its grammar is the one that is kept there, for
    the FILE may be another by now. Raises `UserError`."""
    path = str(run / CONFIG_NAME)
    config = config_of(read_toml(path), path)
    kept = run / GRAMMAR_NAME
    if not names_file(config.validate.grammar) or not kept.is_file():
        return config
    return dataclasses.replace(
        config, validate=dataclasses.replace(config.validate, grammar=str(kept))
    )


def names_file(grammar: str) -> bool:
    """Whether this value of validate.grammar is the name of a file."""
    return bool(grammar) and grammar not in BUILT_IN


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values: what `config_of` reads."""
    plain: dict[str, dict[str, Any]] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def to_toml(config: Config) -> str:
    """The configuration as TOML; reading it gives the same `Config`."""
    lines = []
    for section, body in to_dict(config).items():
        lines += [
            f"[{section}]",
            *(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in body.items()),
        ]
        lines.append("")
    # Strings of TOML are those of JSON, but for this character, which JSON leaves as it is.
    return "\n".join(lines).replace("\x7f", "\\u007f")


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs and may not."""
    keys = sorted(
        {f"{section}.{name}" for body in (old, new) for section in body for name in body[section]}
    )
    lines = []
    for key in keys:
        section, name = key.split(".")
        was, now = (body.get(section, {}).get(name, "absent") for body in (old, new))
        if was != now and key not in MAY_CHANGE:
            lines.append(f"{key}: {json.dumps(was)} -> {json.dumps(now)}")
    return lines


@dataclass(frozen=True)
class _Flag:
    """A value from the command line: text, to be read by the field's type."""

    text: str


@functools.cache
def _keys() -> dict[str, list[type]]:
    """`section.name` of every key -> the classes that have it (several for `model`)."""
    keys: dict[str, list[type]] = {}
    for field in dataclasses.fields(Config):
        kinds = list(_MODELS.values()) if field.name == "model" else [_SECTIONS[field.name]]
        for kind in kinds:
            for inner in dataclasses.fields(kind):
                keys.setdefault(f"{field.name}.{inner.name}", []).append(kind)
    return keys


def _build(kind: Any, section: str, body: Mapping[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    for name in body:
        if name not in hints:
            key = f"{section}.{name}"
            raise UserError(f"{where}: unknown key {key}{_nearest(key, list(_keys()))}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in body:
            raise UserError(
                f"{where}: {section}.{field.name} is missing: {_help_of(kind)[field.name]}"
            )
    return kind(
        **{name: _convert(value, hints[name], f"{section}.{name}") for name, value in body.items()}
    )


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the field's type; flags are parsed, values from TOML must already fit."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        text = value.text if isinstance(value, _Flag) else value
        if text in inner:
            return text
        raise ValueError(f"{key} = {text!r}: choose one of {', '.join(map(str, inner))}")
    if origin is tuple:
        items = _items(value.text) if isinstance(value, _Flag) else value
        if isinstance(items, list | tuple):
            return tuple(_convert(item, inner[0], key) for item in items)
    elif isinstance(value, _Flag):
        if hint is bool and value.text in ("true", "false"):
            return value.text == "true"
        if hint is not bool:
            try:
                return hint(value.text)
            except ValueError:
                pass
    elif type(value) is hint or (hint is float and type(value) is int):
        return hint(value)
    shown = value.text if isinstance(value, _Flag) else value
    name = f"list of {inner[0].__name__}" if origin is tuple else hint.__name__
    raise ValueError(f"{key} = {shown!r}: must be {'true or false' if hint is bool else name}")


def _items(text: str) -> list[Any]:
    """Those of a list on the command line: as TOML has it, or bare between commas, else blanks."""
    text = text.strip()
    if text.startswith("["):
        with contextlib.suppress(tomllib.TOMLDecodeError):
            return list(tomllib.loads(f"list = {text}")["list"])
    if (text[:1], text[-1:]) in (("[", "]"), ("(", ")")):
        text = text[1:-1]
    words = text.split(",") if "," in text else text.split()
    return [_Flag(word.strip()) for word in words if word.strip()]


def _nearest(word: str, known: list[str], prefix: str = "") -> str:
    """A suggestion: the same name in another section first, then the closest spelling."""
    name = word.rpartition(".")[2]
    moved = [key for key in known if key.rpartition(".")[2] == name]
    close = moved or difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


@functools.cache
def _help_of(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, with its default."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    body = typing.cast(ast.ClassDef, tree.body[0]).body
    docs = {}
    for line, after in itertools.pairwise(body):
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            docs[line.target.id] = " ".join(str(after.value.value).split())
    return {
        field.name: docs.get(field.name, "")
        + ("" if field.default is dataclasses.MISSING else f" [{_shown(field.default)}]")
        for field in dataclasses.fields(kind)
    }


def _shown(default: object) -> str:
    return json.dumps(default) if not isinstance(default, str) else default or "-"


def _at_least(key: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        finite = " and finite" if isinstance(value, float) else ""
        raise ValueError(f"{key} = {value}: must be at least {least}{finite}")
