"""What both figures of variants have in common: panels, legend, and how bounds are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from provgen.analysis.statistics import Estimate
from provgen.report.figures import INK
from provgen.report.variant_report import METRICS, Row, group_by_variant

PANELS_PER_ROW = 3
# A bound farther off than this many spans of the lines is written, not drawn.
_FAR = 2.5
GREY = "#999999"
LineStyle = Literal["--", "-.", ":"]
# A bound is dashed, a reference dash-dotted, and what there is without any method dotted.
STYLES: dict[str, LineStyle] = {
    "best possible": "--",
    "closed form": "-.",
    "generator alone": "-.",
}


def make_panels(count: int, *, height: float, wide: float, left: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels of equal size, in rows of three; sizes in inches."""
    columns = min(count, PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(wide * columns + left, height * rows + 0.35), layout="constrained", facecolor="white"
    )
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def place_legend(figure: Figure, legend: Mapping[str, Line2D]) -> None:
    """Put the legend below the panels."""
    if legend:
        figure.legend(
            handles=list(legend.values()),
            labels=list(legend),
            loc="outside lower center",
            ncols=min(4, len(legend)),
            fontsize=8,
            frameon=False,
            labelcolor=INK,
        )


def interval_handle(rows: Sequence[Row]) -> dict[str, Line2D]:
    """Give the legend's entry of the intervals; none if there is one seed of everything."""
    if all(len(group) == 1 for group in group_by_variant(rows).values()):
        return {}
    handle = Line2D([], [], color=INK, marker="|", markersize=6, linewidth=1.0)
    return {"mean and 95 % t interval over seeds": handle}


def reach(means: Sequence[Estimate]) -> tuple[float, float]:
    """Say how far off a bound may lie and still be drawn: farther, it would flatten what is shown."""
    ends = [mean.value + side * half_width(mean) for mean in means for side in (-1, 1)]
    if not ends:
        return -math.inf, math.inf
    room = _FAR * max(max(ends) - min(ends), 0.02 * max(map(abs, ends)))
    return min(ends) - room, max(ends) + room


def half_width(found: Estimate) -> float:
    """Give half the interval, 0 where there is none: a single seed."""
    return 0.0 if math.isnan(found.high) else found.high - found.value


def in_words(title: str, numbers: Sequence[float], metric: str) -> str:
    """Say what a bound is that is too far off to be drawn."""
    low, high = (f"{end:{METRICS[metric].format}}" for end in (min(numbers), max(numbers)))
    return f"({title} {low if low == high else f'{low} to {high}'})"
