"""The sections of a run's report, each from files or tensors to figures, a table and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from provgen.metrics.agreement import agreement, mismatched
from provgen.metrics.copying import distance_ratio, share_memorized
from provgen.metrics.neighbors import distinct_rows, nearest
from provgen.metrics.statistics import Estimate
from provgen.report.figures import plot_entropy, plot_index_quality, plot_ratio_histogram, plot_training
from provgen.report.html import Section, Table, TableCell, picture_of_figure, picture_of_image
from provgen.report.metrics import Metric
from provgen.tracing.records import group_traces

Rows = Sequence[Mapping[str, Any]]
Part = tuple[Section, list[Metric]]


def samples_section(
    grid: Image.Image, shown: int, total: int, *, is_trajectory: bool, calibration_subsets: int
) -> Section:
    """Show the grid of samples and sources.

    Args:
        grid: The picture.
        shown: Samples in it.
        total: Samples there are.
        is_trajectory: Whether they were traced along their sampling.
        calibration_subsets: Subset models that weights were calibrated on; 0 without a calibration.
    """
    picture = picture_of_image(
        grid,
        alt="Each generated sample on the left, the training images it was traced to beside it",
        caption=f"The first {shown} of {total} samples, none picked. Under each source: its class and its weight.",
    )
    traced = "along its own sampling trajectory, from the features the generator computed anyway"
    if not is_trajectory:
        traced = "from the encoder's features of what its latent decodes to"
    weights = "Weights equal the posterior until a calibration has been fitted."
    if calibration_subsets:
        weights = f"Weights are shares of credit, calibrated on {calibration_subsets} subset models."
    return Section(
        "Samples and their sources",
        f"Every sample was traced by the provenance network {traced}. {weights}",
        [picture],
    )


def training_section(metrics: Rows) -> Section:
    """Show the loss curves."""
    picture = picture_of_figure(
        plot_training(metrics),
        alt="Denoising, index and class loss against optimiser steps",
        caption="Losses of single batches (faint) and their running mean.",
    )
    return Section("Training", "The generator and the provenance network are trained in the same steps.", [picture])


def index_section(last: Mapping[str, Any], num_covered: int, num_classes: int) -> Part:
    """Show index metrics beside their closed-form ceilings, from the line of one evaluation."""
    rows = last["index_quality"]
    header, names = ["alpha_bar", "rows", "gap (nats)"], ("cross_entropy", "top1", "top5")
    for name in ("cross-entropy", "top-1", "top-5"):
        header += [name, "ceiling"]
    table_rows = [
        [f"{row['alpha_bar']:.2f}", row["rows"], float(row["kl_gap"])]
        + [row[key] for name in names for key in (name, f"{name}_ceiling")]
        for row in rows
    ]
    note = "Parents are averaged over the closed-form posterior; see docs/metrics.md."
    asked = "For training images, as this generator shows them to its provenance network"
    pictures = []
    if len({row["alpha_bar"] for row in rows}) > 1:
        asked = "For noised training images"
        pictures = [
            picture_of_figure(
                plot_index_quality(rows),
                alt="Cross-entropy, top-1 and top-5 of the index against the alpha_bar, network and closed form",
                caption="Noise on the left, image on the right. Dashed: the closed form, which nothing can beat.",
            )
        ]
    section = Section(
        "Does the network know the index?",
        f"{asked}: how well the network says which one it was, told its class (conditional rows) and told nothing "
        "(unconditional rows), beside the best possible answer for the very same input.",
        pictures,
        Table(header, table_rows, note),
    )
    return section, _index_metrics(last, num_covered, num_classes)


def entropy_section(samples: Rows) -> Section:
    """Show how the posterior narrows along the sampling trajectories."""
    alpha_bar = torch.tensor(samples[0]["step_alpha_bar"])
    network = torch.tensor([sample["step_entropy"] for sample in samples])
    closed = None
    if samples[0]["closed_form_step_entropy"] is not None:
        closed = torch.tensor([sample["closed_form_step_entropy"] for sample in samples])
    picture = picture_of_figure(
        plot_entropy(alpha_bar, network, closed),
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
    return Section("When does a sample settle on its sources?", text, [picture])


def agreement_section(samples: Rows, traces: Rows, closed_traces: Rows, num_train: int) -> Part:
    """Compare the network's sources with the closed form's for the same trajectories."""
    width = max(len(rows) for traced in (traces, closed_traces) for rows in group_traces(traced).values())
    first, second = _indices(traces, width, missing=-1), _indices(closed_traces, width, missing=-2)
    labels = torch.tensor([-1 if s["class_label"] is None else s["class_label"] for s in samples])
    found = agreement(first, second)
    those, others = mismatched(labels)
    chance = agreement(first[those], second[others]) if len(those) else None
    pairs: list[tuple[str, Estimate, Estimate | None]] = [
        ("agreement_top1", found.top1, chance.top1 if chance else None),
        (f"agreement_top{first.shape[1]}_overlap", found.overlap, chance.overlap if chance else None),
    ]
    metrics = [
        Metric.from_estimate(name, estimate, "learned provenance", baseline=null.value if null else None, ceiling=1.0)
        for name, estimate, null in pairs
    ]
    rows: list[list[TableCell]] = [
        [what, _interval(estimate), _interval(null) if null else None, 1.0]
        for what, (_, estimate, null) in zip(
            ("same first source", f"share of {first.shape[1]} sources named by both"), pairs, strict=True
        )
    ]
    section = Section(
        "Network and closed form",
        "The closed form is the exact posterior over the training images; it needs all of "
        "them at hand. It is a statement about the data's geometry, not about cause.",
        table=Table(
            ["agreement", "same sample", "another sample of the class", "ceiling"],
            rows,
            f"95 % intervals in brackets, {len(first)} samples, {num_train} training images.",
        ),
    )
    return section, metrics


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
    rows: list[list[TableCell]] = [[name, _interval(share), share.n] for name, share in shares.items()]
    null = shares["held-out"].value if "held-out" in shares else None
    metric = Metric.from_estimate(
        "share_memorized", shares["generated"], "similarity", baseline=null, ceiling=shares["copied"].value
    )
    section = Section(
        "Is it copying?",
        "The 1/3 rule of Yoon et al. (2023) on raw pixels. Held-out images show what a perfect generator would "
        "score, exact copies of training images what a pure copier would.",
        [picture],
        Table(["images", "share memorized", "n"], rows, "Clopper-Pearson 95 % intervals in brackets."),
    )
    return section, [metric]


def _index_metrics(last: Mapping[str, Any], num_covered: int, num_classes: int) -> list[Metric]:
    metrics = []
    rows = last["index_quality"]
    place = "_at_alpha_bar_0.9" if len({row["alpha_bar"] for row in rows}) > 1 else ""
    for kind in sorted({row["rows"] for row in rows}):
        level = min((r for r in rows if r["rows"] == kind), key=lambda row: abs(row["alpha_bar"] - 0.9))
        chance = 1 / num_covered if kind == "unconditional" else max(num_classes, 1) / num_covered
        for name, null in (("top1", chance), ("top5", min(1.0, 5 * chance))):
            estimate = Estimate(level[name], level[f"{name}_low"], level[f"{name}_high"], level["n"])
            metrics.append(
                Metric.from_estimate(
                    f"index_{name}_{kind}{place}",
                    estimate,
                    "learned provenance",
                    baseline=null,
                    ceiling=level[f"{name}_ceiling"],
                )
            )
        value, low, high = (last[f"kl_gap_{kind}{end}"] for end in ("", "_low", "_high"))
        gap = Estimate(value, low, high, level["n"])
        name = f"index_kl_gap_{kind}_nats"
        metrics.append(Metric.from_estimate(name, gap, "learned provenance", ceiling=0.0))
    return metrics


def _indices(traces: Rows, width: int, *, missing: int) -> Tensor:
    """Give the sources of every sample, (sample, width); samples with fewer are filled up with `missing`."""
    found = [[row["example_index"] for row in rows] for rows in group_traces(traces).values()]
    return torch.tensor([indices + [missing] * (width - len(indices)) for indices in found])


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
