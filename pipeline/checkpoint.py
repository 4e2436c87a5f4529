"""Sharded checkpoints: saved by all ranks, committed last, verified before use. No pickle.

    RUN/checkpoints/step-00001200/tensors-00000-of-00002-5f0c1e9a.safetensors   one file a rank
                                  state.json                           state, config, versions
                                  COMMIT.json                          every file's sha256, last

On local storage or in a bucket (checkpoint.url). A directory without COMMIT.json is what a killed
save left: it is never read, and the next save clears it. Who writes what, and how any number of
processes reads it, is `pipeline.dcp`'s subject; saving beside the training is `pipeline.saver`'s.

    pixloom checkpoint ls RUN              the checkpoints, newest last
    pixloom checkpoint verify RUN          hash every file of every checkpoint
    pixloom checkpoint export RUN --out F  the model alone, see `pipeline.export`
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from pipeline import dcp
from pipeline.config import CONFIG_NAME, read_toml
from pipeline.dcp import Chunk, WrittenFile
from pipeline.ema import Ema
from pipeline.optim import state_to_come
from pipeline.ranks import Ranks
from pipeline.state import TrainState
from shards import storage
from shards.format import FormatError
from shards.storage import StorageError, UserError

CHECKPOINT_VERSION = 4
COMMIT_NAME = "COMMIT.json"
STATE_NAME = "state.json"
_FOLDER = r"step-\d{8,}"


@dataclass(frozen=True)
class Meta:
    """Everything of a checkpoint that is not a tensor."""

    state: TrainState
    config: dict[str, Any]
    data_digest: str
    versions: dict[str, str]

    def to_json(self) -> str:
        body = {"version": CHECKPOINT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(body, indent=1) + "\n"

    @classmethod
    def read(cls, checkpoint: str) -> "Meta":
        """Raises `UserError` when `state.json` cannot be understood."""
        url = storage.join(checkpoint, STATE_NAME)
        try:
            body = json.loads(storage.read_bytes(url))
            if body["version"] != CHECKPOINT_VERSION:
                raise UserError(
                    f"{url}: checkpoint version {body['version']}, "
                    f"this pixloom reads {CHECKPOINT_VERSION}; go on with the one that saved it, "
                    "or choose another run.dir"
                )
            return cls(
                state=TrainState(**body["state"]),
                config=body["config"],
                data_digest=body["data_digest"],
                versions=body["versions"],
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{url}: not the state of a checkpoint ({error!r})") from error


def directory_of(run: Path) -> str:
    """Where a run's checkpoints lie, as its config.toml says."""
    config = run / CONFIG_NAME
    section = read_toml(str(config)).get("checkpoint", {}) if config.is_file() else {}
    url = section.get("url", "") if isinstance(section, dict) else None
    if not isinstance(url, str):
        raise UserError(f"{config}: checkpoint.url must be text")
    return directory_in(run, url)


def directory_in(run: Path, url: str) -> str:
    """Where a run's checkpoints lie when checkpoint.url is `url`."""
    return url or str(run / "checkpoints")


def committed(directory: str) -> list[str]:
    """The committed checkpoints of a run, oldest first. Nothing is verified."""
    return [path for path, is_committed in _folders(directory).items() if is_committed]


def path_of(directory: str, step: int) -> str:
    return storage.join(directory, f"step-{step:08d}")


def step_of(checkpoint: str) -> int:
    return int(name_of(checkpoint).removeprefix("step-"))


def name_of(checkpoint: str) -> str:
    return checkpoint.rpartition("/")[2]


