"""Copy, near copy, blend, novel or unsupported: what the evidence on one generated image comes to, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

from torch import Tensor

from provgen.analysis.memorization import MEMORIZED, calibrated_distance, distance_ratio
from provgen.analysis.neighbors import distinct_rows, nearest
from provgen.analysis.patch_sources import patch_share

Kind = Literal["copy", "near copy", "unsupported", "blend of few", "novel"]
KINDS: tuple[Kind, ...] = ("copy", "near copy", "unsupported", "blend of few", "novel")

TAIL = 0.01
"""Share of held-out images that may lie beyond a threshold."""

FEWEST_HELD_OUT = 40
"""Held-out images from which on limits are read; half of them are judged by these."""

FEW = 4.0
"""Effective number of sources up to which an image is a blend of few."""

NEIGHBORS = 50
"""Of the calibrated distance, as published."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of images, each (query,)."""

    ratio: Tensor
    """Distance to the nearest training image over that to the second nearest."""
    calibrated: Tensor
    """Distance to the nearest over half the mean distance to the 50 nearest."""
    distance: Tensor
    """To the nearest training image, root mean squared over pixels in [-1, 1]."""
    patches: Tensor
    """Largest share of telling parts that one training image explains; NaN where no part tells."""
    sources: Tensor
    """Exponential of the posterior's entropy: the effective number of sources."""
    late_entropy: Tensor
    """Of the posterior at the cleanest traced level, in nats."""
    of_class: Tensor
    """Posterior of the class that was asked for, by a network that is not told it; 1 where none was asked for."""
    top: Tensor
    """Posterior of the most probable source."""
    agreement: Tensor
    """Share of the network's most probable sources that are the closed form's as well."""

    def __len__(self) -> int:
        return len(self.ratio)

    def select(self, rows: Tensor | slice) -> Evidence:
        """Keep the evidence on some images."""
        return Evidence(**{name: values[rows] for name, values in vars(self).items()})


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What held-out images hardly ever go beyond."""

    calibrated: float
    """Least calibrated distance."""
    distance: float
    """Largest distance."""
    sources: float
    """Largest effective number of sources."""
    of_class: float
    """Least posterior of the own class."""
    n: int
    """Held-out images that they were read off: of fewer than 100, one is beyond each limit more often than TAIL."""

    @classmethod
    def of(cls, holdout: Evidence) -> Limits:
        """Read them off held-out images, which no generator has seen."""
        return cls(
            calibrated=float(holdout.calibrated.quantile(TAIL, interpolation="lower")),
            distance=float(holdout.distance.quantile(1 - TAIL, interpolation="higher")),
            sources=float(holdout.sources.quantile(1 - TAIL, interpolation="higher")),
            of_class=float(holdout.of_class.double().quantile(TAIL, interpolation="lower")),
            n=len(holdout),
        )


@dataclass(frozen=True)
class Verdict:
    """What one image is, and why."""

    kind: Kind
    reason: str


def gather_evidence(
    images: Tensor,
    train: Tensor,
    *,
    entropy: Tensor,
    late_entropy: Tensor,
    of_class: Tensor,
    top: Tensor,
    agreement: Tensor,
) -> Evidence:
    """Compare images with the training images.

    Args:
        images: In [-1, 1], (query, channel, height, width).
        train: (train, channel, height, width).
        entropy: Of the traced posteriors in nats, (query,).
        late_entropy: At the cleanest traced level in nats, (query,).
        of_class: Posterior of the class asked for, (query,); 1 where no class was.
        top: Posterior of the most probable source, (query,).
        agreement: Share of sources that another tracer names as well, (query,).
    """
    distinct = distinct_rows(train.flatten(1))
    found = nearest(images.flatten(1), distinct, min(NEIGHBORS, len(distinct)))
    return Evidence(
        ratio=distance_ratio(found),
        calibrated=calibrated_distance(found),
        distance=found.distances[:, 0] / distinct.shape[1] ** 0.5,
        patches=patch_share(images, distinct.view(-1, *train.shape[1:])),
        sources=entropy.double().exp(),
        late_entropy=late_entropy,
        of_class=of_class,
        top=top,
        agreement=agreement,
    )


def verdicts(evidence: Evidence, limits: Limits) -> Sequence[Verdict]:
    """Judge every image; the first rule that applies holds."""
    return [_verdict(evidence, limits, query) for query in range(len(evidence))]


def _verdict(evidence: Evidence, limits: Limits, query: int) -> Verdict:
    ratio, calibrated, distance, patches, sources, of_class, agreement = (
        float(getattr(evidence, name)[query])
        for name in ("ratio", "calibrated", "distance", "patches", "sources", "of_class", "agreement")
    )
    if ratio < MEMORIZED:
        return Verdict("copy", f"nearest training image at {ratio:.2f} of the distance of the second")
    parts = "" if isnan(patches) else f", {patches:.0%} of its parts from one image"
    if calibrated < limits.calibrated:
        return Verdict(
            "near copy",
            f"calibrated distance {calibrated:.2f}, of held-out images {limits.calibrated:.2f}{parts}",
        )
    if distance > limits.distance:
        return Verdict(
            "unsupported",
            f"no training image within {distance:.2f}, of held-out images {limits.distance:.2f}",
        )
    if sources > limits.sources:
        return Verdict(
            "unsupported", f"spread over {sources:.0f} sources, held-out images over {limits.sources:.0f}"
        )
    if of_class < limits.of_class:
        return Verdict("unsupported", f"its sources are of the class asked for with {of_class:.0%} only")
    reason = f"{sources:.1f} sources{parts}, {agreement:.0%} of the strongest are the closed form's too"
    return Verdict("blend of few" if sources <= FEW else "novel", reason)
