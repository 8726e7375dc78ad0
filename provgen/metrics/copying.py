"""Measures of copying: distances to training images, the 1/3 rule, authenticity, and the test C_T."""

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

from provgen.metrics.neighbors import Neighbors, nearest, nearest_others
from provgen.metrics.statistics import Estimate, percentile_interval, proportion, share_above

MEMORIZED = 1 / 3
"""Distance ratio below which an image is a copy (Yoon et al. 2023)."""


def distance_ratio(neighbors: Neighbors) -> Tensor:
    """Divide each query's distance to its nearest training image by that to the second nearest.

    Yoon et al. 2023 (SPIGM workshop at ICML), used by Gu et al. 2023 (arXiv 2310.02664).

    Args:
        neighbors: At least two neighbours of each query among distinct training images (`distinct_rows`).

    Returns:
        float64 (query,) in [0, 1]; 0 is an exact copy.
    """
    return neighbors.distances[:, 0] / neighbors.distances[:, 1]


def share_memorized(ratios: Tensor) -> Estimate:
    """Give the share of `ratios` (query,) strictly below `MEMORIZED`.

    Raises:
        InputError: `ratios` is empty.
    """
    return proportion(int((ratios < MEMORIZED).sum()), len(ratios))


def calibrated_distance(neighbors: Neighbors) -> Tensor:
    """Divide each query's distance to its nearest training image by half of its mean distance to all `neighbors`.

    Carlini et al. 2023 (arXiv 2301.13188), with the 50 nearest: 0 is a copy, 2 is equally far from all. There is
    no threshold that holds everywhere: take a quantile of held-out images.

    Returns:
        float64 (query,) in [0, 2].
    """
    mean = neighbors.distances.mean(dim=1)
    return torch.where(mean > 0, 2 * neighbors.distances[:, 0] / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0)


def authenticity(neighbors: Neighbors, distinct: Tensor) -> Estimate:
    """Give the share of generated images that are farther from their nearest training image than its own neighbour.

    Alaa et al. 2022 (arXiv 2102.08921). Copies have 0. A perfect generator does not have 1/2: locally uniform images
    have 1/3, 0.379 and 0.407 in one, two and three dimensions, and independent Gaussians of 32 dimensions have 0.76.
    Read it beside the share of held-out images. `neighbors` are those of the generated images among `distinct`
    (`distinct_rows`), (train, feature).
    """
    nearest_train, inverse = neighbors.indices[:, 0].unique(return_inverse=True)
    among_training = nearest_others(distinct, nearest_train, 1).distances[inverse, 0]
    return proportion(int((among_training < neighbors.distances[:, 0]).sum()), len(neighbors.distances))


def closer_to_train(neighbors: Neighbors, generated: Tensor, holdout: Tensor) -> Estimate:
    """Give the share of generated images that are nearer to a training image than to any held-out one.

    A generator that has learned no more of the training images than of the held-out ones has N / (N + M), with N
    training and M held-out images; a copier has 1. Ties count half, rounded down. Images are (query, feature);
    `neighbors` are those of the generated ones among training images.
    """
    to_train, to_holdout = neighbors.distances[:, 0], nearest(generated, holdout, 1).distances[:, 0]
    closer = int((to_train < to_holdout).sum()) + int((to_train == to_holdout).sum()) // 2
    return proportion(closer, len(generated))


NUM_CELLS = 3
"""Cells that the space is divided into, as in dgm-eval and FLD."""

MAX_FEATURES = 64
"""Principal components that cells are found in."""

FEWEST_GENERATED = 20
"""Generated images that a cell needs to be counted."""

RESAMPLES = 500
"""Bootstrap resamples of C_T."""

Sides = tuple[NDArray[np.float64], ...]
"""Distances of generated and of held-out images to the nearest training image, each (query,)."""


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
    """Distance to the nearest training image, float64 (query,)."""
    cells: Tensor
    """Cell of the space, int64 (query,)."""


def data_copying(generated: Placed, holdout: Placed, *, seed: int) -> DataCopying:
    """Test for data copying, cell by cell of the space.

    Where no cell has enough of both sets, the whole space is one cell. Held-out images are new to the model.
    """
    cells = counted_cells(generated, holdout)
    value, null_deviation = copying_statistic(cells)
    random, draws = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):  # within cells, so that none is ever empty
        resampled = [tuple(side[random.integers(len(side), size=len(side))] for side in cell) for cell in cells]
        draws.append(copying_statistic(resampled)[0])
    interval = percentile_interval(np.array(draws))
    return DataCopying(Estimate(value, *interval, len(generated.distances)), null_deviation)


def counted_cells(generated: Placed, holdout: Placed) -> list[Sides]:
    """Give the distances of both sets in every cell that holds enough generated images and a held-out one."""
    sets = [(placed.distances.cpu().numpy(), placed.cells.cpu().numpy()) for placed in (generated, holdout)]
    cells: list[Sides] = [
        tuple(distances[of_image == cell] for distances, of_image in sets) for cell in np.unique(sets[1][1])
    ]
    enough = [cell for cell in cells if len(cell[0]) >= FEWEST_GENERATED]
    return enough or [(sets[0][0], sets[1][0])]


def copying_statistic(cells: Sequence[Sides]) -> tuple[float, float]:
    """Give C_T and its deviation where both sets are alike, from distances to the nearest training image by cell."""
    weights = np.array([len(holdout) for _, holdout in cells], dtype=np.float64)
    weights /= weights.sum()
    scores = np.array([rank_sum_score(*cell) for cell in cells])
    # A mean of independent standard normal scores has this deviation, and not 1.
    return float(weights @ scores), float(np.sqrt(weights @ weights))


def rank_sum_score(generated: NDArray[np.float64], holdout: NDArray[np.float64]) -> float:
    """Give the standardised Mann-Whitney U of generated against held-out distances, with continuity correction."""
    m, n = len(generated), len(holdout)
    return (m * n * share_above(generated, holdout) - (m * n / 2 - 0.5)) / sqrt(m * n * (m + n + 1) / 12)


class SpaceCells:
    """Cells of the space, found by k-means on training images."""

    def __init__(self, train: Tensor, *, seed: int) -> None:
        """Divide the space of images (train, feature)."""
        rows = _array(train)
        steps: list[Any] = [KMeans(min(NUM_CELLS, len(rows)), n_init=3, random_state=seed)]
        if rows.shape[1] > MAX_FEATURES:
            steps.insert(0, PCA(min(MAX_FEATURES, len(rows)), random_state=seed))
        self._steps = make_pipeline(*steps).fit(rows)

    def __call__(self, images: Tensor) -> Tensor:
        """Give the cell of every image (query, feature), int64 (query,)."""
        return torch.from_numpy(self._steps.predict(_array(images)).astype(np.int64))


def _array(images: Tensor) -> NDArray[np.float32]:
    return images.detach().cpu().float().numpy()
