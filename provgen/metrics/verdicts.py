"""Verdicts on single samples: copy, near copy, unsupported, blend of few, or novel, with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.metrics.copying import MEMORIZED, calibrated_distance, distance_ratio
from provgen.metrics.neighbors import distinct_rows, nearest

Kind = Literal["copy", "near copy", "unsupported", "blend of few", "novel"]
KINDS: tuple[Kind, ...] = ("copy", "near copy", "unsupported", "blend of few", "novel")

TAIL = 0.01
"""Share of held-out images that may lie beyond a threshold."""

FEWEST_HELD_OUT = 40
"""Held-out images from which on limits are read; half of them are judged by these."""

NEIGHBORS = 50
"""Neighbours that the calibrated distance looks at, as published."""

GRID = 4
"""An image is cut into GRID x GRID parts, or a few more where its size is no multiple."""

SAME = 0.1
"""Root mean squared difference, on a range of 2, by which a part may be farther than the nearest one and still be
explained as well."""

COMMON = 0.05
"""Share of the training images (but at least two) that may explain a part; one that more explain, such as an empty
corner, says nothing."""

MAX_BYTES = 256 * 2**20
"""Size of the (query, train, part) array that is held at once."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of images, each (query,)."""

    ratio: Tensor
    """Distance to the nearest training image over that to the second nearest."""
    calibrated: Tensor
    """Distance to the nearest over half the mean distance to the 50 nearest."""
    distance: Tensor
    """Distance to the nearest training image, root mean squared over pixels in [-1, 1]."""
    patches: Tensor
    """Largest share of telling parts that one training image explains; NaN where no part tells."""
    sources: Tensor
    """Exponential of the posterior's entropy: the effective number of sources."""
    late_entropy: Tensor
    """Entropy of the posterior at the cleanest traced level, in nats."""
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
    """Values that held-out images hardly ever go beyond."""

    calibrated: float
    """Least calibrated distance."""
    distance: float
    """Largest distance."""
    sources: float
    """Largest effective number of sources."""
    few: float
    """Least effective number of sources."""
    of_class: float
    """Least posterior of the own class."""
    n: int
    """Number of held-out images that they were read off; of fewer than 100, more than TAIL go beyond each limit."""

    @classmethod
    def of(cls, holdout: Evidence) -> Limits:
        """Read them off held-out images, which no generator has seen."""
        return cls(
            calibrated=float(holdout.calibrated.quantile(TAIL, interpolation="lower")),
            distance=float(holdout.distance.quantile(1 - TAIL, interpolation="higher")),
            sources=float(holdout.sources.quantile(1 - TAIL, interpolation="higher")),
            few=float(holdout.sources.quantile(TAIL, interpolation="lower")),
            of_class=float(holdout.of_class.double().quantile(TAIL, interpolation="lower")),
            n=len(holdout),
        )


@dataclass(frozen=True)
class Verdict:
    """What one image is, and why."""

    kind: Kind
    """First rule that applies."""
    reason: str
    """Evidence for it, in words."""


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
    """Compare images in [-1, 1], (query, channel, height, width), with the training images (train, ...).

    The entropy of the traced posteriors is in nats; what follows it becomes a field of `Evidence` as it is, (query,).
    """
    distinct = distinct_rows(train.flatten(1))
    neighbors = nearest(images.flatten(1), distinct, min(NEIGHBORS, len(distinct)))
    return Evidence(
        ratio=distance_ratio(neighbors),
        calibrated=calibrated_distance(neighbors),
        distance=neighbors.distances[:, 0] / distinct.shape[1] ** 0.5,
        patches=patch_share(images, distinct.view(-1, *train.shape[1:])),
        sources=entropy.double().exp(),
        late_entropy=late_entropy,
        of_class=of_class,
        top=top,
        agreement=agreement,
    )


def patch_share(images: Tensor, train: Tensor) -> Tensor:
    """Give the largest share of an image's telling parts that one training image explains, float64 (query,).

    A training image explains a part if the same part of no other is nearer by more than `SAME`. Copies have 1, also
    where some parts are changed but little else is near; an image put together from several has less. An image without
    any telling part has NaN. Images are in [-1, 1], (query, channel, height, width); `train` has no duplicates.
    """
    train_parts = _parts(train)
    size = max(1, MAX_BYTES // (4 * len(train) * train_parts.shape[1]))
    return torch.cat([_explained_share(_parts(chunk), train_parts) for chunk in images.split(size)])


def _explained_share(query_parts: Tensor, train_parts: Tensor) -> Tensor:
    """Give the `patch_share` (query,) of parts (query, part, feature) and (train, part, feature)."""
    scale = query_parts.shape[2] ** 0.5
    pairs = zip(query_parts.unbind(1), train_parts.unbind(1), strict=True)
    distances = torch.stack([torch.cdist(queries, train) / scale for queries, train in pairs], dim=2)
    explains = distances <= distances.amin(dim=1, keepdim=True) + SAME
    tells = explains.sum(dim=1) <= max(2, COMMON * explains.shape[1])
    explained = (explains & tells[:, None]).sum(dim=2).amax(dim=1)
    count = tells.sum(dim=1)
    return torch.where(count > 0, explained / count.clamp_min(1), torch.nan).double()


def _parts(images: Tensor) -> Tensor:
    """Cut images into parts, (image, part, feature); what is left over at the border belongs to no part."""
    size = max(1, images.shape[-1] // GRID)
    return F.unfold(images.float(), size, stride=size).transpose(1, 2)


def verdicts(evidence: Evidence, limits: Limits) -> Sequence[Verdict]:
    """Judge every image; the first rule that applies holds."""
    return [_verdict(evidence, limits, query) for query in range(len(evidence))]


def _verdict(evidence: Evidence, limits: Limits, query: int) -> Verdict:
    known = {name: float(values[query]) for name, values in vars(evidence).items()}
    sources, patches = known["sources"], known["patches"]
    parts = "" if isnan(patches) else f", {patches:.0%} of its parts from one image"
    if known["ratio"] < MEMORIZED:
        return Verdict("copy", f"nearest training image at {known['ratio']:.2f} of the distance of the second")
    if known["calibrated"] < limits.calibrated:
        compared = f"{known['calibrated']:.2f}, of held-out images {limits.calibrated:.2f}"
        return Verdict("near copy", f"calibrated distance {compared}{parts}")
    if known["distance"] > limits.distance:
        compared = f"{known['distance']:.2f}, of held-out images {limits.distance:.2f}"
        return Verdict("unsupported", f"no training image within {compared}")
    if sources > limits.sources:
        return Verdict("unsupported", f"spread over {sources:.0f} sources, held-out images over {limits.sources:.0f}")
    if known["of_class"] < limits.of_class:
        return Verdict("unsupported", f"its sources are of the class asked for with {known['of_class']:.0%} only")
    shared = f"{known['agreement']:.0%} of the strongest are the closed form's too"
    return Verdict("blend of few" if sources < limits.few else "novel", f"{sources:.1f} sources{parts}, {shared}")
