"""Estimates with intervals: no number of a report stands without one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan, sqrt
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, t
from torch import Tensor

from provgen.errors import InputError

CONFIDENCE = 0.95
"""Probability that an interval is meant to cover the truth with."""

RESAMPLES_OF_MEAN = 2000
RESAMPLES = 1000
"""Bootstrap resamples of everything that is slower than a mean."""

# Bootstrap draws held in memory at a time (8 bytes each).
_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Estimate:
    """A measured number and how far it can be trusted."""

    value: float
    """The estimate itself."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end of the interval."""
    n: int
    """Independent observations behind it."""

    def columns(self, name: str, separator: str = "_") -> dict[str, float]:
        """Give value and ends as the columns NAME, NAME_low and NAME_high of a table."""
        return {name: self.value, f"{name}{separator}low": self.low, f"{name}{separator}high": self.high}


def flat_row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Give fields as the columns of a table: estimates become several (`Estimate.columns`), tensors none."""
    row: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Estimate):
            row |= value.columns(name)
        elif not isinstance(value, Tensor):
            row[name] = value
    return row


def proportion(successes: int, n: int) -> Estimate:
    """Give `successes / n` with its Clopper-Pearson interval.

    The interval is exact: it covers the truth at least as often as `CONFIDENCE` says, at 0 and at n too.

    Raises:
        InputError: `n` is 0.
    """
    assert 0 <= successes <= n
    if n == 0:
        raise InputError("cannot estimate a proportion from 0 observations; give at least 1")
    # Clopper and Pearson 1934, Biometrika 26(4), 404-413.
    interval = binomtest(successes, n).proportion_ci(confidence_level=CONFIDENCE, method="exact")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def mean_estimate(values: Tensor, *, seed: int) -> Estimate:
    """Give the mean of independent `values` with its bootstrap percentile interval.

    Args:
        values: (observation,), any dtype; a NaN among them makes the estimate NaN.
        seed: Seed of the resampling; the same seed gives the same interval.

    Raises:
        InputError: `values` is empty.
    """
    if len(values) == 0:
        raise InputError("cannot estimate a mean from 0 observations; give at least 1")
    sample = to_numpy(values)
    means = _resampled_means(sample, np.random.default_rng(seed), RESAMPLES_OF_MEAN)
    return Estimate(float(sample.mean()), *percentile_interval(means), len(sample))


def ratio_estimate(above: Tensor, below: Tensor) -> Estimate:
    """Give the ratio of the means of two independent samples (observation,), with a bootstrap interval of both."""
    random, sides = np.random.default_rng(0), [to_numpy(above), to_numpy(below)]
    means = [_resampled_means(side, random, RESAMPLES) for side in sides]
    value = float(sides[0].mean() / sides[1].mean())
    return Estimate(value, *percentile_interval(means[0] / means[1]), min(map(len, sides)))


def auroc(positives: Tensor, negatives: Tensor, *, seed: int, resamples: int = RESAMPLES) -> Estimate:
    """Give the probability that a positive scores above a negative, ties counting half; bootstrap interval of both.

    Both are scores (observation,).

    Raises:
        InputError: Either is empty.
    """
    if not len(positives) or not len(negatives):
        raise InputError(f"AUROC needs scores of both kinds, got {len(positives)} and {len(negatives)}")
    random, sides = np.random.default_rng(seed), [to_numpy(positives), to_numpy(negatives)]
    draws = [
        share_above(*(side[random.integers(len(side), size=len(side))] for side in sides)) for _ in range(resamples)
    ]
    return Estimate(share_above(*sides), *percentile_interval(np.array(draws)), min(map(len, sides)))


def stratified_auroc(scores: Tensor, is_positive: Tensor, strata: Tensor, *, resamples: int) -> Estimate | None:
    """Give the probability that a positive scores above a negative of its own stratum; None without such a pair.

    All are (observation,). The bootstrap draws strata.
    """
    values, pairs = [], []
    for stratum in strata.unique():
        inside = strata == stratum
        positives, negatives = to_numpy(scores[inside & is_positive]), to_numpy(scores[inside & ~is_positive])
        if len(positives) and len(negatives):
            values.append(share_above(positives, negatives))
            pairs.append(len(positives) * len(negatives))
    if not pairs:
        return None
    shares, weights = np.array(values), np.array(pairs)
    rows = np.random.default_rng(0).integers(len(shares), size=(resamples, len(shares)))
    draws = (shares * weights)[rows].sum(axis=1) / weights[rows].sum(axis=1)
    return Estimate(float((shares * weights).sum() / weights.sum()), *percentile_interval(draws), len(shares))


def to_numpy(values: Tensor) -> NDArray[np.float64]:
    """Copy a tensor of any dtype and device into a float64 array of the same shape."""
    array: NDArray[np.float64] = values.detach().cpu().double().numpy()
    return array


def share_above(positives: NDArray[np.float64], negatives: NDArray[np.float64]) -> float:
    """Give the share of pairs in which the positive is larger, ties counting half: Mann-Whitney U over its maximum."""
    ordered = np.sort(negatives)
    below = np.searchsorted(ordered, positives, side="left") + np.searchsorted(ordered, positives, side="right")
    return float(below.mean() / (2 * len(ordered)))


def percentile_interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """Give the middle `CONFIDENCE` of bootstrap draws (resample,)."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_over_seeds(values: Sequence[float]) -> Estimate:
    """Give the mean over training seeds with its 95 % t interval (Student 1908); a single seed has none (NaN)."""
    n, mean = len(values), fmean(values)
    if n < 2:
        return Estimate(mean, nan, nan, n)
    margin = float(t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n)
    return Estimate(mean, mean - margin, mean + margin, n)


def _resampled_means(sample: NDArray[np.float64], random: np.random.Generator, resamples: int) -> NDArray[np.float64]:
    """Draw bootstrap means of `sample` (observation,): (resample,)."""
    rows = max(1, _DRAWS_AT_ONCE // len(sample))
    sizes = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [sample[random.integers(len(sample), size=(size, len(sample)))].mean(axis=1) for size in sizes]
    return np.concatenate(means)
