"""Numbers of a report as text and as data: intervals, Markdown tables, and the metrics of report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from provgen.metrics.statistics import Estimate
from provgen.run import atomic_path

SCHEMA_VERSION = 2
"""Version of the layout of `report.json`; grows when a reader of the old one would go wrong."""

MetricKind = Literal["similarity", "model fit", "learned provenance", "counterfactual"]
"""Claim of a number: that images look alike, how well a model fits, what the network learned, or what retraining
showed."""


def interval(estimate: Estimate, form: str = ".3f") -> str:
    """Write `0.123 [0.100, 0.150]`, each number in the format `form`; without an interval, the value alone."""
    value, low, high = (f"{number:{form}}" for number in (estimate.value, estimate.low, estimate.high))
    return value if math.isnan(estimate.low) else f"{value} [{low}, {high}]"


def percent(estimate: Estimate) -> str:
    """Write a share in percent with one decimal, `12.3 [10.0, 15.0]`."""
    return interval(Estimate(100 * estimate.value, 100 * estimate.low, 100 * estimate.high, estimate.n), ".1f")


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, text_columns: Collection[int] = (0,)
) -> str:
    """Lay out a Markdown table that ends in a line break; an empty cell (None) becomes a hyphen.

    The columns with the numbers `text_columns` are left-aligned, all others right-aligned.
    """
    rule = ["---" if column in text_columns else "---:" for column in range(len(header))]
    lines = [["-" if cell is None else str(cell) for cell in row] for row in (header, rule, *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@dataclass(frozen=True)
class Metric:
    """One number of a report."""

    name: str
    """Name by which other programs find it, such as `share_memorized`."""
    value: float
    """Measured value, in the unit that the name implies."""
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
    """Claim that the number makes."""

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


def write_report_json(path: Path, run_name: str, metrics: Sequence[Metric], generation: str | None = None) -> None:
    """Write `{"schema_version", "run", "generation", "metrics"}`; numbers that are not finite become null.

    `generation` is the id of the samples that the metrics are of.
    """
    rows = [{key: finite_or_null(value) for key, value in asdict(metric).items()} for metric in metrics]
    report = {"schema_version": SCHEMA_VERSION, "run": run_name, "generation": generation, "metrics": rows}
    text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(f"{text}\n", encoding="utf-8")


def finite_or_null(value: Any) -> Any:
    """Give what JSON can hold: None for a number that is not finite, anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
