"""Sharded checkpoints: saved by all ranks, committed last, verified before use. No pickle.

    RUN/checkpoints/step-00001200/tensors-00000-of-00002.safetensors   one file a rank
                                  state.json                           state, config, versions
                                  COMMIT.json                          every file's sha256, last

Under DDP every rank holds all tensors; each is written by one rank, balanced by size, and any
number of processes can read them. A directory without COMMIT.json is what a killed save left: it
is never read, and the next save of that step clears it.

    python -m pipeline.checkpoint ls RUN        the checkpoints, newest last
    python -m pipeline.checkpoint verify RUN    hash every file of every checkpoint
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.ranks import Ranks
from pipeline.state import TrainState
from shards import storage
from shards.storage import UserError

CHECKPOINT_VERSION = 1
COMMIT_NAME = "COMMIT.json"
STATE_NAME = "state.json"


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
    def read(cls, checkpoint: Path) -> "Meta":
        """Raises `UserError` when `state.json` cannot be understood."""
        path = checkpoint / STATE_NAME
        try:
            body = json.loads(path.read_text(encoding="utf-8"))
            if body["version"] != CHECKPOINT_VERSION:
                raise UserError(
                    f"{path}: checkpoint version {body['version']}, "
                    f"this pixloom reads {CHECKPOINT_VERSION}"
                )
            return cls(
                state=TrainState(**body["state"]),
                config=body["config"],
                data_digest=body["data_digest"],
                versions=body["versions"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the state of a checkpoint ({error!r})") from error


def committed(directory: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first. Nothing is verified."""
    return [path for path in _folders(directory) if (path / COMMIT_NAME).is_file()]


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def verify(checkpoint: Path, names: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty when every hash matches.

    With `names`, only these of its files are read.
    """
    try:
        files = _committed_files(checkpoint)
    except UserError as error:
        return [str(error)]
    problems = []
    for name, sha256 in files.items():
        path = checkpoint / name
        if names is not None and name not in names:
            continue
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif _sha256(path) != sha256:
            problems.append(f"{path}: sha256 differs from {COMMIT_NAME}")
    return problems


def newest_valid(directory: Path, log: Any = None) -> Path | None:
    """The newest checkpoint whose every hash matches, or None.

    `log` is called with a line for each one that is passed over.
    """
    for checkpoint in reversed(committed(directory)):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint
        if log is not None:
            log(f"checkpoint {checkpoint.name} does not verify ({problems[0]}); going back")
    return None


def save(directory: Path, tensors: Mapping[str, Tensor], meta: Meta, ranks: Ranks) -> Path:
    """Writes one checkpoint, together with all other ranks; committed when it returns.

    Args:
        directory: the run's `checkpoints/`, seen by every rank.
        tensors: the same names, shapes and values on every rank.
        meta: the same on every rank; rank 0's is written.
    """
    checkpoint = path_of(directory, meta.state.step)
    if ranks.is_main:
        if checkpoint.exists():
            _remove(checkpoint)
        checkpoint.mkdir(parents=True)
    ranks.barrier()
    names = [
        f"tensors-{rank:05d}-of-{ranks.world_size:05d}.safetensors"
        for rank in range(ranks.world_size)
    ]
    sizes = {name: _num_bytes(tensor) for name, tensor in tensors.items()}
    owned = partition(sizes, ranks.world_size)[ranks.rank]
    own_path = checkpoint / names[ranks.rank]
    save_file({name: tensors[name].detach().cpu().contiguous() for name in owned}, own_path)
    storage.sync(own_path)
    # Each rank sends its file's hash by adding it to zeros: no file is read twice, no pickle sent.
    hashes = torch.zeros(ranks.world_size, 32, dtype=torch.int64)
    hashes[ranks.rank] = torch.tensor(list(bytes.fromhex(_sha256(own_path))))
    ranks.sum(hashes)
    if ranks.is_main:
        state_path = checkpoint / STATE_NAME
        state_path.write_text(meta.to_json(), encoding="utf-8")
        storage.sync(state_path)
        sha256 = {name: bytes(row).hex() for name, row in zip(names, hashes.tolist(), strict=True)}
        sha256[STATE_NAME] = _sha256(state_path)
        files = {
            name: {"sha256": digest, "bytes": (checkpoint / name).stat().st_size}
            for name, digest in sha256.items()
        }
        body: dict[str, Any] = {
            "version": CHECKPOINT_VERSION,
            "step": meta.state.step,
            "world_size": ranks.world_size,
            "files": files,
        }
        body["digest"] = _digest_of(body)
        storage.sync(checkpoint)
        storage.sync(directory)
        storage.publish_text(json.dumps(body, indent=1) + "\n", str(checkpoint / COMMIT_NAME))
    ranks.barrier()
    return checkpoint


def choose(run: Path, which: str) -> Path:
    """`best`, `last`, or a step's number. Raises `UserError` when there is no such"""
    found = committed(run / "checkpoints")
    if not found:
        raise UserError(f"{run}: no committed checkpoint; train first, or name another run folder")
    if which == "last":
        chosen = found[-1]
    elif which == "best":
        intact = [path for path in found if not verify(path, [STATE_NAME])]
        best = Meta.read(intact[-1]).state.best_step if intact else None
        chosen = next((path for path in found if step_of(path) == best), found[-1])
    else:
        matching = [path for path in found if which == str(step_of(path))]
        if not matching:
            steps = ", ".join(str(step_of(path)) for path in found)
            raise UserError(f"{run}: no checkpoint of step {which}; it has {steps}")
        chosen = matching[0]
    problems = verify(chosen)
    if problems:
        raise UserError(f"{problems[0]}; choose another one with --checkpoint")
    return chosen


def prune(directory: Path, step: int, keep_last: int, best_step: int | None) -> None:
    """Clears what a run at `step` needs no more, and what killed saves and prunes left.

    Kept are the newest `keep_last` committed checkpoints up to `step`, the best one, and all
    newer ones: a run that fell back to an older checkpoint will write those again.
    """
    kept = [path for path in committed(directory) if step_of(path) <= step][-keep_last:]
    for checkpoint in _folders(directory):
        if step_of(checkpoint) > step or checkpoint in kept:
            continue
        if step_of(checkpoint) != best_step or not (checkpoint / COMMIT_NAME).is_file():
            _remove(checkpoint)


def load_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, on the CPU, whatever the number of ranks that wrote it."""
    tensors: dict[str, Tensor] = {}
    for name in _committed_files(checkpoint):
        if name.endswith(".safetensors"):
            tensors.update(load_file(checkpoint / name))
    return tensors


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`model/NAME` and `optimizer/PARAMETER/NAME`. Hyperparameters are not state: they follow
    from the configuration and the step."""
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer/{name}/{entry}"] = value
    return tensors


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, tensors: Mapping[str, Tensor]
) -> None:
    """The inverse of `tensors_of`, in place. Raises `UserError` when names or shapes differ."""
    own = model.state_dict()
    for name, tensor in own.items():
        loaded = tensors.get(f"model/{name}")
        if loaded is None or loaded.shape != tensor.shape:
            raise UserError(f"the checkpoint's tensor {name} does not fit the model")
        tensor.copy_(loaded)
    extra = {name for name in tensors if name.startswith("model/")} - {f"model/{n}" for n in own}
    if extra:
        raise UserError(
            f"the checkpoint has tensors that the model lacks: {', '.join(sorted(extra))}"
        )
    if optimizer is None:
        return
    for name, parameter in model.named_parameters():
        prefix = f"optimizer/{name}/"
        entries = {
            key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)
        }
        optimizer.state[parameter] = {
            # Moments take the parameter's memory format (channels_last): the optimizer's kernels
            # then run as they did before, bit for bit. Scalars such as Adam's step stay on the CPU.
            entry: torch.empty_like(parameter, dtype=t.dtype).copy_(t)
            if t.shape == parameter.shape and t.dim() > 0
            else t.clone()
            for entry, t in entries.items()
        }


