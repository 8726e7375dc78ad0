"""The figure of a table of variants: lines over what varies, or a row of dots for each variant.

Matplotlib's object API, as in `figures`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from provgen.analysis.statistics import Estimate, mean_over_seeds
from provgen.report.figures import BLUE, GREEN, INK, VERMILION, label_axes
from provgen.report.variant_report import (
    METRICS,
    Row,
    bounds_of,
    group_by_variant,
    numbers_of,
    positions,
    short_key,
    text_of,
)

# Okabe and Ito 2008, the yellow left out: it is too faint for a line.
_LOOKS = (
    (BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), (INK, "X"),
)  # fmt: skip
_PANELS_PER_ROW = 3
# A bound farther off than this many spans of the lines is written, not drawn.
_FAR = 2.5
# Share of the axis by which lines are moved apart.
_SHIFT = 0.012
_GREY = "#999999"
LineStyle = Literal["--", "-.", ":"]
# A bound is dashed, a reference dash-dotted, and what there is without any method dotted.
_STYLES: dict[str, LineStyle] = {
    "best possible": "--",
    "closed form": "-.",
    "generator alone": "-.",
}

# (place on the x axis, mean over seeds, half the interval or 0), in order.
Curve = list[tuple[float, float, float]]


def plot_variants(
    rows: Sequence[Row], metrics: Sequence[str], *, x: str | None, lines: Sequence[str]
) -> Figure:
    """Plot metrics with 95 % t intervals over seeds, and dashed what each is measured against.

    Args:
        rows: One per run, in the order of the variants, with `variant`, `seed`, the keys that vary and metrics.
        metrics: A panel each; what no row has gets none, unless no row has any.
        x: Key on the x axis; None draws a row of dots for each variant.
        lines: Keys whose values get a line each.
    """
    shown = [metric for metric in metrics if numbers_of(rows, metric)] or list(metrics)[:1]
    return _plot_rows(rows, shown) if x is None else _plot_lines(rows, shown, x, lines)


def _plot_lines(rows: Sequence[Row], metrics: Sequence[str], x: str, keys: Sequence[str]) -> Figure:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{short_key(key)} {text_of(row[key])}" for key in keys)
        groups.setdefault(label, []).append(row)
    places = positions([row[x] for row in rows])
    figure, panels = _panels(len(metrics), height=2.6, wide=3.1)
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
    _legend(figure, legend | _interval_handle(rows))
    return figure


def _curve(rows: Sequence[Row], column: str, x: str, places: Mapping[Any, float]) -> Curve:
    points = []
    for value, place in places.items():
        numbers = numbers_of([row for row in rows if row[x] == value], column)
        if numbers:
            found = mean_over_seeds(numbers)
            points.append((place, found.value, _half(found)))
    return sorted(points)


def _half(found: Estimate) -> float:
    return 0.0 if math.isnan(found.high) else found.high - found.value


def _moved(curve: Curve, axes: Axes, places: Mapping[Any, float], share: float) -> Curve:
    """Move a line by a share of the x axis, so that no interval hides another."""
    low, high = min(places.values()), max(places.values())
    if axes.get_xscale() == "log":
        return [(place * (high / low) ** share, mean, half) for place, mean, half in curve]
    return [(place + (high - low) * share, mean, half) for place, mean, half in curve]


def _draw_line(axes: Axes, curve: Curve, color: str, marker: str) -> Line2D:
    drawn = axes.errorbar(
        [place for place, _, _ in curve],
        [mean for _, mean, _ in curve],
        yerr=[half for _, _, half in curve],
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
    low, high = _reach([_curve(group, metric, x, places) for group in groups.values()])
    for column, title in bounds_of(metric).items():
        curves = [_curve(group, column, x, places) for group in groups.values()]
        numbers = numbers_of([row for group in groups.values() for row in group], column)
        if not numbers:
            continue
        if not (low <= min(numbers) and max(numbers) <= high):
            written.append(_in_words(title, numbers, metric))
            continue
        style: LineStyle = _STYLES.get(title, ":")
        for color, curve in _apart(curves):
            axes.plot(
                [p for p, _, _ in curve],
                [m for _, m, _ in curve],
                color=color,
                linestyle=style,
                linewidth=1.2,
            )
        legend[title] = Line2D([], [], color=_GREY, linestyle=style, linewidth=1.2)
    return legend, written


def _reach(curves: Sequence[Curve]) -> tuple[float, float]:
    """Say how far off a bound may lie and still be drawn: farther, it would flatten the lines."""
    ends = [mean + side * half for curve in curves for _, mean, half in curve for side in (-1, 1)]
    if not ends:
        return -math.inf, math.inf
    room = _FAR * max(max(ends) - min(ends), 0.02 * max(map(abs, ends)))
    return min(ends) - room, max(ends) + room


def _in_words(title: str, numbers: Sequence[float], metric: str) -> str:
    low, high = (f"{end:{METRICS[metric].format}}" for end in (min(numbers), max(numbers)))
    return f"({title} {low if low == high else f'{low} to {high}'})"


def _apart(curves: Sequence[Curve]) -> list[tuple[str, Curve]]:
    """Pair curves with the colours of their lines; one grey curve if all agree to what an eye can see."""
    means = [{place: mean for place, mean, _ in curve} for curve in curves]
    places = {place for curve in means for place in curve}
    spread = [
        max(values) - min(values) <= 0.02 * max(abs(value) for value in values) + 1e-12
        for values in ([curve[place] for curve in means if place in curve] for place in places)
    ]
    if all(spread):
        return [(_GREY, max(curves, key=len))]
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


def _plot_rows(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    groups = group_by_variant(rows)
    names = list(groups)
    figure, panels = _panels(
        len(metrics), height=0.8 + 0.24 * len(names), wide=2.7, left=0.06 * max(map(len, names))
    )
    legend: dict[str, Line2D] = {}
    for number, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        for height, group in enumerate(groups.values()):
            _draw_row(axes, numbers_of(group, metric), height)
        drawn, written = _draw_strokes(axes, groups, metric)
        legend |= drawn
        axes.set_yticks(range(len(names)), names if number % _PANELS_PER_ROW == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        label_axes(axes, "\n".join([METRICS[metric].unit, *written]), "", METRICS[metric].title)
    seed = {"one seed": Line2D([], [], color=BLUE, marker="o", markersize=3, alpha=0.35, linestyle="")}
    interval = _interval_handle(rows)
    _legend(figure, (interval | seed if interval else {}) | legend)
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
            xerr=_half(found),
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
    low, high = _reach([[(0.0, estimate.value, _half(estimate))] for estimate in found])
    for column, title in bounds_of(metric).items():
        means = {
            height: sum(values) / len(values)
            for height, group in enumerate(groups.values())
            if (values := numbers_of(group, column))
        }
        if not means:
            continue
        if not (low <= min(means.values()) and max(means.values()) <= high):
            written.append(_in_words(title, list(means.values()), metric))
            continue
        color = VERMILION if title in _STYLES else _GREY
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


def _interval_handle(rows: Sequence[Row]) -> dict[str, Line2D]:
    if all(len(group) == 1 for group in group_by_variant(rows).values()):
        return {}
    handle = Line2D([], [], color=INK, marker="|", markersize=6, linewidth=1.0)
    return {"mean and 95 % t interval over seeds": handle}


def _panels(count: int, *, height: float, wide: float, left: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels of equal size, in rows of three; sizes in inches."""
    columns = min(count, _PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    figure = Figure(
        figsize=(wide * columns + left, height * rows + 0.35), layout="constrained", facecolor="white"
    )
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _legend(figure: Figure, legend: Mapping[str, Line2D]) -> None:
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
