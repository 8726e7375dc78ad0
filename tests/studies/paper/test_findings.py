"""Claims against planted curves: trends and verdicts worked by hand, and what is left out until all is measured."""

import math

import numpy as np
import pytest

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate
from provgen.studies.paper.findings import Claim, findings_page, findings_text, judge, overview, trend, verdict

RISES = Claim(text="It rises.", source="ours", metric="kl_gap", along="x", expected="rises", tolerance=0.1)


def rows_of(curves: list[dict], **fixed) -> list[dict]:
    """One row per seed and x, from one curve {x: metric} per seed."""
    return [{"seed": s, "x": x, "kl_gap": y, **fixed} for s, curve in enumerate(curves) for x, y in curve.items()]


def planned(*xs, **fixed) -> list[dict]:
    return [{"x": x, **fixed} for x in xs]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([1.0, 1.01, 0.99], "reproduced"),
        ([-1.0, -1.01, -0.99], "opposite"),
        ([0.05, 0.06, 0.04], "not reproduced"),
        ([1.0, -1.0, 0.5], "undecided"),
        ([1.0], "one seed"),
    ],
)
def test_the_verdict_follows_the_difference_between_the_ends(ends, expected):
    rows = rows_of([{0: 0.3, 1: 0.3 + end / 2, 2: 0.3 + end} for end in ends])
    (finding,) = judge(rows, RISES, planned(0, 1, 2))
    assert finding.verdict == expected
    assert finding.ends == (0, 2)
    assert finding.trend.difference.value == pytest.approx(sum(ends) / len(ends))
    assert finding.first.value == pytest.approx(0.3)


def test_seeds_are_paired_so_that_what_they_share_makes_no_interval_wider():
    rows = rows_of([{0: base, 1: base + 1} for base in (0.0, 10.0, 20.0)])
    (finding,) = judge(rows, RISES, planned(0, 1))
    assert finding.trend.difference.low == pytest.approx(1)
    assert finding.last.high - finding.last.low > 10


def test_there_is_no_finding_before_a_seed_has_every_planned_value():
    rows = rows_of([{0: 0.0, 1: 1.0, 2: 2.0}, {0: 0.0, 1: None, 2: 2.0}])
    assert judge(rows, RISES, planned(0, 1, 2, 3)) == []
    (finding,) = judge(rows, RISES, planned(0, 1, 2))
    assert finding.trend.difference.n == 1, "the second seed misses one"
    assert judge([], RISES, planned(0, 1)) == []
    assert judge(rows_of([{0: 1.0}]), RISES, planned(0)) == [], "one value is no trend"


def test_each_combination_of_the_rest_is_judged_on_its_own():
    up, down = [{0: 0.0, 1: 1.0}, {0: 0.0, 1: 1.1}], [{0: 1.0, 1: 0.0}, {0: 1.1, 1: 0.0}]
    rows = rows_of(up, size="small") + rows_of(down, size="tiny")
    every = planned(0, 1, size="small") + planned(0, 1, size="tiny")
    findings = judge(rows, RISES, every)
    assert [(f.fixed, f.verdict) for f in findings] == [
        ({"size": "small"}, "reproduced"),
        ({"size": "tiny"}, "opposite"),
    ]
    only = Claim(**(vars(RISES) | {"where": {"size": ["tiny"]}}))
    assert [f.verdict for f in judge(rows, only, every)] == ["opposite"]


def test_a_reference_counts_as_the_smallest_value():
    rows = rows_of([{1: 1.0, 3: 2.0}, {1: 1.0, 3: 2.1}], variant="joint", kind="joint")
    rows += [{"seed": seed, "variant": "alone", "x": 2, "kind": "none", "kl_gap": 0.5 + seed} for seed in (0, 1, 2)]
    claim = Claim(**(vars(RISES) | {"where": {"kind": ["joint"]}, "reference": "alone"}))
    every = [*planned(1, 3, kind="joint"), *planned(2, kind="none")]
    (finding,) = judge(rows, claim, every)
    assert finding.ends == ("alone", 3)
    assert finding.first.value == pytest.approx(1.0)
    # 2.0 - 0.5 and 2.1 - 1.5, of the two seeds that have both.
    assert finding.trend.difference.value == pytest.approx((1.5 + 0.6) / 2)
    assert [f.ends for f in judge(rows, claim, planned(3, kind="joint"))] == [("alone", 3)], "one value is enough"
    assert judge([row for row in rows if row["variant"] != "alone"], claim, every) == []


def test_a_claim_says_whose_it_is():
    for source, words in (("abstract", "abstract"), ("review", "public reviews"), ("ours", "ours")):
        assert words in findings_text([Claim(**(vars(RISES) | {"source": source}))], [])


def test_values_that_are_no_numbers_grow_in_the_order_of_the_variants():
    rows = rows_of([{"b": 0.0, "a": 1.0, None: 2.0}, {"b": 0.0, "a": 1.0, None: 2.1}])
    (finding,) = judge(list(reversed(rows)), RISES, planned("b", "a", None))
    assert finding.ends == ("b", None)
    assert finding.trend.correlation.value == pytest.approx(1)


def test_the_text_gives_verdict_ends_numbers_and_tolerance():
    rows = rows_of([{0.0: 0.25, 1.0: 0.5}], **{"generator.size": "small"})
    findings = judge(rows, RISES, planned(0.0, 1.0, **{"generator.size": "small"}))
    assert findings_text([RISES], findings) == (
        "- It rises. *Claim: ours.*\n"
        "  - **one seed** (size small): as x goes from 0 to 1, KL gap, no label given goes from 0.250 to 0.500: "
        "+0.250 over 1 seed; Spearman's correlation +1.00; expected: rises by more than 0.1\n"
    )
    both = rows_of([{0: 0.0, 1: 1.0}, {0: 0.0, 1: 1.2}])
    text = findings_text([RISES], judge(both, RISES, planned(0, 1)))
    # Differences 1 and 1.2: standard error 0.1, t(0.975, 1) = 12.7062.
    assert "+1.100 [-0.171, +2.371] over 2 seeds" in text


