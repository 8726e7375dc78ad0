"""A sweep over the number of training images as figures, tables and a Parquet file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from provgen.metrics.statistics import Estimate
from provgen.report.figures import (
    ALPHA_BAR,
    BLUE,
    DOTTED,
    GREEN,
    INK,
    draw_band,
    draw_intervals,
    label_axes,
    panel_figure,
)
from provgen.report.format import interval, markdown_table
from provgen.report.html import Section, Table, TableCell, picture_of_figure, render_report
from provgen.run import atomic_path, write_parquet
from provgen.studies.memorization.curves import SweepCurves, crossing

ONSET = 0.5
"""Value of a curve at which something begins or ends."""

ONSETS = {"memorization ends": "share_memorized", "generalization begins": "halves_agreement"}
"""What begins or ends, and the curve that tells."""

# Look of the legend of lines by number of training images.
_OF_SIZES: dict[str, Any] = {"title": "images", "fontsize": 7, "title_fontsize": 7, "frameon": False}

PANELS = (
    ("share_memorized", "Copies", "share under the 1/3 rule"),
    ("halves_agreement", "Same noise, no image in common", "agreement of two generators"),
    ("loss_ratio", "Denoising loss", "held-out / training"),
    ("divergence", "From learned by heart", "nats"),
    ("entropy", "Provenance entropy", "nats"),
    ("commitment", "Commitment, if any", "sampling step"),
    ("octaves", "Temperature of samples", "octaves; 0 is T = 1"),
    ("explained", "Explained by training images", "share of contrast"),
)
"""Names of `curve_point`, titles and units."""

NAMES = {
    "late_entropy": "late entropy",
    "entropy": "entropy",
    "top": "top posterior",
    "commitment": "commitment step",
    "octaves": "own temperature",
    "explained": "explained share",
    "closed_form_late_entropy": "closed form, late entropy",
    "closed_form_entropy": "closed form, entropy",
    "closed_form_top": "closed form, top posterior",
    "closed_form_commitment": "closed form, commitment step",
}
"""Predictors of copies, and what they are called."""


def last_points(curves: SweepCurves) -> dict[int, Mapping[str, Estimate]]:
    """Take the last step of every size."""
    last = max(step for _, step in curves.points)
    return {size: point for (size, step), point in curves.points.items() if step == last}


def _by_size(curves: SweepCurves, name: str) -> dict[int, Estimate]:
    """Give a curve of the last step, at the sizes that have it."""
    return {size: point[name] for size, point in last_points(curves).items() if name in point}


def onset(curves: SweepCurves, name: str) -> float | None:
    """Give the number of images at which a curve of the last step crosses one half; None if it does not."""
    by_size = _by_size(curves, name)
    return crossing(list(by_size), [estimate.value for estimate in by_size.values()], ONSET)


def sweep_tables(curves: SweepCurves) -> dict[str, Table]:
    """Lay out what was measured at the last step, the prediction of copies, and resampling, by name."""
    tables = {"sweep": _points_table(curves)}
    if curves.predictions:
        tables["prediction"] = _prediction_table(
            {**curves.predictions, "all": curves.overall},
            "AUROC of telling copies from other samples of generators of the same size; the last column compares "
            "generators of all sizes.",
        )
        tables["within"] = _prediction_table(
            curves.within, "AUROC of telling copies from other samples of the same generator and class."
        )
    if curves.resampling:
        tables["resampling"] = _resampling_table(curves)
    return tables


def tables_in_words(curves: SweepCurves) -> str:
    """Give all tables as Markdown, with the onsets."""
    tables = [
        f"{table.note}\n\n{markdown_table(table.header, table.rows, text_columns=())}"
        for table in sweep_tables(curves).values()
    ]
    return "\n".join([*tables, *onsets_in_words(curves)]) + "\n"


def onsets_in_words(curves: SweepCurves) -> list[str]:
    """Say where memorization ends and generalization begins."""
    sentences = []
    for title, name in ONSETS.items():
        size = onset(curves, name)
        sentences.append(f"{title} (half) at {size:.0f} images" if size else f"{title}: not within these sizes")
    return sentences


def _panels(curves: SweepCurves) -> list[tuple[str, str, str]]:
    """Give those of `PANELS` that were measured."""
    return [panel for panel in PANELS if _by_size(curves, panel[0])]


def _points_table(curves: SweepCurves) -> Table:
    first, *others = [(name, title.lower()) for name, title, _ in _panels(curves)]
    columns = dict([first, ("share_memorized_holdout", "held-out copies"), *others])
    return Table(
        ["images", *columns.values()],
        [[str(size), *_cells(point, columns)] for size, point in last_points(curves).items()],
        "95 % intervals in brackets: over trainings from three of a size on, otherwise over samples and images.",
    )


def _prediction_table(predictions: Mapping[Any, Mapping[str, Estimate]], note: str) -> Table:
    names = {name: title for name, title in NAMES.items() if any(name in found for found in predictions.values())}
    columns = [_cells(by_predictor, names) for by_predictor in predictions.values()]
    rows = list(zip(names.values(), *columns, strict=True))
    return Table(["images", *map(str, predictions)], rows, note)


def _resampling_table(curves: SweepCurves) -> Table:
    bounds = next(iter(curves.resampling.values()))
    rows: list[list[TableCell]] = []
    for size, effects in curves.resampling.items():
        drawn_once = last_points(curves)[size]["share_memorized"]
        cells = [f"{interval(left, '.3g')}, {interval(draws, '.3g')} draws" for left, draws in effects.values()]
        rows.append([str(size), interval(drawn_once, ".3g"), *cells])
    return Table(
        ["images", "as drawn", *(f"below {bound}" for bound in bounds)],
        rows,
        "Copies left, and draws for each sample, where samples with less late entropy are resampled: less than that "
        "many nats, or than all but that share of held-out images.",
    )


def _cells(estimates: Mapping[str, Estimate], names: Iterable[str]) -> list[str | None]:
    """Write the estimates of these names; None for those that are missing."""
    return [interval(estimates[name], ".3g") if name in estimates else None for name in names]


BESIDE = {
    "share_memorized": ("share_memorized_holdout", "held-out"),
    "entropy": ("closed_form_entropy", "closed form"),
    "commitment": ("closed_form_commitment", "closed form"),
}
"""Curves that are drawn beside those of `PANELS`, and what they are called."""

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
    "resampling": (
        "What does resampling cost and prevent?",
        "The same samples, but those whose late entropy is below a bound were resampled, up to four times.",
        "Each line begins at the samples as they were drawn first; then one point for every bound, the smallest first.",
    ),
    "within": (
        "Copies among samples of one generator and class",
        "A class of few training images has little entropy whatever its samples are, and more copies. Here samples are "
        "compared with others of their own generator and class only.",
        "",
    ),
}
"""Titles, texts and captions of sections by the names of their figure and table; `within` has no figure."""


def write_sweep_report(root: Path, curves: SweepCurves) -> str:
    """Write sweep.parquet, sweep.md, a PNG for every figure, and report.html; give the tables in words."""
    rows = [
        {"size": size, "step": step, "name": name, **asdict(estimate)}
        for (size, step), point in curves.points.items()
        for name, estimate in point.items()
    ]
    write_parquet(root / "sweep.parquet", pa.Table.from_pylist(rows), version=1)
    text = tables_in_words(curves)
    with atomic_path(root / "sweep.md") as partial:
        partial.write_text(text, encoding="utf-8")
    figures = {"sweep": plot_sweep(curves), "time": plot_time(curves), "prediction": plot_prediction(curves)}
    if curves.resampling:
        figures["resampling"] = plot_resampling(curves)
    for name, figure in figures.items():
        with atomic_path(root / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=110)
    with atomic_path(root / "report.html") as partial:
        partial.write_text(_page(root.name, curves, figures), encoding="utf-8")
    return f"{text}\ntable, figures and report.html in {root}"


def _page(name: str, curves: SweepCurves, figures: Mapping[str, Figure]) -> str:
    """Lay out the report of a sweep: a section for everything that has a figure or a table."""
    sizes, steps = zip(*curves.points, strict=True)
    facts = {
        "training images": f"{min(sizes)} to {max(sizes)}",
        "training steps": str(max(steps)),
        "onsets": "; ".join(onsets_in_words(curves)),
    }
    tables, sections = sweep_tables(curves), []
    for key, (title, text, caption) in SECTIONS.items():
        pictures = [picture_of_figure(figures[key], alt=title, caption=caption)] if key in figures else []
        if pictures or key in tables:
            sections.append(Section(title, text, pictures, tables.get(key)))
    return render_report(title=f"provgen sweep: {name}", facts=facts, sections=sections)


def plot_sweep(curves: SweepCurves) -> Figure:
    """Plot everything against the number of training images, at the last step."""
    shown = _panels(curves)
    columns = math.ceil(len(shown) / 2)
    figure, panels = panel_figure(3 * columns, 5.4, columns, 2)
    for spare in panels[len(shown) :]:
        spare.remove()
    for axes, (name, title, unit) in zip(panels, shown, strict=False):
        _draw(axes, curves, name, BLUE, "generated" if name == "share_memorized" else "network")
        if name in BESIDE:
            other, label = BESIDE[name]
            _draw(axes, curves, other, GREEN, label)
            if axes.containers:
                axes.legend(fontsize=7, frameon=False)
        label_axes(axes, "training images", unit, title)
        axes.set_xscale("log", base=2)
        if name in ONSETS.values() and (size := onset(curves, name)):
            axes.axvline(size, **DOTTED)
            axes.text(size, axes.get_ylim()[1], f" {size:.0f}", fontsize=8, va="top", color=INK)
    return figure


def plot_time(curves: SweepCurves) -> Figure:
    """Plot the share of copies against training steps, and against steps for each training image."""
    figure, panels = panel_figure(9.0, 3.2, 2)
    sizes = sorted({size for size, _ in curves.points})
    for axes, divides in zip(panels, (False, True), strict=True):
        for size, shade in zip(sizes, _shades(len(sizes)), strict=True):
            steps = sorted(step for point_size, step in curves.points if point_size == size)
            shares = [curves.points[size, step]["share_memorized"].value for step in steps]
            times = [step / size if divides else step for step in steps]
            axes.plot(times, shares, color=shade, marker="o", markersize=3, label=f"{size}")
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        unit = "training steps / training images" if divides else "training steps"
        label_axes(axes, unit, "share under the 1/3 rule", "Copies against time")
    panels[0].legend(**_OF_SIZES)
    return figure


def plot_prediction(curves: SweepCurves) -> Figure:
    """Plot how well the entropy at every sampling step tells which samples will be copies."""
    figure, (axes,) = panel_figure(6.0, 3.4)
    for (size, predictions), shade in zip(curves.early.items(), _shades(len(curves.early)), strict=True):
        levels, estimates = zip(*predictions, strict=True)
        draw_band(axes, levels, estimates, shade, label=f"{size} images")
    axes.axhline(0.5, **DOTTED)
    label_axes(axes, ALPHA_BAR, "AUROC", "Which samples will be copies?")
    if curves.early:
        axes.legend(fontsize=8, frameon=False)
    return figure


def plot_resampling(curves: SweepCurves) -> Figure:
    """Plot the share of copies that is left against the draws of a sample, from samples drawn once on."""
    figure, (axes,) = panel_figure(6.0, 3.4)
    for (size, effects), shade in zip(curves.resampling.items(), _shades(len(curves.resampling)), strict=True):
        shares = [last_points(curves)[size]["share_memorized"], *(left for left, _ in effects.values())]
        draws = [1.0, *(draws.value for _, draws in effects.values())]
        draw_intervals(axes, draws, shares, color=shade, marker="o", markersize=3, label=f"{size}")
    label_axes(axes, "draws of a sample", "share under the 1/3 rule", "Copies left by resampling")
    axes.legend(**_OF_SIZES)
    return figure


def _shades(count: int) -> list[str]:
    """Give greys from black on, one for each size."""
    return [str(0.75 * number / max(1, count - 1)) for number in range(count)]


def _draw(axes: Axes, curves: SweepCurves, name: str, color: str, label: str) -> None:
    if by_size := _by_size(curves, name):
        look = {"color": color, "marker": "o", "markersize": 4, "capsize": 2, "label": label}
        draw_intervals(axes, list(by_size), list(by_size.values()), **look)
