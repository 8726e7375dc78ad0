"""Tables of planted sources: how often tracers name them, beside the best that can be done, and how sure they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from provgen.analysis.planted import precision_at, reliability
from provgen.analysis.statistics import Estimate

FIRST = 5

EDGES = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1])
"""Bins of belief."""


RANKS = (1, FIRST)
"""Numbers of sources that are looked at."""


def precision_table(
    scores: Mapping[str, Tensor], parents: Tensor, groups: Tensor, best: Sequence[Estimate]
) -> str:
    """Lay out how often the parent is the first source, or one of the first five, for every tracer.

    Args:
        scores: (query, train) by tracer.
        parents: int64 (query,).
        groups: int64 (train,), of `source_groups`.
        best: How often the ideal tracer's first source is the parent, and how often one of its first five.
    """
    lines = [["tracer", "first source, %", f"one of the first {FIRST}, %"]]
    for name, some in scores.items():
        lines.append([name, *(_percent(precision_at(some, parents, groups, k)) for k in RANKS)])
    lines.append(["best possible", *map(_percent, best)])
    return _table(lines)


def reliability_table(beliefs: Mapping[str, Tensor], parents: Tensor, groups: Tensor) -> str:
    """Lay out how often first sources are the parent, by how sure of them a tracer is; arguments as above."""
    lines = [["tracer", "queries", "mean belief, %", "right, %"]]
    for name, some in beliefs.items():
        for belief, right in reliability(some, parents, groups, EDGES):
            lines.append([name, str(right.n), f"{100 * belief.value:.1f}", _percent(right)])
    return _table(lines)


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _table(lines: Sequence[Sequence[str]]) -> str:
    title, *rows = [f"| {' | '.join(line)} |" for line in lines]
    rule = f"| --- |{' ---: |' * (len(lines[0]) - 1)}"
    return "\n".join([title, rule, *rows]) + "\n"
