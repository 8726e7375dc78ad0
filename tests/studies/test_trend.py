"""A t interval and a rank correlation worked by hand, and every verdict."""

import math

import numpy as np
import pytest

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate
from provgen.studies.paper.findings import Trend, trend, verdict


def found(low, high, n=3):
    estimate = Estimate((low + high) / 2, low, high, n)
    return Trend(difference=estimate, correlation=estimate)


def test_three_seeds_worked_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653 (Student's table), margin t / sqrt(3).
    curves = [[0, 5, 1], [1, 0, 3], [-1, 0, 2]]
    result = trend([0.1, 0.2, 0.4], curves)
    margin = 4.302653 / math.sqrt(3)
    assert result.difference.value == 2
    assert result.difference.low == pytest.approx(2 - margin, abs=1e-5)
    assert result.difference.high == pytest.approx(2 + margin, abs=1e-5)
    assert result.difference.n == 3
    # Ranks 1 3 2, 2 1 3, 1 2 3 against 1 2 3: 1 - 6 sum d^2 / (3 * 8) is 1/2, 1/2 and 1.
    assert result.correlation.value == pytest.approx(2 / 3, abs=1e-12)
    half = 4.302653 * math.sqrt(1 / 12) / math.sqrt(3)
    assert result.correlation.high - result.correlation.value == pytest.approx(half, abs=1e-5)


def test_two_seeds_have_the_widest_interval():
    # Differences 1 and 3: s = sqrt(2), so the margin is t(0.975, 1) = 12.7062.
    result = trend([0, 1], [[0, 1], [0, 3]])
    assert result.difference.low == pytest.approx(2 - 12.7062, abs=1e-4)
    assert result.difference.high == pytest.approx(2 + 12.7062, abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    differences = [trend([0, 1], random.normal(size=(3, 2)).tolist()).difference for _ in range(300)]
    covered = sum(difference.low <= 0 <= difference.high for difference in differences)
    assert 0.92 <= covered / 300 <= 0.98


def test_seeds_are_paired():
    """What differs between seeds but not along the curve widens nothing."""
    plain = trend([0, 1, 2], [[0, 1, 2], [0, 1, 3]])
    shifted = trend([0, 1, 2], [[100, 101, 102], [0, 1, 3]])
    assert shifted == plain


def test_the_order_of_x_and_of_the_seeds_does_not_matter():
    xs, curves = [0.0, 1.0, 2.0, 3.0], np.random.default_rng(0).normal(size=(4, 4))
    result = trend(xs, curves.tolist())
    order = [2, 0, 3, 1]
    moved = trend([xs[i] for i in order], curves[order][:, order].tolist())
    for name in ("difference", "correlation"):
        assert vars(getattr(moved, name)) == pytest.approx(vars(getattr(result, name)), abs=1e-12)


def test_a_constant_curve_has_no_correlation():
    assert trend([0, 1, 2], [[1, 1, 1], [0, 1, 2]]).correlation.value == pytest.approx(0.5)


def test_one_seed_has_no_interval_and_no_verdict():
    result = trend([0, 1], [[0, 9]])
    assert result.difference.value == 9
    assert result.correlation.value == pytest.approx(1, abs=1e-12)
    assert math.isnan(result.difference.low)
    assert math.isnan(result.difference.high)
    assert {verdict(result, expected) for expected in ("rises", "falls", "flat")} == {"one seed"}


@pytest.mark.parametrize(
    ("low", "high", "tolerance", "rises", "falls", "flat"),
    [
        (1, 3, 0, "reproduced", "opposite", "not reproduced"),
        (1, 3, 0.9, "reproduced", "opposite", "not reproduced"),
        (1, 3, 1, "not reproduced", "not reproduced", "not reproduced"),
        (1, 3, 3, "not reproduced", "not reproduced", "reproduced"),
        (-3, -1, 0, "opposite", "reproduced", "not reproduced"),
        (-3, -1, 1, "not reproduced", "not reproduced", "not reproduced"),
        (-3, -1, 3, "not reproduced", "not reproduced", "reproduced"),
        (-1, 2, 0, "not reproduced", "not reproduced", "not reproduced"),
        (-1, 2, 1.5, "not reproduced", "not reproduced", "not reproduced"),
        (-1, 2, 2, "not reproduced", "not reproduced", "reproduced"),
    ],
)
def test_the_verdict_is_where_the_interval_lies(low, high, tolerance, rises, falls, flat):
    interval = found(low, high)
    assert verdict(interval, "rises", tolerance) == rises
    assert verdict(interval, "falls", tolerance) == falls
    assert verdict(interval, "flat", tolerance) == flat


@pytest.mark.parametrize(
    ("xs", "ys", "message"),
    [
        ([0], [[1]], "at least two x"),
        ([0, 0], [[1, 2]], "all different"),
        ([0, 1], [[1, 2, 3]], r"\(seed, 2\)"),
        ([0, 1], [], r"\(seed, 2\)"),
        ([0, 1], [[1, math.nan]], "finite"),
    ],
)
def test_curves_that_are_none_are_refused(xs, ys, message):
    with pytest.raises(InputError, match=message):
        trend(xs, ys)
