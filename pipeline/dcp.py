"""torch.distributed.checkpoint (DCP) over safetensors: who writes what, the writer, the reader.

Every rank stages and writes only what it owns: its shards of a sharded tensor (DTensor), and of
tensors that all ranks hold alike an equal share of the bytes, cut between rows. Files hold plain
tensors; where one holds some rows of a tensor, its header says which of how many. So any number
of processes, sharded or not, reads what any other wrote, and DCP's plan is rebuilt from headers.
DCP's own format pickles its metadata and everything that is no tensor; here nothing is pickled.
"""

import itertools
import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.futures import Future

from pipeline.ranks import Ranks
from shards import storage
from shards.storage import StorageError, UserError

_HEADER_KEY = "chunks"

# Said by DCP whenever one process saves or loads alone, which is what is meant here.
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, as one rank holds it."""

    tensor: Tensor
    size: torch.Size
    """shape of the whole tensor"""
    offsets: torch.Size
    """where in the whole the box begins, an entry a dimension"""


def owned(tensors: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Chunk]:
    """What one rank writes, as views. Over all ranks: every element once, balanced by bytes.

    Args:
        tensors: the same names, shapes and (but for DTensors) values on every rank.
    """
    chunks: dict[str, Chunk] = {}
    alike: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor) and any(p != Replicate() for p in tensor.placements):
            local = tensor.to_local()
            if local.numel():
                _, offsets = compute_local_shape_and_global_offset(
                    tensor.shape, tensor.device_mesh, tensor.placements
                )
                chunks[name] = Chunk(local, tensor.shape, torch.Size(offsets))
        else:
            alike[name] = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    sizes = {name: (len(t) if t.dim() else 1, t.nbytes) for name, t in alike.items()}
    for name, (start, stop) in cut(sizes, rank, world_size).items():
        tensor = alike[name]
        rows = tensor[start:stop] if tensor.dim() else tensor
        origin = [start, *[0] * (tensor.dim() - 1)] if tensor.dim() else []
        chunks[name] = Chunk(rows, tensor.shape, torch.Size(origin))
    return chunks


def cut(
    sizes: Mapping[str, tuple[int, int]], rank: int, world_size: int
) -> dict[str, tuple[int, int]]:
    """The rows [start, stop) of each tensor that are a rank's; tensors without any are left out,
    but for empty ones, which are rank 0's.

    All tensors are laid end to end, and cut into equal parts at the nearest rows.

    Args:
        sizes: (rows, bytes) of each tensor.
    """
    total = sum(num_bytes for _, num_bytes in sizes.values())
    begin, end = (total * part // world_size for part in (rank, rank + 1))
    rows_of: dict[str, tuple[int, int]] = {}
    at = 0
    for name, (rows, num_bytes) in sizes.items():
        start, stop = (
            min(max(round(rows * (edge - at) / num_bytes), 0), rows) if num_bytes else 0
            for edge in (begin, end)
        )
        if start < stop or (not num_bytes and rank == 0):
            rows_of[name] = (start, stop)
        at += num_bytes
    return rows_of


class Stage:
    """Host memory for what a rank owns, kept from one save to the next; pinned next to a GPU."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def reserve(self, chunks: Collection[Chunk]) -> None:
        """Makes room for such chunks now: the first use of new memory takes longer than a copy."""
        num_bytes = sum(_room(chunk) for chunk in chunks)
        pinned = any(chunk.tensor.is_cuda for chunk in chunks)
        if num_bytes > len(self._memory) or pinned != self._memory.is_pinned():
            self._memory = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=pinned)

    def copy(self, chunks: Mapping[str, Chunk]) -> dict[str, Chunk]:
        """The chunks as they are now: what happens to the originals afterwards changes nothing."""
        self.reserve(chunks.values())
        staged = {}
        at = 0
        for name, chunk in chunks.items():
            source = chunk.tensor.detach()
            memory = self._memory[at : at + source.nbytes]
            buffer = memory.view(source.dtype).view(source.shape)
            buffer.copy_(source, non_blocking=True)
            staged[name] = Chunk(buffer, chunk.size, chunk.offsets)
            at += _room(chunk)
        if self._memory.is_pinned():
            torch.cuda.current_stream().synchronize()
        return staged


