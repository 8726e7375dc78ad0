"""The data-copying test C_T: are generated images nearer to the training images than held-out ones are?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from torch import Tensor

from provgen.analysis.statistics import Estimate, percentile_interval, share_above

NUM_CELLS = 3
"""Parts of the space, as in dgm-eval and FLD."""

MAX_FEATURES = 64
"""Principal components that parts are found in."""

FEWEST_GENERATED = 20
"""Generated images that a part needs to be counted."""


Sides = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Distances to the nearest training image, and cells, each (query,)."""


@dataclass(frozen=True)
class DataCopying:
    """C_T of Meehan et al. 2020 (arXiv 2004.05675): far below 0 is copying, far above is underfitting.

    A generator that makes few kinds of images is far below 0 as well: read it beside recall and coverage.
    """

    statistic: Estimate
    """C_T, with its bootstrap interval over generated and held-out images."""
    null_deviation: float
    """Standard deviation of C_T where generated and held-out images are alike, which is below 1."""


@dataclass(frozen=True)
class Placed:
    """Where a set of images lies, as seen from the training images."""

    distances: Tensor
    """To the nearest of them, float64 (query,)."""
    cells: Tensor
    """Part of the space, int64 (query,)."""


def data_copying(generated: Placed, holdout: Placed, *, seed: int, resamples: int = 500) -> DataCopying:
    """Test for data copying, cell by cell of the space.

    Args:
        generated: By the model.
        holdout: Images that it has not seen.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Where no cell has enough of both, the whole space is one cell.
    """
    sets = [(placed.distances.cpu().numpy(), placed.cells.cpu().numpy()) for placed in (generated, holdout)]
    counted = counted_cells(*(cells for _, cells in sets))
    if not counted:
        sets = [(distances, np.zeros_like(cells)) for distances, cells in sets]
        counted = [0]
    value, null_deviation = copying_statistic(sets[0], sets[1], counted)
    random, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = [random.integers(len(distances), size=len(distances)) for distances, _ in sets]
        again = [(distances[some], cells[some]) for (distances, cells), some in zip(sets, rows, strict=True)]
        draws.append(copying_statistic(again[0], again[1], counted)[0])
    low, high = percentile_interval(np.array(draws))
    return DataCopying(Estimate(value, low, high, len(generated.distances)), null_deviation)


def counted_cells(generated: NDArray[np.int64], holdout: NDArray[np.int64]) -> list[int]:
    """List the cells that hold enough generated images and a held-out one."""
    return [int(cell) for cell in np.unique(holdout) if (generated == cell).sum() >= FEWEST_GENERATED]


def copying_statistic(generated: Sides, holdout: Sides, counted: Sequence[int]) -> tuple[float, float]:
    """Give C_T and its deviation under the null from distances to the nearest training image, and cells.

    Args:
        generated: Distances and cells.
        holdout: Distances and cells.
        counted: Cells that are looked at; those without an image of either kind are left out.
    """
    scores, weights = [], []
    for cell in counted:
        mine, theirs = (distances[cells == cell] for distances, cells in (generated, holdout))
        if len(mine) and len(theirs):
            scores.append(rank_sum_score(mine, theirs))
            weights.append(len(theirs) / len(holdout[0]))
    total = sum(weights)
    value = sum(w * z for w, z in zip(weights, scores, strict=True)) / total
    # A mean of independent standard normal scores has this deviation, and not 1.
    return value, sqrt(sum(w**2 for w in weights)) / total


def rank_sum_score(generated: NDArray[np.float64], holdout: NDArray[np.float64]) -> float:
    """Give the standardised Mann-Whitney U of generated against held-out distances, with continuity correction."""
    m, n = len(generated), len(holdout)
    return (m * n * share_above(generated, holdout) - (m * n / 2 - 0.5)) / sqrt(m * n * (m + n + 1) / 12)


class SpaceCells:
    """Parts of the space, found by k-means on training images."""

    def __init__(self, train: Tensor, *, seed: int, num_cells: int = NUM_CELLS) -> None:
        """Divide the space of images (train, feature)."""
        rows = _array(train)
        steps: list[Any] = [KMeans(min(num_cells, len(rows)), n_init=3, random_state=seed)]
        if rows.shape[1] > MAX_FEATURES:
            steps.insert(0, PCA(min(MAX_FEATURES, len(rows)), random_state=seed))
        self._steps = make_pipeline(*steps).fit(rows)

    def __call__(self, images: Tensor) -> Tensor:
        """Give the cell of every image (query, feature), int64 (query,)."""
        return torch.from_numpy(self._steps.predict(_array(images)).astype(np.int64))


def _array(images: Tensor) -> NDArray[np.float32]:
    return images.detach().cpu().float().numpy()