def test_a_claim_that_cannot_be_judged_yet_says_so():
    assert findings_text([RISES], []) == "- It rises. *Claim: ours.*\n  - not measured at all of its values\n"
    assert "Nothing is claimed" in findings_text([], [])


def test_pages_are_collected_one_level_deeper():
    page = findings_page("Title", "Why?", "1 of 2 runs", [], [])
    assert page.startswith("# Title\n\nWhy?\n\n1 of 2 runs.\n\n")
    text = overview({"alpha": (page, "| a |\n"), "beta": (page.replace("Title", "Other"), "| b |\n")})
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [heading.split(" ", 1)[0] for heading in headings] == ["#", "##", "##"]
    assert "](alpha/figure.png)" in text
    assert "](beta/table.parquet)" in text
    assert "body of the paper was not available" in text
    assert all(
        f"*{verdict}*" in text for verdict in ("reproduced", "undecided", "not reproduced", "opposite", "one seed")
    )
    assert text.index("## Title") < text.index("| a |") < text.index("## Other") < text.index("| b |")


def test_three_seeds_worked_by_hand():
    # Differences 1, 2, 3: mean 2, s = 1, t(0.975, 2) = 4.302653 (Student's table), margin t / sqrt(3).
    curves = [[0, 5, 1], [1, 0, 3], [-1, 0, 2]]
    result = trend(curves)
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
    result = trend([[0, 1], [0, 3]])
    assert result.difference.low == pytest.approx(2 - 12.7062, abs=1e-4)
    assert result.difference.high == pytest.approx(2 + 12.7062, abs=1e-4)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    differences = [trend(random.normal(size=(3, 2)).tolist()).difference for _ in range(300)]
    covered = sum(difference.low <= 0 <= difference.high for difference in differences)
    assert 0.92 <= covered / 300 <= 0.98


def test_seeds_are_paired():
    """What differs between seeds but not along the curve widens nothing."""
    plain = trend([[0, 1, 2], [0, 1, 3]])
    shifted = trend([[100, 101, 102], [0, 1, 3]])
    assert shifted == plain


def test_the_order_of_the_seeds_does_not_matter():
    curves = np.random.default_rng(0).normal(size=(4, 4))
    result, moved = trend(curves.tolist()), trend(curves[[2, 0, 3, 1]].tolist())
    for name in ("difference", "correlation"):
        assert vars(getattr(moved, name)) == pytest.approx(vars(getattr(result, name)), abs=1e-12)


def test_a_constant_curve_has_no_correlation():
    assert trend([[1, 1, 1], [0, 1, 2]]).correlation.value == pytest.approx(0.5)


def test_one_seed_has_no_interval_and_no_verdict():
    result = trend([[0, 9]])
    assert result.difference.value == 9
    assert result.correlation.value == pytest.approx(1, abs=1e-12)
    assert math.isnan(result.difference.low)
    assert math.isnan(result.difference.high)
    assert {verdict(result.difference, expected, 0.0) for expected in ("rises", "falls", "flat")} == {"one seed"}


# Where the interval of the difference lies, the tolerance, and the verdict on each direction, worked by hand.
VERDICTS = [
    # All beyond the tolerance on one side.
    (1, 3, 0, "reproduced", "opposite", "not reproduced"),
    (1, 3, 0.9, "reproduced", "opposite", "not reproduced"),
    (-3, -1, 0, "opposite", "reproduced", "not reproduced"),
    # Not zero, but partly within the tolerance: it may or may not be more than that.
    (1, 3, 1, "undecided", "not reproduced", "undecided"),
    (1, 3, 2, "undecided", "not reproduced", "undecided"),
    (-3, -1, 1, "not reproduced", "undecided", "undecided"),
    # All within the tolerance: nothing that counts.
    (1, 3, 3, "not reproduced", "not reproduced", "reproduced"),
    (-3, -1, 3, "not reproduced", "not reproduced", "reproduced"),
    (-1, 2, 2, "not reproduced", "not reproduced", "reproduced"),
    (0, 0, 0, "not reproduced", "not reproduced", "reproduced"),
    # Zero and more than the tolerance: nothing was decided.
    (-1, 2, 0, "undecided", "undecided", "undecided"),
    (-1, 2, 1.5, "undecided", "not reproduced", "undecided"),
    (-2, 1, 1.5, "not reproduced", "undecided", "undecided"),
    (0, 2, 1, "undecided", "not reproduced", "undecided"),
]


@pytest.mark.parametrize(("low", "high", "tolerance", "rises", "falls", "flat"), VERDICTS)
def test_the_verdict_is_where_the_interval_lies(low, high, tolerance, rises, falls, flat):
    interval = Estimate((low + high) / 2, low, high, 3)
    assert verdict(interval, "rises", tolerance) == rises
    assert verdict(interval, "falls", tolerance) == falls
    assert verdict(interval, "flat", tolerance) == flat


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ([[1]], "at least two x"),
        ([[1, 2], [1, 2, 3]], "at least two x"),
        ([], "at least two x"),
        ([[1, math.nan]], "finite"),
    ],
)
def test_curves_that_are_none_are_refused(curves, message):
    with pytest.raises(InputError, match=message):
        trend(curves)