def partition(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """Names split into `parts` lists of nearly equal total size, the same on every rank."""
    lists: list[list[str]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = totals.index(min(totals))
        lists[least].append(name)
        totals[least] += sizes[name]
    return lists


def _folders(directory: Path) -> list[Path]:
    """Checkpoints, committed or not, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_of)


def _committed_files(checkpoint: Path) -> dict[str, str]:
    """The files that COMMIT.json names, with their SHA-256. Raises `UserError`."""
    path = checkpoint / COMMIT_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["digest"] != _digest_of(body):
            raise UserError(f"{path}: its own digest does not match")
        return {str(name): str(entry["sha256"]) for name, entry in body["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read ({error!r})") from error


def _remove(checkpoint: Path) -> None:
    """Takes back the commit first: a kill in between leaves no checkpoint that looks whole."""
    (checkpoint / COMMIT_NAME).unlink(missing_ok=True)
    storage.sync(checkpoint)
    shutil.rmtree(checkpoint)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(body: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in body.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def main(argv: Sequence[str] | None = None) -> int:
    """`pixloom checkpoint`."""
    parser = argparse.ArgumentParser(
        prog="pixloom checkpoint", description="List or verify the checkpoints of a run."
    )
    parser.add_argument("action", choices=["ls", "verify"])
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return storage.command("checkpoint", lambda: _list(parser.parse_args(argv)))


def _list(arguments: argparse.Namespace) -> int:
    found = committed(arguments.run / "checkpoints")
    if not found:
        raise UserError(f"{arguments.run}: no committed checkpoint")
    rows = []
    for checkpoint in found:
        problems = verify(checkpoint) if arguments.action == "verify" else []
        size = sum(path.stat().st_size for path in checkpoint.iterdir())
        row: dict[str, Any] = {"checkpoint": str(checkpoint), "bytes": size, "problems": problems}
        try:
            state = Meta.read(checkpoint).state
            row |= {
                "order_digest": state.order_digest,
                "best": state.best_step == step_of(checkpoint),
            }
        except UserError as error:
            row["problems"] = [*problems, str(error)]
        rows.append(row)
    bad = any(row["problems"] for row in rows)
    if arguments.json:
        print(json.dumps({"checkpoints": rows, "ok": not bad}))
    else:
        for row in rows:
            verdict = "; ".join(row["problems"]) or ("ok" if arguments.action == "verify" else "")
            best = "best" if row.get("best") else ""
            print(
                f"{row['checkpoint']}  {row['bytes'] / 1e6:9.2f} MB  {best:4}  {verdict}".rstrip()
            )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
