"""Sections on what the provenance network knows: the index of training images, and the class of held-out images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from provgen.metrics.class_quality import ClassQuality
from provgen.metrics.statistics import Estimate
from provgen.report.figures import plot_index_quality
from provgen.report.format import Metric, interval
from provgen.report.html import Section, Table, TableCell, picture_of_figure
from provgen.report.sections import Part

MEASURED = {
    "consistency_top1": "first source has the class",
    "consistency_top5": "one of five sources has the class",
    "knn_accuracy": "class read off the sources",
    "class_accuracy": "class head",
}
"""Metrics of `ClassQuality` that are shown, and what they are called."""


def index_section(last: Mapping[str, Any], num_covered: int, num_classes: int) -> Part:
    """Show index metrics beside their closed-form ceilings.

    Args:
        last: Line of `metrics.jsonl` with the last evaluation.
        num_covered: Number of training images that the network can name.
        num_classes: Number of classes; 0 without classes.
    """
    rows = last["index_quality"]
    header = ["alpha_bar", "rows", "gap (nats)"]
    for title in ("cross-entropy", "top-1", "top-5"):
        header += [title, "ceiling"]
    columns = [f"{name}{ending}" for name in ("cross_entropy", "top1", "top5") for ending in ("", "_ceiling")]
    table = Table(
        header,
        [
            [f"{row['alpha_bar']:.2f}", row["rows"], float(row["kl_gap"]), *(row[column] for column in columns)]
            for row in rows
        ],
        "Parents are averaged over the closed-form posterior; see docs/reference/metrics.md.",
    )
    asked = "For training images, as this generator shows them to its provenance network"
    pictures = []
    if _has_levels(rows):
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
        table,
    )
    kinds = sorted({row["rows"] for row in rows})
    return section, [metric for kind in kinds for metric in _index_metrics(last, kind, num_covered, num_classes)]


def _index_metrics(last: Mapping[str, Any], kind: str, num_covered: int, num_classes: int) -> list[Metric]:
    """Give top-1 and top-5 at the level nearest to 0.9, and the KL gap, of conditional or unconditional rows."""
    of_kind = [row for row in last["index_quality"] if row["rows"] == kind]
    level = min(of_kind, key=lambda row: abs(row["alpha_bar"] - 0.9))
    ending = "_at_alpha_bar_0.9" if _has_levels(last["index_quality"]) else ""
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


def _has_levels(rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({row["alpha_bar"] for row in rows}) > 1


def classes_section(by_level: Mapping[float, ClassQuality]) -> Part:
    """Show class metrics on held-out images, by the alpha_bar they were noised to."""
    rows: list[list[TableCell]] = []
    metrics = []
    for level, quality in by_level.items():
        for name, title in MEASURED.items():
            estimate: Estimate | None = getattr(quality, name)
            if estimate is None:
                continue
            closed_form, baseline = (getattr(quality, f"{name}_{of}") for of in ("closed_form", "baseline"))
            rows.append([f"{level:.2f}", title, interval(estimate), closed_form, baseline])
            key = f"holdout_{name}_at_alpha_bar_{level:.1f}"
            metrics.append(Metric.from_estimate(key, estimate, "learned provenance", baseline=baseline, ceiling=1.0))
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
