"""What methods predict of subset models, held to those models: the table, its figure, and the report's section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import rankdata
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.datamodeling import LdsComparison, NoiseCeiling, noise_ceiling, predicted_outputs
from provgen.metrics.statistics import Estimate
from provgen.report.figures import BLUE, INK, VERMILION, label_axes
from provgen.report.format import Metric, interval, markdown_table, percent
from provgen.report.html import Section, Table, picture_of_figure
from provgen.run import atomic_path, read_parquet, write_parquet
from provgen.studies.faithfulness.attributor import Cost, MethodLabel, Role
from provgen.studies.faithfulness.retraining import RetrainedFolder
from provgen.studies.faithfulness.tuning import Split

PREDICTIONS_VERSION, LDS_VERSION = 2, 2
"""Schema versions of predictions.parquet and of the table."""

Row = Mapping[str, Any]
"""One method on one kind of query, held to the subset models; an estimate has the columns NAME, NAME low, NAME high."""

TITLES = {"generated": "generated images", "holdout": "held-out images"}


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
    hindsight: float | None = None
    """LDS of the setting that turned out best, when the method was asked; None for an ensemble."""


def predict(
    scores: Tensor,
    masks: Tensor,
    *,
    label: MethodLabel,
    queries: str,
    setting: str,
    cost: Cost | None,
    hindsight: float | None = None,
) -> Prediction:
    """Rank subsets by the sum of the scores (query, train) of their examples, masks (subset, train)."""
    ranks = torch.from_numpy(rankdata(predicted_outputs(scores, masks).numpy(), axis=1))
    return Prediction(label=label, queries=queries, setting=setting, ranks=ranks, cost=cost, hindsight=hindsight)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What all methods say, of every subset there is a mask of, whether its model has been trained or not."""

    rows: Sequence[Prediction]
    """One for each method and kind of query."""
    calibration_subsets: int
    """How many subset models methods were tuned on, the first ones."""

    def without_hindsight(self) -> Predictions:
        """Leave out what turned out best, which holds for the subset models it was looked back on alone."""
        return replace(self, rows=[replace(row, hindsight=None) for row in self.rows])

    def save(self, path: Path) -> None:
        """Write a Parquet file. Correlations of ranks need no more than ranks."""
        metadata = {"calibration_subsets": str(self.calibration_subsets)}
        # Ranks of ties end on a half, so twice the rank is a whole number.
        table = _table_of(
            [
                {
                    **_shared_columns(row),
                    "num_subsets": row.ranks.shape[1],
                    "double_ranks": (2 * row.ranks).numpy().astype(np.uint16).ravel(),
                }
                for row in self.rows
            ]
        )
        write_parquet(path, table.replace_schema_metadata(metadata), version=PREDICTIONS_VERSION)

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read it.

        Raises:
            InputError: It is not there, or of another version.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing; run `provgen faithfulness` first")
        table = read_parquet(path, version=PREDICTIONS_VERSION)
        subsets = int(table.schema.metadata[b"calibration_subsets"])
        return cls(rows=[_prediction(row) for row in table.to_pylist()], calibration_subsets=subsets)


def with_added(earlier: Sequence[Prediction], made: Sequence[Prediction]) -> list[Prediction]:
    """Add the predictions of methods to earlier ones, in the place of the same methods."""
    added = {(row.label.name, row.queries): row for row in made}
    return [*(row for row in earlier if (row.label.name, row.queries) not in added), *added.values()]


def _prediction(row: Row) -> Prediction:
    label = {field.name: row[field.name] for field in fields(MethodLabel) if field.name != "name"}
    ranks = torch.tensor(row["double_ranks"], dtype=torch.float64) / 2
    cost = {field.name: row[field.name] for field in fields(Cost)}
    return Prediction(
        label=MethodLabel(**{**label, "name": row["method"], "role": Role(row["role"])}),
        queries=row["queries"],
        setting=row["setting"],
        ranks=ranks.view(-1, row["num_subsets"]),
        cost=None if None in cost.values() else Cost(**cost),
        hindsight=row.get("hindsight"),
    )


def _shared_columns(prediction: Prediction) -> dict[str, Any]:
    """Give the columns that predictions and the table have in common."""
    label = asdict(prediction.label)
    cost = dict.fromkeys(field.name for field in fields(Cost)) if prediction.cost is None else asdict(prediction.cost)
    return {
        "method": label.pop("name"), **label, "queries": prediction.queries, "setting": prediction.setting, **cost,
        "hindsight": prediction.hindsight,
    }  # fmt: skip


def _table_of(rows: Sequence[Row]) -> pa.Table:
    """Make a table of rows, of which not every one has every column; from_pylist looks at the first row alone."""
    return pa.table({name: [row.get(name) for row in rows] for name in dict.fromkeys(n for row in rows for n in row)})


