"""What methods predict of subset models, and the table that is made of it in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from scipy.stats import rankdata
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.datamodeling import LdsComparison, NoiseCeiling, noise_ceiling, predicted_outputs
from provgen.metrics.statistics import Estimate
from provgen.run import atomic_path
from provgen.studies.faithfulness.attributor import Cost, MethodLabel, Role
from provgen.studies.faithfulness.retraining import KINDS, Retrained, RetrainedFolder
from provgen.studies.faithfulness.section import plot_lds, read_lds_rows
from provgen.studies.faithfulness.tuning import Split

PREDICTIONS_VERSION, LDS_VERSION = "2", "2"
"""Schema versions of predictions.parquet and of the table."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one method says subset models make of the queries of one kind."""

    label: MethodLabel
    """The method."""
    queries: str
    """Kind of query, `generated` or `holdout`."""
    setting: str
    """What was chosen on the calibration subsets, as it is printed."""
    ranks: Tensor
    """Ranks of the predicted outputs among all subsets, ties averaged: float64 (query, subset)."""
    cost: Cost | None
    """None for an ensemble, which costs what its methods do."""


def predict(
    scores: Tensor, masks: Tensor, *, label: MethodLabel, queries: str, setting: str, cost: Cost | None
) -> Prediction:
    """Rank subsets by the sum of the scores (query, train) of their examples, masks (subset, train)."""
    ranks = torch.from_numpy(rankdata(predicted_outputs(scores, masks).numpy(), axis=1))
    return Prediction(label=label, queries=queries, setting=setting, ranks=ranks, cost=cost)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What all methods say, of every subset there is a mask of, whether its model has been trained or not."""

    rows: Sequence[Prediction]
    """One for each method and kind of query."""
    calibration_subsets: int
    """How many subset models methods were tuned on, the first ones."""

    def save(self, path: Path) -> None:
        """Write a Parquet file. Correlations of ranks need no more than ranks."""
        metadata = {"schema_version": PREDICTIONS_VERSION, "calibration_subsets": str(self.calibration_subsets)}
        table = pa.Table.from_pylist([_flat(row) for row in self.rows], schema=_SCHEMA)
        with atomic_path(path) as partial:
            pq.write_table(table.replace_schema_metadata(metadata), partial, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read it.

        Raises:
            InputError: It is not there, or of an earlier version.
        """
        table = pq.read_table(path) if path.is_file() else None
        if table is None or table.schema.metadata[b"schema_version"].decode() != PREDICTIONS_VERSION:
            raise InputError(f"{path} is missing or of an earlier version; run `provgen faithfulness` first")
        return cls(
            rows=[_prediction(row) for row in table.to_pylist()],
            calibration_subsets=int(table.schema.metadata[b"calibration_subsets"]),
        )


_LABEL = {
    "method": pa.string(),
    "along": pa.string(),
    "uses_provenance": pa.bool_(),
    "is_reference": pa.bool_(),
    "role": pa.string(),
}

_COST = {"fit_seconds": pa.float64(), "seconds_per_query": pa.float64(), "stored_bytes": pa.int64()}

_SCHEMA = pa.schema({
    **_LABEL,
    "queries": pa.string(),
    "setting": pa.string(),
    **_COST,
    "num_subsets": pa.int64(),
    "double_ranks": pa.list_(pa.uint16()),
})  # fmt: skip


def _label_columns(label: MethodLabel) -> dict[str, Any]:
    """Give the columns that both files keep of a method."""
    fields = asdict(label)
    return {"method": fields.pop("name"), **fields}


def _flat(row: Prediction) -> dict[str, Any]:
    """Ranks of ties end on a half, so twice the rank is a whole number."""
    return {
        **_label_columns(row.label),
        "queries": row.queries,
        "setting": row.setting,
        **({} if row.cost is None else asdict(row.cost)),
        "num_subsets": row.ranks.shape[1],
        "double_ranks": (2 * row.ranks).numpy().astype(np.uint16).ravel(),
    }


