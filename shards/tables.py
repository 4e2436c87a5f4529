"""Tables as rows of cells: CSV, JSON lines and Parquet; and a cell that is found again.

A row of a text table is found again by its place in the file, a row of Parquet by its number: it
is read with its row group, of which no more is kept in memory than the rows that are wanted. What
the columns mean, and what becomes of a row, is the subject of `shards.sources`.
"""

import bisect
import contextlib
import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from shards import storage
from shards.storage import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
DELIMITERS = {".csv": ",", ".tsv": "\t"}

MAX_FIELD_CHARS = 16 * 2**20
MAX_LINE_BYTES = 64 * 2**20
PARQUET_BATCH_ROWS = 16
"""Rows decoded at a time: their images are in memory together."""
PARQUET_BUFFER_BYTES = 2**20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One row. `start` and `size` are its bytes in a text table; its number, and 1, in Parquet."""

    number: int
    """Counted from 1, as a reader of the table would."""
    start: int
    size: int
    group: int | None
    """The number of its row group in Parquet."""
    cells: Mapping[str, str | None] | None
    """Those asked for; bytes that are no UTF-8 are surrogates. None: the row cannot be used."""


@dataclass(frozen=True)
class Table:
    """The wanted columns of one table, by name."""

    url: str
    positions: Mapping[str, int | str]
    """What `read_cell` and `ParquetCells` need to know of a column."""
    binary: frozenset[str]
    """Columns of bytes; others are text."""

    def rows(self, loaded: Sequence[str]) -> Iterator[Row]:
        """All rows, with their cells of the columns `loaded`.

        Raises `UserError` naming the file and the place where it is no table any more.
        """
        suffix = suffix_of(self.url)
        if suffix == ".parquet":
            return _parquet_rows(self.url, loaded)
        if suffix == ".jsonl":
            return _json_rows(self.url, list(self.positions), loaded)
        return _csv_rows(self.url, loaded)


def suffix_of(name: str) -> str:
    """The suffix of a table's name in lower case; empty for what is no table."""
    return next((suffix for suffix in SUFFIXES if name.lower().endswith(suffix)), "")


def open_table(url: str, columns: Sequence[str]) -> Table:
    """The table at `url`. Raises `UserError` for a column that it has not, or has twice."""
    suffix = suffix_of(url)
    if suffix == ".parquet":
        return _open_parquet(url, columns)
    if suffix == ".jsonl":
        # Each line has its own; one that no line has is missed when all were read.
        return Table(url, {name: name for name in columns}, frozenset())
    with storage.open_read(url) as file:
        header = next(_csv_records(url, file), None)
    if header is None:
        raise UserError(f"{url}: empty; its first line must name the columns")
    names = [name.strip() for name in header[2]]
    return Table(url, {name: _find(url, names, name) for name in columns}, frozenset())


def read_cell(record: bytes, name: str, position: int | str) -> bytes | None:
    """The cell at `position` of a row's bytes, from a text table called `name`; None where none is.

    Raises OSError when the bytes are no row: the table has changed.
    """
    text = record.decode("utf-8", "surrogateescape")
    cell: object = None
    try:
        if isinstance(position, str):
            cell = json.loads(text).get(position)
        else:
            lines = io.StringIO(text, newline="\n")
            [cells] = _csv_reader(lines, DELIMITERS[suffix_of(name)])
            cell = cells[position]
    except (ValueError, AttributeError, IndexError, RecursionError, csv.Error) as error:
        raise OSError(f"{name}: changed") from error
    if cell is None:
        return None
    if not isinstance(cell, str):
        raise OSError(f"{name}: changed")
    # Surrogates stand for bytes that are no UTF-8, or JSON spelt them: either way, still no UTF-8.
    return cell.encode("utf-8", "surrogatepass")


