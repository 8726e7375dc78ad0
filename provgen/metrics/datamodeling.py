"""The linear datamodeling score (LDS): whether scores predict what generators trained on subsets make of a query.

For a query, the sum of a method's scores over the examples of a subset is its prediction of how well a generator
trained on that subset alone does on the query; the LDS is Spearman's correlation of prediction and measurement over
the subsets (Park et al. 2023, arXiv 2303.14186; for diffusion Zheng et al. 2024, arXiv 2311.00500).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from provgen.metrics.statistics import Estimate, percentile_interval, to_numpy

Matrix = NDArray[np.float64]


def predicted_outputs(scores: Tensor, masks: Tensor) -> Tensor:
    """Sum the scores (query, train) of every subset's examples, bool masks (subset, train): float64 (query, subset)."""
    return scores.double() @ masks.double().T


def datamodeling_scores(predicted: Tensor, outputs: Tensor) -> Tensor:
    """Give Spearman's correlation over the subsets of predicted and measured outputs (query, subset): float64 (query,).

    A query for which either is the same for all subsets has 0: nothing is predicted. Outputs are larger where the
    subset model does better: minus its loss.
    """
    return torch.from_numpy(_spearman(to_numpy(predicted), to_numpy(outputs)))


class LdsComparison:
    """The LDS of several methods on the same queries and subset models, and the differences between them.

    Intervals are percentile intervals of a bootstrap that draws subsets and queries anew, the same for every method:
    both are samples, and differences of methods are far better known than the methods are.
    """

    def __init__(self, predicted: Mapping[str, Tensor], outputs: Tensor, *, seed: int, resamples: int) -> None:
        """Resample.

        Args:
            predicted: Predictions by method, (query, subset) each.
            outputs: Measured outputs (query, subset).
            seed: Seed of the bootstrap.
            resamples: Number of bootstrap resamples.
        """
        self.shape = tuple(outputs.shape)
        # All methods at once, (method, query, subset): a call for each would take most of the time.
        values, measured = np.stack([to_numpy(p) for p in predicted.values()]), to_numpy(outputs)
        random = np.random.default_rng(seed)
        draws = np.stack([self._draw(values, measured, random) for _ in range(resamples)], axis=1)
        scores = _spearman(values, measured).mean(axis=1)
        self.values = {name: float(score) for name, score in zip(predicted, scores, strict=True)}
        self.draws = dict(zip(predicted, draws, strict=True))

    def estimate(self, method: str) -> Estimate:
        """Give the mean LDS of a method over the queries."""
        return Estimate(self.values[method], *percentile_interval(self.draws[method]), self.shape[1])

    def difference(self, method: str, other: str) -> Estimate:
        """Give by how much the LDS of a method is larger than that of another, paired."""
        interval = percentile_interval(self.draws[method] - self.draws[other])
        return Estimate(self.values[method] - self.values[other], *interval, self.shape[1])

    def _draw(self, predicted: Matrix, outputs: Matrix, random: np.random.Generator) -> Matrix:
        """Give the mean LDS of every method in one resample, (method,)."""
        queries, subsets = (random.integers(size, size=size) for size in self.shape)
        drawn = predicted[:, queries][:, :, subsets], outputs[queries][:, subsets]
        scores: Matrix = _spearman(*drawn).mean(axis=1)
        return scores


@dataclass(frozen=True)
class NoiseCeiling:
    """The best LDS that a method can have which knows everything but the noise of training."""

    seed_correlation: float
    """Mean correlation r over the subsets between the outputs of two training seeds."""
    estimate: Estimate
    """sqrt(S r / (1 + (S - 1) r)) for the mean of S seeds; 0 where r is not positive."""


def noise_ceiling(outputs: Tensor, *, num_seeds: int, seed: int, resamples: int) -> NoiseCeiling:
    """Estimate the ceiling from the agreement of training seeds.

    Correlation with the mean of S measurements of reliability r each is attenuated by the square root of their joint
    reliability (Spearman 1910 and Brown 1910, British Journal of Psychology 3). r is the mean over queries, and the
    square root is concave: where queries differ in r, this is an upper bound of the mean of their ceilings.

    Args:
        outputs: (seed, query, subset), at least two seeds; a part of the subsets will do.
        num_seeds: S, the seeds whose mean methods are held to.
        seed: Seed of the bootstrap over subsets and queries.
        resamples: Number of bootstrap resamples.
    """
    values, random = to_numpy(outputs), np.random.default_rng(seed)
    r = _seed_correlation(values)
    draws = []
    for _ in range(resamples):
        queries, subsets = (random.integers(size, size=size) for size in values.shape[1:])
        draws.append(_ceiling(_seed_correlation(values[:, queries][:, :, subsets]), num_seeds))
    interval = percentile_interval(np.array(draws))
    return NoiseCeiling(r, Estimate(_ceiling(r, num_seeds), *interval, values.shape[2]))


def _seed_correlation(outputs: Matrix) -> float:
    """Give the mean correlation over queries and pairs of seeds; outputs are (seed, query, subset)."""
    ranks = [_standard_ranks(outputs_of_seed) for outputs_of_seed in outputs]
    return float(np.mean([(a * b).sum(axis=1).mean() for a, b in combinations(ranks, 2)]))


def _ceiling(r: float, seeds: int) -> float:
    return sqrt(seeds * r / (1 + (seeds - 1) * r)) if r > 0 else 0.0


def _spearman(first: Matrix, second: Matrix) -> Matrix:
    """Correlate the ranks of each row, the last axis, ties averaged: (..., row)."""
    correlation: Matrix = (_standard_ranks(first) * _standard_ranks(second)).sum(axis=-1)
    return correlation


def _standard_ranks(values: Matrix) -> Matrix:
    """Give ranks of each row with mean 0 and sum of squares 1; zeros where all are equal."""
    ranks = rankdata(values, axis=-1)
    ranks -= ranks.mean(axis=-1, keepdims=True)
    norms = np.linalg.norm(ranks, axis=-1, keepdims=True)
    standard: Matrix = np.divide(ranks, norms, out=np.zeros_like(ranks), where=norms > 0)
    return standard