def _prediction(row: Mapping[str, Any]) -> Prediction:
    label = {name: row[name] for name in _LABEL if name != "method"}
    costs = {name: row[name] for name in _COST}
    ranks = torch.tensor(row["double_ranks"], dtype=torch.float64) / 2
    return Prediction(
        label=MethodLabel(**{**label, "name": row["method"], "role": Role(row["role"])}),
        queries=row["queries"],
        setting=row["setting"],
        ranks=ranks.view(-1, row["num_subsets"]),
        cost=None if None in costs.values() else Cost(**costs),
    )


@dataclass(frozen=True, kw_only=True)
class LdsRow:
    """One method on one kind of query, held to the subset models."""

    prediction: Prediction
    """What the method says."""
    lds: Estimate
    """Linear datamodeling score."""
    over: Mapping[str, Estimate]
    """By how much it exceeds the references and the trace, paired."""
    ceiling: NoiseCeiling | None
    """None with one training seed, which does not show how noisy training is."""
    moved: Mapping[str, Estimate | None]
    """How far samples moved without the sources it names, by what was left out; None where that was not tried."""


def compare(
    predictions: Predictions,
    folder: RetrainedFolder,
    *,
    moved: Mapping[str, Mapping[str, Estimate]],
    resamples: int,
    first_subset: int = 0,
) -> list[LdsRow]:
    """Hold predictions to the subset models that no method was tuned on.

    Args:
        predictions: Of the same queries and subsets.
        folder: The subset models.
        moved: How far samples moved when their sources were left out: by what was left out, then by method.
        resamples: Bootstrap resamples of the intervals.
        first_subset: Only subsets from this number on are reported.
    """
    retrained, several = folder.load(), folder.load_several_seeds()
    num_queries = len(retrained.queries[KINDS[0]].images)
    split = Split.first(retrained.subsets, num_queries, calibration=predictions.calibration_subsets)
    rows = []
    for kind in KINDS:
        of_kind = {row.label.name: row for row in predictions.rows if row.queries == kind}
        compared = _held(of_kind, retrained, split, kind, first_subset=first_subset, resamples=resamples)
        ceiling: NoiseCeiling | None = None
        if several is not None:
            outputs, seeds = -several.losses[kind][:, ~split.queries], len(retrained.losses[kind])
            ceiling = noise_ceiling(outputs, num_seeds=seeds, seed=0, resamples=resamples)
        others = {name: name for name, row in of_kind.items() if row.label.is_reference}
        others["the trace"] = trace_of([row.label for row in of_kind.values()]).name
        rows += [
            LdsRow(
                prediction=row,
                lds=compared.estimate(name),
                over={title: compared.difference(name, other) for title, other in others.items()},
                ceiling=ceiling,
                moved={title: effects.get(name) for title, effects in moved.items()} if kind == "generated" else {},
            )
            for name, row in of_kind.items()
        ]
    return rows


def _held(
    predictions: Mapping[str, Prediction],
    retrained: Retrained,
    split: Split,
    kind: str,
    *,
    first_subset: int,
    resamples: int,
) -> LdsComparison:
    """Compare predictions with what is measured on the reported queries and subsets."""
    is_reported = ~split.subsets & (retrained.subsets >= first_subset)
    measured = -retrained.losses[kind][:, ~split.queries][:, :, is_reported].mean(dim=0)
    reported = retrained.subsets[is_reported]
    predicted = {name: row.ranks[~split.queries][:, reported] for name, row in predictions.items()}
    return LdsComparison(predicted, measured, seed=0, resamples=resamples)


def trace_of(labels: Sequence[MethodLabel]) -> MethodLabel:
    """Give the trace that every other method is compared with: calibrated before not, trajectory before noised."""
    traces = [label for label in labels if label.role in (Role.CALIBRATED_TRACE, Role.TRACE)]
    return min(traces, key=lambda label: (label.role != Role.CALIBRATED_TRACE, label.along != "trajectory"))