class ParquetCells:
    """Cells of Parquet tables below `root`, of the rows `wanted`: (file, row, column) each.

    Asked for in the order of their rows, a few rows are in memory; in any order inside a row group,
    the wanted rows of that group that were passed. Close it.
    """

    def __init__(self, root: str, wanted: Iterable[tuple[str, int, str]]) -> None:
        self._root = root
        self._rows: dict[str, set[int]] = {}
        self._columns: dict[str, set[str]] = {}
        for name, row, column in wanted:
            self._rows.setdefault(name, set()).add(row)
            self._columns.setdefault(name, set()).add(column)
        self._stack = contextlib.ExitStack()
        self._name = ""
        self._parquet: Any = None
        self._starts: list[int] = []
        self._group = -1
        self._batches: Iterator[Any] = iter(())
        self._next_row = 0
        self._held: dict[tuple[int, str], bytes | None] = {}

    def read(self, name: str, row: int, column: str) -> bytes | None:
        """A wanted cell; None where it is null. Raises OSError when the table has changed."""
        if name != self._name:
            self._open(name)
        group = bisect.bisect_right(self._starts, row) - 1
        if group >= len(self._starts) - 1:
            raise OSError(f"{name}: changed")
        if group != self._group or (row < self._next_row and (row, column) not in self._held):
            self._start(group)
        while row >= self._next_row:
            with _explained(storage.join(self._root, name)):
                batch = next(self._batches, None)
            if batch is None:
                raise OSError(f"{name}: changed")
            with _explained(storage.join(self._root, name)):
                self._hold(batch)
        return self._held.pop((row, column))

    def close(self) -> None:
        self._held.clear()
        self._stack.close()

    def _open(self, name: str) -> None:
        self.close()
        self._parquet = self._stack.enter_context(_parquet_file(storage.join(self._root, name)))
        self._name, self._group = name, -1
        self._starts = _group_starts(self._parquet)

    def _start(self, group: int) -> None:
        self._held.clear()
        self._group, self._next_row = group, self._starts[group]
        columns = sorted(self._columns[self._name])
        self._batches = _batches(self._parquet, group, columns, PARQUET_BATCH_ROWS)

    def _hold(self, batch: Any) -> None:
        rows = range(self._next_row, self._next_row + batch.num_rows)
        self._next_row = rows.stop
        wanted = [row for row in rows if row in self._rows[self._name]]
        for column in self._columns[self._name] if wanted else ():
            cells = _binary_cells(batch, column)
            for row in wanted:
                self._held[row, column] = cells[row - rows.start].as_py()


def _find(url: str, names: Sequence[str], name: str) -> int:
    found = [at for at, one in enumerate(names) if one == name]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{url}: {len(found)} columns are called {name!r}; rename one")
    raise _missing(url, name, names)


def _missing(url: str, name: str, names: Iterable[str]) -> UserError:
    known = ", ".join(ascii(one[:40]) for one in itertools.islice(names, 12))
    return UserError(
        f"{url}: no column {name!r}, it has {known}; choose with --image-column, --code-column, "
        "--split-column"
    )


class _Lines:
    """Lines of text, and how many bytes they took. `start` is where the record begins, of which
    there may be several."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self._url = url
        self._file = file
        self.position = len(_BYTE_ORDER_MARK)
        if file.read(self.position) != _BYTE_ORDER_MARK:
            self.position = file.seek(0)
        self.start = self.position

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_LINE_BYTES + 1)
        if not line:
            raise StopIteration
        if self.position + len(line) - self.start > MAX_LINE_BYTES:
            raise UserError(
                f"{self._url}: the line or record at byte {self.start} has more than "
                f"{MAX_LINE_BYTES} bytes; not a table of text"
            )
        self.position += len(line)
        return line.decode("utf-8", "surrogateescape")


def _csv_reader(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _csv_records(url: str, file: BinaryIO) -> Iterator[tuple[int, int, list[str]]]:
    """First byte, number of bytes and fields of every record, the header first."""
    lines = _Lines(url, file)
    records = _csv_reader(lines, DELIMITERS[suffix_of(url)])
    while True:
        start = lines.start = lines.position
        try:
            cells = next(records, None)
        except csv.Error as error:
            raise UserError(
                f"{url}: the record at byte {start}: {error}; fields with quotes or line ends "
                'must stand in quotes, which are doubled inside: "a ""b"" c"'
            ) from error
        if cells is None:
            return
        if cells:
            yield start, lines.position - start, cells


def _csv_rows(url: str, loaded: Sequence[str]) -> Iterator[Row]:
    with storage.open_read(url) as file:
        records = _csv_records(url, file)
        _, _, header = next(records, (0, 0, []))
        names = [name.strip() for name in header]
        positions = {name: _find(url, names, name) for name in loaded}
        for number, (start, size, cells) in enumerate(records, 1):
            found: Mapping[str, str | None] | None = None
            if len(cells) == len(header):
                found = {name: cells[at] for name, at in positions.items()}
            yield Row(number, start, size, None, found)


def _json_rows(url: str, columns: Sequence[str], loaded: Sequence[str]) -> Iterator[Row]:
    unseen = set(columns)
    seen: dict[str, None] = {}
    number = 0
    with storage.open_read(url) as file:
        lines = _Lines(url, file)
        start = lines.position
        for line in lines:
            size = lines.position - start
            if line.strip():
                number += 1
                row = _json_object(line)
                cells: Mapping[str, str | None] | None = None
                if row is not None:
                    unseen -= row.keys()
                    seen |= dict.fromkeys(itertools.islice(row, 12))
                    wanted = [row.get(name) for name in columns]
                    if all(cell is None or isinstance(cell, str) for cell in wanted):
                        cells = {name: row.get(name) for name in loaded}
                yield Row(number, start, size, None, cells)
            start = lines.start = lines.position
    if number and unseen:
        raise _missing(url, min(unseen), seen)


def _json_object(line: str) -> dict[str, Any] | None:
    """The object of a line; None for another value, for no JSON, and where a key comes twice."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a key comes twice")
        return found

    try:
        row = json.loads(line, object_pairs_hook=unique)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _open_parquet(url: str, columns: Sequence[str]) -> Table:
    types = _pyarrow(url).types
    positions: dict[str, int | str] = {}
    binary = set()
    with _parquet_file(url) as file, _explained(url):
        schema = file.schema_arrow
        for name in columns:
            kind = schema.field(_find(url, schema.names, name)).type
            positions[name] = name
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                # As Hugging Face keeps images.
                positions[name] = f"{name}.bytes"
                kind = kind.field(kind.get_field_index("bytes")).type
            if types.is_dictionary(kind):
                kind = kind.value_type
            if types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind):
                binary.add(name)
            elif not (
                types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            ):
                raise UserError(f"{url}: column {name!r} holds {kind}; text or bytes are needed")
    return Table(url, positions, frozenset(binary))


