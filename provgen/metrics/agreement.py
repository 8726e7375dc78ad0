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

    Comparing a tracer's answer with the other tracer's answer for another sample of the class is the agreement
    to be had without looking at the sample. A sample that is alone in its class has no partner and is left out.
    """
    classes = [(class_labels == label).nonzero().flatten() for label in class_labels.unique()]
    groups = [members for members in classes if len(members) > 1] or [torch.empty(0, dtype=torch.int64)]
    return torch.cat(groups), torch.cat([members.roll(-1) for members in groups])


def beam_recall(searched: Tensor, exhaustive: Tensor, k: int) -> Estimate:
    """Measure recall@k: the share of the k best examples of all that are among the k best the search found.

    Both are index logits (query, train). Examples at the lowest finite value are ruled out (`exhaustive`) or were not
    looked at (`searched`), and never count. A query with fewer than k possible examples is asked for those it has.
    """
    wanted = _best(exhaustive, k)
    recalled = wanted & _best(searched, k)
    return mean_estimate(recalled.sum(dim=1) / wanted.sum(dim=1), seed=0)


def _best(logits: Tensor, k: int) -> Tensor:
    """Mark the k largest of every row that are above the lowest finite value, bool (query, train)."""
    values, index = logits.topk(min(k, logits.shape[1]), dim=1)
    is_possible = values > torch.finfo(logits.dtype).min
    return torch.zeros_like(logits, dtype=torch.bool).scatter(1, index, is_possible)
