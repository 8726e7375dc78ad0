"""Claims against planted curves: every verdict, the pairs of seeds, and what is left out until all is measured."""

import pytest

from provgen.studies.paper.findings import Claim, findings_page, findings_text, judge, overview

RISES = Claim(text="It rises.", metric="kl_gap", along="x", expected="rises", tolerance=0.1)


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
        ([1.0, -1.0, 0.5], "not reproduced"),
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


def test_values_that_are_no_numbers_grow_in_the_order_of_the_variants():
    rows = rows_of([{"b": 0.0, "a": 1.0, None: 2.0}, {"b": 0.0, "a": 1.0, None: 2.1}])
    (finding,) = judge(list(reversed(rows)), RISES, planned("b", "a", None))
    assert finding.ends == ("b", None)
    assert finding.trend.correlation.value == pytest.approx(1)


def test_the_text_gives_verdict_ends_numbers_and_tolerance():
    rows = rows_of([{0.0: 0.25, 1.0: 0.5}], **{"generator.size": "small"})
    findings = judge(rows, RISES, planned(0.0, 1.0, **{"generator.size": "small"}))
    assert findings_text([RISES], findings) == (
        "- It rises.\n"
        "  - **one seed** (size small): as x goes from 0 to 1, KL gap, no label given goes from 0.250 to 0.500: "
        "+0.250 over 1 seed; Spearman's correlation +1.00; expected: rises by more than 0.1\n"
    )
    both = rows_of([{0: 0.0, 1: 1.0}, {0: 0.0, 1: 1.2}])
    text = findings_text([RISES], judge(both, RISES, planned(0, 1)))
    # Differences 1 and 1.2: standard error 0.1, t(0.975, 1) = 12.7062.
    assert "+1.100 [-0.171, +2.371] over 2 seeds" in text


def test_a_claim_that_cannot_be_judged_yet_says_so():
    assert findings_text([RISES], []) == "- It rises.\n  - not measured at all of its values\n"
    assert "Nothing is claimed" in findings_text([], [])


def test_pages_are_collected_one_level_deeper():
    page = findings_page("Title", "Why?", "1 of 2 runs", [], [])
    assert page.startswith("# Title\n\nWhy?\n\n1 of 2 runs.\n\n")
    text = overview({"alpha": (page, "| a |\n"), "beta": (page.replace("Title", "Other"), "| b |\n")})
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert [heading.split(" ", 1)[0] for heading in headings] == ["#", "##", "##"]
    assert "](alpha/figure.png)" in text
    assert "](beta/table.parquet)" in text
    assert text.index("## Title") < text.index("| a |") < text.index("## Other") < text.index("| b |")
