"""Sections on the trained networks: losses in training and by noise level, the index, and the class of sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import exp, log
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from provgen.metrics.class_quality import ClassQuality
from provgen.metrics.statistics import Estimate, mean_estimate, ratio_estimate
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS
from provgen.report.figures import (
    BLUE,
    DOTTED,
    FAINT,
    GREEN,
    VERMILION,
    draw_band,
    label_axes,
    panel_figure,
    plot_index_quality,
    plot_training,
)
from provgen.report.format import Metric, interval
from provgen.report.html import Section, Table, TableCell, picture_of_figure
from provgen.report.sections import Part

THIRDS = ("little_noise", "some_noise", "much_noise")
"""Thirds of the noise schedule."""

MEASURED = {
    "consistency_top1": "first source has the class",
    "consistency_top5": "one of five sources has the class",
    "knn_accuracy": "class read off the sources",
    "class_accuracy": "class head",
}
"""Metrics of `ClassQuality` that are shown, and what they are called."""


def training_section(metrics: Sequence[Mapping[str, Any]]) -> Part:
    """Show the loss curves, from the lines of `metrics.jsonl`."""
    picture = picture_of_figure(
        plot_training(metrics),
        alt="Denoising, index and class loss against optimiser steps",
        caption="Losses of single batches (faint) and their running mean.",
    )
    text = "The generator and the provenance network are trained in the same steps."
    return Section("Training", text, [picture]), []


def generalization_section(
    name: str, what: str, train_losses: Tensor, holdout_losses: Tensor, divergence: Mapping[int, Tensor] | None
) -> Part:
    """Compare the generator's loss on training and held-out images.

    Args:
        name: Name of the generator's loss in report.json.
        what: Description of that loss.
        train_losses: (query, draw), from clean to noisy where there are noise levels.
        holdout_losses: (query, draw).
        divergence: Divergence of a denoiser from the closed form on training images in nats, (query,) by timestep; None
            for a generator without noise levels.
    """
    train, holdout = (mean_estimate(losses.mean(dim=1), seed=0) for losses in (train_losses, holdout_losses))
    metrics = [
        Metric.from_estimate(f"holdout_{name}", holdout, "model fit", baseline=train.value),
        Metric.from_estimate(f"train_{name}", train, "model fit", baseline=holdout.value),
    ]
    rows: list[list[TableCell]] = [["training", interval(train), train.n], ["held-out", interval(holdout), holdout.n]]
    for levels, ratio in loss_ratios(train_losses, holdout_losses).items():
        if levels == "all" or divergence is not None:
            ending = "" if levels == "all" else f"_{levels}"
            metrics.append(Metric.from_estimate(f"{name}_ratio{ending}", ratio, "model fit", baseline=1.0))
            rows.append([f"held-out / training, {levels.replace('_', ' ')}", interval(ratio), ratio.n])
    pictures = []
    if divergence is not None:
        nats = mean_estimate(torch.stack(list(divergence.values())).mean(dim=0), seed=0)
        metrics.append(Metric.from_estimate("divergence_from_closed_form_nats", nats, "model fit", ceiling=0.0))
        picture = picture_of_figure(
            plot_by_level(train_losses, holdout_losses, divergence),
            alt="Loss on training and held-out images by timestep, and divergence from the closed-form denoiser",
            caption="Left: where the curves part, the network knows its training images. Right: 0 would be a "
            "network that has learned them by heart. Bands: 95 % bootstrap intervals over images.",
        )
        pictures.append(picture)
    note = (
        "Bootstrap 95 % intervals over images in brackets. A ratio of 1 is what a generator has that knows its "
        "training images no better than others."
    )
    text = f"{what}, averaged weights. A network that memorizes is much better on the images it has seen."
    table = Table(["images", name.replace("_", " "), "n"], rows, note)
    return Section("Does it generalize?", text, pictures, table), metrics


def loss_ratios(train_losses: Tensor, holdout_losses: Tensor) -> dict[str, Estimate]:
    """Give the loss on held-out images over that on training images: of all draws, and of each third of them.

    Losses are (query, draw), from clean to noisy where there are noise levels.
    """
    draws = train_losses.shape[1]
    edges = {"all": (0, draws)}
    if draws >= len(THIRDS):
        ends = [round(draws * third / len(THIRDS)) for third in range(len(THIRDS) + 1)]
        edges |= dict(zip(THIRDS, pairwise(ends), strict=True))
    return {
        name: ratio_estimate(*(losses[:, low:high].mean(dim=1) for losses in (holdout_losses, train_losses)))
        for name, (low, high) in edges.items()
    }


def plot_by_level(train_losses: Tensor, holdout_losses: Tensor, divergence: Mapping[int, Tensor]) -> Figure:
    """Plot both losses against the timestep, and the divergence from the closed form; arguments as above."""
    figure, (left, right) = panel_figure(9.0, 3.0, 2)
    draws, dots = train_losses.shape[1], {"marker": "o", "markersize": 3}
    middles = [(draw + 0.5) * NUM_TRAIN_TIMESTEPS / draws for draw in range(draws)]
    for losses, name, color in ((train_losses, "training", VERMILION), (holdout_losses, "held-out", GREEN)):
        draw_band(left, middles, [mean_estimate(of_draw, seed=0) for of_draw in losses.T], color, label=name, **dots)
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    label_axes(left, "timestep (0 image, 1000 noise)", "squared error of the noise", "Denoising loss")
    draw_band(right, list(divergence), [mean_estimate(nats, seed=0) for nats in divergence.values()], BLUE, **dots)
    right.axhline(0, **DOTTED)
    label_axes(right, "timestep (0 image, 1000 noise)", "nats", "From the closed form")
    return figure


def index_section(last: Mapping[str, Any], num_covered: int, num_classes: int) -> Part:
    """Show index metrics beside their closed-form ceilings, from the last evaluation, a line of `metrics.jsonl`.

    The network can name `num_covered` training images.
    """
    rows = last["index_quality"]
    columns = [f"{name}{ending}" for name in ("cross_entropy", "top1", "top5") for ending in ("", "_ceiling")]
    table = Table(
        ["alpha_bar", "rows", "gap (nats)", "cross-entropy", "ceiling", "top-1", "ceiling", "top-5", "ceiling"],
        [
            [f"{row['alpha_bar']:.2g}", row["rows"], float(row["kl_gap"]), *(row[column] for column in columns)]
            for row in rows
        ],
        "Parents are averaged over the closed-form posterior; see docs/reference/metrics.md.",
    )
    asked = "For training images, as this generator shows them to its provenance network"
    pictures = []
    if _has_levels(rows):
        asked = "For noised training images"
        picture = picture_of_figure(
            plot_index_quality(rows),
            alt="Cross-entropy, top-1 and top-5 of the index against the alpha_bar, network and closed form",
            caption="Noise on the left, image on the right. Dashed: the closed form, which nothing can beat.",
        )
        pictures.append(picture)
    text = (
        f"{asked}: how well the network says which one it was, told its class (conditional rows) and told nothing "
        "(unconditional rows), beside the best possible answer for the very same input."
    )
    kinds = sorted({row["rows"] for row in rows})
    metrics = [metric for kind in kinds for metric in _index_metrics(last, kind, num_covered, num_classes)]
    return Section("Does the network know the index?", text, pictures, table), metrics


def _index_metrics(last: Mapping[str, Any], kind: str, num_covered: int, num_classes: int) -> list[Metric]:
    """Give top-1 and top-5 at the level in the middle, and the KL gap, of conditional or unconditional rows."""
    of_kind = [row for row in last["index_quality"] if row["rows"] == kind]
    level = of_kind[len(of_kind) // 2]
    ending = "_at_the_middle_level" if _has_levels(last["index_quality"]) else ""
    chance = 1 / num_covered if kind == "unconditional" else max(num_classes, 1) / num_covered
    metrics = [
        Metric.from_estimate(
            f"index_{name}_{kind}{ending}",
            Estimate(level[name], level[f"{name}_low"], level[f"{name}_high"], level["n"]),
            "learned provenance",
            baseline=min(1.0, guesses * chance),
            ceiling=level[f"{name}_ceiling"],
        )
        for name, guesses in (("top1", 1), ("top5", 5))
    ]
    value, low, high = (last[f"kl_gap_{kind}{end}"] for end in ("", "_low", "_high"))
    gap = Estimate(value, low, high, level["n"])
    return [*metrics, Metric.from_estimate(f"index_kl_gap_{kind}_nats", gap, "learned provenance", ceiling=0.0)]


def temperature_section(rows: Sequence[Mapping[str, Any]], window: tuple[float, float]) -> Part:
    """Show the temperatures of the posteriors by noise level, rows of `evaluation.temperature_rows`.

    Metrics are geometric means over the levels in the `window` of noise levels whose posteriors are averaged.
    """
    picture = picture_of_figure(
        plot_temperatures(rows, window),
        alt="Temperature of the closed form and of the network against the log signal-to-noise ratio",
        caption="Noise on the left, image on the right; the grey span is the window that traces average over. 1 is a "
        "generator that has learned its images by heart.",
    )
    text = (
        "How widely training images must be mixed to give what the generator draws at each noise level. A copier has "
        "a temperature of 1, and wider mixing raises it. At cleaner levels than the window "
        "the image is decided, and the temperature says how locally the generator removes noise."
    )
    inside = [row for row in rows if window[0] < row["alpha_bar"] < window[1]] or rows
    metrics = []
    for kind in ("conditional", "unconditional"):
        mean = exp(sum(log(row[f"closed_form_{kind}"]) for row in inside) / len(inside))
        metrics.append(Metric(f"temperature_{kind}", mean, None, None, None, 1.0, len(inside), "model fit"))
    return Section("How widely does it mix?", text, [picture]), metrics


def plot_temperatures(rows: Sequence[Mapping[str, Any]], window: tuple[float, float]) -> Figure:
    """Plot temperatures against the log signal-to-noise ratio, the network dashed, the window grey."""
    figure, (axes,) = panel_figure(4.6, 3.0)
    places = torch.logit(torch.tensor([row["alpha_bar"] for row in rows], dtype=torch.float64)).tolist()
    for tracer, style in (("closed_form", "-"), ("network", "--")):
        for kind, color in (("conditional", BLUE), ("unconditional", VERMILION)):
            values = [row[f"{tracer}_{kind}"] for row in rows]
            label = f"{tracer.replace('_', ' ')}, {kind}"
            axes.plot(places, values, style, color=color, marker="o", markersize=3, label=label)
    span = torch.logit(torch.tensor(window, dtype=torch.float64), eps=1e-6).tolist()
    axes.axvspan(*span, color=FAINT, alpha=0.15, linewidth=0)
    axes.axhline(1, **DOTTED)
    axes.set_yscale("log", base=2)
    axes.legend(fontsize=7, frameon=False)
    label_axes(axes, "log signal-to-noise ratio", "temperature")
    return figure


def _has_levels(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["alpha_bar"] for row in rows}) > 1


def classes_section(by_level: Mapping[float, ClassQuality]) -> Part:
    """Show class metrics on held-out images, by the alpha_bar they were noised to."""
    rows: list[list[TableCell]] = []
    metrics = []
    for level, quality in by_level.items():
        for name, title in MEASURED.items():
            estimate: Estimate | None = getattr(quality, name)
            if estimate is not None:
                closed_form, baseline = (getattr(quality, f"{name}_{end}") for end in ("closed_form", "baseline"))
                rows.append([f"{level:.2f}", title, interval(estimate), closed_form, baseline])
                key = f"holdout_{name}_at_alpha_bar_{level:.1f}"
                metric = Metric.from_estimate(key, estimate, "learned provenance", baseline=baseline, ceiling=1.0)
                metrics.append(metric)
    text = (
        "Held-out images, shown without their class. The closed form answers for the same input, noise included; it "
        "knows pixels alone, so a network can do better. Guessing is one training image, or class, at random."
    )
    header = ["alpha_bar", "share of held-out images", "network", "closed form", "guessing"]
    table = Table(header, rows, "95 % intervals in brackets.")
    return Section("Do sources share the class?", text, table=table), metrics
