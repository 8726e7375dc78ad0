"""The report's section on classes: do the sources of a held-out image know what it shows?"""

from __future__ import annotations

from collections.abc import Mapping

from provgen.metrics.class_quality import ClassQuality
from provgen.metrics.statistics import Estimate
from provgen.report.html import Section, Table, TableCell
from provgen.report.metrics import Metric

MEASURED = {
    "consistency_top1": "first source has the class",
    "consistency_top5": "one of five sources has the class",
    "knn_accuracy": "class read off the sources",
    "class_accuracy": "class head",
}
"""Metrics of `ClassQuality` that are shown, and what they are called."""


def class_section(by_level: Mapping[float, ClassQuality]) -> tuple[Section, list[Metric]]:
    """Show class metrics on held-out images, by the alpha_bar they were noised to."""
    rows: list[list[TableCell]] = []
    metrics = []
    for level, quality in by_level.items():
        for name, what in MEASURED.items():
            estimate: Estimate | None = getattr(quality, name)
            if estimate is None:
                continue
            reference, null = (getattr(quality, f"{name}_{kind}") for kind in ("closed_form", "baseline"))
            interval = f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
            rows.append([f"{level:.2f}", what, interval, reference, null])
            metrics.append(
                Metric.from_estimate(
                    f"holdout_{name}_at_alpha_bar_{level:.1f}",
                    estimate,
                    "learned provenance",
                    baseline=null,
                    ceiling=1.0,
                )
            )
    section = Section(
        "Do sources share the class?",
        "Held-out images, shown without their class. The closed form answers for the same input, noise included; it "
        "knows pixels alone, so a network can do better. Guessing is one training image, or class, at random.",
        table=Table(
            ["alpha_bar", "share of held-out images", "network", "closed form", "guessing"],
            rows,
            "95 % intervals in brackets.",
        ),
    )
    return section, metrics
