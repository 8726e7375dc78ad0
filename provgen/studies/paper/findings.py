"""Findings of the paper as directions that can be checked, and what became of each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from scipy.stats import spearmanr

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate, mean_over_seeds
from provgen.studies.paper.table import METRICS, Row, positions, short_key, text_of

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
        raise InputError(f"a trend over {len(grid)} x needs curves of (seed, {len(grid)}), got {curves.shape}")
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


EXPECTED: tuple[str, ...] = get_args(Expected)
"""What a claim may say of a metric."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A finding of the paper, as a direction that can be checked."""

    text: str
    metric: str
    along: str
    """Key that grows; values that are no numbers grow in the order in which they are listed."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Variants it is about: key to value, or to a list of values."""
    expected: Expected
    tolerance: float
    """Difference that counts as none, in units of the metric."""

    def is_about(self, values: Row) -> bool:
        """Whether a variant, or a run of it, is one of those it is about."""
        return all(
            values[key] in (wanted if isinstance(wanted, list) else [wanted]) for key, wanted in self.where.items()
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a claim, for one combination of everything else that varies."""

    claim: Claim
    fixed: Mapping[str, Any]
    """What else varies in the experiment, and is the same in these runs."""
    ends: tuple[Any, Any]
    """Smallest and largest value of `claim.along`."""
    first: Estimate
    """The metric at the smallest."""
    last: Estimate
    """The metric at the largest."""
    trend: Trend
    verdict: Verdict


def judge(rows: Sequence[Row], claim: Claim, planned: Sequence[Row]) -> list[Finding]:
    """Check a claim, once for every combination of what it does not mention.

    Seeds are paired: a seed counts if it has the metric at every planned value of `claim.along`. Where no seed has
    them all there is no finding.

    Args:
        rows: One per run that was measured.
        claim: The claim.
        planned: The values in which the variants differ, of every variant in order, measured or not.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Any]] = {}
    for values in planned:
        if claim.is_about(values):
            fixed = tuple((key, value) for key, value in values.items() if key != claim.along)
            groups.setdefault(fixed, []).append(values[claim.along])
    findings = []
    for fixed, along in groups.items():
        of_group = [row for row in rows if all(row[key] == value for key, value in fixed)]
        curves = _whole_curves(of_group, claim, along)
        if curves and len(along) > 1:
            findings.append(_finding(claim, dict(fixed), positions(along), curves))
    return findings


def _whole_curves(rows: Sequence[Row], claim: Claim, along: Sequence[Any]) -> list[dict[Any, float]]:
    """Give metric by value of `claim.along`, of every seed that has them all."""
    curves: dict[int, dict[Any, float]] = {}
    for row in rows:
        if row.get(claim.metric) is not None and row[claim.along] in along:
            curves.setdefault(row["seed"], {})[row[claim.along]] = float(row[claim.metric])
    return [curve for curve in curves.values() if len(curve) == len(along)]


def _finding(
    claim: Claim, fixed: Mapping[str, Any], places: Mapping[Any, float], curves: Sequence[Mapping[Any, float]]
) -> Finding:
    first, last = min(places, key=places.__getitem__), max(places, key=places.__getitem__)
    found = trend(list(places.values()), [[curve[value] for value in places] for curve in curves])
    return Finding(
        claim=claim,
        fixed=fixed,
        ends=(first, last),
        first=mean_over_seeds([curve[first] for curve in curves]),
        last=mean_over_seeds([curve[last] for curve in curves]),
        trend=found,
        verdict=verdict(found, claim.expected, claim.tolerance),
    )


def findings_text(claims: Sequence[Claim], findings: Sequence[Finding]) -> str:
    """Write every claim with its verdict and the numbers behind it, as a Markdown list."""
    lines = []
    for claim in claims:
        of_claim = [finding for finding in findings if finding.claim is claim]
        lines.append(f"- {claim.text}")
        lines += [f"  - {_sentence(finding)}" for finding in of_claim]
        if not of_claim:
            lines.append("  - not measured at all of its values")
    return "\n".join(lines or ["Nothing is claimed here; the table says what was found."]) + "\n"


def _sentence(finding: Finding) -> str:
    claim, look = finding.claim, METRICS[finding.claim.metric]
    where = ", ".join(f"{short_key(key)} {text_of(value)}" for key, value in finding.fixed.items())
    ends = " to ".join(text_of(end) for end in finding.ends)
    values = " to ".join(_with_interval(value, look.format) for value in (finding.first, finding.last))
    change = _with_interval(finding.trend.difference, f"+{look.format}")
    seeds = finding.trend.difference.n
    correlation = finding.trend.correlation.value
    return (
        f"**{finding.verdict}**{f' ({where})' if where else ''}: as {short_key(claim.along)} goes from {ends}, "
        f"{look.title} goes from {values}: {change} over {seeds} "
        f"seed{'s' if seeds > 1 else ''}; Spearman's correlation {correlation:+.2f}; expected: "
        f"{claim.expected}{_tolerance(claim)}"
    )


def _tolerance(claim: Claim) -> str:
    if not claim.tolerance:
        return ""
    return f" {'within' if claim.expected == 'flat' else 'by more than'} {claim.tolerance:g}"


def _with_interval(found: Estimate, form: str) -> str:
    value = f"{found.value:{form}}"
    return value if math.isnan(found.low) else f"{value} [{found.low:{form}}, {found.high:{form}}]"


def findings_page(title: str, question: str, facts: str, claims: Sequence[Claim], findings: Sequence[Finding]) -> str:
    """Write the Markdown page of an experiment: its question, and what became of every claim."""
    return f"# {title}\n\n{question}\n\n{facts}.\n\n{findings_text(claims, findings)}"


def overview(parts: Mapping[str, Sequence[str]]) -> str:
    """Collect experiments on one Markdown page.

    Args:
        parts: By folder, the page and the table of each experiment.
    """
    sections = [_INTRODUCTION]
    for folder, (page, table) in parts.items():
        picture = f"![Metrics of every variant of {folder}]({folder}/figure.png)"
        sections.append(
            f"#{page}\n{picture}\n\n{table}\nOne row per run: [{folder}/table.parquet]({folder}/table.parquet)\n"
        )
    return "\n".join(sections)


_INTRODUCTION = """# Findings of "Provenance Networks" (arXiv 2510.03361), measured again

A finding is *reproduced* if the 95 % t interval over seeds of the difference between the two ends lies beyond the
tolerance on the expected side (for "flat": within it), *opposite* if it lies beyond it on the other side, and else
*not reproduced*; one seed tells nothing. Beside every metric stands its bound: the best possible, what the closed form
reaches, or what guessing reaches.
"""
