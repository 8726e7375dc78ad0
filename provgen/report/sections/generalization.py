"""Sections on losses: their curves in training, and losses on training and held-out images by noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from provgen.metrics.statistics import Estimate, mean_estimate, ratio_estimate
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS
from provgen.report.figures import BLUE, GREEN, INK, VERMILION, label_axes, plot_training
from provgen.report.format import Metric, interval
from provgen.report.html import Picture, Section, Table, TableCell, picture_of_figure
from provgen.report.sections import Part

THIRDS = ("little_noise", "some_noise", "much_noise")
"""Thirds of the noise schedule."""


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
    ratios = loss_ratios(train_losses, holdout_losses)
    if divergence is None:
        ratios = {"all": ratios["all"]}
    metrics = [
        Metric.from_estimate(f"holdout_{name}", holdout, "model fit", baseline=train.value),
        Metric.from_estimate(f"train_{name}", train, "model fit", baseline=holdout.value),
    ]
    rows: list[list[TableCell]] = [
        ["training", interval(train), train.n],
        ["held-out", interval(holdout), holdout.n],
    ]
    for levels, ratio in ratios.items():
        ending = "" if levels == "all" else f"_{levels}"
        metrics.append(Metric.from_estimate(f"{name}_ratio{ending}", ratio, "model fit", baseline=1.0))
        rows.append([f"held-out / training, {levels.replace('_', ' ')}", interval(ratio), ratio.n])
    pictures = []
    if divergence is not None:
        nats = mean_estimate(torch.stack(list(divergence.values())).mean(dim=0), seed=0)
        metrics.append(Metric.from_estimate("divergence_from_closed_form_nats", nats, "model fit", ceiling=0.0))
        pictures = [_picture_by_level(train_losses, holdout_losses, divergence)]
    section = Section(
        "Does it generalize?",
        f"{what}, averaged weights. A network that memorizes is much better on the images it has seen.",
        pictures,
        Table(
            ["images", name.replace("_", " "), "n"],
            rows,
            "Bootstrap 95 % intervals over images in brackets. A ratio of 1 is what a generator has that knows its "
            "training images no better than others.",
        ),
    )
    return section, metrics


def _picture_by_level(train_losses: Tensor, holdout_losses: Tensor, divergence: Mapping[int, Tensor]) -> Picture:
    return picture_of_figure(
        plot_by_level(train_losses, holdout_losses, divergence),
        alt="Loss on training and held-out images by timestep, and divergence from the closed-form denoiser",
        caption="Left: where the curves part, the network knows its training images. Right: 0 would be a "
        "network that has learned them by heart. Bands: 95 % bootstrap intervals over images.",
    )


def loss_ratios(train_losses: Tensor, holdout_losses: Tensor) -> dict[str, Estimate]:
    """Give the loss on held-out images over that on training images: of all draws, and of each third of them.

    Args:
        train_losses: (query, draw), from clean to noisy where there are noise levels.
        holdout_losses: (query, draw).
    """
    draws = train_losses.shape[1]
    edges = {"all": (0, draws)}
    if draws >= len(THIRDS):
        ends = [round(draws * third / len(THIRDS)) for third in range(len(THIRDS) + 1)]
        edges |= dict(zip(THIRDS, pairwise(ends), strict=True))
    return {
        name: ratio_estimate(holdout_losses[:, low:high].mean(dim=1), train_losses[:, low:high].mean(dim=1), seed=0)
        for name, (low, high) in edges.items()
    }


def plot_by_level(train_losses: Tensor, holdout_losses: Tensor, divergence: Mapping[int, Tensor]) -> Figure:
    """Plot both losses against the timestep, and the divergence from the closed form; arguments as above."""
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    draws = train_losses.shape[1]
    middles = [(draw + 0.5) * NUM_TRAIN_TIMESTEPS / draws for draw in range(draws)]
    for losses, name, color in ((train_losses, "training", VERMILION), (holdout_losses, "held-out", GREEN)):
        _band(left, middles, [mean_estimate(losses[:, draw], seed=0) for draw in range(draws)], name, color)
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    label_axes(left, "timestep (0 image, 1000 noise)", "squared error of the noise", "Denoising loss")
    estimates = [mean_estimate(values, seed=0) for values in divergence.values()]
    _band(right, [float(step) for step in divergence], estimates, "", BLUE)
    right.axhline(0, color=INK, linewidth=0.8, linestyle=":")
    label_axes(right, "timestep (0 image, 1000 noise)", "nats", "From the closed form")
    return figure


def _band(axes: Axes, timesteps: list[float], estimates: list[Estimate], name: str, color: str) -> None:
    axes.plot(timesteps, [estimate.value for estimate in estimates], color=color, marker="o", markersize=3, label=name)
    lows, highs = [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]
    axes.fill_between(timesteps, lows, highs, color=color, alpha=0.2)
