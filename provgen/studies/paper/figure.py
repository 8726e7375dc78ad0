"""The figure of a table of variants: lines over what varies, or a row of dots for each variant."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from provgen.metrics.statistics import Estimate, mean_over_seeds
from provgen.report.figures import BLUE, GREEN, INK, LEGEND, VERMILION, draw_intervals, label_axes, panel_figure
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
# Share of the axis by which lines are moved apart.
_SHIFT = 0.012
_GREY = "#999999"
# Okabe and Ito 2008, the yellow left out: it is too faint for a line.
_LOOKS = (
    (BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"), (INK, "X"),
)  # fmt: skip
_Style = Literal["--", "-.", ":"]
# A bound is dashed, a reference dash-dotted, and what there is without any method dotted.
_STYLES: dict[str, _Style] = {"best possible": "--", "closed form": "-.", "generator alone": "-."}

_SEED: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 3, "alpha": 0.35, "linestyle": ""}
_DOT: dict[str, Any] = {"color": BLUE, "marker": "o", "markersize": 5, "capsize": 2.5, "elinewidth": 1.0}
_STROKE: dict[str, Any] = {"marker": "|", "markersize": 11, "markeredgewidth": 1.8, "linestyle": ""}
_LINE: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.5, "elinewidth": 1.0, "capsize": 2.5}

# Mean over seeds with its interval, by the place on an axis, in order.
Curve = dict[float, Estimate]


def plot_variants(rows: Sequence[Row], metrics: Sequence[str], *, x: str | None, lines: Sequence[str]) -> Figure:
    """Plot metrics with 95 % t intervals over seeds, and what each is measured against.

    Args:
        rows: One per run, in the order of the variants, with `variant`, `seed`, the keys that vary and metrics.
        metrics: A panel each; what no row has gets none, unless no row has any.
        x: Key on the x axis; None draws a row of dots for each variant.
        lines: Keys whose values get a line each.
    """
    shown = [metric for metric in metrics if numbers_of(rows, metric)] or list(metrics)[:1]
    return _plot_rows(rows, shown) if x is None else _plot_lines(rows, shown, x, lines)


def _plot_rows(rows: Sequence[Row], metrics: Sequence[str]) -> Figure:
    """Plot every metric in a panel, a row for each variant."""
    groups = group_by_variant(rows)
    names = list(groups)
    height, left = 0.8 + 0.24 * len(names), 0.06 * max(map(len, names))
    figure, panels = _panels(len(metrics), height=height, width=2.7, left=left)
    legend: dict[str, Line2D] = {}
    for number, (axes, metric) in enumerate(zip(panels, metrics, strict=True)):
        for row, group in enumerate(groups.values()):
            _draw_dots(axes, numbers_of(group, metric), row)
        near, far = _bounds(rows, metric)
        for column, title in near.items():
            legend[title] = _draw_strokes(axes, groups.values(), column, VERMILION if title in _STYLES else _GREY)
        axes.set_yticks(range(len(names)), names if number % PANELS_PER_ROW == 0 else [""] * len(names))
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        label_axes(axes, "\n".join([METRICS[metric].unit, *far]), "", METRICS[metric].title)
    interval = _interval_handle(rows)
    seed = {"one seed": Line2D([], [], **_SEED)} if interval else {}
    _place_legend(figure, interval | seed | legend)
    return figure


def _plot_lines(rows: Sequence[Row], metrics: Sequence[str], x: str, keys: Sequence[str]) -> Figure:
    """Plot every metric over `x`, a line for each combination of the values of `keys`."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{short_key(key)} {text_of(row[key])}" for key in keys)
        groups.setdefault(label, []).append(row)
    places = positions([row[x] for row in rows])
    figure, panels = _panels(len(metrics), height=2.6, width=3.1)
    legend: dict[str, Line2D] = {}
    for axes, metric in zip(panels, metrics, strict=True):
        _place_ticks(axes, places)
        for number, (label, group) in enumerate(groups.items()):
            share = _SHIFT * (number - (len(groups) - 1) / 2)
            curve = _moved(_curve(group, metric, x, places), axes, places, share)
            color, marker = _LOOKS[number % len(_LOOKS)]
            drawn = draw_intervals(axes, list(curve), list(curve.values()), color=color, marker=marker, **_LINE)
            legend |= {label: drawn.lines[0]} if label else {}
        near, far = _bounds(rows, metric)
        for column, title in near.items():
            curves = [_curve(group, column, x, places) for group in groups.values()]
            legend[title] = _draw_bound(axes, curves, _STYLES.get(title, ":"))
        label_axes(axes, short_key(x), "\n".join([METRICS[metric].unit, *far]), METRICS[metric].title)
    _place_legend(figure, legend | _interval_handle(rows))
    return figure


