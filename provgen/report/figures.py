"""The look that all figures share, and the figures of a report that are drawn from plain values.

They are made with matplotlib's object API: no pyplot, no global state. Who calls a function saves or embeds its
`Figure`. Colours are those of Okabe and Ito 2008, which people with any colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.copying import MEMORIZED
from provgen.metrics.statistics import Estimate

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, FAINT = "#333333", "#dddddd"

ALPHA_BAR = "$\\bar\\alpha_t$ (0 noise, 1 image)"
"""Label of an axis of noise levels."""

LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": INK}
"""Look of a legend."""

DOTTED: dict[str, Any] = {"color": INK, "linewidth": 0.8, "linestyle": ":"}
"""Look of a line that marks a limit, or a value to compare with."""

# Key in metrics.jsonl, title, unit.
_LOSSES = (
    ("denoising_loss", "Denoising loss", "mean squared error"),
    ("reconstruction_loss", "Reconstruction", "mean squared error"),
    ("latent_divergence", "Latent divergence", "nats per pixel"),
    ("index_loss", "Index loss", "cross-entropy / nats"),
    ("class_loss", "Class loss", "cross-entropy / nats"),
)
# Key in an index-quality row, title, unit.
_QUALITIES = (
    ("cross_entropy", "Cross-entropy", "nats (lower is better)"),
    ("top1", "Top-1", "share of queries"),
    ("top5", "Top-5", "share of queries"),
)
# Colour and marker of rows whose class the network is told, and of the others.
_LOOKS = {"conditional": (BLUE, "o"), "unconditional": (VERMILION, "s")}
# A curve this long gets a smoothed one over it.
_SMOOTH_FROM = 20
_RATIO_BINS = 30


def panel_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make a figure of `width` x `height` inches, and its panels row by row."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flatten())


def label_axes(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Write axis labels and title, and give the axes the look that all figures share."""
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.tick_params(labelsize=8, color=FAINT, labelcolor=INK)
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)


def label_small(axes: Axes, title: str) -> None:
    """Give one of many small panels its title and look."""
    axes.set_title(title, fontsize=9, color=INK)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def draw_intervals(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], **look: Any) -> ErrorbarContainer:
    """Draw estimates at `x` as a line with error bars; an estimate without an interval has no bar."""
    sides = [[e.value - e.low for e in estimates], [e.high - e.value for e in estimates]]
    lengths = np.nan_to_num(sides).clip(min=0)
    return axes.errorbar(x, [e.value for e in estimates], yerr=lengths, **look)


def draw_band(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], color: str, **look: Any) -> None:
    """Draw estimates at `x` as a line, and their intervals as a band."""
    axes.plot(x, [e.value for e in estimates], color=color, **look)
    axes.fill_between(x, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.2)


def plot_training(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the losses in rows of `metrics.jsonl` against the step: raw values faint, their moving average over them.

    Raises:
        InputError: No row has a loss.
    """
    logged = [loss for loss in _LOSSES if any(loss[0] in row for row in metrics)]
    if not logged:
        raise InputError("metrics.jsonl holds no losses to plot; train for at least training.log_every steps")
    figure, panels = panel_figure(2.8 * len(logged) + 0.6, 2.7, len(logged))
    for axes, (key, title, unit) in zip(panels, logged, strict=True):
        rows = sorted((row for row in metrics if key in row), key=lambda row: int(row["step"]))
        _plot_loss(axes, [int(row["step"]) for row in rows], [_number(row[key]) for row in rows])
        label_axes(axes, "optimiser step", unit, title)
    panels[0].legend(**LEGEND)
    return figure


def _number(value: float | None) -> float:
    """Read a JSON number; null, which stands for a value that is not finite, leaves a gap."""
    return float("nan") if value is None else float(value)


def _plot_loss(axes: Axes, steps: list[int], values: list[float]) -> None:
    if len(values) < _SMOOTH_FROM:
        axes.plot(steps, values, color=BLUE, linewidth=1.5, label="logged")
    else:
        axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.3, label="logged")
        axes.plot(steps, _moving_average(values), color=BLUE, linewidth=1.6, label="moving average")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _moving_average(values: Sequence[float]) -> NDArray[np.float64]:
    """Average over a centred window of a twentieth of the curve, narrower at its start, cut off at its end."""
    half = max(2, len(values) // 40)
    # Narrower, not cut off: losses fall steeply at first, and half a window would hide from where.
    reach = [min(half, center) for center in range(len(values))]
    return np.array([np.mean(values[center - r : center + r + 1]) for center, r in enumerate(reach)])


def plot_index_quality(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot cross-entropy, top-1 and top-5 of the index head against alpha_bar.

    The network is solid, the closed form dashed: no network can do better than the dashed line of its colour.

    Args:
        rows: One dict per alpha_bar and kind of row, with the keys `alpha_bar`, `rows` ("conditional" or
            "unconditional") and `cross_entropy`, `top1`, `top5`, each also with `_ceiling` appended.
    """
    figure, panels = panel_figure(9.0, 3.2, len(_QUALITIES))
    kinds = [kind for kind in _LOOKS if any(row["rows"] == kind for row in rows)]
    lines: list[Line2D] = []
    for axes, (key, title, unit) in zip(panels, _QUALITIES, strict=True):
        lines = [line for kind in kinds for line in _plot_quality(axes, rows, key, kind)]
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0, top=None if key == "cross_entropy" else 1.03)
        label_axes(axes, ALPHA_BAR, unit, title)
    figure.legend(handles=lines, loc="outside lower center", ncols=4, **LEGEND)
    return figure


