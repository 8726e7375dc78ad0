"""The run folder: where everything of one run lies on disk, and how files get there whole."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EACCES, EDQUOT, EEXIST, ENOSPC, ENOTEMPTY, EPERM, EROFS
from glob import escape
from pathlib import Path
from secrets import token_hex
from socket import gethostname
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from provgen.errors import InputError, notice
from provgen.settings import Settings, flat_settings


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
        """All of one generation: PNGs, `grid.png`, `generation.json`, `part-PROCESS.parquet`, and traces."""
        return self.root / "samples"

    @property
    def generation(self) -> Path:
        """What was asked for when the samples were generated, and from which weights."""
        return self.samples / "generation.json"

    @property
    def traces(self) -> Path:
        """Network traces, `part-PROCESS.parquet`."""
        return self.samples / "traces"

    @property
    def closed_form_traces(self) -> Path:
        """Traces of the same samples by the closed-form posterior, `part-PROCESS.parquet`."""
        return self.samples / "traces_closed_form"

    @property
    def report(self) -> Path:
        """All of one analysis: page, numbers and verdicts."""
        return self.root / "report"

    @property
    def report_html(self) -> Path:
        """Link to the analysis as one self-contained page."""
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        """Link to the metrics of the analysis, machine-readable."""
        return self.root / "report.json"

    @property
    def verdicts(self) -> Path:
        """Link to what each sample is, and why: a row for each."""
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

    def link_report(self) -> None:
        """Link what lies in `report/` from the root, where it is looked for."""
        for link in (self.report_html, self.report_json, self.verdicts):
            target = Path(self.report.name) / link.name
            if not (self.root / target).is_file():
                link.unlink(missing_ok=True)
            elif not (link.is_symlink() and link.readlink() == target):
                with atomic_path(link) as partial:
                    partial.symlink_to(target)


def require_run(root: Path) -> RunFolder:
    """Open an existing run folder.

    Raises:
        InputError: `root` is not a run folder.
    """
    run = RunFolder(root.expanduser())
    if not run.config.is_file():
        raise InputError(f"no run in {root}: {run.config} is missing; train one with `provgen train` first")
    for path in (run.pipeline, run.samples, run.report):
        take_back(path)
    return run


@contextmanager
def only_writer(folder: Path, command: str, *, name: str = "", writes: bool = True) -> Iterator[None]:
    """Keep other writers out of a folder while the block runs; a kill lets them in again.

    Args:
        folder: Is created if it is missing.
        command: What writes, as the next one is told.
        name: Of the part of the folder that is written, such as a shard; others may write other parts.
        writes: Whether this process writes at all; of several only the main one does.

    Raises:
        InputError: Another process writes into it, or it cannot be written.
    """
    if not writes:
        yield
        return
    lock, owner = FileLock(folder / f".lock{name}"), folder / f".writer{name}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(
                f"{_first_line(owner)} is writing into {folder}; wait until it has ended, or stop it"
            ) from None
        owner.write_text(f"process {os.getpid()} on {gethostname()} ({command})\n", encoding="utf-8")
    try:
        yield
    finally:
        lock.release()


def _first_line(path: Path) -> str:
    """Give who a lock's owner says to be; the file is written after the lock is taken."""
    with suppress(OSError, UnicodeDecodeError, IndexError):
        return path.read_text(encoding="utf-8").splitlines()[0]
    return "another process"


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
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        remedy = {
            **dict.fromkeys((ENOSPC, EDQUOT), "free space"),
            **dict.fromkeys((EACCES, EPERM, EROFS), "fix permissions"),
        }.get(getattr(error, "errno", None) or 0, "mend that")
        raise InputError(
            f"cannot write {path}: {reason}; what was saved before is intact, {remedy} and run the same command again"
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
            with suppress(OSError):  # where nothing can be written there is nothing to remove
                _remove(temporary)
            raise


CHECKSUMS = "sha256.json"
"""File of a folder with the sha256 of all others."""


def seal(folder: Path) -> None:
    """Write the sha256 of every file below a folder into it."""
    (folder / CHECKSUMS).write_text(_checksums(folder), encoding="utf-8")


def digest(folder: Path) -> str:
    """Give one sha256 for all files below a folder, the same whether it is sealed or not."""
    return hashlib.sha256(_checksums(folder).encode()).hexdigest()


def _checksums(folder: Path) -> str:
    """Give the sha256 of every file by its path, as JSON."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    sums = {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
    return json.dumps(sums, indent=1) + "\n"


def check_seal(folder: Path, remedy: str) -> None:
    """Check that every file that was in a folder when it was sealed is there, and is the same.

    A folder of an earlier version has no seal; nothing is known of it.

    Args:
        folder: The folder.
        remedy: What to do about damage, as the end of a sentence.

    Raises:
        InputError: A file is missing or was changed; the message names it.
    """
    path = folder / CHECKSUMS
    if not path.is_file():
        notice(f"{folder} has no {CHECKSUMS}: damage in it would not be noticed")
        return
    sums = read_json(path, remedy)
    for name, digest in sums.items():
        if not (folder / name).is_file():
            raise InputError(f"{folder / name} is missing; {remedy}")
        if _sha256(folder / name) != digest:
            raise InputError(f"{folder / name} is not what was saved, it is damaged or of another run; {remedy}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        remedy: What to do about a file that is missing or damaged, as the end of a sentence.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; {remedy}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())[:100]}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object; {remedy}")
    return content


def claim_folder(root: Path, fingerprint: Mapping[str, Any]) -> None:
    """Start a folder of results that is filled piece by piece, or go on with it.

    A setting that did not exist when the folder was started had its default.

    Raises:
        InputError: There are results of something else in it.
    """
    path = root / "fingerprint.json"
    wanted = json.dumps({"schema_version": 1, **fingerprint}, indent=1, sort_keys=True) + "\n"
    if not path.is_file():
        with atomic_path(path) as partial:
            partial.write_text(wanted, encoding="utf-8")
        return
    defaults, claimed = flat_settings(Settings()), read_json(path, "remove the folder to start again")
    newer = {key: defaults[key] for key in fingerprint if key in defaults and key not in claimed}
    if {**newer, **claimed} != json.loads(wanted):
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
    except (OSError, pa.ArrowException, UnicodeDecodeError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is not a whole Parquet file of provgen; remove it and run the command that wrote it"
        ) from error
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
    """Put the file or folder `new` in the place of `path`; what stood there goes.

    Linux exchanges the two in one step. Elsewhere no call replaces a folder that is not empty: the old one is renamed
    first and removed last, and `take_back` brings it back if a kill falls between.
    """
    old = _sibling(path, "old")
    while not _has_replaced(new, path):
        if _exchanged(new, path):
            _remove(new)
            return
        with suppress(FileNotFoundError):  # another process has just moved it
            path.replace(old)
    _remove(old)


def take_back(path: Path) -> None:
    """Bring back what a killed call has moved out of the way, if nothing stands at `path`."""
    if os.path.lexists(path):
        return
    for old in sorted(path.parent.glob(f".{escape(path.name)}.*old"), key=lambda old: old.stat().st_mtime)[-1:]:
        with writing(path):
            old.replace(path)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, where the system can."""
    if sys.platform != "linux":
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    names = (os.fsencode(path) for path in (one, other))
    return rename is not None and rename(working_folder, next(names), working_folder, next(names), exchange) == 0


def _has_replaced(new: Path, path: Path) -> bool:
    """Rename, unless a folder is in the way."""
    if new.is_dir() and os.path.lexists(path):
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
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
