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
"""A row of what `faithfulness_table.write_parquet` writes."""

TITLES = {"generated": "generated images", "holdout": "held-out images"}
WITH_NETWORK = ("calibrated trace, trajectory", "calibrated trace, noised", "ensemble")
"""What uses the provenance network without saying so."""


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
    for place, row in enumerate(rows):
        colour = VERMILION if _uses_network(row["method"]) else BLUE
        axes.plot([row["lds low"], row["lds high"]], [place, place], color=colour, linewidth=1.5)
        axes.plot(row["lds"], place, "o", color=colour, markersize=4)
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows], fontsize=7.5, color=INK)
    axes.axvline(0, color=INK, linewidth=0.8)
    if (ceiling := rows[0]["noise_ceiling"]) is not None:
        axes.axvline(ceiling, color=INK, linewidth=1, linestyle="--")
        axes.axvspan(rows[0]["noise_ceiling low"], rows[0]["noise_ceiling high"], color=INK, alpha=0.07)
        axes.annotate("noise ceiling", (ceiling, 0), rotation=90, ha="right", va="bottom", fontsize=7.5, color=INK)


def _uses_network(method: str) -> bool:
    return method in WITH_NETWORK or ("provenance network" in method and "without" not in method)


def faithfulness_section(rows: Sequence[Row]) -> tuple[Section, list[Metric]]:
    """Show the LDS of all methods."""
    over = [name.removeprefix("over ") for name in rows[0] if name.startswith("over ")]
    others = [name for name in over if not name.endswith((" low", " high"))]
    moved = [name for name in rows[0] if name.startswith("moved ") and not name.endswith((" low", " high"))]
    table_rows: list[list[TableCell]] = [
        [
            row["method"],
            row["queries"],
            _percent(row, "lds"),
            *(_percent(row, f"over {name}") for name in others),
            *(_plain(row, name) for name in moved),
            *_costs(row),
        ]
        for row in sorted(rows, key=lambda row: (row["queries"], -row["lds"]))
    ]
    picture = picture_of_figure(
        plot_lds(rows),
        alt="Linear datamodeling score of every attribution method with its interval, and the noise ceiling",
        caption="Red: methods that use the provenance network. Dashed: the best that any method could have, and its "
        "interval.",
    )
    section = Section(
        "Are the sources right?",
        "The generator was trained again on random halves of its training images. A method predicts how well each half "
        "does on an image by the sum of its scores over the half; the linear datamodeling score (LDS) is the rank "
        "correlation of prediction and measurement, mean over images. Every method was tuned on the same few halves "
        "and images and is reported on the others.",
        [picture],
        Table(
            [
                "method",
                "queries",
                "LDS, %",
                *(f"over {name}" for name in others),
                *moved,
                "set-up, s",
                "query, ms",
                "kept, MB",
            ],
            table_rows,
            "95 % intervals of a bootstrap over halves and images, paired where two methods are compared. Moved: how "
            "far a sample moves when its sources are left out and the generator is trained again.",
        ),
    )
    metrics = [
        Metric(
            f"lds_{row['queries']}_{row['method']}",
            row["lds"],
            row["lds low"],
            row["lds high"],
            baseline=0.0,
            ceiling=row["noise_ceiling"],
            n=row["subsets"],
            kind="counterfactual",
        )
        for row in rows
    ]
    return section, metrics


def _costs(row: Row) -> list[TableCell]:
    seconds, per_query, stored = (row[name] for name in ("fit_seconds", "seconds_per_query", "stored_bytes"))
    return [
        seconds,
        None if per_query is None else 1e3 * per_query,
        None if stored is None else stored / 1e6,
    ]


def _plain(row: Row, name: str) -> str | None:
    value, low, high = (row[key] for key in (name, f"{name} low", f"{name} high"))
    return None if value is None else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _percent(row: Row, name: str) -> str:
    value, low, high = (100 * row[key] for key in (name, f"{name} low", f"{name} high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