def _room(chunk: Chunk) -> int:
    """Bytes of a chunk in a `Stage`, which begins each at a multiple of a cache line."""
    return -(-chunk.tensor.nbytes // 64) * 64


def save(
    chunks: Mapping[str, Chunk],
    ranks: Ranks,
    *,
    prepare: Callable[[], str],
    write: Callable[[str, Callable[[Path], None]], "WrittenFile"],
    commit: Callable[[Sequence["WrittenFile"]], None],
) -> None:
    """Writes each rank's `chunks` into a file of its own; together with all other ranks.

    Args:
        prepare: called on rank 0 before any rank writes; gives a word for the names of the files.
        write: called with a file's name and a function that makes it at a local path; puts it
            where it belongs.
        commit: called on rank 0 when all have written.

    Raises:
        CheckpointException: on all ranks, when one of them failed.
    """
    dcp_save(
        {},
        storage_writer=_Writer(ranks, prepare, write, commit),
        planner=_SavePlanner(chunks),
        process_group=ranks.group,
        no_dist=ranks.group is None,
    )


def load(targets: dict[str, Tensor], files: Iterable[Path]) -> None:
    """Fills tensors in place, DTensors too; every rank for itself.

    Raises:
        UserError: a file is not what it should be, or a tensor is missing or of another shape.
    """
    reader = _Reader(files)
    saved = reader.read_metadata().state_dict_metadata
    for name, tensor in targets.items():
        found = saved.get(name)
        if not isinstance(found, TensorStorageMetadata) or found.size != tensor.shape:
            raise UserError(f"the checkpoint's tensor {name} does not fit the model")
    try:
        dcp_load(
            targets,
            storage_reader=reader,
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            no_dist=True,
        )
    except CheckpointException as error:  # such as a file that was pruned meanwhile
        raise UserError(cause_of(error)) from error


def cause_of(error: CheckpointException) -> str:
    """One line: which rank failed first, and why. DCP's own text holds tracebacks."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {cause or type(cause).__name__}"


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file, readable by whom any new file is. Raises `StorageError`."""
    with storage.explained(str(path)):
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(dict(tensors), path, dict(metadata))  # replaces it by a private file
        except SafetensorError as error:
            raise StorageError(f"{path}: {error}") from error
        path.chmod(mode)


def shapes(files: Iterable[Path]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and type of every tensor in the files. Raises `UserError` as `load` does."""
    metadata = _Reader(files).read_metadata().state_dict_metadata
    return {
        name: (entry.size, entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


@dataclass(frozen=True)
class WrittenFile:
    """One file of a checkpoint."""

    name: str
    num_bytes: int
    sha256: str


class _SavePlanner(DefaultSavePlanner):
    """Plans to write exactly the chunks that this rank owns. DCP checks that nothing is missing
    and that no two overlap."""

    def __init__(self, chunks: Mapping[str, Chunk]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.chunks = chunks

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, chunk) for name, chunk in self.chunks.items()])
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self.chunks[write_item.index.fqn].tensor


def _write_item(name: str, chunk: Chunk) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=chunk.offsets, sizes=chunk.tensor.shape),
            properties=TensorProperties(dtype=chunk.tensor.dtype),
            size=chunk.size,
        ),
    )


class _Writer(StorageWriter):
    """One safetensors file a rank. See `save`."""

    def __init__(
        self,
        ranks: Ranks,
        prepare: Callable[[], str],
        write: Callable[[str, Callable[[Path], None]], WrittenFile],
        commit: Callable[[Sequence[WrittenFile]], None],
    ) -> None:
        self._ranks, self._prepare, self._write, self._commit = ranks, prepare, write, commit

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        word = self._prepare()
        return [
            SavePlan(
                plan.items,
                storage_data=f"tensors-{rank:05d}-of-{len(plans):05d}-{word}.safetensors",
                planner_data=plan.planner_data,
            )
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        future: Future[list[WriteResult]] = Future()
        results = []
        if plan.items:
            tensors: dict[str, Tensor] = {}
            boxes = {}
            for item in plan.items:
                assert item.tensor_data is not None
                name = item.index.fqn
                value = planner.resolve_data(item)
                assert isinstance(value, Tensor)
                tensors[name] = value
                whole, box = item.tensor_data.size, item.tensor_data.chunk
                if box.sizes != whole:
                    boxes[name] = {"size": list(whole), "offsets": list(box.offsets)}

            def make(path: Path) -> None:
                write_tensors(tensors, path, {_HEADER_KEY: json.dumps(boxes)})

            written = self._write(plan.storage_data, make)
            results = [WriteResult(plan.items[0].index, written.num_bytes, written)]
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._commit([result.storage_data for rows in results for result in rows])

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


class _Reader(StorageReader):
    """Reads boxes out of memory-mapped safetensors files; the plan comes from their headers."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, TensorStorageMetadata] = {}
        path_of: dict[MetadataIndex, Path] = {}
        for path in self._files:
            for name, (dtype, whole, box) in _header(path).items():
                entry = entries.setdefault(
                    name, TensorStorageMetadata(TensorProperties(dtype=dtype), whole, [])
                )
                if entry.size != whole or entry.properties.dtype != dtype:
                    raise UserError(f"{path}: {name} is of another shape in another file")
                entry.chunks.append(box)
                path_of[MetadataIndex(name, box.offsets)] = path
        for name, entry in entries.items():
            boxes = entry.chunks
            if len({box.offsets for box in boxes}) < len(boxes) or math.prod(entry.size) != sum(
                math.prod(box.sizes) for box in boxes
            ):
                raise UserError(f"{self._files[0].parent}: {name} is not there as a whole")
        return Metadata(entries, storage_data=path_of)  # type: ignore[arg-type]

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._path_of: dict[MetadataIndex, Path] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_path = sorted(plan.items, key=lambda item: str(self._path_of[item.storage_index]))
        for path, items in itertools.groupby(
            by_path, key=lambda item: self._path_of[item.storage_index]
        ):
            with safe_open(path, framework="pt") as file:
                for item in items:
                    name = item.storage_index.fqn
                    box = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    value = file.get_slice(name)[box] if box else file.get_tensor(name)
                    planner.resolve_tensor(item).detach().copy_(value)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False


def _header(path: Path) -> dict[str, tuple[torch.dtype, torch.Size, ChunkStorageMetadata]]:
    """Type, whole shape and box of each tensor in a file. Raises `UserError`."""
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            boxes = json.loads((file.metadata() or {}).get(_HEADER_KEY, "{}"))
            for name in file.keys():  # noqa: SIM118 (the file is no mapping)
                part = file.get_slice(name)
                sizes = torch.Size(part.get_shape())
                box = boxes.get(name, {})
                whole = torch.Size(box.get("size", sizes))
                offsets = torch.Size(box.get("offsets", [0] * len(sizes)))
                inside = len(whole) == len(offsets) == len(sizes) and all(
                    begin >= 0 and begin + length <= size
                    for begin, length, size in zip(offsets, sizes, whole, strict=True)
                )
                if not inside:
                    raise ValueError(f"{name}: {sizes} at {offsets} of {whole}")
                dtype = _DTYPES[part.get_dtype()]
                found[name] = (dtype, whole, ChunkStorageMetadata(offsets, sizes))
    except (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a tensor file of a checkpoint ({error})") from error
    return found


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