def _panels(count: int, *, height: float, width: float, left: float = 0.0) -> tuple[Figure, list[Axes]]:
    """Make a figure with panels of equal size, in rows of three; sizes in inches."""
    columns = min(count, PANELS_PER_ROW)
    rows = math.ceil(count / columns)
    figure, panels = panel_figure(width * columns + left, height * rows + 0.35, columns, rows)
    for axes in panels[count:]:
        axes.remove()
    return figure, panels[:count]


def _place_legend(figure: Figure, legend: Mapping[str, Line2D]) -> None:
    """Put the legend below the panels."""
    if legend:
        handles, columns = list(legend.values()), min(4, len(legend))
        figure.legend(handles=handles, labels=list(legend), ncols=columns, loc="outside lower center", **LEGEND)


def _interval_handle(rows: Sequence[Row]) -> dict[str, Line2D]:
    """Give the legend's entry of the intervals; none if there is one seed of everything."""
    if all(len(group) == 1 for group in group_by_variant(rows).values()):
        return {}
    handle = Line2D([], [], color=INK, marker="|", markersize=6, linewidth=1.0)
    return {"mean and 95 % t interval over seeds": handle}


def _bounds(rows: Sequence[Row], metric: str) -> tuple[dict[str, str], list[str]]:
    """Sort what a metric is measured against: what is near enough to be drawn, and the rest in words.

    Returns:
        Title by column; and a line for each bound that would flatten what is shown.
    """
    groups = [numbers_of(group, metric) for group in group_by_variant(rows).values()]
    means = [mean_over_seeds(values) for values in groups if values]
    ends = [mean.value + side * _half_width(mean) for mean in means for side in (-1, 1)] or [-math.inf, math.inf]
    room = _FAR * max(max(ends) - min(ends), 0.02 * max(map(abs, ends)))
    near, far, form = {}, [], METRICS[metric].format
    for column, title in bounds_of(metric).items():
        numbers = numbers_of(rows, column)
        if not numbers:
            continue
        low, high = min(numbers), max(numbers)
        if min(ends) - room <= low and high <= max(ends) + room:
            near[column] = title
        else:
            far.append(f"({title} {' to '.join(dict.fromkeys([f'{low:{form}}', f'{high:{form}}']))})")
    return near, far


def _half_width(mean: Estimate) -> float:
    """Give half the interval, 0 where there is none: a single seed."""
    return 0.0 if math.isnan(mean.high) else mean.high - mean.value


def _draw_dots(axes: Axes, values: Sequence[float], height: int) -> None:
    """Draw every seed faintly, and the mean with its interval."""
    if values:
        mean = mean_over_seeds(values)
        axes.plot(values, [height] * len(values), **_SEED)
        axes.errorbar(mean.value, height, xerr=_half_width(mean), **_DOT)


def _draw_strokes(axes: Axes, groups: Iterable[Sequence[Row]], column: str, color: str) -> Line2D:
    """Draw the mean over seeds as an upright stroke in the row of each variant."""
    values_by_height = {height: numbers_of(group, column) for height, group in enumerate(groups)}
    means = {height: sum(values) / len(values) for height, values in values_by_height.items() if values}
    strokes: Line2D = axes.plot(list(means.values()), list(means), color=color, **_STROKE)[0]
    return strokes


def _curve(rows: Sequence[Row], column: str, x: str, places: Mapping[Any, float]) -> Curve:
    by_place = {place: numbers_of([row for row in rows if row[x] == value], column) for value, place in places.items()}
    return {place: mean_over_seeds(numbers) for place, numbers in by_place.items() if numbers}


def _moved(curve: Curve, axes: Axes, places: Mapping[Any, float], share: float) -> Curve:
    """Move a line by a share of the x axis, so that no interval hides another."""
    low, high = min(places.values()), max(places.values())
    if axes.get_xscale() == "log":
        return {place * (high / low) ** share: mean for place, mean in curve.items()}
    return {place + (high - low) * share: mean for place, mean in curve.items()}


def _draw_bound(axes: Axes, curves: Sequence[Curve], style: _Style) -> Line2D:
    """Draw what all lines are measured against: once in grey where it is the same, else in the colours of the lines."""
    if _agree(curves):
        coloured = [(_GREY, max(curves, key=len))]
    else:
        coloured = [(_LOOKS[number % len(_LOOKS)][0], curve) for number, curve in enumerate(curves)]
    for color, curve in coloured:
        means = [mean.value for mean in curve.values()]
        axes.plot(list(curve), means, color=color, linestyle=style, linewidth=1.2)
    return Line2D([], [], color=_GREY, linestyle=style, linewidth=1.2)


def _agree(curves: Sequence[Curve]) -> bool:
    """Whether all curves agree to what an eye can see."""
    for place in {place for curve in curves for place in curve}:
        values = [curve[place].value for curve in curves if place in curve]
        if max(values) - min(values) > 0.02 * max(map(abs, values)) + 1e-12:
            return False
    return True


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
