"""Several kinds of evidence as one score: how much of each is fitted to subset models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

RIDGE = 1e-2
"""Of the fit, in units of the mean squared prediction: it shares weight out between kinds that say the same."""


@dataclass(frozen=True)
class Mixture:
    """Weights of kinds of evidence, none negative, that sum to 1."""

    weights: Mapping[str, float]

    def __call__(self, evidence: Mapping[str, Tensor]) -> Tensor:
        """Give scores (query, train) from scores of every kind that has a weight."""
        parts = [weight * standardised(evidence[name]) for name, weight in self.weights.items() if weight > 0]
        return torch.stack(parts).sum(dim=0)


def standardised(scores: Tensor) -> Tensor:
    """Give every query's scores (query, train) mean 0 and deviation 1, in float64; 0 where all are equal.

    What a random half of the examples adds up to then varies equally for all queries and kinds of evidence.
    """
    centred = scores.double() - scores.double().mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation.clamp_min(1e-300), 0.0)


def fit_mixture(evidence: Mapping[str, Tensor], masks: Tensor, outputs: Tensor) -> Mixture:
    """Fit how much of each kind predicts the outputs of subset models best, by non-negative least squares.

    Args:
        evidence: Scores (query, train) by kind.
        masks: bool (subset, train).
        outputs: (query, subset), larger where the subset model does better; every query counts the same.

    Returns:
        Equal weights where nothing predicts anything.
    """
    predicted = [_centred(standardised(scores) @ masks.double().T) for scores in evidence.values()]
    columns = torch.stack([some.flatten() for some in predicted], dim=1)
    centred = _centred(outputs.double())
    target = (centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-300)).flatten()
    count = columns.shape[1]
    scale = float((RIDGE * columns.square().sum() / count).sqrt())
    left = np.vstack([columns.numpy(), scale * np.eye(count)])
    right = np.concatenate([target.numpy(), np.zeros(count)])
    found, _ = nnls(left, right)
    total = found.sum()
    weights = found / total if total > 0 else np.full(count, 1 / count)
    return Mixture(dict(zip(evidence, map(float, weights), strict=True)))


def _centred(values: Tensor) -> Tensor:
    """Take the mean over subsets off every query."""
    return values - values.mean(dim=1, keepdim=True)
