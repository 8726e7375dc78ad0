"""The table of variants: rows of runs to Markdown, mean and interval over seeds, and to Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from provgen.errors import InputError
from provgen.metrics.statistics import mean_over_seeds
from provgen.report.format import markdown_table
from provgen.run import write_parquet
from provgen.settings_file import did_you_mean

SCHEMA_VERSION = 1
"""Version of the columns of `table.parquet`."""

Row = Mapping[str, Any]

SHARE, NATS, LOSS, COUNT, SMALL = ".3f", ".3f", ".5f", ",.0f", ".2f"


@dataclass(frozen=True)
class MetricLook:
    """How a metric is called and written."""

    title: str
    unit: str
    format: str
    stem: str | None = None
    """Name that the endings of `BOUNDS` are attached to; None for the metric's own."""
    baseline: str = "guessing"
    """What the metric's baseline is called."""


METRICS = {
    "index_top1": MetricLook("index top-1", "share of training images", SHARE),
    "index_top5": MetricLook("index top-5", "share of training images", SHARE),
    "cross_entropy": MetricLook("cross-entropy of the index", "nats", NATS),
    "kl_gap": MetricLook("KL gap, no label given", "nats", NATS),
    "kl_gap_conditional": MetricLook("KL gap, label given", "nats", NATS),
    "beam_recall10": MetricLook("beam recall@10", "share of the exhaustive answer", SHARE),
    "steps_to_gap_half": MetricLook("steps to a gap of 0.5 nats", "optimiser steps", COUNT),
    "consistency_top1": MetricLook("class consistency top-1", "share of held-out images", SHARE),
    "consistency_top5": MetricLook("class consistency top-5", "share of held-out images", SHARE),
    "share_top5": MetricLook("first five sources of the class", "share of sources", SHARE),
    "knn_accuracy": MetricLook("class read off the exemplars", "accuracy, held-out images", SHARE),
    "class_accuracy": MetricLook("class head", "accuracy, held-out images", SHARE),
    "holdout_loss": MetricLook("generator's loss, held-out", "loss", LOSS),
    "train_loss": MetricLook("generator's loss, training", "loss", LOSS),
    "share_memorized": MetricLook("share memorized", "share of samples", SHARE, baseline="held-out images"),
    "nearest_distance": MetricLook(
        "distance to nearest training image", "Euclidean, pixels in [-1, 1]", SMALL, baseline="held-out images"
    ),
    "confidence_realism": MetricLook(
        "confidence with realism", "Spearman's correlation", SMALL, baseline="held-out images"
    ),
    "linear_probe_accuracy": MetricLook(
        "linear probe, generator's features", "accuracy, held-out images", SHARE, "linear_probe"
    ),
    "linear_probe_own_accuracy": MetricLook(
        "linear probe, index features", "accuracy, held-out images", SHARE, "linear_probe"
    ),
    "generator_parameters": MetricLook("generator", "parameters", COUNT),
    "provenance_parameters": MetricLook("provenance network", "parameters", COUNT),
    "index_head_parameters": MetricLook("index head", "parameters", COUNT),
    "training_megabytes": MetricLook("memory of a training step", "MB", ".1f"),
    "step_ms": MetricLook("training step", "ms", ".1f"),
    "step_ratio": MetricLook("step time, with / without provenance", "ratio", SMALL),
    "coverage": MetricLook("coverage", "share of training images", SHARE),
}
"""Metrics that experiments may show; docs/reference/metrics.md says what they are."""

BOUNDS = {
    "_ceiling": "best possible",
    "_closed_form": "closed form",
    "_baseline": "guessing",
    "_alone": "generator alone",
}
"""What stands beside a metric: ending of its name, and how it is called."""


def require_metric(name: str) -> None:
    """Check that a metric can be shown.

    Raises:
        InputError: It is none of `METRICS`.
    """
    if name not in METRICS:
        raise InputError(f"no metric is named {name!r}; {did_you_mean(name, METRICS)}")


def with_ratios(row: Row) -> dict[str, Any]:
    """Add the ratio of step times; both were measured in turn, so it drifts less than either."""
    together, alone = row.get("step_ms"), row.get("step_ms_alone")
    return {**row, "step_ratio": together / alone if together and alone else None}


def bounds_of(metric: str) -> dict[str, str]:
    """Give what may stand beside a metric: column to what it is called."""
    look = METRICS[metric]
    titles = BOUNDS | {"_baseline": look.baseline}
    return {f"{look.stem or metric}{ending}": title for ending, title in titles.items()}


def group_by_variant(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Collect the seeds of each variant, in the order in which variants first appear."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return groups


def numbers_of(rows: Sequence[Row], column: str) -> list[float]:
    """Take the values of a column that are there."""
    return [float(row[column]) for row in rows if row.get(column) is not None]


def variants_table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """Lay out one line per variant in Markdown: every metric beside its bounds, mean and t interval over seeds.

    Rows are runs, with `variant`, `seed` and metrics. Metrics that no row has are left out, bounds too.
    """
    columns = [
        (name, title, METRICS[metric].format)
        for metric in metrics
        if numbers_of(rows, metric)
        for name, title in ({metric: METRICS[metric].title} | bounds_of(metric)).items()
        if numbers_of(rows, name)
    ]
    lines = [
        [variant, len(group), *(_cell(numbers_of(group, name), len(group), form) for name, _, form in columns)]
        for variant, group in group_by_variant(rows).items()
    ]
    note = "± is half the 95 % t interval over seeds; (k of n) counts the seeds that have the number at all."
    return f"{markdown_table(['variant', 'seeds', *(title for _, title, _ in columns)], lines)}\n{note}\n"


def _cell(values: Sequence[float], seeds: int, form: str) -> str | None:
    if not values:
        return None
    mean = mean_over_seeds(values)
    text = f"{mean.value:{form}}"
    # Parameters are the same for every seed; an interval would only be noise to the eye.
    if max(values) - min(values) > 1e-9 * abs(mean.value):
        text += f" ± {mean.high - mean.value:{form}}"
    return text if len(values) == seeds else f"{text} ({len(values)} of {seeds})"


def positions(values: Sequence[Any]) -> dict[Any, float]:
    """Give values their positions on an axis: numbers ascending, anything else in the order of first appearance."""
    different = list(dict.fromkeys(values))
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in different):
        return {value: float(value) for value in sorted(different)}
    return {value: float(number) for number, value in enumerate(different)}


def short_key(key: str) -> str:
    """Give the last part of a dotted key, as a reader would say it."""
    return key.rpartition(".")[2].replace("_", " ")


def text_of(value: Any) -> str:
    """Write a value of a setting; null is the default that takes all there is."""
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a Parquet file with a row per run: every column that any row has, numbers of a column in one type."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: _column([row.get(name) for row in rows]) for name in names}
    write_parquet(path, pa.table(columns), version=SCHEMA_VERSION)


def _column(values: Sequence[Any]) -> pa.Array:
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, int) for value in given):
        return pa.array(values)
    is_text = any(isinstance(value, str) for value in given)
    convert, kind = (str, pa.string()) if is_text else (float, pa.float64())
    return pa.array([None if value is None else convert(value) for value in values], kind)
