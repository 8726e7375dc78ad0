"""Sections on generated samples and their traces: the grid, entropy along sampling, agreement with the closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from provgen.metrics.agreement import agreement, mismatched
from provgen.metrics.statistics import Estimate, mean_estimate, proportion
from provgen.report.figures import plot_entropy
from provgen.report.format import Metric, interval
from provgen.report.html import Section, Table, TableCell, picture_of_figure, picture_of_image
from provgen.report.sections import Part
from provgen.tracing.attribution import Explained, Support
from provgen.tracing.records import group_traces

Rows = Sequence[Mapping[str, Any]]


def samples_section(
    grid: Image.Image, shown: int, total: int, *, is_trajectory: bool, calibration_subsets: int
) -> Part:
    """Show the grid (`report.grid`) of the first `shown` of `total` samples and their sources.

    Weights were calibrated on `calibration_subsets` subset models; 0 for the default ones.
    """
    picture = picture_of_image(
        grid,
        alt="Each generated sample on the left, the training images it was traced to beside it",
        caption=f"The first {shown} of {total} samples, none picked. Under each source: its class and its weight.",
    )
    traced = "along its own sampling trajectory, from the features the generator computed anyway"
    if not is_trajectory:
        traced = "from the encoder's features of what its latent decodes to"
    weights = "Weights are shares of leave-one-out variance under default hyperparameters."
    if calibration_subsets:
        weights = f"Weights are shares of credit, calibrated on {calibration_subsets} subset models."
    text = f"Every sample was traced by the provenance network {traced}. {weights}"
    return Section("Samples and their sources", text, [picture]), []


def explained_section(explained: Mapping[str, Explained]) -> Part:
    """Show how much training images explain of images that are `generated`, `held-out`, `copied`, and of `noise`."""
    shares = {name: mean_estimate(of_set.share, seed=0) for name, of_set in explained.items()}
    kinds = {
        name: [
            proportion(sum(of_set.support(q) == kind for q in range(len(of_set.share))), len(of_set.share))
            for kind in (Support.NONE, Support.COPY)
        ]
        for name, of_set in explained.items()
    }
    rows: list[list[TableCell]] = [
        [
            name,
            interval(shares[name]),
            *(float(values.mean()) for values in (of_set.by_nearest, of_set.by_class_mean)),
            *map(interval, kinds[name]),
        ]
        for name, of_set in explained.items()
    ]
    baselines = {name: estimate.value for name, estimate in shares.items()}
    generated, (none, copies) = shares["generated"], kinds["generated"]
    metrics = [
        Metric.from_estimate("explained_share", generated, "similarity", baseline=baselines["noise"], ceiling=1.0),
        Metric.from_estimate("share_without_sources", none, "similarity", baseline=kinds["noise"][0].value),
        Metric.from_estimate("share_copies", copies, "similarity", ceiling=kinds["copied"][1].value),
    ]
    if "held-out" in shares:
        held_out = shares["held-out"]
        metrics.append(
            Metric.from_estimate(
                "holdout_explained_share", held_out, "similarity", baseline=baselines["noise"], ceiling=1.0
            )
        )
    limits = explained["generated"]
    text = (
        "Weights say who, this says how much: the share of an image's contrast that the best mixture of training "
        f"images accounts for. Below {float(limits.least[0]):.0%} an image has no sources: hardly any held-out image "
        f"and no noise lies on the other side. From {float(limits.copy[0]):.0%} by the nearest alone it is a copy."
    )
    header = ["images", "explained", "by the nearest", "by a class mean", "no sources", "copies"]
    table = Table(header, rows, "Means and shares with 95 % intervals in brackets.")
    return Section("How much do training images explain?", text, table=table), metrics


def entropy_section(samples: Rows) -> Part:
    """Show how the posterior narrows along the sampling trajectories of samples, rows of `samples/`."""
    alpha_bar = torch.tensor(samples[0]["step_alpha_bar"])
    entropies, closed_form = torch.tensor([sample["step_entropy"] for sample in samples]), None
    if samples[0]["closed_form_step_entropy"] is not None:
        closed_form = torch.tensor([sample["closed_form_step_entropy"] for sample in samples])
    picture = picture_of_figure(
        plot_entropy(alpha_bar, entropies, closed_form),
        alt="Entropy of the posterior over training images against alpha_bar along sampling",
        caption="Line: median over samples; band: 10 to 90 %. Near alpha_bar = 1 the closed form is a "
        "nearest-neighbour look-up of the finished image, whatever it came from. Where the line falls says when "
        "sources were settled.",
    )
    steps = [sample["commitment_step"] for sample in samples if sample["commitment_step"] is not None]
    median = f"{torch.tensor(steps).median()}" if steps else "none"
    text = (
        f"{len(steps)} of {len(samples)} samples commit: the top source of their last step "
        f"keeps more than half of the posterior from some step on; median step: {median}."
    )
    return Section("When does a sample settle on its sources?", text, [picture]), []


def agreement_section(samples: Rows, traces: Rows, closed_form_traces: Rows, num_train: int) -> Part:
    """Compare the network's sources with the closed form's for the same trajectories.

    Rows are those of `samples/` and of `traces/`, the latter by sample and rank.
    """
    width = max(len(sources) for rows in (traces, closed_form_traces) for sources in group_traces(rows).values())
    network, closed_form = _sources(traces, width, missing=-1), _sources(closed_form_traces, width, missing=-2)
    labels = torch.tensor([-1 if sample["class_label"] is None else sample["class_label"] for sample in samples])
    same, (those, partners) = agreement(network, closed_form), mismatched(labels)
    baseline = agreement(network[those], closed_form[partners]) if len(those) else None
    metrics: list[Metric] = []
    rows: list[list[TableCell]] = []
    for measure, name, title in (
        ("top1", "top1", "same first source"),
        ("overlap", f"top{width}_overlap", f"share of {width} sources named by both"),
    ):
        estimate: Estimate = getattr(same, measure)
        other: Estimate | None = getattr(baseline, measure, None)
        chance, key = None if other is None else other.value, f"agreement_{name}"
        metrics.append(Metric.from_estimate(key, estimate, "learned provenance", baseline=chance, ceiling=1.0))
        rows.append([title, interval(estimate), None if other is None else interval(other), 1.0])
    text = (
        "The closed form is the exact posterior over the training images; it needs all of them at hand. It is a "
        "statement about the data's geometry, not about cause."
    )
    table = Table(
        ["agreement", "same sample", "another sample of the class", "ceiling"],
        rows,
        f"95 % intervals in brackets, {len(network)} samples, {num_train} training images.",
    )
    return Section("Network and closed form", text, table=table), metrics


def _sources(traces: Rows, width: int, *, missing: int) -> Tensor:
    """Give the sources of every sample, (sample, width); samples with fewer are filled up with `missing`."""
    sources = [[row["example_index"] for row in rows] for rows in group_traces(traces).values()]
    return torch.tensor([indices + [missing] * (width - len(indices)) for indices in sources])
