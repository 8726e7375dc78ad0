"""Claims as directions that can be checked, and what became of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import spearmanr

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate, mean_over_seeds
from provgen.report.format import interval
from provgen.studies.paper.table import METRICS, Row, positions, require_metric, short_key, text_of

Verdict = Literal["reproduced", "not reproduced", "opposite", "undecided", "one seed"]

SOURCES = {"abstract": "the paper's abstract", "review": "public reviews and summaries of the paper", "ours": "ours"}
"""Where a claim comes from, and how that is written; the paper's body was not available."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An expectation of how a metric moves, written down before the runs.

    The body of "Provenance Networks" was not available. What is expected comes from its abstract, from public reviews
    and summaries of it, or is ours.
    """

    text: str
    source: Literal["abstract", "review", "ours"]
    """Where the claim comes from, a key of `SOURCES`."""
    metric: str
    along: str
    """Key that grows; values that are no numbers grow in the order in which they are listed."""
    where: dict[str, list[Any]] = field(default_factory=dict)
    """Variants that the claim is about: key to values."""
    reference: str | None = None
    """Name of a variant that counts as the smallest value, such as the generator alone; null for none."""
    expected: Literal["rises", "falls", "flat"]
    tolerance: float
    """Difference that counts as none, in units of the metric."""

    def __post_init__(self) -> None:
        require_metric(self.metric)
        if self.tolerance < 0:
            raise InputError(f"tolerance must be a number, at least 0, got {self.tolerance}")

    def is_about(self, values: Row) -> bool:
        """Whether a variant, or a run of it, is one that the claim is about."""
        return all(values[key] in wanted for key, wanted in self.where.items())


@dataclass(frozen=True)
class Trend:
    """How y moves with x, paired within each seed; intervals are 95 % t intervals over seeds, NaN for one seed."""

    difference: Estimate
    """Mean over seeds of the last y minus the first, in units of y."""
    correlation: Estimate
    """Mean over seeds of Spearman's correlation of y with x; a constant curve counts as 0."""


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


