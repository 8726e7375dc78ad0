"""The report's section on sets of images: all measures in three columns."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from provgen.metrics.set_measures import SetMeasure
from provgen.metrics.statistics import Estimate
from provgen.report.figures import BLUE, GREEN, INK, VERMILION
from provgen.report.html import Section, Table, TableCell, picture_of_figure
from provgen.report.metrics import Metric

READ = {
    "share_memorized": ("1/3 rule", "nearest training image thrice as near as the second"),
    "data_copying": (
        "C_T in deviations",
        "below 0: nearer to training images than held-out ones are, or too few kinds",
    ),
    "authenticity": ("authenticity", "training images have nearer neighbours than the generated ones"),
    "closer_to_train": ("closer to train", "nearer to a training image than to any held-out one"),
    "precision": ("precision", "generated images among held-out ones"),
    "recall": ("recall", "held-out images among generated ones"),
    "density": ("density", "how thickly: 1 where both are alike"),
    "coverage": ("coverage", "held-out images with a generated one near"),
    "frechet_distance": (
        "Frechet distance",
        "of means and covariances to held-out images, on these features",
    ),
    "kernel_distance": ("kernel distance", "to held-out images, unbiased: 0 where both are alike"),
    "vendi_score": ("Vendi score", "effective number of different images"),
}
"""Measures, what they are called, and how to read them."""

COLUMNS = {"generated": ("generated", BLUE), "holdout": ("held-out", GREEN), "copies": ("copies", VERMILION)}
"""Fields of `SetMeasure`, what they are called, and their colours."""

PANELS_IN_A_ROW = 4


def set_section(measures: Mapping[str, SetMeasure], features: str) -> tuple[Section, list[Metric]]:
    """Show what `set_measures` found on some features; the 1/3 rule has a section and a metric of its own."""
    rows: list[list[TableCell]] = [
        [READ[name][0], *(_interval(getattr(found, column)) for column in COLUMNS), READ[name][1]]
        for name, found in measures.items()
    ]
    metrics = [
        Metric.from_estimate(
            name, found.generated, "similarity", baseline=found.holdout.value, ceiling=found.copies.value
        )
        for name, found in measures.items()
        if name != "share_memorized"
    ]
    count = measures["share_memorized"].generated.n
    named = {"pixels": "raw pixels", "own": "the generator's last encoder stage"}.get(
        features, f"features of {features}"
    )
    section = Section(
        "Does the whole set look copied, or made up?",
        f"No number of this kind means anything alone. Each is measured three times in the same way, on {named}: for "
        f"{count} generated images, for {count} held-out images as if they had been generated, which is what a perfect "
        f"generator would score, and for {count} training images, which is what a copier would score. The reference is "
        f"another {count} held-out images.",
        [
            picture_of_figure(
                plot_set_measures(measures),
                alt="Every measure of generated images beside held-out images and training images, with intervals",
                caption="Blue near green: like a perfect generator. Blue near red: like a copier. 95 % intervals.",
            )
        ],
        Table(
            ["measure", *(title for title, _ in COLUMNS.values()), "what it counts"],
            rows,
            "95 % intervals in brackets: Clopper-Pearson for shares, bootstrap for C_T and density, jackknife for "
            "distances and Vendi score. docs/metrics.md has definitions and sources.",
        ),
    )
    return section, metrics


def plot_set_measures(measures: Mapping[str, SetMeasure]) -> Figure:
    """Plot a panel for every measure, the three sets beside each other."""
    height = -(-len(measures) // PANELS_IN_A_ROW)
    figure = Figure(figsize=(9.0, 1.6 * height), layout="constrained")
    panels = figure.subplots(height, PANELS_IN_A_ROW, squeeze=False).flatten()
    for axes, (name, found) in zip(panels, measures.items(), strict=False):
        for place, (column, (title, color)) in enumerate(COLUMNS.items()):
            estimate: Estimate = getattr(found, column)
            ends = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
            axes.errorbar([place], [estimate.value], yerr=ends, color=color, marker="o", capsize=3, label=title)
        axes.set_title(READ[name][0], fontsize=9, color=INK)
        axes.set_xticks(range(len(COLUMNS)), [title for title, _ in COLUMNS.values()], fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.margins(x=0.3, y=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    return figure


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
