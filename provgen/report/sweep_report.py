"""A sweep over the number of training images as figures, tables and a Parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from provgen.analysis.statistics import Estimate
from provgen.analysis.sweep_curves import SweepCurves
from provgen.report.figures import BLUE, GREEN, INK, label_axes
from provgen.report.html import Section, picture_of_figure, render_report
from provgen.report.sweep_tables import (
    PANELS,
    last_points,
    onset,
    onsets_in_words,
    sweep_tables,
    tables_in_words,
)
from provgen.run_folder import atomic_path

BESIDE = {
    "share_memorized": ("share_memorized_holdout", "held-out"),
    "entropy": ("closed_form_entropy", "closed form"),
    "commitment": ("closed_form_commitment", "closed form"),
}
"""What is drawn beside them, and what it is called."""

SECTIONS = {
    "sweep": (
        "From copying to generalizing",
        "Generators of the same settings, trained on more and more images. Two of each size share no image and start "
        "from the same noise: where they make the same image, it is not one that they were trained on.",
        "Dotted: where the share of copies, and the agreement, cross one half. 95 % intervals.",
    ),
    "time": (
        "When does a generator begin to copy?",
        "The same generators at several steps of their training.",
        "Right: the same against how often every image has been seen, where curves of many sizes should fall together.",
    ),
    "prediction": (
        "Can a copy be told before it is finished?",
        "AUROC of the entropy of provenance at every sampling step, for telling samples that will be copies under the "
        "1/3 rule from others of generators of the same size. Sizes with fewer than 5 of either kind are left out.",
        "Bands: 95 % intervals. 0.5 is guessing.",
    ),
    "redrawing": (
        "What does drawing again cost and prevent?",
        "The same samples, but those whose late entropy is below a bound were drawn again, up to four times.",
        "Each line begins at the samples as they were drawn first; then one point for every bound, the smallest first.",
    ),
}
"""Figures, with titles, texts and captions; tables of the same name stand below them."""

WITHIN = (
    "Copies among samples of one generator and class",
    "A class of few training images has little entropy whatever its samples are, and more copies. Here samples are "
    "compared with others of their own generator and class only.",
)
"""Title and text of a section without a figure."""


def write_sweep_report(root: Path, curves: SweepCurves) -> str:
    """Write sweep.parquet, sweep.md, a PNG for every figure, and report.html; give the tables in words."""
    rows = [
        {"size": size, "step": step, "name": name, **asdict(estimate)}
        for (size, step), point in curves.points.items()
        for name, estimate in point.items()
    ]
    with atomic_path(root / "sweep.parquet") as partial:
        pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"schema_version": "1"}), partial)
    text = tables_in_words(curves)
    with atomic_path(root / "sweep.md") as partial:
        partial.write_text(text, encoding="utf-8")
    figures = {"sweep": plot_sweep(curves), "time": plot_time(curves), "prediction": plot_prediction(curves)}
    if curves.redrawing:
        figures["redrawing"] = plot_redrawing(curves)
    for name, figure in figures.items():
        with atomic_path(root / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=110)
    sizes, steps = zip(*curves.points, strict=True)
    facts = {"training images": f"{min(sizes)} to {max(sizes)}", "training steps": str(max(steps))}
    facts["onsets"] = "; ".join(onsets_in_words(curves))
    tables = sweep_tables(curves)
    sections = [
        Section(title, note, [picture_of_figure(figures[name], alt=title, caption=caption)], tables.get(name))
        for name, (title, note, caption) in SECTIONS.items()
        if name in figures
    ]
    if "within" in tables:
        sections.append(Section(*WITHIN, table=tables["within"]))
    page = render_report(title=f"provgen sweep: {root.name}", facts=facts, sections=sections)
    with atomic_path(root / "report.html") as partial:
        partial.write_text(page, encoding="utf-8")
    return f"{text}\ntable, figures and report.html in {root}"


def plot_sweep(curves: SweepCurves) -> Figure:
    """Plot everything against the number of training images, at the last step."""
    figure, points = Figure(figsize=(9.0, 5.4), layout="constrained"), last_points(curves)
    for axes, (name, title, unit) in zip(figure.subplots(2, 3).flatten(), PANELS, strict=True):
        _draw(axes, points, name, BLUE, "generated" if name == "share_memorized" else "network")
        if name in BESIDE:
            other, called = BESIDE[name]
            _draw(axes, points, other, GREEN, called)
            if axes.containers:
                axes.legend(fontsize=7, frameon=False)
        label_axes(axes, "training images", unit, title)
        axes.set_xscale("log", base=2)
        place = onset(curves, name) if name in ("share_memorized", "halves_agreement") else None
        if place:
            axes.axvline(place, color=INK, linewidth=0.8, linestyle=":")
            axes.text(place, axes.get_ylim()[1], f" {place:.0f}", fontsize=8, va="top", color=INK)
    return figure


def plot_time(curves: SweepCurves) -> Figure:
    """Plot the share of copies against training steps, and against steps for each training image."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    sizes = sorted({size for size, _ in curves.points})
    for axes, divides in zip(figure.subplots(1, 2), (False, True), strict=True):
        for number, size in enumerate(sizes):
            steps = sorted(step for of, step in curves.points if of == size)
            shares = [curves.points[size, step]["share_memorized"].value for step in steps]
            places = [step / size if divides else step for step in steps]
            shade = str(0.75 * number / max(1, len(sizes) - 1))
            axes.plot(places, shares, color=shade, marker="o", markersize=3, label=f"{size}")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        unit = "training steps / training images" if divides else "training steps"
        label_axes(axes, unit, "share under the 1/3 rule", "Copies against time")
    figure.axes[0].legend(title="images", fontsize=7, title_fontsize=7, frameon=False)
    return figure