def compare(
    predictions: Predictions,
    folder: RetrainedFolder,
    *,
    moved: Mapping[str, Mapping[str, Estimate]],
    resamples: int,
    first_subset: int = 0,
) -> list[Row]:
    """Hold predictions to the subset models from `first_subset` on that no method was tuned on.

    `moved` is how far samples moved when their sources were left out: by what was left out, then by method.
    """
    retrained, several = folder.load(), folder.load_several_seeds()
    num_queries = len(retrained.queries["generated"].images)
    split = Split.first(retrained.subsets, num_queries, calibration=predictions.calibration_subsets)
    is_reported = ~split.subsets & (retrained.subsets >= first_subset)
    rows: list[Row] = []
    for kind in TITLES:
        of_kind = [row for row in predictions.rows if row.queries == kind]
        reported = retrained.subsets[is_reported]
        predicted = {row.label.name: row.ranks[~split.queries][:, reported] for row in of_kind}
        measured = -retrained.losses[kind][:, ~split.queries][:, :, is_reported].mean(dim=0)
        compared = LdsComparison(predicted, measured, seed=0, resamples=resamples)
        ceiling: NoiseCeiling | None = None
        if several is not None:
            outputs, seeds = -several.losses[kind][:, ~split.queries], len(retrained.losses[kind])
            ceiling = noise_ceiling(outputs, num_seeds=seeds, seed=0, resamples=resamples)
        effects = moved if kind == "generated" else {}
        rows += [_held(row, compared, ceiling, _references(of_kind), effects) for row in of_kind]
    return rows


def _references(predictions: Sequence[Prediction]) -> dict[str, str]:
    """Name the methods that every other is compared with, by title."""
    labels = [row.label for row in predictions]
    return {label.name: label.name for label in labels if label.is_reference} | {"the trace": trace_of(labels).name}


def trace_of(labels: Sequence[MethodLabel]) -> MethodLabel:
    """Give the trace that every other method is compared with: calibrated before not, trajectory before noised."""
    traces = [label for label in labels if label.role in (Role.CALIBRATED_TRACE, Role.TRACE)]
    return min(traces, key=lambda label: (label.role != Role.CALIBRATED_TRACE, label.along != "trajectory"))


def _held(
    prediction: Prediction,
    compared: LdsComparison,
    ceiling: NoiseCeiling | None,
    references: Mapping[str, str],
    moved: Mapping[str, Mapping[str, Estimate]],
) -> Row:
    """Give the row of a prediction; without a ceiling one training seed does not show how noisy training is."""
    name = prediction.label.name
    estimates = {
        "lds": compared.estimate(name),
        **{f"over {title}": compared.difference(name, other) for title, other in references.items()},
        **{title: effects.get(name) for title, effects in moved.items()},
        "noise_ceiling": None if ceiling is None else ceiling.estimate,
    }
    columns = [_columns(title, estimate) for title, estimate in estimates.items()]
    return {
        **_shared_columns(prediction),
        "subsets": compared.shape[1],
        **{column: value for of_estimate in columns for column, value in of_estimate.items()},
        "seed_correlation": None if ceiling is None else ceiling.seed_correlation,
    }


def _columns(name: str, estimate: Estimate | None) -> Mapping[str, float | None]:
    missing = dict.fromkeys((name, f"{name} low", f"{name} high"))
    return missing if estimate is None else estimate.columns(name, " ")


def write_tables(rows: Sequence[Row], folder: Path, name: str, *, calibration_subsets: int) -> str:
    """Write `name`.parquet, .md and .png into a folder; give the table in words."""
    write_parquet(folder / f"{name}.parquet", _table_of(rows), version=LDS_VERSION)
    tables = [_markdown(kind, of_kind) for kind, of_kind in _by_kind(rows).items()]
    if any(row["role"] == Role.CALIBRATED_TRACE for row in rows):
        tables.append(
            "Set-up of a calibrated trace: its features and the search over settings. "
            f"Training the {calibration_subsets} subset models it is calibrated on comes on top.\n"
        )
    with atomic_path(folder / f"{name}.md") as temporary:
        temporary.write_text("\n".join(tables), encoding="utf-8")
    with atomic_path(folder / f"{name}.png") as temporary:
        plot_lds(rows).savefig(temporary, format="png", dpi=110)
    return "\n".join([*tables, f"tables and figure in {folder}"])


