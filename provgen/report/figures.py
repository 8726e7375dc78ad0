"""The figures of a report, made with matplotlib's object API: no pyplot, no global state.

Every function takes plain values and returns a `Figure`; who calls it saves or embeds it. Colours are
those of Okabe and Ito 2008, which people with any colour vision tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.copying import MEMORIZED

BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, FAINT = "#333333", "#dddddd"

# Key in metrics.jsonl, title, unit.
_LOSSES = (
    ("denoising_loss", "Denoising loss", "mean squared error of the noise"),
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
_ALPHA_BAR = "$\\bar\\alpha_t$ (0 noise, 1 image)"
# A curve this long gets a smoothed one over it.
_SMOOTH_FROM = 20
_RATIO_BINS = 30


def plot_training(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the losses against the optimiser step: raw values faint, their moving average over them.

    Args:
        metrics: Rows of `metrics.jsonl`; a loss that no row has gets no panel.

    Raises:
        InputError: No row has a loss.
    """
    logged = [loss for loss in _LOSSES if any(loss[0] in row for row in metrics)]
    if not logged:
        raise InputError("metrics.jsonl holds no losses to plot; train for at least training.log_every steps")
    figure = _figure(width=2.8 * len(logged) + 0.6, height=2.7)
    for axes, (key, title, unit) in zip(_panels(figure, len(logged)), logged, strict=True):
        rows = sorted((row for row in metrics if key in row), key=lambda row: int(row["step"]))
        _plot_loss(axes, [int(row["step"]) for row in rows], [_number(row[key]) for row in rows])
        label_axes(axes, "optimiser step", unit, title)
    _legend(figure.axes[0])
    return figure


