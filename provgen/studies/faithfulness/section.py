"""The report's section on faithfulness: whose scores predict what is made of a query without part of the data?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from provgen.report.figures import BLUE, INK, VERMILION, label_axes
from provgen.report.format import Metric
from provgen.report.html import Section, Table, TableCell, picture_of_figure

Row = Mapping[str, Any]
"""A row of what `comparison.write_parquet` writes."""

TITLES = {"generated": "generated images", "holdout": "held-out images"}


def read_lds_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a faithfulness table."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def plot_lds(rows: Sequence[Row]) -> Figure:
    """Plot the LDS of every method with its interval, one panel for each kind of query, and the noise ceiling."""
    kinds = [kind for kind in TITLES if any(row["queries"] == kind for row in rows)]
    longest = max(sum(row["queries"] == kind for row in rows) for kind in kinds)
    figure = Figure(figsize=(5.6 * len(kinds), 1.0 + 0.24 * longest), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        label_axes(axes, "LDS", "", TITLES[kind])
        _plot_kind(axes, sorted((r for r in rows if r["queries"] == kind), key=lambda r: r["lds"]))
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


EXPLANATION = (
    "The generator was trained again on random halves of its training images. A method predicts how well each half "
    "does on an image by the sum of its scores over the half. The linear datamodeling score (LDS) is the rank "
    "correlation of prediction and measurement, mean over images. Every method was tuned on the same few halves and "
    "images, and is reported on the others."
)

NOTE = (
    "95 % intervals of a bootstrap over halves and images, paired where two methods are compared. Moved: how far a "
    "sample moves when its sources are left out and the generator is trained again. Set-up of a calibrated trace: its "
    "features and the search over settings; training the subset models it is calibrated on comes on top."
)


def faithfulness_section(rows: Sequence[Row]) -> tuple[Section, list[Metric]]:
    """Show the LDS of all methods."""
    compared = [_estimates(rows, start) for start in ("over ", "moved ")]
    cells = [_cells(row, *compared) for row in sorted(rows, key=lambda row: (row["queries"], -row["lds"]))]
    picture = picture_of_figure(
        plot_lds(rows),
        alt="Linear datamodeling score of every attribution method with its interval, and the noise ceiling",
        caption="Red: methods that use the provenance network. Dashed: the best that any method could have, and its "
        "interval.",
    )
    table = Table([*cells[0]], [[*line.values()] for line in cells], NOTE)
    return Section("Are the sources right?", EXPLANATION, [picture], table), [_metric(row) for row in rows]


def _estimates(rows: Sequence[Row], start: str) -> list[str]:
    """List the columns with intervals that start so."""
    return [name for name in rows[0] if name.startswith(start) and f"{name} low" in rows[0]]


def _cells(row: Row, over: Sequence[str], moved: Sequence[str]) -> dict[str, TableCell]:
    """Give a row of the table by title."""
    per_query, stored = row["seconds_per_query"], row["stored_bytes"]
    return {
        "method": row["method"],
        "queries": row["queries"],
        "LDS, %": _percent(row, "lds"),
        **{name: _percent(row, name) for name in over},
        **{name: _plain(row, name) for name in moved},
        "set-up, s": row["fit_seconds"],
        "query, ms": None if per_query is None else 1e3 * per_query,
        "kept, MB": None if stored is None else stored / 1e6,
    }


def _metric(row: Row) -> Metric:
    return Metric(
        f"lds_{row['queries']}_{row['method']}",
        row["lds"],
        row["lds low"],
        row["lds high"],
        baseline=0.0,
        ceiling=row["noise_ceiling"],
        n=row["subsets"],
        kind="counterfactual",
    )


def _plain(row: Row, name: str) -> str | None:
    value, low, high = (row[key] for key in (name, f"{name} low", f"{name} high"))
    return None if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _percent(row: Row, name: str) -> str:
    value, low, high = (100 * row[key] for key in (name, f"{name} low", f"{name} high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
