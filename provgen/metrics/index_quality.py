"""How well the provenance network predicts the index, beside the best anything could do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from provgen.metrics.statistics import Estimate, flat_row, mean_estimate

LEVELS = (0.02, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Noise levels alpha_bar that are looked at; the nearest timestep of the schedule is taken."""


@dataclass(frozen=True, kw_only=True)
class IndexQuality:
    """Index metrics at one noise level, each beside its closed-form ceiling.

    The parent of x_t is not drawn but averaged over the closed-form posterior: `top1` is the probability that
    the network's first choice is the parent. That has the expectation of the plain hit rate, less variance, and
    never exceeds its ceiling by chance.
    """

    alpha_bar: float
    rows: str
    """`conditional` or `unconditional`: whether the class was given, to the network and to the ceiling alike."""
    cross_entropy: float
    """Mean over queries, nats."""
    cross_entropy_ceiling: float
    """Least cross-entropy: the conditional entropy H(i | x_t), nats."""
    kl_gap: Estimate
    """`cross_entropy` minus its ceiling: mean KL divergence from closed form to network, nats."""
    top1: Estimate
    top1_ceiling: float
    top5: Estimate
    top5_ceiling: float
    query_gaps: Tensor
    """KL divergence of every query, nats, (query,)."""

    def as_row(self) -> dict[str, Any]:
        """Give the metrics as a flat JSON-able dict; estimates become NAME, NAME_low and NAME_high."""
        return {"n": len(self.query_gaps), **flat_row(vars(self))}


def index_hits(log_probs: Tensor, posterior: Tensor, mixing: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Measure each query: the columns that `index_quality` summarises, (query, 6).

    The network's index log-probabilities and the closed form are (query, train), the former float64. `mixing` is the
    label mixing of the targets that the network was trained towards.
    """
    target = posterior if mixing is None else mixing(posterior)
    five = min(5, posterior.shape[1])
    chosen = posterior.gather(1, log_probs.topk(five, dim=1).indices)
    best = posterior.topk(five, dim=1).values
    cross_entropy, entropy = -(target * log_probs).sum(dim=1), torch.special.entr(target).sum(dim=1)
    return torch.stack([cross_entropy, entropy, chosen[:, 0], best[:, 0], chosen.sum(dim=1), best.sum(dim=1)], dim=1)


def index_quality(alpha_bar: float, rows: str, hits: Tensor) -> IndexQuality:
    """Summarise what `index_hits` found at one noise level."""
    cross_entropy, floor, top1, top1_ceiling, top5, top5_ceiling = hits.T
    gaps = cross_entropy - floor
    return IndexQuality(
        alpha_bar=alpha_bar,
        rows=rows,
        cross_entropy=float(cross_entropy.mean()),
        cross_entropy_ceiling=float(floor.mean()),
        kl_gap=mean_estimate(gaps, seed=0),
        top1=mean_estimate(top1, seed=0),
        top1_ceiling=float(top1_ceiling.mean()),
        top5=mean_estimate(top5, seed=0),
        top5_ceiling=float(top5_ceiling.mean()),
        query_gaps=gaps,
    )


def mean_kl_gap(qualities: Sequence[IndexQuality], rows: str) -> Estimate:
    """Mean KL gap in nats over all levels of some rows, bootstrapped over queries."""
    gaps = [quality.query_gaps for quality in qualities if quality.rows == rows]
    return mean_estimate(torch.stack(gaps).mean(dim=0), seed=0)
