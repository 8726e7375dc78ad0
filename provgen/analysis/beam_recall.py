"""What a search of the best cells alone misses."""

from __future__ import annotations

import torch
from torch import Tensor

from provgen.analysis.statistics import Estimate, mean_estimate


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
