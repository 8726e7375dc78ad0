"""The evidence behind verdicts, as distributions: generated images beside held-out images and training images."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from provgen.analysis.memorization import MEMORIZED
from provgen.analysis.verdicts import FEW, Evidence, Limits
from provgen.report.figures import BLUE, GREEN, INK, VERMILION

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

COLORS = (BLUE, GREEN, VERMILION)


def plot_evidence(evidence: Mapping[str, Evidence], limits: Limits) -> Figure:
    """Plot a panel for every kind of evidence: the share of images below each value, and the verdicts' limits.

    Args:
        evidence: By set: generated, held-out, copies.
        limits: Drawn dotted, beside those that are fixed.
    """
    bounds = {
        "ratio": [MEMORIZED],
        "calibrated": [limits.calibrated],
        "distance": [limits.distance],
        "of_class": [limits.of_class],
        "sources": [FEW, limits.sources],
    }
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(3, 3).flatten(), PANELS.items(), strict=True):
        for color, (label, of) in zip(COLORS, evidence.items(), strict=True):
            values = getattr(of, name).double()
            values = values[values.isfinite()]
            if len(values):
                axes.ecdf(values.numpy(), color=color, label=label)
        for bound in bounds.get(name, ()):
            axes.axvline(bound, color=INK, linewidth=0.8, linestyle=":")
        if name == "sources":
            axes.set_xscale("log")
        axes.set_title(title, fontsize=9, color=INK)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(COLORS), frameon=False, fontsize=8)
    figure.supylabel("share of images below", fontsize=8)
    return figure
