"""A sweep over the number of training images as figures, tables and a Parquet file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from provgen.metrics.statistics import Estimate
from provgen.report.figures import BLUE, GREEN, INK, label_axes
from provgen.report.html import Section, Table, TableCell, picture_of_figure, render_report
from provgen.run import atomic_path
from provgen.studies.memorization.curves import SweepCurves, crossing

ONSET = 0.5
"""Share of copies, and agreement of halves, at which memorization ends and generalization begins."""

PANELS = (
    ("share_memorized", "Copies", "share under the 1/3 rule"),
    ("halves_agreement", "Same noise, no image in common", "agreement of two generators"),
    ("loss_ratio", "Denoising loss", "held-out / training"),
    ("divergence", "From learned by heart", "nats"),
    ("entropy", "Provenance entropy", "nats"),
    ("commitment", "Commitment, if any", "sampling step"),
)
"""Names of `curve_point`, titles and units."""

NAMES = {
    "late_entropy": "late entropy",
    "entropy": "entropy",
    "top": "top posterior",
    "commitment": "commitment step",
    "closed_form_late_entropy": "closed form, late entropy",
    "closed_form_entropy": "closed form, entropy",
    "closed_form_top": "closed form, top posterior",
    "closed_form_commitment": "closed form, commitment step",
}
"""Predictors of copies."""


def last_points(curves: SweepCurves) -> dict[int, Mapping[str, Estimate]]:
    """Take the last step of every size."""
    last = max(step for _, step in curves.points)
    return {size: point for (size, step), point in curves.points.items() if step == last}


def onset(curves: SweepCurves, name: str) -> float | None:
    """Give the number of images at which a curve of the last step crosses one half; None if it does not."""
    points = {size: point for size, point in last_points(curves).items() if name in point}
    return crossing(list(points), [point[name].value for point in points.values()], ONSET)


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
    return "\n".join([*map(_markdown, sweep_tables(curves).values()), *onsets_in_words(curves)]) + "\n"


def onsets_in_words(curves: SweepCurves) -> list[str]:
    """Say where memorization ends and generalization begins."""
    ends = (("memorization ends", "share_memorized"), ("generalization begins", "halves_agreement"))
    places = [(what, onset(curves, name)) for what, name in ends]
    return [
        f"{what} (half) at {place:.0f} images" if place else f"{what}: not within these sizes" for what, place in places
    ]


def _points_table(curves: SweepCurves) -> Table:
    first, *others = [(name, title.lower()) for name, title, _ in PANELS]
    columns = [first, ("share_memorized_holdout", "held-out copies"), *others]
    rows: list[list[TableCell]] = [
        [str(size), *(_text(point.get(name)) for name, _ in columns)] for size, point in last_points(curves).items()
    ]
    return Table(
        ["images", *(title for _, title in columns)],
        rows,
        "95 % intervals in brackets: over trainings from three of a size on, otherwise over samples and images.",
    )


def _prediction_table(predictions: Mapping[Any, Mapping[str, Estimate]], note: str) -> Table:
    rows: list[list[TableCell]] = [
        [title, *(_text(found.get(name)) for found in predictions.values())] for name, title in NAMES.items()
    ]
    return Table(["images", *map(str, predictions)], rows, note)


def _resampling_table(curves: SweepCurves) -> Table:
    bounds = next(iter(curves.resampling.values()))
    rows: list[list[TableCell]] = []
    for size, found in curves.resampling.items():
        cells = [f"{_text(left)}, {_text(draws)} draws" for left, draws in found.values()]
        rows.append([str(size), _text(last_points(curves)[size]["share_memorized"]), *cells])
    return Table(
        ["images", "as drawn", *(f"below {below:g}" for below in bounds)],
        rows,
        "Copies left, and draws for each sample, where samples with less late entropy (nats) are resampled.",
    )


def _markdown(table: Table) -> str:
    rows = [table.header, ["---:"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |" for row in rows)
    return f"{table.note}\n\n{text}\n"


def _text(estimate: Estimate | None) -> str | None:
    return None if estimate is None else f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


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
    "resampling": (
        "What does resampling cost and prevent?",
        "The same samples, but those whose late entropy is below a bound were resampled, up to four times.",
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
    if curves.resampling:
        figures["resampling"] = plot_resampling(curves)
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
        axes.fill_between(levels, [e.low for _, e in found], [e.high for _, e in found], color=color, alpha=0.15)
    axes.axhline(0.5, color=INK, linewidth=0.8, linestyle=":")
    label_axes(axes, "$\\bar\\alpha_t$ (0 noise, 1 image)", "AUROC", "Which samples will be copies?")
    if curves.early:
        axes.legend(fontsize=8, frameon=False)
    return figure


def plot_resampling(curves: SweepCurves) -> Figure:
    """Plot the share of copies that is left against the draws of a sample, from samples drawn once on."""
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, (size, found) in enumerate(curves.resampling.items()):
        color = str(0.75 * number / max(1, len(curves.resampling) - 1))
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
    label_axes(axes, "draws of a sample", "share under the 1/3 rule", "Copies left by resampling")
    axes.legend(title="images", fontsize=7, title_fontsize=7, frameon=False)
    return figure


def _draw(axes: Axes, points: Mapping[int, Mapping[str, Estimate]], name: str, color: str, label: str) -> None:
    there = {size: point[name] for size, point in points.items() if name in point}
    values = [estimate.value for estimate in there.values()]
    ends = [
        [estimate.value - estimate.low for estimate in there.values()],
        [estimate.high - estimate.value for estimate in there.values()],
    ]
    if there:
        axes.errorbar(list(there), values, yerr=ends, color=color, marker="o", markersize=4, capsize=2, label=label)
