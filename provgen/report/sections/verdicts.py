"""Section on single samples: how many are copies, blends or novel, and on what evidence; verdicts.parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from matplotlib.figure import Figure
from PIL import Image

from provgen.metrics.copying import MEMORIZED
from provgen.metrics.statistics import Estimate, proportion
from provgen.metrics.verdicts import KINDS, Evidence, Limits, Verdict
from provgen.report.figures import BLUE, DOTTED, GREEN, INK, VERMILION, label_small, panel_figure
from provgen.report.format import Metric, interval
from provgen.report.html import Section, Table, TableCell, picture_of_figure, picture_of_image
from provgen.report.sections import Part
from provgen.run import write_parquet

PANELS = {
    "ratio": "nearest / second nearest",
    "calibrated": "calibrated distance",
    "distance": "distance to the nearest",
    "patches": "parts from one image",
    "sources": "effective sources",
    "top": "top posterior",
    "late_entropy": "entropy at little noise",
    "of_class": "posterior of the class",
    "agreement": "shared with the closed form",
}
"""Fields of `Evidence`, and what they are called."""

SET_COLORS = (BLUE, GREEN, VERMILION)
"""Colours of generated images, held-out images and copies."""

COLORS = {
    "copy": "#D55E00",
    "near copy": "#E69F00",
    "unsupported": "#999999",
    "blend of few": "#56B4E9",
    "novel": "#009E73",
}
"""Colours of the verdicts."""

GALLERY = 3
"""Samples of each verdict that are shown."""


def verdicts_section(
    judged: Mapping[str, Sequence[Verdict]],
    evidence: Mapping[str, Evidence],
    limits: Limits,
    gallery: Image.Image,
) -> Part:
    """Show the verdicts on three sets of images, `generated`, `held-out` and `copies`, with the evidence they rest on.

    The gallery shows the samples of `gallery_rows` with their sources.
    """
    shares = {name: _shares(verdicts) for name, verdicts in judged.items()}
    rows: list[list[TableCell]] = [
        [kind, *(interval(of_set[kind]) for of_set in shares.values()), _rule(kind, limits)] for kind in KINDS
    ]
    metrics = [
        Metric.from_estimate(
            f"share_{kind.replace(' ', '_')}",
            shares["generated"][kind],
            "similarity" if kind in ("copy", "near copy") else "learned provenance",
            baseline=shares["held-out"][kind].value,
            ceiling=shares["copies"][kind].value,
        )
        for kind in KINDS
    ]
    counts = ", ".join(f"{len(verdicts)} {name}" for name, verdicts in judged.items())
    text = (
        "Every image gets the first verdict that applies; verdicts.parquet has the reasons. Thresholds are read off "
        "other held-out images, so that those shown tell how often a verdict is wrong. All were traced as images from "
        f"outside, told no class ({counts})."
    )
    pictures = [
        picture_of_figure(
            plot_verdicts(judged),
            alt="Shares of verdicts among generated images, held-out images and training images",
            caption="Held-out images should be novel or blends, training images copies.",
        ),
        picture_of_image(
            gallery,
            alt="Samples of each verdict with their sources",
            caption=f"The first {GALLERY} samples of each verdict with the sources of their own traces.",
        ),
        picture_of_figure(
            plot_evidence(evidence, limits),
            alt="Distributions of all evidence for generated images, held-out images and training images",
            caption="What the verdicts rest on; dotted: their limits.",
        ),
    ]
    table = Table(["verdict", *judged, "rule"], rows, "Clopper-Pearson 95 % intervals in brackets.")
    return Section("What is each sample?", text, pictures, table), metrics


def gallery_rows(verdicts: Sequence[Verdict]) -> list[int]:
    """Choose samples for the gallery: the first few of each verdict, in the order of verdicts."""
    by_kind = {kind: [row for row, verdict in enumerate(verdicts) if verdict.kind == kind] for kind in KINDS}
    return [row for rows in by_kind.values() for row in rows[:GALLERY]]


def plot_verdicts(judged: Mapping[str, Sequence[Verdict]]) -> Figure:
    """Plot a bar for every set of images, divided by verdict."""
    figure, (axes,) = panel_figure(8.0, 0.55 * len(judged) + 1.0)
    for bar, verdicts in enumerate(judged.values()):
        left = 0.0
        for kind, share in _shares(verdicts).items():
            axes.barh(bar, share.value, left=left, color=COLORS[kind], label=kind if bar == 0 else None)
            if share.value >= 0.05:
                axes.text(left + share.value / 2, bar, f"{share.value:.0%}", ha="center", va="center", fontsize=8)
            left += share.value
    axes.set_yticks(range(len(judged)), list(judged), color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("share of images")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(KINDS), frameon=False, fontsize=8)
    return figure


def plot_evidence(evidence: Mapping[str, Evidence], limits: Limits) -> Figure:
    """Plot a panel for every kind of evidence by set: the share of images below each value, and dotted the limits."""
    bounds = {
        "ratio": [MEMORIZED],
        "calibrated": [limits.calibrated],
        "distance": [limits.distance],
        "of_class": [limits.of_class],
        "sources": [limits.few, limits.sources],
    }
    figure, panels = panel_figure(9.0, 5.4, 3, 3)
    for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
        for color, (label, of_set) in zip(SET_COLORS, evidence.items(), strict=True):
            values = getattr(of_set, name).double()
            values = values[values.isfinite()]
            if len(values):
                axes.ecdf(values.numpy(), color=color, label=label)
        for bound in bounds.get(name, ()):
            axes.axvline(bound, **DOTTED)
        if name == "sources":
            axes.set_xscale("log")
        label_small(axes, title)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(SET_COLORS), frameon=False, fontsize=8)
    figure.supylabel("share of images below", fontsize=8)
    return figure


def write_verdicts(
    path: Path, evidence: Evidence, verdicts: Sequence[Verdict], commitment_steps: Sequence[int | None]
) -> None:
    """Write a row for every sample: verdict, reason and evidence; the commitment step is of its own trajectory."""
    columns = {
        "sample": list(range(len(verdicts))),
        "verdict": [verdict.kind for verdict in verdicts],
        "reason": [verdict.reason for verdict in verdicts],
        **{name: values.double().tolist() for name, values in vars(evidence).items()},
        "commitment_step": pa.array(commitment_steps, pa.int64()),
    }
    write_parquet(path, pa.table(columns), version=1)


def _shares(verdicts: Sequence[Verdict]) -> dict[str, Estimate]:
    return {kind: proportion(sum(verdict.kind == kind for verdict in verdicts), len(verdicts)) for kind in KINDS}


def _rule(kind: str, limits: Limits) -> str:
    return {
        "copy": "nearest training image at less than 1/3 of the distance of the second",
        "near copy": f"calibrated distance below {limits.calibrated:.2f}, as of 1 % of {limits.n} held-out images",
        "unsupported": f"no training image within {limits.distance:.2f}, or more than {limits.sources:.0f} effective "
        f"sources, or less than {limits.of_class:.0%} of its sources of the class asked for",
        "blend of few": f"fewer than {limits.few:.0f} effective sources, as of 1 % of held-out images",
        "novel": "none of these",
    }[kind]
