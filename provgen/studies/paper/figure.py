"""The figure of a table of variants: lines over what varies, or a row of dots for each variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from provgen.metrics.statistics import Estimate, mean_over_seeds
from provgen.report.figures import BLUE, GREEN, INK, VERMILION, label_axes
from provgen.studies.paper.table import (
    METRICS,
    Row,
    bounds_of,
    group_by_variant,
    numbers_of,
    positions,
    short_key,
    text_of,
)

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
    figure = Figure(figsize=(wide * columns + left, height * rows + 0.35), layout="constrained", facecolor="white")
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
        axes.plot(values, [height] * len(values), color=BLUE, marker="o", markersize=3, alpha=0.35, linestyle="")
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


def _draw_strokes(axes: Axes, groups: Mapping[str, Sequence[Row]], metric: str) -> tuple[dict[str, Line2D], list[str]]:
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


# Okabe and Ito 2008, the yellow left out: it is too faint for a line.
_LOOKS = (
    (BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), (INK, "X"),
)  # fmt: skip
# Share of the axis by which lines are moved apart.
_SHIFT = 0.012

# Places on the x axis, and the mean over seeds with its interval, in order.
Curve = list[tuple[float, Estimate]]


def plot_lines(rows: Sequence[Row], metrics: Sequence[str], x: str, keys: Sequence[str]) -> Figure:
    """Plot every metric over `x`, a line for each combination of the values of `keys`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{short_key(key)} {text_of(row[key])}" for key in keys)
        groups.setdefault(label, []).append(row)
    places = positions([row[x] for row in rows])
    figure, panels = make_panels(len(metrics), height=2.6, wide=3.1)
    legend: dict[str, Line2D] = {}
    for axes, metric in zip(panels, metrics, strict=True):
        _place_ticks(axes, places)
        for number, (label, group) in enumerate(groups.items()):
            share = _SHIFT * (number - (len(groups) - 1) / 2)
            curve = _moved(_curve(group, metric, x, places), axes, places, share)
            line = _draw_line(axes, curve, *_LOOKS[number % len(_LOOKS)])
            legend |= {label: line} if label else {}
        drawn, written = _draw_bounds(axes, groups, metric, x, places)
        legend |= drawn
        label_axes(axes, short_key(x), "\n".join([METRICS[metric].unit, *written]), METRICS[metric].title)
    place_legend(figure, legend | interval_handle(rows))
    return figure


def _curve(rows: Sequence[Row], column: str, x: str, places: Mapping[Any, float]) -> Curve:
    points = []
    for value, place in places.items():
        numbers = numbers_of([row for row in rows if row[x] == value], column)
        if numbers:
            points.append((place, mean_over_seeds(numbers)))
    return sorted(points, key=lambda point: point[0])


def _moved(curve: Curve, axes: Axes, places: Mapping[Any, float], share: float) -> Curve:
    """Move a line by a share of the x axis, so that no interval hides another."""
    low, high = min(places.values()), max(places.values())
    if axes.get_xscale() == "log":
        return [(place * (high / low) ** share, mean) for place, mean in curve]
    return [(place + (high - low) * share, mean) for place, mean in curve]


def _draw_line(axes: Axes, curve: Curve, color: str, marker: str) -> Line2D:
    drawn = axes.errorbar(
        [place for place, _ in curve],
        [mean.value for _, mean in curve],
        yerr=[half_width(mean) for _, mean in curve],
        color=color,
        marker=marker,
        markersize=4.5,
        linewidth=1.5,
        elinewidth=1.0,
        capsize=2.5,
    )
    line: Line2D = drawn.lines[0]
    return line


def _draw_bounds(
    axes: Axes, groups: Mapping[str, Sequence[Row]], metric: str, x: str, places: Mapping[Any, float]
) -> tuple[dict[str, Line2D], list[str]]:
    """Draw what a metric is measured against: once in grey where it is the same for every line.

    Returns:
        Entries of the legend, and in words what is too far off to be drawn.
    """
    legend, written = {}, []
    shown = [_curve(group, metric, x, places) for group in groups.values()]
    low, high = reach([mean for curve in shown for _, mean in curve])
    for column, title in bounds_of(metric).items():
        curves = [_curve(group, column, x, places) for group in groups.values()]
        numbers = numbers_of([row for group in groups.values() for row in group], column)
        if not numbers:
            continue
        if not (low <= min(numbers) and max(numbers) <= high):
            written.append(in_words(title, numbers, metric))
            continue
        style: LineStyle = STYLES.get(title, ":")
        for color, curve in _apart(curves):
            axes.plot(
                [place for place, _ in curve],
                [mean.value for _, mean in curve],
                color=color,
                linestyle=style,
                linewidth=1.2,
            )
        legend[title] = Line2D([], [], color=GREY, linestyle=style, linewidth=1.2)
    return legend, written


def _apart(curves: Sequence[Curve]) -> list[tuple[str, Curve]]:
    """Pair curves with the colours of their lines; one grey curve if all agree to what an eye can see."""
    means = [{place: mean.value for place, mean in curve} for curve in curves]
    places = {place for curve in means for place in curve}
    spread = [
        max(values) - min(values) <= 0.02 * max(abs(value) for value in values) + 1e-12
        for values in ([curve[place] for curve in means if place in curve] for place in places)
    ]
    if all(spread):
        return [(GREY, max(curves, key=len))]
    return [(_LOOKS[number % len(_LOOKS)][0], curve) for number, curve in enumerate(curves)]


def _place_ticks(axes: Axes, places: Mapping[Any, float]) -> None:
    numbers = list(places.values())
    if all(value == place for value, place in places.items()) and _is_even_in_logarithms(numbers):
        axes.set_xscale("log")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(numbers, [text_of(value) for value in places])


def _is_even_in_logarithms(numbers: Sequence[float]) -> bool:
    """Whether the gaps between values such as 0.01, 0.03, 0.1 are more alike on a logarithmic axis."""
    if len(numbers) < 3 or min(numbers) <= 0:
        return False
    plain, logarithmic = (
        [high - low for low, high in pairwise(scaled)] for scaled in (numbers, [math.log(n) for n in numbers])
    )
    return max(logarithmic) / min(logarithmic) < max(plain) / min(plain)


def plot_variants(rows: Sequence[Row], metrics: Sequence[str], *, x: str | None, lines: Sequence[str]) -> Figure:
    """Plot metrics with 95 % t intervals over seeds, and dashed what each is measured against.

    Args:
        rows: One per run, in the order of the variants, with `variant`, `seed`, the keys that vary and metrics.
        metrics: A panel each; what no row has gets none, unless no row has any.
        x: Key on the x axis; None draws a row of dots for each variant.
        lines: Keys whose values get a line each.
    """
    shown = [metric for metric in metrics if numbers_of(rows, metric)] or list(metrics)[:1]
    return plot_rows(rows, shown) if x is None else plot_lines(rows, shown, x, lines)