def verify(checkpoint: str, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when every hash matches.

    With `names`, only these of its files are read.

    Raises:
        StorageError: a bucket does not answer, which says nothing about what is in it.
    """
    try:
        files = _committed_files(checkpoint)
    except UserError as error:
        return _as_problem(checkpoint, error)
    problems = []
    for name, sha256 in files.items():
        if names is None or name in names:
            with tempfile.TemporaryDirectory(prefix="pixloom-") as scratch:
                problems += _check(checkpoint, name, sha256, Path(scratch))
    return problems


def fetch(checkpoint: str, folder: Path) -> list[str]:
    """Downloads a checkpoint into `folder`, which is made; what is wrong with it, as `verify`.

    Raises:
        StorageError: as `verify`, or `folder` cannot be written.
    """
    try:
        files = _committed_files(checkpoint)
    except UserError as error:
        return _as_problem(checkpoint, error)
    storage.fetch(storage.join(checkpoint, COMMIT_NAME), folder / COMMIT_NAME)
    problems = []
    for name, sha256 in files.items():
        problems += _check(checkpoint, name, sha256, folder)
    return problems


@contextlib.contextmanager
def opened(checkpoint: str) -> Iterator[Path]:
    """The checkpoint as a local folder; one from a bucket is downloaded for as long as needed.

    Raises:
        UserError: the download does not verify.
    """
    if not storage.is_remote(checkpoint):
        yield storage.local_path(checkpoint)
        return
    with tempfile.TemporaryDirectory(prefix="pixloom-") as folder:
        problems = fetch(checkpoint, Path(folder))
        if problems:
            raise UserError(f"{problems[0]}; choose another one with --checkpoint")
        yield Path(folder)


def save(
    directory: str,
    chunks: Mapping[str, Chunk],
    meta: Meta,
    ranks: Ranks,
    scratch: Path | None = None,
) -> str:
    """Writes one checkpoint, together with all other ranks; committed when it returns.

    Args:
        directory: the run's checkpoints, seen by every rank.
        chunks: what this rank owns, staged: see `dcp.owned` and `dcp.Stage`.
        meta: the same on every rank; rank 0's is written.
        scratch: local folder in which files for a bucket are made; default: the system's.

    A checkpoint of this step that verifies stays, and is not written again.

    Raises:
        UserError: on all ranks, when one of them could not write. Nothing is committed then.
    """
    checkpoint = path_of(directory, meta.state.step)
    if ranks.sum_int(int(ranks.is_main and _is_there(checkpoint, meta)))[0]:
        return checkpoint

    def prepare() -> str:
        # A writer of a killed job may still be at it, or its upload arrive late: so that it can
        # never touch a file of this save, names differ from one save to the next.
        remove(checkpoint)
        if not storage.is_remote(checkpoint):
            with storage.explained(checkpoint):
                storage.local_path(checkpoint).mkdir(parents=True)
                storage.sync(storage.local_path(directory).parent)
        return secrets.token_hex(4)

    def write(name: str, make: Callable[[Path], None]) -> WrittenFile:
        url = storage.join(checkpoint, name)
        if storage.is_remote(checkpoint):
            if scratch is not None:
                with storage.explained(str(scratch)):
                    scratch.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix="upload-", dir=scratch) as folder:
                path = Path(folder) / name
                written = _make(name, path, make)
                storage.publish(path, url)
        else:
            if not storage.exists(checkpoint):
                raise UserError(f"{checkpoint}: was made by rank 0; do all nodes see {directory}?")
            written = _make(name, storage.local_path(url), make)
            storage.sync(storage.local_path(url))
        return written

    def commit(files: Sequence[WrittenFile]) -> None:
        state = meta.to_json()
        storage.publish_text(state, storage.join(checkpoint, STATE_NAME))
        data = state.encode()
        for file in files:
            url = storage.join(checkpoint, file.name)
            if storage.size_bytes(url) != file.num_bytes:
                raise UserError(f"{url}: is not of the size that was written; is the disk full?")
        body: dict[str, Any] = {
            "version": CHECKPOINT_VERSION,
            "step": meta.state.step,
            "world_size": ranks.world_size,
            "saved": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            "files": {
                file.name: {"sha256": file.sha256, "bytes": file.num_bytes}
                for file in (
                    *files,
                    WrittenFile(STATE_NAME, len(data), hashlib.sha256(data).hexdigest()),
                )
            },
        }
        if not storage.is_remote(checkpoint):
            storage.sync(storage.local_path(checkpoint))
            storage.sync(storage.local_path(directory))
        storage.publish_text(_commit_text(body), storage.join(checkpoint, COMMIT_NAME))

    try:
        dcp.save(chunks, ranks, prepare=prepare, write=write, commit=commit)
    except CheckpointException as error:
        raise UserError(dcp.cause_of(error)) from error
    return checkpoint


def choose(run: Path, which: str) -> str:
    """`best`, `last`, or a step's number. Raises `UserError` when there is no such."""
    directory = directory_of(run)
    found = committed(directory)
    if not found:
        raise UserError(
            f"{directory}: no committed checkpoint; train first, or name another run folder"
        )
    if which == "last":
        chosen = found[-1]
    elif which == "best":
        chosen = _best_of(found) or found[-1]
    else:
        matching = [path for path in found if which == str(step_of(path))]
        if not matching:
            steps = ", ".join(str(step_of(path)) for path in found)
            raise UserError(f"{run}: no checkpoint of step {which}; it has {steps}")
        chosen = matching[0]
    # Not one in a bucket: `opened` verifies what it fetches.
    problems = [] if storage.is_remote(chosen) else verify(chosen)
    if problems:
        raise UserError(f"{problems[0]}; choose another one with --checkpoint")
    return chosen


def newest_state(run: Path) -> TrainState:
    """What is known of the whole run: the state of its newest checkpoint that can be read.

    Raises:
        UserError: there is none.
    """
    directory = directory_of(run)
    for path in reversed(committed(directory)):
        if not verify(path, [STATE_NAME]):
            return Meta.read(path).state
    raise UserError(f"{directory}: no checkpoint whose {STATE_NAME} can be read")


def prune(
    directory: str,
    step: int,
    *,
    keep_last: int,
    keep_every: int = 0,
    damaged: Collection[int] = (),
) -> None:
    """Clears what a run at `step` needs no more, and what killed saves and prunes left.

    Kept are the newest `keep_last` committed checkpoints up to `step`, the best one, those of
    every `keep_every`-th step, and all newer ones: a run that fell back to an older checkpoint
    will write those again. Those of the steps in `damaged` count for nothing. No save may be
    under way.
    """
    found = _folders(directory)
    older = [
        path
        for path, is_committed in found.items()
        if is_committed and step_of(path) <= step and step_of(path) not in damaged
    ]
    best = _best_of(older)
    kept = {
        path
        for path in older
        if path in older[-keep_last:]
        or path == best
        or (keep_every and step_of(path) % keep_every == 0)
    }
    for checkpoint in found:
        if step_of(checkpoint) <= step and checkpoint not in kept:
            remove(checkpoint)
    storage.abort_uploads(directory)


def remove(checkpoint: str) -> None:
    """Takes back the commit first: a kill in between leaves no checkpoint that looks whole."""
    url = storage.join(checkpoint, COMMIT_NAME)
    if storage.exists(url):
        storage.remove(url)
        if not storage.is_remote(checkpoint):
            storage.sync(storage.local_path(checkpoint))
    storage.remove_tree(checkpoint)


def tensors_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None = None,
    *,
    to_come: bool = False,
) -> dict[str, Tensor]:
    """`model/NAME`, `optimizer/PARAMETER/NAME` and, of averaged weights, `ema/PARAMETER`.
    Hyperparameters are not state: they follow from the configuration and the step.

    With `to_come`, an optimizer that has made no step yet counts as if it had; of what it will
    keep the shapes are right, not the values.
    """
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if to_come:
            state = state or state_to_come(optimizer, parameter)
        for entry, value in state.items():
            tensors[f"optimizer/{name}/{entry}"] = value
    return tensors | _averages(ema)


