"""The data-copying test C_T: are generated images nearer to the training images than held-out ones are?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from torch import Tensor

from provgen.analysis.neighbors import nearest
from provgen.analysis.statistics import Estimate, percentile_interval
from provgen.errors import InputError

NUM_CELLS = 3
"""Parts of the space, as in dgm-eval and FLD."""

MAX_FEATURES = 64
"""Principal components that parts are found in."""

FEWEST_GENERATED = 20
"""Generated images that a part needs to be counted."""


@dataclass(frozen=True)
class DataCopying:
    """C_T of Meehan et al. 2020 (arXiv 2004.05675): far below 0 is copying, far above is underfitting.

    A generator that makes few kinds of images is far below 0 as well: read it beside recall and coverage.
    """

    statistic: Estimate
    """C_T, with its bootstrap interval over generated and held-out images."""
    null_deviation: float
    """Standard deviation of C_T where generated and held-out images are alike, which is below 1."""


def data_copying(
    generated: Tensor,
    holdout: Tensor,
    train: Tensor,
    *,
    seed: int,
    num_cells: int = NUM_CELLS,
    resamples: int = 500,
) -> DataCopying:
    """Test for data copying, cell by cell of the space.

    Args:
        generated: (query, feature).
        holdout: Images that the generator has not seen, (query, feature).
        train: (train, feature).
        seed: Of the cells and of the bootstrap.
        num_cells: Parts of the space, found by k-means on the training images.
        resamples: Bootstrap resamples.

    Raises:
        InputError: No cell has enough of both.
    """
    cell_of = _cells(train, num_cells, seed)
    distances = [nearest(images, train, 1).distances[:, 0].numpy() for images in (generated, holdout)]
    cells = [cell_of(images) for images in (generated, holdout)]
    value, null_deviation = copying_statistic(*distances, *cells)
    random, draws = np.random.default_rng(seed), []
    for _ in range(resamples):
        rows = [random.integers(len(images), size=len(images)) for images in distances]
        again = [values[some] for values, some in zip([*distances, *cells], rows * 2, strict=True)]
        draws.append(copying_statistic(*again)[0])
    low, high = percentile_interval(np.array(draws))
    return DataCopying(Estimate(value, low, high, len(generated)), null_deviation)


def copying_statistic(
    generated: NDArray[np.float64],
    holdout: NDArray[np.float64],
    generated_cells: NDArray[np.int64],
    holdout_cells: NDArray[np.int64],
) -> tuple[float, float]:
    """Give C_T and its deviation under the null from distances to the nearest training image, and cells.

    Raises:
        InputError: No cell has enough of both.
    """
    scores, weights = [], []
    for cell in np.unique(holdout_cells):
        mine, theirs = generated[generated_cells == cell], holdout[holdout_cells == cell]
        if len(mine) >= FEWEST_GENERATED:
            scores.append(rank_sum_score(mine, theirs))
            weights.append(len(theirs) / len(holdout))
    if not scores:
        raise InputError(
            f"no part of the space holds {FEWEST_GENERATED} generated images and a held-out one; generate more"
        )
    total = sum(weights)
    value = sum(w * z for w, z in zip(weights, scores, strict=True)) / total
    # A mean of independent standard normal scores has this deviation, and not 1.
    return value, sqrt(sum(w**2 for w in weights)) / total


def rank_sum_score(generated: NDArray[np.float64], holdout: NDArray[np.float64]) -> float:
    """Give the standardised Mann-Whitney U of generated against held-out distances, with continuity correction."""
    m, n = len(generated), len(holdout)
    u = float(mannwhitneyu(generated, holdout, method="asymptotic").statistic)
    return (u - (m * n / 2 - 0.5)) / sqrt(m * n * (m + n + 1) / 12)


def _cells(train: Tensor, num_cells: int, seed: int) -> Callable[[Tensor], NDArray[np.int64]]:
    """Divide the space; give a function from images (query, feature) to their cells (query,)."""
    rows = _array(train)
    steps: list[Any] = [KMeans(min(num_cells, len(rows)), n_init=3, random_state=seed)]
    if rows.shape[1] > MAX_FEATURES:
        steps.insert(0, PCA(min(MAX_FEATURES, len(rows)), random_state=seed))
    found = make_pipeline(*steps).fit(rows)
    return lambda images: found.predict(_array(images)).astype(np.int64)


def _array(images: Tensor) -> NDArray[np.float32]:
    return images.detach().cpu().float().numpy()
