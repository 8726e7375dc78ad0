"""Sections on sets of images: the 1/3 rule on pixels, and all measures in three columns."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from torch import Tensor

from provgen.metrics.copying import distance_ratio, share_memorized
from provgen.metrics.neighbors import distinct_rows, nearest
from provgen.metrics.set_measures import SetMeasure
from provgen.report.figures import (
    BLUE,
    GREEN,
    VERMILION,
    draw_intervals,
    label_small,
    panel_figure,
    plot_ratio_histogram,
)
from provgen.report.format import Metric, interval
from provgen.report.html import Section, Table, TableCell, picture_of_figure
from provgen.report.sections import Part

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
    "frechet_distance": ("Frechet distance", "of means and covariances to held-out images, on these features"),
    "kernel_distance": ("kernel distance", "to held-out images, unbiased: 0 where both are alike"),
    "vendi_score": ("Vendi score", "effective number of different images"),
}
"""Measures, what they are called, and how to read them."""

COLUMNS = {"generated": ("generated", BLUE), "holdout": ("held-out", GREEN), "copies": ("copies", VERMILION)}
"""Fields of `SetMeasure`, what they are called, and their colours."""

PANELS_IN_A_ROW = 4


def memorization_section(generated: Tensor, holdout: Tensor, copies: Tensor, train: Tensor) -> Part:
    """Apply the 1/3 rule to three image sets, each (query, feature); `train` is (train, feature)."""
    sets = {"generated": generated, "held-out": holdout, "copied": copies}
    distinct = distinct_rows(train)
    ratios = {name: distance_ratio(nearest(images, distinct, 2)) for name, images in sets.items() if len(images)}
    shares = {name: share_memorized(values) for name, values in ratios.items()}
    picture = picture_of_figure(
        plot_ratio_histogram(ratios),
        alt="Histograms of the distance ratio of generated, held-out and copied images",
        caption="Distance to the nearest training image over the distance to the second nearest; below 1/3 an "
        "image counts as memorized.",
    )
    metric = Metric.from_estimate(
        "share_memorized",
        shares["generated"],
        "similarity",
        baseline=shares["held-out"].value if "held-out" in shares else None,
        ceiling=shares["copied"].value,
    )
    text = (
        "The 1/3 rule of Yoon et al. (2023) on raw pixels. Held-out images show what a perfect generator would "
        "score, exact copies of training images what a pure copier would."
    )
    rows: list[list[TableCell]] = [[name, interval(share), share.n] for name, share in shares.items()]
    table = Table(["images", "share memorized", "n"], rows, "Clopper-Pearson 95 % intervals in brackets.")
    return Section("Is it copying?", text, [picture], table), [metric]


def sets_section(measures: Mapping[str, SetMeasure], features: str) -> Part:
    """Show what `set_measures` found on some features; the 1/3 rule has a section and a metric of its own."""
    rows: list[list[TableCell]] = [
        [READ[name][0], *(interval(getattr(measure, column), ".3g") for column in COLUMNS), READ[name][1]]
        for name, measure in measures.items()
    ]
    metrics = [
        Metric.from_estimate(
            name, measure.generated, "similarity", baseline=measure.holdout.value, ceiling=measure.copies.value
        )
        for name, measure in measures.items()
        if name != "share_memorized"
    ]
    count = measures["share_memorized"].generated.n
    titles = {"pixels": "raw pixels", "own": "the generator's last encoder stage"}
    text = (
        "No number of this kind means anything alone. Each is measured three times in the same way, on "
        f"{titles.get(features, f'features of {features}')}: for {count} generated images, for {count} held-out images "
        f"as if they had been generated, which is what a perfect generator would score, and for {count} training "
        f"images, which is what a copier would score. The reference is another {count} held-out images."
    )
    picture = picture_of_figure(
        plot_set_measures(measures),
        alt="Every measure of generated images beside held-out images and training images, with intervals",
        caption="Blue near green: like a perfect generator. Blue near red: like a copier. 95 % intervals.",
    )
    note = (
        "95 % intervals in brackets: Clopper-Pearson for shares, bootstrap for C_T and density, jackknife for "
        "distances and Vendi score. docs/reference/metrics.md has definitions and sources."
    )
    table = Table(["measure", *(title for title, _ in COLUMNS.values()), "what it counts"], rows, note)
    return Section("Does the whole set look copied, or made up?", text, [picture], table), metrics


def plot_set_measures(measures: Mapping[str, SetMeasure]) -> Figure:
    """Plot a panel for every measure, the three sets beside each other."""
    height = -(-len(measures) // PANELS_IN_A_ROW)
    figure, panels = panel_figure(9.0, 1.6 * height, PANELS_IN_A_ROW, height)
    for axes, (name, measure) in zip(panels, measures.items(), strict=False):
        for place, (column, (_, color)) in enumerate(COLUMNS.items()):
            draw_intervals(axes, [place], [getattr(measure, column)], color=color, marker="o", capsize=3)
        label_small(axes, READ[name][0])
        axes.set_xticks(range(len(COLUMNS)), [title for title, _ in COLUMNS.values()])
        axes.margins(x=0.3, y=0.2)
    for axes in panels[len(measures) :]:
        axes.set_axis_off()
    return figure
