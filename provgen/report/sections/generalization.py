"""The report's section on generalization: losses on training and held-out images, by noise level."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from provgen.metrics.statistics import Estimate, mean_estimate, ratio_estimate
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS
from provgen.report.figures import BLUE, GREEN, INK, VERMILION, label_axes
from provgen.report.html import Section, Table, TableCell, picture_of_figure
from provgen.report.metrics import Metric

THIRDS = ("little_noise", "some_noise", "much_noise")
"""Of the schedule."""


def generalization_section(
    name: str, what: str, train_losses: Tensor, holdout_losses: Tensor, divergence: Mapping[int, Tensor] | None = None
) -> tuple[Section, list[Metric]]:
    """Compare the generator's loss on training and held-out images.

    Args:
        name: Name of the generator's loss in report.json.
        what: Description of that loss.
        train_losses: (query, draw), from clean to noisy where there are noise levels.
        holdout_losses: (query, draw).
        divergence: Of a denoiser from the closed form's on training images in nats, (query,) by timestep.
    """
    seen, unseen = (mean_estimate(losses.mean(dim=1), seed=0) for losses in (train_losses, holdout_losses))
    ratios = loss_ratios(train_losses, holdout_losses)
    metrics = [
        Metric.from_estimate(f"holdout_{name}", unseen, "model fit", baseline=seen.value),
        Metric.from_estimate(f"train_{name}", seen, "model fit", baseline=unseen.value),
        Metric.from_estimate(f"{name}_ratio", ratios["all"], "model fit", baseline=1.0),
    ]
    pictures = []
    if divergence is not None:
        far = mean_estimate(torch.stack(list(divergence.values())).mean(dim=0), seed=0)
        metrics += [
            Metric.from_estimate(f"{name}_ratio_{third}", ratio, "model fit", baseline=1.0)
            for third, ratio in ratios.items()
            if third != "all"
        ]
        metrics.append(Metric.from_estimate("divergence_from_closed_form_nats", far, "model fit", ceiling=0.0))
        pictures.append(
            picture_of_figure(
                plot_by_level(train_losses, holdout_losses, divergence),
                alt="Loss on training and held-out images by timestep, and divergence from the closed-form denoiser",
                caption="Left: where the curves part, the network knows its training images. Right: 0 would be a "
                "network that has learned them by heart. Bands: 95 % bootstrap intervals over images.",
            )
        )
    rows: list[list[TableCell]] = [
        ["training", _interval(seen), seen.n],
        ["held-out", _interval(unseen), unseen.n],
    ]
    for levels, ratio in ratios.items():
        if divergence is not None or levels == "all":
            rows.append([f"held-out / training, {levels.replace('_', ' ')}", _interval(ratio), ratio.n])
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


def loss_ratios(train_losses: Tensor, holdout_losses: Tensor) -> dict[str, Estimate]:
    """Give the loss on held-out images over that on training images: of all draws, and of each third of them.

    Args:
        train_losses: (query, draw), from clean to noisy where there are noise levels.
        holdout_losses: (query, draw).
    """
    draws = train_losses.shape[1]
    edges = {"all": (0, draws)}
    if draws >= len(THIRDS):
        ends = [round(draws * place / len(THIRDS)) for place in range(len(THIRDS) + 1)]
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


def _band(axes: Axes, places: list[float], estimates: list[Estimate], name: str, color: str) -> None:
    axes.plot(places, [estimate.value for estimate in estimates], color=color, marker="o", markersize=3, label=name)
    lows, highs = [estimate.low for estimate in estimates], [estimate.high for estimate in estimates]
    axes.fill_between(places, lows, highs, color=color, alpha=0.2)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
