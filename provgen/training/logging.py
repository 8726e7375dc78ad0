"""Logs of a training run: `metrics.jsonl`, a progress bar, and tables of index metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

# accelerate's registry of trackers wants a subclass; the method names are its own.
from accelerate.tracking import GeneralTracker, on_main_process
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from provgen.errors import InputError, printable
from provgen.run import atomic_path, writing
from provgen.training.checkpoint import list_checkpoints


class JsonLinesTracker(GeneralTracker):
    """Appends scalars, and lists of row dicts, to a JSON-lines file."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, *, start_step: int) -> None:
        """Open `path` for appending; lines of later steps than `start_step`, left by a kill, are dropped."""
        super().__init__()
        self.path, self.start_step = path, start_step

    @property
    def tracker(self) -> Path:
        """The file itself."""
        return self.path

    @on_main_process
    def start(self) -> None:
        """Drop what a killed run logged after its last checkpoint."""
        kept = [row for row in read_metrics(self.path) if row["step"] <= self.start_step]
        with atomic_path(self.path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Do nothing: the settings are in `config.yaml`."""

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        """Append one line."""
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file; lines that are damaged, or cut short by a kill, are left out."""
    if not path.is_file():
        return []
    # A complete file ends in a newline, so what follows the last one is a torn line.
    lines = path.read_bytes().split(b"\n")[:-1]
    return [row for row in map(_read_row, lines) if row is not None]


def _read_row(line: bytes) -> dict[str, Any] | None:
    """Read one line; None for one that holds no row."""
    with suppress(ValueError, RecursionError):  # of both JSON and UTF-8
        row = json.loads(line.decode("utf-8"))
        if isinstance(row, dict) and type(row.get("step")) is int:
            return row
    return None


SHORT_NAMES = {
    "denoising_loss": "denoise",
    "reconstruction_loss": "reconstruct",
    "latent_divergence": "divergence",
    "index_loss": "index",
    "class_loss": "class",
}


class TrainingProgress:
    """Progress bar on a terminal; elsewhere a line for every twentieth of the run."""

    def __init__(self, step: int, max_steps: int, *, is_shown: bool) -> None:
        self.console = Console(quiet=not is_shown, width=None if is_shown and Console().is_terminal else 120)
        self.max_steps = max_steps
        self._next_line = 0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not is_shown or not self.console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=max_steps, completed=step, losses="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Show the losses at `step`."""
        text = "  ".join(f"{SHORT_NAMES[name]} {loss:.4f}" for name, loss in losses.items() if name in SHORT_NAMES)
        self._progress.update(self._task, completed=step, losses=text)
        if not self.console.is_terminal and step >= self._next_line:
            self._next_line = step + max(1, self.max_steps // 20)
            self.say(f"step {step}/{self.max_steps}  {text}")

    def say(self, message: str) -> None:
        """Print a line above the bar; names and paths in it can do nothing to the terminal."""
        self.console.print(printable(message), highlight=False, markup=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table above the bar."""
        self.console.print(table)


def quality_table(rows: Sequence[Mapping[str, Any]], step: int) -> Table:
    """Lay out index metrics as network/closed-form ceiling, a line for each kind of rows and noise level."""
    title = f"index metrics at step {step}: network/closed-form ceiling; cross-entropy and gap in nats"
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1))
    table.add_column("rows", no_wrap=True)
    for heading in ("alpha_bar", "cross-entropy", "gap", "top-1", "top-5"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (str(row["rows"]), float(row["alpha_bar"]))):
        pairs = [f"{row[name]:.2f}/{row[f'{name}_ceiling']:.2f}" for name in ("cross_entropy", "top1", "top5")]
        table.add_row(str(row["rows"]), f"{row['alpha_bar']:.2g}", pairs[0], f"{row['kl_gap']:.3f}", *pairs[1:])
    return table


def check_finite(losses: Mapping[str, float], step: int, checkpoints: Path) -> None:
    """Stop a run before anything of it is saved.

    Raises:
        InputError: A loss, or a gradient norm, is NaN or infinite.
    """
    bad = [f"{name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
    if bad:
        saved = list_checkpoints(checkpoints)
        last = f"the last good checkpoint is {saved[-1]}" if saved else "nothing was saved yet"
        raise InputError(f"{bad[0]} at step {step}; {last}; lower training.learning_rate in a new output_dir")
