"""Do two answers name the same sources: of two tracers, or of a search and of the exhaustive one?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.metrics.statistics import Estimate, mean_estimate, proportion


@dataclass(frozen=True)
class Agreement:
    """Agreement of two tracers over the same samples."""

    top1: Estimate
    """Share of samples for which both name the same first source."""
    overlap: Estimate
    """Mean share of the k named sources that both name."""


def agreement(first: Tensor, second: Tensor, *, seed: int = 0) -> Agreement:
    """Compare the sources that two tracers name.

    Args:
        first: Example indices, most probable first, int64 (query, k).
        second: Those of the other tracer, (query, k).
        seed: Of the bootstrap.
    """
    same = int((first[:, 0] == second[:, 0]).sum())
    return Agreement(proportion(same, len(first)), mean_estimate(shared_sources(first, second), seed=seed))


def shared_sources(first: Tensor, second: Tensor) -> Tensor:
    """Give the share of the first tracer's sources (query, k) that the second (query, k) names too, (query,)."""
    return (first[:, :, None] == second[:, None, :]).any(dim=2).double().mean(dim=1)


def mismatched(class_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each sample with the next of its own class: two int64 (pair,), the samples and their partners.

    Comparing a tracer's answer with the other tracer's answer for another sample of the class is the agreement
    to be had without looking at the sample. A sample that is alone in its class has no partner and is left out.
    """
    rows = [(class_labels == label).nonzero().flatten() for label in class_labels.unique()]
    groups = [group for group in rows if len(group) > 1]
    if not groups:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    return torch.cat(groups), torch.cat([group.roll(-1) for group in groups])


def beam_recall(searched: Tensor, exhaustive: Tensor, k: int, *, seed: int = 0) -> Estimate:
    """Measure recall@k: the share of the k best examples of all that are among the k best the search found.

    Examples at the lowest finite value are ruled out (`exhaustive`) or were not looked at (`searched`), and never
    count. A query with fewer than k possible examples is asked for those it has.

    Args:
        searched: Index logits of the search, (query, train).
        exhaustive: Index logits of all examples, (query, train); at least one per query is possible.
        k: How many of the best count, at least 1; more than train means all.
        seed: Of the bootstrap over queries.
    """
    wanted = _best(exhaustive, k)
    found = wanted & _best(searched, k)
    return mean_estimate(found.sum(dim=1) / wanted.sum(dim=1), seed=seed)


def _best(logits: Tensor, k: int) -> Tensor:
    """Mark the k largest of every row that are above the lowest finite value, bool (query, train)."""
    values, index = logits.topk(min(k, logits.shape[1]), dim=1)
    marks = torch.zeros_like(logits, dtype=torch.bool)
    return marks.scatter(1, index, values > torch.finfo(logits.dtype).min)