def _parquet_rows(url: str, loaded: Sequence[str]) -> Iterator[Row]:
    with _parquet_file(url) as file:
        starts = _group_starts(file)
        num_bytes = storage.size_bytes(url)
        if starts[-1] > num_bytes:
            raise UserError(f"{url}: claims {starts[-1]} rows in {num_bytes} bytes")
        for group in range(len(starts) - 1):
            row = starts[group]
            if not loaded:
                for at in range(row, starts[group + 1]):
                    yield Row(at + 1, at, 1, group, {})
                continue
            with _explained(url):
                for batch in _batches(file, group, loaded, 1024):
                    texts = {name: _texts(batch, name) for name in loaded}
                    for at in range(batch.num_rows):
                        cells = {name: texts[name][at] for name in loaded}
                        yield Row(row + 1, row, 1, group, cells)
                        row += 1
            if row != starts[group + 1]:
                raise UserError(f"{url}: row group {group} has fewer rows than it claims")


def _pyarrow(url: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            f"{url}: pyarrow is needed to read Parquet; pip install 'pixloom[parquet]'"
        ) from error
    return pa


@contextlib.contextmanager
def _parquet_file(url: str) -> Iterator[Any]:
    pa = _pyarrow(url)
    with storage.open_read(url) as file, contextlib.ExitStack() as stack:
        with _explained(url):
            # Pages are asked for as they are needed, and not a row group's columns at once.
            parquet = pa.parquet.ParquetFile(
                file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False
            )
            stack.callback(parquet.close)
        yield parquet


@contextlib.contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turns what Arrow raises for damaged files, OSError among it, into a `UserError`."""
    pa = _pyarrow(url)
    try:
        yield
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a name is no UTF-8
        line = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{url}: damaged, or no Parquet file ({line})") from error


def _group_starts(file: Any) -> list[int]:
    """The first row of each row group, and the number of all rows."""
    counts = [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)]
    return [0, *itertools.accumulate(counts)]


def _batches(file: Any, group: int, columns: Sequence[str], num_rows: int) -> Iterator[Any]:
    found: Iterator[Any] = file.iter_batches(
        batch_size=num_rows, row_groups=[group], columns=list(columns), use_threads=False
    )
    return found


def _texts(batch: Any, column: str) -> list[str | None]:
    cells = _binary_cells(batch, column).to_pylist()
    return [cell if cell is None else cell.decode("utf-8", "surrogateescape") for cell in cells]


def _binary_cells(batch: Any, position: str) -> Any:
    """A column as bytes: Arrow does not check that text is UTF-8, and would fail to make it str."""
    import pyarrow as pa

    names = batch.schema.names
    cells = batch.column(names.index(position if position in names else position[: -len(".bytes")]))
    if pa.types.is_struct(cells.type):
        [cells] = cells.flatten()
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    return cells.cast(pa.large_binary())
