"""`metrics.jsonl`: a tracker for `accelerator.log`, one JSON object per logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# accelerate's registry of trackers wants a subclass; the method names are its own.
from accelerate.tracking import GeneralTracker, on_main_process

from provgen.run_folder import atomic_path


class JsonLinesTracker(GeneralTracker):
    """Appends scalars, and lists of row dicts, to a JSON-lines file."""

    name = "jsonl"
    requires_logging_directory = False

    def __init__(self, path: Path, *, start_step: int) -> None:
        """Open `path` for appending; lines of later steps than `start_step`, left by a kill, are dropped."""
        super().__init__()
        self.path = path
        self.start_step = start_step

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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file; a last line cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # A complete file ends in a newline, so what follows the last one is a torn line.
    return [json.loads(line) for line in lines[:-1]]
