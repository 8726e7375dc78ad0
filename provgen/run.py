"""The run folder: where everything of one run lies on disk, and how files get there whole."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EEXIST, ENOTEMPTY
from glob import escape
from pathlib import Path
from secrets import token_hex
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from provgen.errors import InputError


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run; nothing is created until it is written."""

    root: Path

    @property
    def config(self) -> Path:
        """Resolved settings with versions; can be passed to `--config` again."""
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        """One row per image of the data set, in the order of the example index."""
        return self.root / "manifest.parquet"

    @property
    def metrics(self) -> Path:
        """One JSON object per line: `step` and the scalars logged at it."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`step-000500/` and so on."""
        return self.root / "checkpoints"

    @property
    def pipeline(self) -> Path:
        """`ProvenancePipeline.save_pretrained` folder."""
        return self.root / "pipeline"

    @property
    def samples(self) -> Path:
        """Generated PNGs, `grid.png` and `part-PROCESS.parquet`."""
        return self.root / "samples"

    @property
    def traces(self) -> Path:
        """Network traces, `part-PROCESS.parquet`."""
        return self.root / "traces"

    @property
    def closed_form_traces(self) -> Path:
        """Traces of the same samples by the closed-form posterior, `part-PROCESS.parquet`."""
        return self.root / "traces_closed_form"

    @property
    def verdicts(self) -> Path:
        """What each sample is, and why: a row for each."""
        return self.root / "verdicts.parquet"

    @property
    def retrained(self) -> Path:
        """Subset models, as long trained as the run."""
        return self.root / "retrained"

    @property
    def retrained_epochs(self) -> Path:
        """Subset models with as many passes over their images as the run."""
        return self.root / "retrained_epochs"

    @property
    def faithfulness(self) -> Path:
        """Comparison of attribution methods on subset models."""
        return self.root / "faithfulness"

    @property
    def leave_out(self) -> Path:
        """Models trained without the sources of samples."""
        return self.root / "leave_out"

    @property
    def planted(self) -> Path:
        """Report on planted sources."""
        return self.root / "planted.md"

    @property
    def report_json(self) -> Path:
        """Metrics of the analysis, machine-readable."""
        return self.root / "report.json"

    @property
    def report_html(self) -> Path:
        """The analysis as one self-contained page."""
        return self.root / "report.html"


def require_run(root: Path) -> RunFolder:
    """Open an existing run folder.

    Raises:
        InputError: `root` is not a run folder.
    """
    run = RunFolder(root)
    if not run.config.is_file():
        raise InputError(f"no run in {root}: {run.config} is missing; train one with `provgen train` first")
    return run


LEFTOVER_SECONDS = 24 * 3600
"""Age from which a temporary of a killed process is removed; no write takes so long, on this machine or another."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses while `path` is written into one line.

    Raises:
        InputError: The file system refused the write (full disk, missing permission).
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was saved before is intact, "
            "free space or fix permissions and run the same command again"
        ) from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; rename it to `path` when the block ends well.

    Works for a file and for a folder. An error in the block leaves what stood at `path` untouched, and so does a
    kill. Several processes may write one path at once, since each has a temporary of its own: the last one stands.

    Raises:
        InputError: The file system refused the write (full disk, missing permission).
    """
    temporary = _sibling(path, "partial")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            replace_path(temporary, path)
            _remove_leftovers(path)
        except BaseException:
            _remove(temporary)
            raise


def claim_folder(root: Path, fingerprint: Mapping[str, Any]) -> None:
    """Start a folder of results that is filled piece by piece, or go on with it.

    Raises:
        InputError: There are results of something else in it.
    """
    path = root / "fingerprint.json"
    wanted = json.dumps({"schema_version": 1, **fingerprint}, indent=1, sort_keys=True) + "\n"
    if not path.is_file():
        with atomic_path(path) as partial:
            partial.write_text(wanted, encoding="utf-8")
    elif path.read_text(encoding="utf-8") != wanted:
        raise InputError(f"{root} holds results of another run or of other options; remove the folder to start again")


def write_parquet(path: Path, table: pa.Table, *, version: int, level: int = 3) -> None:
    """Write a table with its schema version, whole or not at all.

    Args:
        path: The file.
        table: Its other schema metadata is kept.
        version: Of the schema, which `read_parquet` asks for.
        level: Zstandard level, 1 (fast) to 22 (small).
    """
    metadata = {**(table.schema.metadata or {}), b"schema_version": str(version)}
    # Bytes of one place compress better side by side; Parquet can do that to numbers alone.
    split = [name for name, kind in _leaves(table.schema) if pa.types.is_floating(kind) or pa.types.is_integer(kind)]
    words = [name for name, _ in _leaves(table.schema) if name not in split]
    with atomic_path(path) as partial:
        pq.write_table(
            table.replace_schema_metadata(metadata),
            partial,
            compression="zstd",
            compression_level=level,
            use_dictionary=words,
            use_byte_stream_split=split,
        )


def read_parquet(path: Path, *, version: int, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table that `write_parquet` wrote, all columns of it or some.

    Raises:
        InputError: The file is damaged, or has another schema version.
    """
    try:
        table = pq.ParquetFile(path).read(columns and list(columns))
    except pa.ArrowException as error:
        raise InputError(f"{path} is not a whole Parquet file; remove it and run the command that wrote it") from error
    found = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if found != str(version):
        raise InputError(
            f"{path} has schema version {found}, this provgen reads {version}; use the provgen that wrote it"
        )
    return table


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    """Give the columns as Parquet names them, with the type of a value."""
    for field in schema:
        is_list = pa.types.is_list(field.type)
        yield (f"{field.name}.list.element", field.type.value_type) if is_list else (field.name, field.type)


def replace_path(new: Path, path: Path) -> None:
    """Put the file or folder `new` in the place of `path`.

    No call replaces a folder that is not empty, so the old one is renamed first and removed last: the time in
    which nothing stands at `path` is that of a rename.
    """
    old = _sibling(path, "old")
    while not _has_replaced(new, path):
        _remove(old)
        with suppress(FileNotFoundError):  # another process has just moved it
            path.replace(old)
    _remove(old)


def _has_replaced(new: Path, path: Path) -> bool:
    """Rename, unless a folder is in the way."""
    if new.is_dir() and path.exists():
        return False
    try:
        new.replace(path)
    except OSError as error:
        if error.errno not in (ENOTEMPTY, EEXIST):
            raise
        return False  # another process was faster
    return True


def _sibling(path: Path, kind: str) -> Path:
    """Name a path beside `path` that no other call names."""
    return path.with_name(f".{path.name}.{os.getpid()}-{token_hex(4)}.{kind}")


def _remove_leftovers(path: Path) -> None:
    """Remove what killed calls left beside `path`; those that may still be written stay."""
    for leftover in path.parent.glob(f".{escape(path.name)}.*"):
        with suppress(FileNotFoundError):
            is_temporary = leftover.suffix in (".partial", ".old")
            if is_temporary and time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
