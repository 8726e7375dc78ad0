"""Variants as rows: every seed as a dot, the mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from provgen.analysis.statistics import mean_over_seeds
from provgen.report.figures import BLUE, VERMILION, label_axes
from provgen.report.variant_panels import (
    GREY,
    PANELS_PER_ROW,
    STYLES,
    half_width,
    in_words,
    interval_handle,
    make_panels,
    place_legend,
    reach,
)
from provgen.report.variant_report import METRICS, Row, bounds_of, group_by_variant, numbers_of


def plot_rows(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Plot every metric in a panel, a row for each variant."""
    groups = group_by_variant(rows)
    names = list(groups)
    figure, panels = make_panels(
        len(metrics), height=0.8 + 0.24 * len(names), wide=2.7, left=0.06 * max(map(len, names))
    )
    legend: dict[str, Line2D] = {}
    for number, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        for height, group in enumerate(groups.values()):
            _draw_row(axes, numbers_of(group, metric), height)
        drawn, written = _draw_strokes(axes, groups, metric)
        legend |= drawn
        axes.set_yticks(range(len(names)), names if number % PANELS_PER_ROW == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        label_axes(axes, "\n".join([METRICS[metric].unit, *written]), "", METRICS[metric].title)
    seed = {"one seed": Line2D([], [], color=BLUE, marker="o", markersize=3, alpha=0.35, linestyle="")}
    interval = interval_handle(rows)
    place_legend(figure, (interval | seed if interval else {}) | legend)
    return figure


def _draw_row(axes: Axes, values: Sequence[float], height: int) -> None:
    """Draw every seed faintly, and the mean with its interval."""
    if values:
        found = mean_over_seeds(values)
        axes.plot(
            values, [height] * len(values), color=BLUE, marker="o", markersize=3, alpha=0.35, linestyle=""
        )
        axes.errorbar(
            found.value,
            height,
            xerr=half_width(found),
            color=BLUE,
            marker="o",
            markersize=5,
            capsize=2.5,
            elinewidth=1.0,
        )


def _draw_strokes(
    axes: Axes, groups: Mapping[str, Sequence[Row]], metric: str
) -> tuple[dict[str, Line2D], list[str]]:
    """Draw what a metric is measured against as an upright stroke in every row; what is far off, say in words."""
    legend, written = {}, []
    found = [mean_over_seeds(values) for group in groups.values() if (values := numbers_of(group, metric))]
    low, high = reach(found)
    for column, title in bounds_of(metric).items():
        means = {
            height: sum(values) / len(values)
            for height, group in enumerate(groups.values())
            if (values := numbers_of(group, column))
        }
        if not means:
            continue
        if not (low <= min(means.values()) and max(means.values()) <= high):
            written.append(in_words(title, list(means.values()), metric))
            continue
        color = VERMILION if title in STYLES else GREY
        (legend[title],) = axes.plot(
            list(means.values()),
            list(means),
            color=color,
            marker="|",
            markersize=11,
            markeredgewidth=1.8,
            linestyle="",
        )
    return legend, written