def _by_kind(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Group rows by kind of query, those of the lowest LDS last."""
    by_kind = {kind: [row for row in rows if row["queries"] == kind] for kind in TITLES}
    return {kind: sorted(of_kind, key=lambda row: -row["lds"]) for kind, of_kind in by_kind.items() if of_kind}


def _markdown(kind: str, rows: Sequence[Row]) -> str:
    """Lay out the table of one kind of query; LDS in percent with 95 % intervals."""
    ceiling = "unknown (one training seed)"
    if rows[0]["noise_ceiling"] is not None:
        correlation = rows[0]["seed_correlation"]
        ceiling = f"{_written(rows[0], 'noise_ceiling', percent)} % (correlation of training seeds {correlation:.2f})"
    lines = []
    for row in rows:
        itself = {f"over {row['method']}": None} if row["is_reference"] else {}
        costs = [
            f"{cost:.{digits}f}" if cost is not None else None
            for cost, digits in zip(_costs(row), (1, 2, 2), strict=True)
        ]
        lines.append([row["method"], *(_effects(row) | itself).values(), *costs, row["setting"] or None])
    header = ["method", *_effects(rows[0]), *COSTS, "setting"]
    table = markdown_table(header, lines, text_columns=(0, len(header) - 1))
    return f"Queries: {kind}; {rows[0]['subsets']} subset models; noise ceiling {ceiling}\n\n{table}"


COSTS = ("set-up, s", "query, ms", "kept, MB")


def _costs(row: Row) -> list[float | None]:
    """Give the costs of `COSTS`."""
    if row["stored_bytes"] is None:
        return [None] * len(COSTS)
    return [row["fit_seconds"], 1e3 * row["seconds_per_query"], row["stored_bytes"] / 1e6]


def _effects(row: Row) -> dict[str, str | None]:
    """Write LDS, differences and how far samples moved, by title."""
    hindsight = row.get("hindsight")  # a table of an earlier version has none
    written = {
        "LDS, %": _written(row, "lds", percent),
        "best in hindsight": None if hindsight is None else f"{100 * hindsight:.1f}",
    }
    for start, write in (("over ", percent), ("moved ", partial(interval, form=".2f"))):
        names = [name for name in row if name.startswith(start) and f"{name} low" in row]
        written |= {name: _written(row, name, write) for name in names}
    return written


def _written(row: Row, name: str, write: Callable[[Estimate], str]) -> str | None:
    """Write an estimate of a row; None where it has none."""
    value, low, high = (row[column] for column in (name, f"{name} low", f"{name} high"))
    return None if value is None else write(Estimate(value, low, high, row["subsets"]))


def plot_lds(rows: Sequence[Row]) -> Figure:
    """Plot the LDS of every method with its interval, one panel for each kind of query, and the noise ceiling."""
    by_kind = _by_kind(rows)
    height = 1.0 + 0.24 * max(map(len, by_kind.values()))
    figure = Figure(figsize=(5.6 * len(by_kind), height), layout="constrained")
    for axes, (kind, of_kind) in zip(figure.subplots(1, len(by_kind), squeeze=False)[0], by_kind.items(), strict=True):
        label_axes(axes, "LDS", "", TITLES[kind])
        _plot_kind(axes, sorted(of_kind, key=lambda row: row["lds"]))
    return figure


def _plot_kind(axes: Axes, rows: Sequence[Row]) -> None:
    for height, row in enumerate(rows):
        colour = VERMILION if row["uses_provenance"] else BLUE
        axes.plot([row["lds low"], row["lds high"]], [height, height], color=colour, linewidth=1.5)
        axes.plot(row["lds"], height, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7.5, color=INK)
    axes.axvline(0, color=INK, linewidth=0.8)
    if (ceiling := rows[0]["noise_ceiling"]) is not None:
        axes.axvline(ceiling, color=INK, linewidth=1, linestyle="--")
        axes.axvspan(rows[0]["noise_ceiling low"], rows[0]["noise_ceiling high"], color=INK, alpha=0.07)
        axes.annotate("noise ceiling", (ceiling, 0), rotation=90, ha="right", va="bottom", fontsize=7.5, color=INK)


def read_lds_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a faithfulness table."""
    rows: list[dict[str, Any]] = read_parquet(path, version=LDS_VERSION).to_pylist()
    return rows


EXPLANATION = (
    "The generator was trained again on random halves of its training images. A method predicts how well each half "
    "does on an image by the sum of its scores over the half. The linear datamodeling score (LDS) is the rank "
    "correlation of prediction and measurement, mean over images. Every method was tuned on the same few halves and "
    "images, and is reported on the others."
)

NOTE = (
    "Best in hindsight: the LDS of the setting that is best on the very part that is reported, which no tuning could "
    "surpass. 95 % intervals of a bootstrap over halves and images, paired where two methods are compared. Moved: how "
    "far a sample moves when its sources are left out and the generator is trained again. Set-up of a calibrated "
    "trace: its features and the search over settings; training the subset models it is calibrated on comes on top."
)


def faithfulness_section(rows: Sequence[Row]) -> tuple[Section, list[Metric]]:
    """Show the LDS of all methods in the report: whose scores predict what is made of a query without some data."""
    picture = picture_of_figure(
        plot_lds(rows),
        alt="Linear datamodeling score of every attribution method with its interval, and the noise ceiling",
        caption="Red: methods that use the provenance network. Dashed: the best that any method could have, and its "
        "interval.",
    )
    cells = [
        [row["method"], row["queries"], *_effects(row).values(), *_costs(row)]
        for of_kind in _by_kind(rows).values()
        for row in of_kind
    ]
    table = Table(["method", "queries", *_effects(rows[0]), *COSTS], cells, NOTE)
    return Section("Are the sources right?", EXPLANATION, [picture], table), [_metric(row) for row in rows]


def _metric(row: Row) -> Metric:
    """Name the LDS of a method, whose baseline is 0."""
    lds = Estimate(row["lds"], row["lds low"], row["lds high"], row["subsets"])
    name = f"lds_{row['queries']}_{row['method']}"
    return Metric.from_estimate(name, lds, "counterfactual", baseline=0.0, ceiling=row["noise_ceiling"])
