"""The run folder: where everything of one run lies on disk, and how files get there whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary sibling of `path` to write to; rename it to `path` when the block ends well.

    Works for a file and for a folder. An error in the block leaves what stood at `path` untouched, and so does a
    kill. One process at a time may write a path.

    Raises:
        InputError: The file system refused the write (full disk, missing permission).
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _remove(temporary)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        replace_path(temporary, path)
    except (OSError, SafetensorError) as error:
        _remove(temporary)
        raise InputError(
            f"cannot write {path}: {getattr(error, 'strerror', None) or error}; what was saved before is intact, "
            "free space or fix permissions and run the same command again"
        ) from error
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


def replace_path(new: Path, path: Path) -> None:
    """Put the file or folder `new` in the place of `path`.

    No call replaces a folder that is not empty, so the old one is renamed first and removed last: the time in
    which nothing stands at `path` is that of a rename.
    """
    if not (new.is_dir() and path.exists()):
        new.replace(path)
        return
    old = path.with_name(f".{path.name}.old")
    _remove(old)
    path.replace(old)
    new.replace(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
