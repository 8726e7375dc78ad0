"""Variants along an axis: a line with intervals for each of some settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from provgen.analysis.statistics import Estimate, mean_over_seeds
from provgen.report.figures import BLUE, GREEN, INK, VERMILION, label_axes
from provgen.report.variant_panels import (
    GREY,
    STYLES,
    LineStyle,
    half_width,
    in_words,
    interval_handle,
    make_panels,
    place_legend,
    reach,
)
from provgen.report.variant_report import METRICS, Row, bounds_of, numbers_of, positions, short_key, text_of

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