def _plot_quality(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, kind: str) -> list[Line2D]:
    """Plot the network and the closed form on one kind of row, and give both lines."""
    color, marker = _LOOKS[kind]
    of_kind = sorted((row for row in rows if row["rows"] == kind), key=lambda row: float(row["alpha_bar"]))
    levels = [float(row["alpha_bar"]) for row in of_kind]
    network, ceiling = ([_number(row[name]) for row in of_kind] for name in (key, f"{key}_ceiling"))
    (dashed,) = axes.plot(levels, ceiling, color=color, linewidth=1.2, linestyle="--")
    (solid,) = axes.plot(levels, network, color=color, linewidth=1.5, marker=marker, markersize=3.5)
    dashed.set_label(f"closed form, {kind} rows")
    solid.set_label(f"network, {kind} rows")
    return [solid, dashed]


def plot_entropy(step_alpha_bar: Tensor, entropies: Tensor, closed_form_entropies: Tensor | None = None) -> Figure:
    """Plot how the posterior over training images narrows while an image is sampled.

    Entropies are (sample, step) in nats, of the network's and of the closed form's posterior; alpha_bar is (step,).
    """
    figure, (axes,) = panel_figure(4.6, 3.0)
    order = step_alpha_bar.argsort()
    x = step_alpha_bar[order].double().cpu().numpy()
    looks = ((entropies, BLUE, "-", "network"), (closed_form_entropies, VERMILION, "--", "closed form"))
    for values, color, style, label in looks:
        if values is not None:
            low, median, high = np.quantile(values[:, order].double().cpu().numpy(), (0.1, 0.5, 0.9), axis=0)
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(x, median, color=color, linewidth=1.6, linestyle=style, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    label_axes(axes, ALPHA_BAR, "posterior entropy / nats", "Median over samples, band from 10 % to 90 %")
    axes.legend(**LEGEND)
    return figure


def plot_ratio_histogram(ratios_by_set: Mapping[str, Tensor]) -> Figure:
    """Overlay histograms of the distance ratios (query,) of up to three image sets, with the threshold of memorization.

    Sets of different sizes compare, as bars are shares of their set. A bar of copies at 0 that would dwarf
    the rest is cut, and its height written beside it.
    """
    figure, (axes,) = panel_figure(4.6, 3.0)
    edges = np.linspace(0, 1, _RATIO_BINS + 1)
    counts = {
        name: np.histogram(ratios.double().cpu().numpy(), bins=edges)[0] for name, ratios in ratios_by_set.items()
    }
    shares = {name: counts[name] / max(1, len(ratios)) for name, ratios in ratios_by_set.items()}
    top = _histogram_top(list(shares.values()))
    for (name, heights), color in zip(shares.items(), (BLUE, GREEN, VERMILION), strict=False):
        label = f"{name} (n = {len(ratios_by_set[name])})"
        axes.stairs(heights, edges, color=color, fill=True, alpha=0.15)
        axes.stairs(heights, edges, color=color, linewidth=1.5, baseline=None, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, top)
    note: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK}
    threshold = f"memorized below {Fraction(MEMORIZED).limit_denominator(100)}"
    axes.axvline(MEMORIZED, color=INK, linewidth=1, linestyle=":")
    axes.annotate(threshold, (MEMORIZED, 0.5), xycoords=("data", "axes fraction"), xytext=(4, 0), **note)
    if cut := [f"{name}: {heights[0]:.0%}" for name, heights in shares.items() if heights[0] > top]:
        axes.annotate("↑ " + "\n   ".join(cut), (edges[1], top), xytext=(4, -3), va="top", **note)
    label_axes(axes, "distance to nearest / to second nearest training image", "share of images per bin")
    axes.legend(**LEGEND)
    return figure


def _histogram_top(shares: Sequence[NDArray[np.float64]]) -> float:
    """Choose the upper end of the axis: the tallest bar, unless it stands at 0 and is twice all others."""
    tallest = max(float(heights.max()) for heights in shares)
    beyond_copies = max(float(heights[1:].max()) for heights in shares)
    return 1.45 * (beyond_copies if 0 < beyond_copies < tallest / 2 else tallest)
