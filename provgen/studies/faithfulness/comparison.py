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
from provgen.studies.faithfulness.attributor import Cost
from provgen.studies.faithfulness.retraining import KINDS, RetrainedFolder
from provgen.studies.faithfulness.section import plot_lds, read_lds_rows
from provgen.studies.faithfulness.tuning import Split

SCHEMA_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class LdsRow:
    """One method on one kind of query."""

    method: str
    queries: str
    """`generated` or `holdout`."""
    setting: str
    """What was chosen on the calibration subsets."""
    lds: Estimate
    over: Mapping[str, Estimate]
    """By how much it exceeds reference methods, paired."""
    ceiling: NoiseCeiling | None
    """None with one training seed, which does not show how noisy training is."""
    moved: Mapping[str, Estimate | None]
    """How far samples moved without the sources it names, by what was left out; None where that was not tried."""
    cost: Cost | None
    """None for a ensemble, which costs what its parts do."""


def markdown_table(rows: Sequence[LdsRow]) -> str:
    """Lay out one table for each kind of query, best method first; LDS in percent with 95 % intervals."""
    kinds = list(dict.fromkeys(row.queries for row in rows))
    return "\n".join(_table(kind, [row for row in rows if row.queries == kind]) for kind in kinds)


def _table(kind: str, rows: Sequence[LdsRow]) -> str:
    others = list(rows[0].over)
    ceiling = rows[0].ceiling
    best = "unknown (one training seed)"
    if ceiling is not None:
        best = f"{_percent(ceiling.estimate)} % (correlation of training seeds {ceiling.seed_correlation:.2f})"
    titles = [
        "method",
        "LDS, %",
        *(f"over {name}" for name in others),
        *rows[0].moved,
        "set-up, s",
        "query, ms",
        "kept, MB",
        "setting",
    ]
    lines = [titles, ["---", *["---:"] * (len(titles) - 2), "---"]]
    for row in sorted(rows, key=lambda row: -row.lds.value):
        lines.append([
            row.method,
            _percent(row.lds),
            *(_percent(row.over[name]) if name != row.method else "-" for name in others),
            *("-" if some is None else _plain(some) for some in row.moved.values()),
            *_costs(row.cost),
            row.setting or "-",
        ])  # fmt: skip
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"Queries: {kind}; {rows[0].lds.n} subset models; noise ceiling {best}\n\n{text}\n"


def _costs(cost: Cost | None) -> list[str]:
    if cost is None:
        return ["-"] * 3
    return [
        f"{cost.fit_seconds:.1f}",
        f"{1e3 * cost.seconds_per_query:.2f}",
        f"{cost.stored_bytes / 1e6:.2f}",
    ]


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _plain(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def write_parquet(path: Path, rows: Sequence[LdsRow]) -> None:
    """Write one flat row for each method and kind of query."""
    flat = [
        {
            "method": row.method,
            "queries": row.queries,
            "setting": row.setting,
            "subsets": row.lds.n,
            **_columns("lds", row.lds),
            **{key: value for name, e in row.over.items() for key, value in _columns(f"over {name}", e).items()},
            **{
                key: value for name, e in row.moved.items() if e is not None for key, value in _columns(name, e).items()
            },
            **_ceiling(row.ceiling),
            **({} if row.cost is None else asdict(row.cost)),
        }
        for row in rows
    ]
    # Not every row has every column, and from_pylist looks at the first row alone.
    columns = list(dict.fromkeys(name for row in flat for name in row))
    table = pa.table({name: [row.get(name) for row in flat] for name in columns}).replace_schema_metadata(
        {"schema_version": SCHEMA_VERSION}
    )
    with atomic_path(path) as partial:
        pq.write_table(table, partial)


def _ceiling(ceiling: NoiseCeiling | None) -> dict[str, float | None]:
    if ceiling is None:
        return {"noise_ceiling": None, "seed_correlation": None}
    columns = _columns("noise_ceiling", ceiling.estimate)
    return {**columns, "seed_correlation": ceiling.seed_correlation}


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name} low": estimate.low, f"{name} high": estimate.high}


REFERENCES = ("random", "pixel kernel")
"""Methods that every other is compared with, pair by pair, beside the trace."""