def restore(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    ema: Ema | None = None,
) -> None:
    """The inverse of saving `tensors_of`, in place, whatever processes saved it.

    Every rank reads what it needs of the local `folder`, and nothing more. Without an optimizer the
    model is to be used: where the checkpoint has averaged weights, it takes these.

    Raises:
        UserError: names or shapes are not the model's.
    """
    files = _tensor_files(folder)
    saved = dcp.shapes(files)
    targets = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    extra = {name for name in saved if name.startswith("model/")} - targets.keys()
    if extra:
        raise UserError(
            f"the checkpoint has tensors that the model lacks: {', '.join(sorted(extra))}"
        )
    if optimizer is None:
        averaged = {name: name.replace("model/", "ema/", 1) for name in targets}
        targets = {
            averaged[name] if averaged[name] in saved else name: tensor
            for name, tensor in targets.items()
        }
    else:
        targets |= _averages(ema)
        for name, parameter in model.named_parameters():
            prefix = f"optimizer/{name}/"
            state = {
                key.removeprefix(prefix): _empty_state(parameter, *saved[key])
                for key in saved
                if key.startswith(prefix)
            }
            optimizer.state[parameter] = state
            targets |= {f"{prefix}{entry}": tensor for entry, tensor in state.items()}
    dcp.load(targets, files)