def plot_prediction(curves: SweepCurves) -> Figure:
    """Plot how well the entropy at every sampling step tells which samples will be copies."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (size, found) in enumerate(curves.early.items()):
        color = str(0.75 * number / max(1, len(curves.early) - 1))
        levels = [level for level, _ in found]
        axes.plot(levels, [estimate.value for _, estimate in found], color=color, label=f"{size} images")
        axes.fill_between(
            levels, [e.low for _, e in found], [e.high for _, e in found], color=color, alpha=0.15
        )
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    label_axes(axes, "signal level $a_t$ (0 noise, 1 image)", "AUROC", "Which samples will be copies?")
    if curves.early:
        axes.legend(fontsize=8, frameon=False)
    return figure


def plot_redrawing(curves: SweepCurves) -> Figure:
    """Plot the share of copies that is left against the draws of a sample, from samples drawn once on."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (size, found) in enumerate(curves.redrawing.items()):
        color = str(0.75 * number / max(1, len(curves.redrawing) - 1))
        shares = [last_points(curves)[size]["share_memorized"], *(left for left, _ in found.values())]
        ends = [[e.value - e.low for e in shares], [e.high - e.value for e in shares]]
        places = [1.0, *(draws.value for _, draws in found.values())]
        axes.errorbar(
            places,
            [e.value for e in shares],
            yerr=ends,
            color=color,
            marker="o",
            markersize=3,
            label=f"{size}",
        )
    label_axes(axes, "draws of a sample", "share under the 1/3 rule", "Copies left by drawing again")
    axes.legend(title="images", fontsize=7, title_fontsize=7, frameon=False)
    return figure


def _draw(
    axes: Axes, points: Mapping[int, Mapping[str, Estimate]], name: str, color: str, label: str
) -> None:
    there = {size: point[name] for size, point in points.items() if name in point}
    values = [estimate.value for estimate in there.values()]
    ends = [
        [estimate.value - estimate.low for estimate in there.values()],
        [estimate.high - estimate.value for estimate in there.values()],
    ]
    if there:
        axes.errorbar(
            list(there), values, yerr=ends, color=color, marker="o", markersize=4, capsize=2, label=label
        )