def trend(curves: Sequence[Sequence[float]]) -> Trend:
    """Summarise the curves of several seeds (seed, x) over the same x, at least two in ascending order.

    Raises:
        InputError: The curves are of different lengths or too short, or a value is not finite.
    """
    if not curves or len(curves[0]) < 2 or any(len(curve) != len(curves[0]) for curve in curves):
        raise InputError(f"a trend needs curves (seed, x) with at least two x, got {curves}")
    values = np.asarray(curves, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError("a trend needs finite values, got NaN or infinity; leave out the runs that failed")
    order = np.arange(values.shape[1])
    correlations = [0.0 if np.ptp(curve) == 0 else float(spearmanr(order, curve).statistic) for curve in values]
    return Trend(mean_over_seeds((values[:, -1] - values[:, 0]).tolist()), mean_over_seeds(correlations))


def verdict(difference: Estimate, expected: str, tolerance: float) -> Verdict:
    """Say whether the expected trend was found, by where the interval of `difference` (last y minus first y) lies.

    A difference agrees with `rises` or `falls` if it is beyond the tolerance on that side, with `flat` if it is within
    the tolerance.

    Returns:
        `reproduced` if every difference in the interval agrees, `undecided` if some do and some do not. If none
        does: `opposite` if all are beyond the tolerance on the other side, else `not reproduced`; `flat` has no
        other side. `one seed` if there is no interval.
    """
    low, high = difference.low, difference.high
    if difference.n < 2:
        return "one seed"
    if expected == "flat":
        if -tolerance <= low and high <= tolerance:
            return "reproduced"
        return "not reproduced" if low > tolerance or high < -tolerance else "undecided"
    if expected == "falls":
        low, high = -high, -low
    if low > tolerance:
        return "reproduced"
    if high > tolerance:
        return "undecided"
    return "opposite" if high < -tolerance else "not reproduced"


def judge(rows: Sequence[Row], claim: Claim, planned: Sequence[Row]) -> list[Finding]:
    """Check a claim on the rows of measured runs, once for every combination of what it does not mention.

    Seeds are paired: a seed counts if it has the metric at every planned value of `claim.along`, and of the reference.
    Where no seed has them all there is no finding. `planned` has the values of every variant in order, measured or not.
    """
    groups: dict[tuple[tuple[str, Any], ...], list[Any]] = {}
    for values in planned:
        if claim.is_about(values):
            fixed = tuple((key, value) for key, value in values.items() if key != claim.along)
            groups.setdefault(fixed, []).append(values[claim.along])
    findings = []
    for fixed, along in groups.items():
        chosen: dict[Any, Row] = {} if claim.reference is None else {claim.reference: {"variant": claim.reference}}
        chosen |= {value: {**dict(fixed), claim.along: value} for value in positions(along)}
        by_value = {value: _by_seed(rows, claim.metric, values) for value, values in chosen.items()}
        seeds = sorted(set.intersection(*(set(metrics) for metrics in by_value.values())))
        if seeds and len(by_value) > 1:
            curves = [[metrics[seed] for metrics in by_value.values()] for seed in seeds]
            findings.append(_finding(claim, dict(fixed), list(by_value), curves))
    return findings


def _by_seed(rows: Sequence[Row], metric: str, values: Row) -> dict[int, float]:
    """Give a metric by seed, of the runs with these values."""
    chosen = [row for row in rows if all(row[key] == value for key, value in values.items())]
    return {row["seed"]: float(row[metric]) for row in chosen if row.get(metric) is not None}


def _finding(
    claim: Claim, fixed: Mapping[str, Any], along: Sequence[Any], curves: Sequence[Sequence[float]]
) -> Finding:
    moved = trend(curves)
    return Finding(
        claim=claim,
        fixed=fixed,
        ends=(along[0], along[-1]),
        first=mean_over_seeds([curve[0] for curve in curves]),
        last=mean_over_seeds([curve[-1] for curve in curves]),
        trend=moved,
        verdict=verdict(moved.difference, claim.expected, claim.tolerance),
    )


def findings_text(claims: Sequence[Claim], findings: Iterable[Finding]) -> str:
    """Write every claim with its source, its verdict and the numbers behind it, as a Markdown list."""
    lines = []
    for claim in claims:
        of_claim = [f"  - {_sentence(finding)}" for finding in findings if finding.claim is claim]
        lines.append(f"- {claim.text} *Claim: {SOURCES[claim.source]}.*")
        lines += of_claim or ["  - not measured at all of its values"]
    return "\n".join(lines or ["Nothing is claimed here; the table says what was found."]) + "\n"


def _sentence(finding: Finding) -> str:
    claim, look = finding.claim, METRICS[finding.claim.metric]
    where = ", ".join(f"{short_key(key)} {text_of(value)}" for key, value in finding.fixed.items())
    ends = " to ".join(text_of(end) for end in finding.ends)
    values = " to ".join(interval(value, look.format) for value in (finding.first, finding.last))
    change, seeds = interval(finding.trend.difference, f"+{look.format}"), finding.trend.difference.n
    kind = "within" if claim.expected == "flat" else "by more than"
    tolerance = f" {kind} {claim.tolerance:g}" if claim.tolerance else ""
    return (
        f"**{finding.verdict}**{f' ({where})' if where else ''}: as {short_key(claim.along)} goes from {ends}, "
        f"{look.title} goes from {values}: {change} over {seeds} seed{'s' if seeds > 1 else ''}; "
        f"Spearman's correlation {finding.trend.correlation.value:+.2f}; expected: {claim.expected}{tolerance}"
    )


def findings_page(title: str, question: str, facts: str, claims: Sequence[Claim], findings: Sequence[Finding]) -> str:
    """Write the Markdown page of an experiment: its question, and what became of every claim."""
    return f"# {title}\n\n{question}\n\n{facts}.\n\n{findings_text(claims, findings)}"


def overview(pages: Mapping[str, tuple[str, str]]) -> str:
    """Collect experiments on one Markdown page: the page and the table of each, by folder."""
    sections = [_INTRODUCTION]
    for folder, (page, table) in pages.items():
        picture = f"![Metrics of every variant of {folder}]({folder}/figure.png)"
        sections.append(
            f"#{page}\n{picture}\n\n{table}\nOne row per run: [{folder}/table.parquet]({folder}/table.parquet)\n"
        )
    return "\n".join(sections)


_INTRODUCTION = """# Claims about "Provenance Networks" (arXiv 2510.03361), measured

The body of the paper was not available to us. Claims are those of its abstract and of public reviews and summaries of
it; some are ours. Each says where it comes from. Our settings are our own, and none of our numbers is the paper's.

Every claim says how a metric moves between two ends, and which difference counts as none: the tolerance. A difference
agrees with the claim if it lies beyond the tolerance on the expected side. For "flat" it agrees within the tolerance.
The verdict is where the 95 % t interval over seeds lies:

- *reproduced*: every difference in the interval agrees.
- *undecided*: some differences in the interval agree and some do not; more seeds may tell.
- *not reproduced*: no difference in the interval agrees.
- *opposite*: no difference agrees, and all lie beyond the tolerance on the other side.
- *one seed*: there is no interval, and nothing can be said.

Beside every metric stands its bound: the best possible, what the closed form reaches, or what guessing reaches.
"""