TRACES = ("calibrated trace, trajectory", "calibrated trace, noised", "provenance network, trajectory")
"""What `the trace` of a kind of query is: the first that there is, or the network on noised images."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one method says subset models make of the queries of one kind."""

    method: str
    queries: str
    setting: str
    """What was chosen on the calibration subsets."""
    ranks: Tensor
    """Of the predicted outputs among all subsets, ties averaged: float64 (query, subset)."""
    cost: Cost | None
    """None for a ensemble, which costs what its parts do."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What all methods say, of every subset there is a mask of, whether its model has been trained or not."""

    rows: Sequence[Prediction]
    calibration_subsets: int
    """How many subset models methods were tuned on, the first ones."""

    def save(self, path: Path) -> None:
        """Write a Parquet file. Correlations of ranks need no more than ranks."""
        flat = [_flat(row) for row in self.rows]
        metadata = {"schema_version": "1", "calibration_subsets": str(self.calibration_subsets)}
        table = pa.Table.from_pylist(flat, schema=_SCHEMA).replace_schema_metadata(metadata)
        with atomic_path(path) as partial:
            pq.write_table(table, partial, compression="zstd")

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read it.

        Raises:
            InputError: It is not there.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing; run `provgen faithfulness` first")
        table = pq.read_table(path)
        return cls(
            rows=[_prediction(row) for row in table.to_pylist()],
            calibration_subsets=int(table.schema.metadata[b"calibration_subsets"]),
        )


_SCHEMA = pa.schema({
    "method": pa.string(),
    "queries": pa.string(),
    "setting": pa.string(),
    "fit_seconds": pa.float64(),
    "seconds_per_query": pa.float64(),
    "stored_bytes": pa.int64(),
    "num_subsets": pa.int64(),
    "double_ranks": pa.list_(pa.uint16()),
})  # fmt: skip


def _flat(row: Prediction) -> dict[str, Any]:
    """Ranks of ties end on a half, so twice the rank is a whole number."""
    return {
        "method": row.method,
        "queries": row.queries,
        "setting": row.setting,
        **({} if row.cost is None else asdict(row.cost)),
        "num_subsets": row.ranks.shape[1],
        "double_ranks": (2 * row.ranks).numpy().astype(np.uint16).ravel(),
    }


def _prediction(row: Mapping[str, Any]) -> Prediction:
    costs = {name: row[name] for name in ("fit_seconds", "seconds_per_query", "stored_bytes")}
    ranks = torch.tensor(row["double_ranks"], dtype=torch.float64) / 2
    return Prediction(
        method=row["method"],
        queries=row["queries"],
        setting=row["setting"],
        ranks=ranks.view(-1, row["num_subsets"]),
        cost=None if None in costs.values() else Cost(**costs),
    )


def predict(scores: Tensor, masks: Tensor, *, method: str, queries: str, setting: str, cost: Cost | None) -> Prediction:
    """Rank subsets by the sum of the scores (query, train) of their examples, masks (subset, train)."""
    ranks = torch.from_numpy(rankdata(predicted_outputs(scores, masks).numpy(), axis=1))
    return Prediction(method=method, queries=queries, setting=setting, ranks=ranks, cost=cost)


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
    rows = []
    for kind in KINDS:
        losses = retrained.losses[kind]
        split = Split.first(retrained.subsets, losses.shape[1], calibration=predictions.calibration_subsets)
        is_reported = ~split.subsets & (retrained.subsets >= first_subset)
        measured = -losses[:, ~split.queries][:, :, is_reported].mean(dim=0)
        of_kind = {row.method: row for row in predictions.rows if row.queries == kind}
        reported = retrained.subsets[is_reported]
        predicted = {name: row.ranks[~split.queries][:, reported] for name, row in of_kind.items()}
        compared = LdsComparison(predicted, measured, seed=0, resamples=resamples)
        ceiling: NoiseCeiling | None = None
        if several is not None:
            outputs = -several.losses[kind][:, ~split.queries]
            ceiling = noise_ceiling(outputs, num_seeds=len(losses), seed=0, resamples=resamples)
        others = {name: name for name in REFERENCES} | {"the trace": trace_of(of_kind)}
        rows += [
            LdsRow(
                method=name,
                queries=kind,
                setting=row.setting,
                lds=compared.estimate(name),
                over={title: compared.difference(name, other) for title, other in others.items()},
                ceiling=ceiling,
                moved={title: some.get(name) for title, some in moved.items()} if kind == "generated" else {},
                cost=row.cost,
            )
            for name, row in of_kind.items()
        ]
    return rows


def write_tables(rows: Sequence[LdsRow], folder: Path, name: str) -> str:
    """Write `name`.parquet, .md and .png into a folder; give the table in words."""
    write_parquet(folder / f"{name}.parquet", rows)
    table = markdown_table(rows)
    with atomic_path(folder / f"{name}.md") as partial:
        partial.write_text(table, encoding="utf-8")
    figure = plot_lds(read_lds_rows(folder / f"{name}.parquet"))
    with atomic_path(folder / f"{name}.png") as partial:
        figure.savefig(partial, format="png", dpi=110)
    return f"{table}\ntables and figure in {folder}"


def trace_of(names: Mapping[str, Any]) -> str:
    """Name the trace that every other method is compared with."""
    return next((name for name in TRACES if name in names), "provenance network, noised")
