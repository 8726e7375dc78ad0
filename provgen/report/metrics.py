"""The numbers of a report: each with its interval, what it is compared with, and what kind of claim it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from provgen.metrics.statistics import Estimate
from provgen.run import atomic_path

SCHEMA_VERSION = 2
"""Version of the layout of `report.json`; grows when a reader of the old one would go wrong."""

MetricKind = Literal["similarity", "model fit", "learned provenance", "counterfactual"]
"""What a number claims: that images look alike, how well a model fits, what the network learned, or what
retraining showed."""


@dataclass(frozen=True)
class Metric:
    """One number of a report."""

    name: str
    """Name by which other programs find it, such as `share_memorized`."""
    value: float
    """The measured value, in the unit that the name implies."""
    low: float | None
    """Lower end of the 95 % interval; None where there is none."""
    high: float | None
    """Upper end of the 95 % interval; None where there is none."""
    baseline: float | None
    """Value where there is nothing to find: by chance, or on held-out images; None if not measured."""
    ceiling: float | None
    """Value that the best possible method reaches, or exact copies; None if not known."""
    n: int
    """Independent observations behind `value`."""
    kind: MetricKind
    """What the number claims."""

    @classmethod
    def from_estimate(
        cls,
        name: str,
        estimate: Estimate,
        kind: MetricKind,
        *,
        baseline: float | None = None,
        ceiling: float | None = None,
    ) -> Metric:
        """Name an estimate and set it beside what it is compared with."""
        return cls(name, estimate.value, estimate.low, estimate.high, baseline, ceiling, estimate.n, kind)


def write_report_json(path: Path, run_name: str, metrics: Sequence[Metric]) -> None:
    """Write `{"schema_version", "run", "metrics"}`; numbers that are not finite become null."""
    rows = [{key: _finite(value) for key, value in asdict(metric).items()} for metric in metrics]
    report = {"schema_version": SCHEMA_VERSION, "run": run_name, "metrics": rows}
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
