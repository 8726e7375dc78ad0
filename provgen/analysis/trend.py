"""Does a finding about a curve hold over training seeds?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import spearmanr

from provgen.analysis.statistics import Estimate, mean_over_seeds
from provgen.errors import InputError

Expected = Literal["rises", "falls", "flat"]
Verdict = Literal["reproduced", "not reproduced", "opposite", "one seed"]


@dataclass(frozen=True)
class Trend:
    """How y moves with x, paired within each seed; intervals are 95 % t intervals over seeds, NaN for one seed."""

    difference: Estimate
    """Mean over seeds of y at the largest x minus y at the smallest x, in units of y."""
    correlation: Estimate
    """Mean over seeds of Spearman's correlation of y with x; a constant curve counts as 0."""


def trend(xs: Sequence[float], ys: Sequence[Sequence[float]]) -> Trend:
    """Summarise the curves of several seeds over the same x.

    Args:
        xs: At least two different values, (x,), in any order.
        ys: One curve for each seed, (seed, x).

    Raises:
        InputError: The shapes do not fit, the x are not different, or a value is not finite.
    """
    grid, curves = np.asarray(xs, dtype=np.float64), np.asarray(ys, dtype=np.float64)
    if len(grid) < 2 or len(np.unique(grid)) < len(grid):
        raise InputError(f"a trend needs at least two x, all different, got {list(xs)}")
    if curves.ndim != 2 or curves.shape[1] != len(grid) or not len(curves):
        raise InputError(
            f"a trend over {len(grid)} x needs curves of (seed, {len(grid)}), got {curves.shape}"
        )
    if not (np.isfinite(grid).all() and np.isfinite(curves).all()):
        raise InputError("a trend needs finite values, got NaN or infinity; leave out the runs that failed")
    differences = curves[:, grid.argmax()] - curves[:, grid.argmin()]
    correlations = np.array([0.0 if np.ptp(y) == 0 else spearmanr(grid, y).statistic for y in curves])
    return Trend(mean_over_seeds(differences.tolist()), mean_over_seeds(correlations.tolist()))


def verdict(found: Trend, expected: Expected, tolerance: float = 0.0) -> Verdict:
    """Say whether the expected trend was found, by the interval of the difference.

    Args:
        found: The trend.
        expected: What y does as x grows.
        tolerance: Difference that counts as none, in units of y.

    Returns:
        `reproduced` if the whole interval is beyond the tolerance on the expected side (for `flat`: within the
        tolerance), `opposite` if it is beyond it on the other side, else `not reproduced`; `one seed` if there is
        no interval.
    """
    low, high = found.difference.low, found.difference.high
    if found.difference.n < 2:
        return "one seed"
    if expected == "flat":
        return "reproduced" if -tolerance <= low and high <= tolerance else "not reproduced"
    if expected == "falls":
        low, high = -high, -low
    if low > tolerance:
        return "reproduced"
    return "opposite" if high < -tolerance else "not reproduced"
