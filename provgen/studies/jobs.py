"""Many models, trained one by one: which of them a call and a process train, and where their results are kept."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from numpy.typing import NDArray

from provgen.errors import InputError
from provgen.run import only_writer, read_parquet, write_parquet

T = TypeVar("T")

SCHEMA_VERSION = 2
"""Version of kept results; those of provgen 0.1 were .npz files."""

BYTES_PER_FILE = 600_000
"""Uncompressed size up to which rows are compacted into one file: less than 500 kB, so that git can keep it."""


@dataclass(frozen=True)
class Shard:
    """A share of the models: `number` of `count`, from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read `1/2`.

        Raises:
            InputError: Not two numbers, or not one of the shards.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise InputError(f"--shard must be a number of how many, such as 1/2, got {text}")
        return cls(int(match[1]), int(match[2]))

    def share(self, models: Sequence[T]) -> list[T]:
        """Take every `count`-th model, so that shards are about equally long."""
        return list(models[self.number - 1 :: self.count])


def missing_models(
    models: Sequence[T],
    is_there: Callable[[T], bool],
    *,
    shard: Shard,
    accelerator: Accelerator,
    folder: Path,
    describe: Callable[[T], str] = str,
) -> Iterator[T]:
    """Yield what this process has to train of a shard, and print how far it is; all processes end together.

    `is_there` says whether a model has been measured into `folder`, and `describe` names it.
    """
    missing = [model for model in shard.share(models) if not is_there(model)]
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    waiting = missing[accelerator.process_index :: accelerator.num_processes]
    say = partial(print, flush=True)
    name, writes = f"-{shard.number}-of-{shard.count}", accelerator.is_main_process
    with only_writer(folder, f"shard {shard.number}/{shard.count}", name=name, writes=writes):
        if writes:
            say(f"{len(models)} models into {folder}, {len(missing)} of this shard are missing")
        start = time.perf_counter()
        for done, model in enumerate(waiting, start=1):
            yield model
            left = (time.perf_counter() - start) / done * (len(waiting) - done) / 60
            say(f"[{done}/{len(waiting)}] {describe(model)}; about {left:.0f} min left")
        accelerator.wait_for_everyone()


class ResultStore:
    """Rows of results in a folder of Parquet files: a small file for each while models are trained, few at the end.

    Any number of processes may save rows at once. A row is whole or not there. A row that is saved again replaces the
    earlier one of the same key.
    """

    def __init__(self, folder: Path, key: Sequence[str]) -> None:
        """Name a folder of these files and no others, and the columns that tell rows apart."""
        self.folder, self.key = folder, tuple(key)

    def save(self, row: Mapping[str, Any]) -> None:
        """Write one row: numbers, texts and NumPy arrays of at least one axis."""
        name = "-".join(re.sub(r"\W", "_", f"{row[column]}") for column in self.key)
        write_parquet(self.folder / f"piece-{name}.parquet", _table_of(row), version=SCHEMA_VERSION)

    def rows(self) -> dict[tuple[Any, ...], dict[str, Any]]:
        """Read all rows by key, in the order of their keys; columns that a row lacks are left out.

        Raises:
            InputError: A file is damaged or of another version of provgen.
        """
        _, table = self._read()
        return {} if table is None else {self._key(row): row for row in _rows_of(table)}

    def saved_keys(self) -> set[tuple[Any, ...]]:
        """Read which rows there are."""
        _, table = self._read(columns=self.key)
        return set() if table is None else {self._key(row) for row in table.to_pylist()}

    def compact(self) -> None:
        """Move what is in small files into files of up to `BYTES_PER_FILE`.

        New files are written before small ones are removed, and have names of their own. So a kill, and another
        process that compacts, can at worst leave a row twice.
        """
        pieces, table = self._read(pattern="piece-*.parquet")
        if table is None:
            return
        number = max((int(path.name.split("-")[1]) for path in self._files("rows-*.parquet")), default=0)
        count = max(1, BYTES_PER_FILE * len(table) // table.nbytes)
        for first in range(0, len(table), count):
            number += 1
            path = self.folder / f"rows-{number:04d}-{uuid4().hex[:8]}.parquet"
            write_parquet(path, table.slice(first, count), version=SCHEMA_VERSION, level=19)
        for piece in pieces:
            piece.unlink(missing_ok=True)

    def _key(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[column] for column in self.key)

    def _files(self, pattern: str = "[!.]*.parquet") -> list[Path]:
        """List files, the newest rows last."""
        return sorted(self.folder.glob(pattern), key=lambda path: (path.name.startswith("piece"), path.name))

    def _read(
        self, pattern: str = "[!.]*.parquet", columns: Sequence[str] | None = None
    ) -> tuple[list[Path], pa.Table | None]:
        """Read files and their rows, sorted by key; no table where there is no file."""
        while True:
            files = self._files(pattern)
            try:
                tables = [read_parquet(path, version=SCHEMA_VERSION, columns=columns) for path in files]
            except InputError:
                if all(path.is_file() for path in files):
                    raise
                continue  # compacted by another process just now, so its rows are in a newer file
            return files, self._newest(pa.concat_tables(tables, promote_options="default")) if tables else None

    def _newest(self, table: pa.Table) -> pa.Table:
        """Keep the last row of every key, sorted by key."""
        last = {self._key(row): number for number, row in enumerate(table.select(list(self.key)).to_pylist())}
        return table.take([last[key] for key in sorted(last)])


def require_no_npz(folder: Path) -> None:
    """Refuse results of provgen 0.1.

    Raises:
        InputError: There are .npz files in the folder.
    """
    if next(folder.glob("*.npz"), None) is not None:
        raise InputError(f"{folder} was written by provgen 0.1, which kept .npz files; remove it and measure again")


def _table_of(row: Mapping[str, Any]) -> pa.Table:
    """Make a table of one row: an array is a flat list, and the column knows its axes but the first."""
    fields, values = [], []
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            array = pa.array([value.ravel()], pa.list_(pa.from_numpy_dtype(value.dtype)))
            about = {"axes": ",".join(map(str, value.shape[1:]))}
        else:
            array, about = pa.array([value]), None
        fields.append(pa.field(name, array.type, metadata=about))
        values.append(array)
    return pa.table(values, schema=pa.schema(fields))


def _rows_of(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Give rows back as they were saved."""
    axes = {
        field.name: tuple(int(size) for size in field.metadata[b"axes"].decode().split(",") if size)
        for field in table.schema
        if field.metadata and b"axes" in field.metadata
    }
    columns = {name: table[name].combine_chunks() for name in table.column_names}
    for number in range(len(table)):
        cells = {name: column[number] for name, column in columns.items() if column[number].is_valid}
        yield {name: _array(cell, axes[name]) if name in axes else cell.as_py() for name, cell in cells.items()}


def _array(cell: pa.ListScalar, axes: tuple[int, ...]) -> NDArray[Any]:
    values: NDArray[Any] = cell.values.to_numpy(zero_copy_only=False)
    return values.reshape(-1, *axes).copy()
