"""Whether two answers name the same sources: those of two tracers, or of a search and an exhaustive search."""

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


def agreement(first: Tensor, second: Tensor) -> Agreement:
    """Compare the sources that two tracers name, int64 (query, k) each, most probable first."""
    same = int((first[:, 0] == second[:, 0]).sum())
    return Agreement(proportion(same, len(first)), mean_estimate(shared_sources(first, second), seed=0))


def shared_sources(first: Tensor, second: Tensor) -> Tensor:
    """Give the share of the first tracer's sources (query, k) that the second (query, k) names too, (query,)."""
    return (first[:, :, None] == second[:, None, :]).any(dim=2).double().mean(dim=1)


def mismatched(class_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pair each sample with the next of its own class: two int64 (pair,), the samples and their partners.

    Agreement between a sample and its partner is what two tracers reach without looking at the sample. A sample that
    is alone in its class is left out.
    """
    order = class_labels.argsort(stable=True)
    groups = order.split(class_labels.unique(return_counts=True)[1].tolist())
    partners = torch.cat([members.roll(-1) for members in groups])
    has_partner = order != partners
    return order[has_partner], partners[has_partner]


def beam_recall(searched: Tensor, exhaustive: Tensor, k: int) -> Estimate:
    """Measure recall@k: the share of the k best examples of all that are among the k best the search found.

    Examples at the lowest finite value are ruled out (`exhaustive`) or were not looked at (`searched`), and never
    count. A query with fewer than k possible examples is asked for those it has.

    Args:
        searched: Index logits of the search, (query, train).
        exhaustive: Index logits of all examples, (query, train); at least one per query is possible.
        k: How many of the best count, at least 1; more than train means all.
    """
    wanted = _best(exhaustive, k)
    recalled = wanted & _best(searched, k)
    return mean_estimate(recalled.sum(dim=1) / wanted.sum(dim=1), seed=0)


def _best(logits: Tensor, k: int) -> Tensor:
    """Mark the k largest of every row that are above the lowest finite value, bool (query, train)."""
    values, index = logits.topk(min(k, logits.shape[1]), dim=1)
    marks = torch.zeros_like(logits, dtype=torch.bool)
    return marks.scatter(1, index, values > torch.finfo(logits.dtype).min)