def load_tensors(checkpoint: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, on the CPU."""
    with opened(checkpoint) as folder:
        files = _tensor_files(folder)
        tensors = {
            name: torch.empty(size, dtype=dtype)
            for name, (size, dtype) in dcp.shapes(files).items()
        }
        dcp.load(tensors, files)
    return tensors


def _averages(ema: Ema | None) -> dict[str, Tensor]:
    return {f"ema/{name}": tensor for name, tensor in ema.average.items()} if ema else {}


def _empty_state(parameter: nn.Parameter, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Room for a tensor of the optimizer's.

    Moments take the parameter's memory format (channels_last) and sharding: the optimizer's
    kernels then run as they did before, bit for bit. Scalars such as Adam's step stay on the CPU.
    """
    if size == parameter.shape and len(size):
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype)


def _folders(directory: str) -> dict[str, bool]:
    """Checkpoints, oldest first, and whether they are committed."""
    found: dict[str, bool] = {}
    names = list(storage.list_files(directory))
    if not storage.is_remote(directory) and storage.exists(directory):
        with storage.explained(directory):
            names += [path.name for path in storage.local_path(directory).iterdir()]  # empty ones
    for name in names:
        folder, _, file = name.partition("/")
        if re.fullmatch(_FOLDER, folder):
            found[folder] = found.get(folder, False) or file == COMMIT_NAME
    return {storage.join(directory, folder): found[folder] for folder in sorted(found, key=step_of)}


def _best_of(found: Sequence[str]) -> str | None:
    """Of committed checkpoints, oldest first, the best by what their states say.

    The newest state names a step. Where that one could not be saved, the best is the newest that
    was the best when it was saved.
    """
    named = None
    for path in reversed(found):
        if verify(path, [STATE_NAME]):
            continue
        state = Meta.read(path).state
        if named is None:
            named = state.best_step
            for other in found:
                if step_of(other) == named:
                    return other
        if state.best_step == step_of(path):
            return path
    return None


def _is_there(checkpoint: str, meta: Meta) -> bool:
    """Whether this very state is saved already. It is then when a run fell back without need."""
    try:
        if not storage.exists(storage.join(checkpoint, COMMIT_NAME)) or verify(checkpoint):
            return False
        return Meta.read(checkpoint).state.order_digest == meta.state.order_digest
    except (UserError, OSError):
        return False


def _committed_files(checkpoint: str) -> dict[str, str]:
    """The files that COMMIT.json names, with their SHA-256. Raises `UserError`."""
    if not re.fullmatch(_FOLDER, name_of(checkpoint)):
        raise UserError(f"{checkpoint}: no checkpoint; one is RUN/checkpoints/step-00001200, say")
    body = _read_commit(checkpoint)
    if body["step"] != step_of(checkpoint):
        raise UserError(f"{checkpoint}: holds the commit of step {body['step']}")
    return {name: entry["sha256"] for name, entry in body["files"].items()}


def _read_commit(folder: str) -> dict[str, Any]:
    """What COMMIT.json says, whole and unchanged. Raises `UserError`."""
    url = storage.join(folder, COMMIT_NAME)
    try:
        text = storage.read_text(url)
        body: dict[str, Any] = json.loads(text)
        if text != _commit_text({key: body[key] for key in body if key != "digest"}):
            raise UserError(f"{url}: its own digest does not match")
        for name, entry in body["files"].items():
            storage.join(folder, name)  # refuses names that lead elsewhere
            bytes.fromhex(entry["sha256"])
        return body | {"step": int(body["step"]), "world_size": int(body["world_size"])}
    except FormatError as error:
        raise UserError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{url}: cannot be read ({error!r})") from error


