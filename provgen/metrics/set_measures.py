"""All measures of a set of generated images, in three columns: generated, held out, and exact training copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics import copying
from provgen.metrics.distances import frechet_distance, kernel_distance, precision_recall, vendi_score, with_interval
from provgen.metrics.neighbors import distinct_rows, nearest
from provgen.metrics.statistics import Estimate

FEWEST = 20
"""Images of each kind that a comparison needs, as intervals leave out tenths; held-out ones are halved."""
MAX_SPREAD = 2000
"""Images of each kind for measures whose time grows with their square."""


@dataclass(frozen=True)
class SetMeasure:
    """One measure of three sets of images."""

    generated: Estimate
    """Score of the generated images."""
    holdout: Estimate
    """Score of a perfect generator: one half of the held-out images, as if it had been generated."""
    copies: Estimate
    """Score of a pure copier: training images."""


def set_measures(generated: Tensor, holdout: Tensor, train: Tensor) -> dict[str, SetMeasure]:
    """Measure three sets of images in the same way.

    One half of the held-out images is the reference of all three columns, the other half the second column. Sets are
    cut to the same size, as some measures depend on it. All are features, (query, feature) and (train, feature).

    Raises:
        InputError: A set has too few images.
    """
    size = common_size(len(generated), len(holdout), len(train))
    if size < FEWEST:
        raise InputError(
            f"comparing sets needs {FEWEST} generated, {2 * FEWEST} held-out and {FEWEST} training images, got "
            f"{len(generated)}, {len(holdout)} and {len(train)}"
        )
    generator = torch.Generator().manual_seed(0)
    held = holdout[torch.randperm(len(holdout), generator=generator).to(holdout.device)]
    columns = {
        "generated": _drawn(generated, size, generator),
        "holdout": held[:size],
        "copies": _drawn(train, size, generator),
    }
    measure = _Measures(held[size : 2 * size], train)
    measured = {name: measure(images) for name, images in columns.items()}
    return {
        name: SetMeasure(**{column: of_column[name] for column, of_column in measured.items()})
        for name in measured["generated"]
    }


def common_size(generated: int, holdout: int, train: int) -> int:
    """Give the number of images that every set is cut to."""
    return min(generated, holdout // 2, train)


class _Measures:
    """All measures of a set of images against one reference and one training set."""

    def __init__(self, reference: Tensor, train: Tensor) -> None:
        self.reference = reference
        self.distinct = distinct_rows(train)
        self.cells = copying.SpaceCells(train, seed=0)
        self.placed = self._place(reference, nearest(reference, self.distinct, 1).distances)

    def __call__(self, images: Tensor) -> Mapping[str, Estimate]:
        neighbors = nearest(images, self.distinct, 2)
        few, few_of_reference = images[:MAX_SPREAD], self.reference[:MAX_SPREAD]
        return {
            "share_memorized": copying.share_memorized(copying.distance_ratio(neighbors)),
            "data_copying": self._copying(images, neighbors.distances),
            "authenticity": copying.authenticity(neighbors, self.distinct),
            "closer_to_train": copying.closer_to_train(neighbors, images, self.reference),
            **precision_recall(few, few_of_reference)._asdict(),
            "frechet_distance": with_interval(frechet_distance, images, self.reference),
            "kernel_distance": with_interval(kernel_distance, few, few_of_reference),
            "vendi_score": with_interval(vendi_score, few),
        }

    def _copying(self, images: Tensor, distances: Tensor) -> Estimate:
        """Give C_T in units of its deviation where sets are alike, as that depends on the cells."""
        test = copying.data_copying(self._place(images, distances), self.placed, seed=0)
        c, deviation = test.statistic, test.null_deviation
        return Estimate(c.value / deviation, c.low / deviation, c.high / deviation, c.n)

    def _place(self, images: Tensor, distances: Tensor) -> copying.Placed:
        return copying.Placed(distances[:, 0], self.cells(images))


def _drawn(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
