"""A sweep over the number of training images as tables: for the page, and in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from provgen.analysis.statistics import Estimate
from provgen.analysis.sweep_curves import SweepCurves
from provgen.analysis.transition import crossing
from provgen.report.html import Table, TableCell

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
    """Lay out what was measured at the last step, the prediction of copies, and drawing again, by name."""
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
    if curves.redrawing:
        tables["redrawing"] = _redrawing_table(curves)
    return tables


def tables_in_words(curves: SweepCurves) -> str:
    """Give all tables as Markdown, with the onsets."""
    return "\n".join([*map(_markdown, sweep_tables(curves).values()), *onsets_in_words(curves)]) + "\n"


def onsets_in_words(curves: SweepCurves) -> list[str]:
    """Say where memorization ends and generalization begins."""
    ends = (("memorization ends", "share_memorized"), ("generalization begins", "halves_agreement"))
    places = [(what, onset(curves, name)) for what, name in ends]
    return [
        f"{what} (half) at {place:.0f} images" if place else f"{what}: not within these sizes"
        for what, place in places
    ]


def _points_table(curves: SweepCurves) -> Table:
    first, *others = [(name, title.lower()) for name, title, _ in PANELS]
    columns = [first, ("share_memorized_holdout", "held-out copies"), *others]
    rows: list[list[TableCell]] = [
        [str(size), *(_text(point.get(name)) for name, _ in columns)]
        for size, point in last_points(curves).items()
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


def _redrawing_table(curves: SweepCurves) -> Table:
    bounds = next(iter(curves.redrawing.values()))
    rows: list[list[TableCell]] = []
    for size, found in curves.redrawing.items():
        cells = [f"{_text(left)}, {_text(draws)} draws" for left, draws in found.values()]
        rows.append([str(size), _text(last_points(curves)[size]["share_memorized"]), *cells])
    return Table(
        ["images", "as drawn", *(f"below {below:g}" for below in bounds)],
        rows,
        "Copies left, and draws for each sample, where samples with less late entropy (nats) are drawn again.",
    )


def _markdown(table: Table) -> str:
    rows = [table.header, ["---:"] * len(table.header), *table.rows]
    text = "\n".join(f"| {' | '.join('-' if cell is None else str(cell) for cell in row)} |" for row in rows)
    return f"{table.note}\n\n{text}\n"


def _text(estimate: Estimate | None) -> str | None:
    return None if estimate is None else f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
