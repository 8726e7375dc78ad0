"""All measures of a set of generated images, in three columns: generated, held out, and exact training copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.copying import (
    Placed,
    SpaceCells,
    authenticity,
    closer_to_train,
    data_copying,
    distance_ratio,
    share_memorized,
)
from provgen.metrics.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
    vendi_score,
    with_interval,
)
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
    """What was asked about."""
    holdout: Estimate
    """What a perfect generator would score: one half of the held-out images, as if it had been generated."""
    copies: Estimate
    """What a pure copier would score: training images."""


def set_measures(generated: Tensor, holdout: Tensor, train: Tensor, *, seed: int = 0) -> dict[str, SetMeasure]:
    """Measure three sets of images in the same way.

    One half of the held-out images is the reference of all three columns, the other half the second column. Sets are
    cut to the same size, as some measures depend on it.

    Args:
        generated: Features of generated images, (query, feature).
        holdout: Of held-out images, (query, feature).
        train: Of the training images, (train, feature).
        seed: Of all choices.

    Raises:
        InputError: Too few of either.
    """
    size = common_size(len(generated), len(holdout), len(train))
    if size < FEWEST:
        raise InputError(
            f"comparing sets needs {FEWEST} generated, {2 * FEWEST} held-out and {FEWEST} training images, got "
            f"{len(generated)}, {len(holdout)} and {len(train)}"
        )
    generator = torch.Generator().manual_seed(seed)
    held = holdout[torch.randperm(len(holdout), generator=generator).to(holdout.device)]
    columns = {
        "generated": _some(generated, size, generator),
        "holdout": held[:size],
        "copies": _some(train, size, generator),
    }
    measure = _Measures(held[size : 2 * size], train, seed)
    measured = {name: measure(images) for name, images in columns.items()}
    return {
        name: SetMeasure(**{column: found[name] for column, found in measured.items()})
        for name in measured["generated"]
    }


def common_size(generated: int, holdout: int, train: int) -> int:
    """Give the number of images that every set is cut to."""
    return min(generated, holdout // 2, train)


class _Measures:
    """What does not depend on the column."""

    def __init__(self, reference: Tensor, train: Tensor, seed: int) -> None:
        self.reference, self.seed = reference, seed
        self.distinct = distinct_rows(train)
        self.cells = SpaceCells(train, seed=seed)
        self.placed = self._place(reference, nearest(reference, self.distinct, 1).distances)

    def __call__(self, images: Tensor) -> Mapping[str, Estimate]:
        found = nearest(images, self.distinct, 2)
        alike = precision_recall(images[:MAX_SPREAD], self.reference[:MAX_SPREAD], seed=self.seed)
        return {
            "share_memorized": share_memorized(distance_ratio(found)),
            "data_copying": self._copying(images, found.distances),
            "authenticity": authenticity(found, self.distinct),
            "closer_to_train": closer_to_train(found, images, self.reference),
            **alike._asdict(),
            "frechet_distance": with_interval(frechet_distance, images, self.reference, seed=self.seed),
            "kernel_distance": with_interval(
                kernel_distance, images[:MAX_SPREAD], self.reference[:MAX_SPREAD], seed=self.seed
            ),
            "vendi_score": with_interval(vendi_score, images[:MAX_SPREAD], seed=self.seed),
        }

    def _copying(self, images: Tensor, distances: Tensor) -> Estimate:
        """Give C_T in units of its deviation under the null, as that depends on the cells."""
        found = data_copying(self._place(images, distances), self.placed, seed=self.seed)
        c = found.statistic
        value, low, high = (end / found.null_deviation for end in (c.value, c.low, c.high))
        return Estimate(value, low, high, c.n)

    def _place(self, images: Tensor, distances: Tensor) -> Placed:
        return Placed(distances[:, 0], self.cells(images))


def _some(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
