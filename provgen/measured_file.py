"""`measured.json`: what was measured of a run, beside the run, and with which settings."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from provgen.run_folder import RunFolder, atomic_path
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings

MEASURED_VERSION = 1
"""Version of `measured.json`; grows when a metric changes its meaning, and then finished runs are measured again."""

Values = dict[str, Any]


def read_measured(folder: Path, settings: Settings) -> Values | None:
    """Read the metrics of a run; None if it was not measured by this version, or with other settings."""
    try:
        content = json.loads((folder / "measured.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    wanted = {"schema_version": MEASURED_VERSION, "settings": _kept_settings(settings)}
    if any(content.get(key) != value for key, value in wanted.items()):
        return None
    measured: Values = content["metrics"]
    return measured


def write_measured(folder: Path, settings: Settings, metrics: Mapping[str, Any]) -> None:
    """Write the metrics of a run, whole or not at all; numbers that are not finite become null."""
    content = {
        "schema_version": MEASURED_VERSION,
        "settings": _kept_settings(settings),
        "metrics": {name: _finite(value) for name, value in metrics.items()},
    }
    with atomic_path(folder / "measured.json") as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def is_trained(folder: RunFolder, settings: Settings, last_step: int) -> bool:
    """Whether a run has reached `last_step`, its last checkpoint, with these very settings."""
    if last_step != settings.training.max_steps or not folder.config.is_file():
        return False
    return _kept_settings(load_settings(folder.config, [])) == _kept_settings(settings)


def _kept_settings(settings: Settings) -> Values:
    """Give the settings that a measurement depends on: not where files are."""
    return {k: v for k, v in flat_settings(settings).items() if k not in ("data.path", "output_dir")}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