def markdown_table(rows: Sequence[LdsRow], calibration_subsets: int) -> str:
    """Lay out one table for each kind of query, best method first; LDS in percent with 95 % intervals."""
    kinds = list(dict.fromkeys(row.prediction.queries for row in rows))
    tables = [_table(kind, [row for row in rows if row.prediction.queries == kind]) for kind in kinds]
    if any(row.prediction.label.role == Role.CALIBRATED_TRACE for row in rows):
        tables.append(
            "Set-up of a calibrated trace: its features and the search over settings. "
            f"Training the {calibration_subsets} subset models it is calibrated on comes on top.\n"
        )
    return "\n".join(tables)


def _table(kind: str, rows: Sequence[LdsRow]) -> str:
    ceiling, best = rows[0].ceiling, "unknown (one training seed)"
    if ceiling is not None:
        best = f"{_percent(ceiling.estimate)} % (correlation of training seeds {ceiling.seed_correlation:.2f})"
    cells = [_cells(row) for row in sorted(rows, key=lambda row: -row.lds.value)]
    lines = [[*cells[0]], ["---", *["---:"] * (len(cells[0]) - 2), "---"], *([*line.values()] for line in cells)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Queries: {kind}; {rows[0].lds.n} subset models; noise ceiling {best}\n\n{text}\n"


def _cells(row: LdsRow) -> dict[str, str]:
    """Give a row of the table by title."""
    name, cost = row.prediction.label.name, row.prediction.cost
    return {
        "method": name,
        "LDS, %": _percent(row.lds),
        **{f"over {other}": "-" if other == name else _percent(row.over[other]) for other in row.over},
        **{title: "-" if effect is None else _plain(effect) for title, effect in row.moved.items()},
        "set-up, s": "-" if cost is None else f"{cost.fit_seconds:.1f}",
        "query, ms": "-" if cost is None else f"{1e3 * cost.seconds_per_query:.2f}",
        "kept, MB": "-" if cost is None else f"{cost.stored_bytes / 1e6:.2f}",
        "setting": row.prediction.setting or "-",
    }


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def write_parquet(path: Path, rows: Sequence[LdsRow]) -> None:
    """Write one flat row for each method and kind of query."""
    flat = [_flat_row(row) for row in rows]
    # Not every row has every column, and from_pylist looks at the first row alone.
    columns = list(dict.fromkeys(name for row in flat for name in row))
    table = pa.table({name: [row.get(name) for row in flat] for name in columns})
    with atomic_path(path) as partial:
        pq.write_table(table.replace_schema_metadata({"schema_version": LDS_VERSION}), partial)


def _flat_row(row: LdsRow) -> dict[str, Any]:
    ceiling = None if row.ceiling is None else row.ceiling.estimate
    estimates = {f"over {other}": estimate for other, estimate in row.over.items()} | dict(row.moved)
    columns = [_columns(name, estimate) for name, estimate in estimates.items() if estimate is not None]
    return {
        **_label_columns(row.prediction.label),
        "queries": row.prediction.queries,
        "setting": row.prediction.setting,
        "subsets": row.lds.n,
        **_columns("lds", row.lds),
        **{name: value for estimate in columns for name, value in estimate.items()},
        **({"noise_ceiling": None} if ceiling is None else _columns("noise_ceiling", ceiling)),
        "seed_correlation": None if row.ceiling is None else row.ceiling.seed_correlation,
        **({} if row.prediction.cost is None else asdict(row.prediction.cost)),
    }


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}


def write_tables(rows: Sequence[LdsRow], folder: Path, name: str, *, calibration_subsets: int) -> str:
    """Write `name`.parquet, .md and .png into a folder; give the table in words."""
    write_parquet(folder / f"{name}.parquet", rows)
    table = markdown_table(rows, calibration_subsets)
    with atomic_path(folder / f"{name}.md") as partial:
        partial.write_text(table, encoding="utf-8")
    figure = plot_lds(read_lds_rows(folder / f"{name}.parquet"))
    with atomic_path(folder / f"{name}.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
    return f"{table}\ntables and figure in {folder}"