def plot_index_quality(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot cross-entropy, top-1 and top-5 of the index head against alpha_bar.

    The network is solid, the closed form dashed: no network can do better than the dashed line of its colour.

    Args:
        rows: One dict per alpha_bar and kind of row, with the keys `alpha_bar`, `rows` ("conditional" or
            "unconditional") and `cross_entropy`, `top1`, `top5`, each also with `_ceiling` appended.
    """
    figure = _figure(width=9.0, height=3.2)
    kinds = [kind for kind in _LOOKS if any(row["rows"] == kind for row in rows)]
    for axes, (key, title, unit) in zip(_panels(figure, len(_QUALITIES)), _QUALITIES, strict=True):
        for kind in kinds:
            chosen = sorted((row for row in rows if row["rows"] == kind), key=lambda row: float(row["alpha_bar"]))
            _plot_quality(axes, chosen, key, *_LOOKS[kind])
        axes.set_xlim(0, 1)
        axes.set_ylim(bottom=0, top=None if key == "cross_entropy" else 1.03)
        label_axes(axes, _ALPHA_BAR, unit, title)
    _legend_of_index_quality(figure, kinds)
    return figure


def plot_entropy(step_alpha_bar: Tensor, entropies: Tensor, closed_form_entropies: Tensor | None = None) -> Figure:
    """Plot how the posterior over training images narrows while an image is sampled.

    Args:
        step_alpha_bar: (step,) alpha_bar of each sampling step.
        entropies: (sample, step) entropy of the network's posterior, in nats.
        closed_form_entropies: The same of the closed-form posterior, or None.
    """
    figure = _figure(width=4.6, height=3.0)
    axes = figure.add_subplot()
    order = step_alpha_bar.argsort()
    _plot_band(axes, step_alpha_bar[order], entropies[:, order], BLUE, "-", "network")
    if closed_form_entropies is not None:
        _plot_band(axes, step_alpha_bar[order], closed_form_entropies[:, order], VERMILION, "--", "closed form")
    axes.set_xlim(0, 1)
    axes.set_ylim(bottom=0)
    label_axes(axes, _ALPHA_BAR, "posterior entropy / nats", "Median over samples, band from 10 % to 90 %")
    _legend(axes)
    return figure


def plot_ratio_histogram(ratios_by_set: Mapping[str, Tensor]) -> Figure:
    """Overlay histograms of the distance ratio of several image sets, with the threshold of memorization.

    Sets of different sizes compare, as bars are shares of their set. A bar of copies at 0 that would dwarf
    the rest is cut, and its height written beside it.

    Args:
        ratios_by_set: (query,) distance ratios in [0, 1] by the name of the set, 1 to 3 sets.
    """
    assert 1 <= len(ratios_by_set) <= 3
    figure = _figure(width=4.6, height=3.0)
    axes = figure.add_subplot()
    edges = np.linspace(0, 1, _RATIO_BINS + 1)
    shares = {name: _shares(ratios, edges) for name, ratios in ratios_by_set.items()}
    top = _histogram_top(list(shares.values()))
    for (name, heights), color in zip(shares.items(), (BLUE, VERMILION, GREEN), strict=False):
        label = f"{name} (n = {len(ratios_by_set[name])})"
        axes.stairs(heights, edges, color=color, fill=True, alpha=0.15)
        axes.stairs(heights, edges, color=color, linewidth=1.5, baseline=None, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, top)
    _mark_threshold(axes)
    _write_cut_bars(axes, shares, top)
    label_axes(axes, "distance to nearest / to second nearest training image", "share of images per bin")
    _legend(axes)
    return figure


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _panels(figure: Figure, count: int) -> list[Axes]:
    return [figure.add_subplot(1, count, number + 1) for number in range(count)]


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


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)


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
    windows = [values[center - r : center + r + 1] for center, r in enumerate(reach)]
    return np.array([np.mean(window) for window in windows])


def _plot_quality(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, color: str, marker: str) -> None:
    alpha_bar = [float(row["alpha_bar"]) for row in rows]
    network, ceiling = ([_number(row[name]) for row in rows] for name in (key, f"{key}_ceiling"))
    axes.plot(alpha_bar, ceiling, color=color, linewidth=1.2, linestyle="--")
    axes.plot(alpha_bar, network, color=color, linewidth=1.5, marker=marker, markersize=3.5)


def _legend_of_index_quality(figure: Figure, kinds: Sequence[str]) -> None:
    entries = []
    for kind in kinds:
        color, marker = _LOOKS[kind]
        entries += [
            Line2D([], [], color=color, marker=marker, markersize=3.5, label=f"network, {kind} rows"),
            Line2D([], [], color=color, linewidth=1.2, linestyle="--", label=f"closed form, {kind} rows"),
        ]
    figure.legend(handles=entries, loc="outside lower center", ncols=4, fontsize=8, frameon=False, labelcolor=INK)


def _plot_band(axes: Axes, alpha_bar: Tensor, entropies: Tensor, color: str, linestyle: str, label: str) -> None:
    low, median, high = np.quantile(entropies.double().cpu().numpy(), (0.1, 0.5, 0.9), axis=0)
    x = alpha_bar.double().cpu().numpy()
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    axes.plot(x, median, color=color, linewidth=1.6, linestyle=linestyle, label=label)


def _shares(ratios: Tensor, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Give the share of `ratios` (query,) in each bin: (bin,)."""
    counts, _ = np.histogram(ratios.double().cpu().numpy(), bins=edges)
    return counts / max(1, len(ratios))


def _histogram_top(shares: Sequence[NDArray[np.float64]]) -> float:
    """Choose the upper end of the axis: the tallest bar, unless it stands at 0 and is twice all others."""
    tallest = max(float(heights.max()) for heights in shares)
    beyond_copies = max(float(heights[1:].max()) for heights in shares)
    return 1.45 * (beyond_copies if 0 < beyond_copies < tallest / 2 else tallest)


def _mark_threshold(axes: Axes) -> None:
    axes.axvline(MEMORIZED, color=INK, linewidth=1, linestyle=":")
    axes.annotate(
        f"memorized below {Fraction(MEMORIZED).limit_denominator(100)}",
        (MEMORIZED, 0.5),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )


def _write_cut_bars(axes: Axes, shares: Mapping[str, NDArray[np.float64]], top: float) -> None:
    cut = [f"{name}: {heights[0]:.0%}" for name, heights in shares.items() if heights[0] > top]
    if cut:
        axes.annotate(
            "↑ " + "\n   ".join(cut),
            (1 / _RATIO_BINS, top),
            xytext=(4, -3),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color=INK,
        )