def _commit_text(body: Mapping[str, Any]) -> str:
    """The one way to write a commit: a flipped bit makes another text, or another digest."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "digest": digest}, indent=1) + "\n"


def _check(checkpoint: str, name: str, sha256: str, scratch: Path) -> list[str]:
    """Hashes one file; one from a bucket is downloaded into `scratch`."""
    url = storage.join(checkpoint, name)
    if not storage.exists(url):
        return [f"{url}: missing"]
    path = scratch / name if storage.is_remote(url) else storage.local_path(url)
    try:
        if storage.is_remote(url):
            storage.fetch(url, path)
        with storage.explained(str(path)):
            return (
                [] if sha256_of(path) == sha256 else [f"{url}: sha256 differs from {COMMIT_NAME}"]
            )
    except StorageError as error:
        return _as_problem(checkpoint, error)


def _as_problem(checkpoint: str, error: UserError) -> list[str]:
    """A local file that cannot be read is damaged; a bucket that does not answer says nothing."""
    if isinstance(error, StorageError) and storage.is_remote(checkpoint):
        raise error
    return [str(error)]


def _tensor_files(folder: Path) -> list[Path]:
    names = _read_commit(str(folder))["files"]
    return [folder / name for name in names if name.endswith(".safetensors")]


def _make(name: str, path: Path, make: Callable[[Path], None]) -> WrittenFile:
    make(path)
    with storage.explained(str(path)):
        return WrittenFile(name, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom checkpoint`."""
    # Here, because an export is built from a checkpoint.
    from pipeline.export import add_export_arguments, run_export

    parser = argparse.ArgumentParser(
        prog="pixloom checkpoint",
        description="List, verify or export the checkpoints of a run.",
        epilog="Each action has --help, and --json for one JSON object on stdout's last line.",
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    helps = {
        "ls": "the checkpoints, newest last",
        "verify": "hash every file of every committed checkpoint",
    }
    for name, text in helps.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
        action.add_argument("--json", action="store_true", help="one JSON object on stdout")
    text = "the model alone, as one safetensors file with its configuration and tokenizer"
    add_export_arguments(actions.add_parser("export", help=text, description=text))

    def run() -> int:
        arguments = parser.parse_args(argv)
        return run_export(arguments) if arguments.action == "export" else _list(arguments)

    return storage.command("checkpoint", run)


def _list(arguments: argparse.Namespace) -> int:
    directory = directory_of(arguments.run)
    found = _folders(directory)
    if not any(found.values()):
        raise UserError(f"{directory}: no committed checkpoint; is {arguments.run} a run's folder?")
    sizes = storage.list_files(directory)
    rows: list[dict[str, Any]] = []
    for checkpoint, is_committed in found.items():
        name = name_of(checkpoint)
        row: dict[str, Any] = {
            "checkpoint": checkpoint,
            "step": step_of(checkpoint),
            "bytes": sum(size for file, size in sizes.items() if file.startswith(f"{name}/")),
            "committed": is_committed,
            "problems": [],
        }
        if is_committed:
            row["problems"] = verify(checkpoint) if arguments.action == "verify" else []
            try:
                commit = _read_commit(checkpoint)
                state = Meta.read(checkpoint).state
                row |= {
                    "saved": commit.get("saved"),
                    "ranks": commit["world_size"],
                    "best": state.best_step == step_of(checkpoint),
                    "best_metric": state.best_metric,
                    "order_digest": state.order_digest,
                }
            except UserError as error:
                row["problems"] = row["problems"] or [str(error)]
        rows.append(row)
    bad = any(row["problems"] for row in rows)
    if arguments.json:
        print(json.dumps({"checkpoints": rows, "ok": not bad}))
    else:
        print(directory)
        print("\n".join(_table(rows, verified=arguments.action == "verify")))
    return 1 if bad else 0


def _table(rows: Sequence[Mapping[str, Any]], *, verified: bool) -> list[str]:
    cells = [["step", "MB", "ranks", "saved (UTC)", "best so far", "state"]]
    for row in rows:
        metric = row.get("best_metric")
        if row["problems"]:
            state = "; ".join(row["problems"])
        elif not row["committed"]:
            state = "not committed: left by a killed save, cleared by the next"
        else:
            state = "verified" if verified else "committed"
        cells.append(
            [
                str(row["step"]),
                f"{row['bytes'] / 1e6:.2f}",
                str(row.get("ranks", "")),
                str(row.get("saved") or ""),
                ("" if metric is None else f"{metric:.4g}") + (" *" if row.get("best") else ""),
                state,
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


if __name__ == "__main__":
    sys.exit(main())
