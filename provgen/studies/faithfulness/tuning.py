"""What methods are tuned on, what is reported of them, and ensembles of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.datamodeling import LdsComparison, datamodeling_scores, predicted_outputs
from provgen.run import atomic_path
from provgen.studies.faithfulness.attributor import AttributionScores

RESAMPLES = 500
"""Of the calibration part, for the standard error of a difference."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which subset models and queries methods are tuned on, and which are reported."""

    subsets: Tensor
    """bool (subset,), true for calibration."""
    queries: Tensor
    """bool (query,), true for calibration."""

    @classmethod
    def first(cls, subsets: Tensor, num_queries: int, *, calibration: int, left: int = 2) -> Split:
        """Take the first `calibration` subsets, random halves as any, and a quarter of the queries, drawn once.

        Subset models may be added later: what was calibrated on stays the same.

        Args:
            subsets: Numbers of the subsets whose models there are, int64 (subset,).
            num_queries: All queries.
            calibration: At least 2.
            left: How many subsets must be left to report.

        Raises:
            InputError: There are too few.
        """
        is_first = subsets < calibration
        if calibration < 2 or int(is_first.sum()) < calibration or int((~is_first).sum()) < left:
            raise InputError(
                f"{len(subsets)} subset models cannot be split into the first {calibration} for calibration and {left} "
                "or more to report; train more with `provgen retrain`, or choose another --calibration-subsets"
            )
        order = torch.randperm(num_queries, generator=torch.Generator().manual_seed(0))
        return cls(subsets=is_first, queries=order < max(1, num_queries // 4))


def tune(scores: Mapping[str, AttributionScores], masks: Tensor, outputs: Mapping[str, Tensor], split: Split) -> str:
    """Choose by the LDS on the calibration part, mean over kinds of queries.

    The setting with the largest is not taken, but the one nearest to a method's usual setting that is not worse by
    more than a standard error of the difference (the one-standard-error rule of Breiman et al. 1984, Classification
    and Regression Trees): the calibration part is small, and the best of many is so by luck.

    Args:
        scores: Of all queries, by kind.
        masks: bool (subset, train), of all subsets.
        outputs: (query, subset), minus the losses, by kind.
        split: What may be looked at.
    """
    predicted = {kind: _predictions(scores[kind], masks, split) for kind in scores}
    wanted = {kind: outputs[kind][split.queries][:, split.subsets] for kind in scores}
    some = next(iter(scores.values()))
    means = {
        name: float(np.mean([datamodeling_scores(predicted[kind][name], wanted[kind]).mean() for kind in scores]))
        for name in some.settings
    }
    best = max(means, key=lambda name: means[name])
    errors = _standard_errors(predicted, wanted, best)
    good = [name for name in some.settings if means[best] - means[name] <= errors[name]]
    steps = dict(zip(some.settings, some.distance_to_default, strict=True))
    return min(good, key=lambda name: (steps[name], -means[name]))


def _standard_errors(
    predicted: Mapping[str, Mapping[str, Tensor]], wanted: Mapping[str, Tensor], best: str
) -> dict[str, float]:
    """Give the standard error of by how much the best setting is better than each, by name."""
    # The same seed draws the same subsets for all kinds.
    draws = [LdsComparison(predicted[kind], wanted[kind], seed=0, resamples=RESAMPLES).draws for kind in wanted]
    return {name: float(np.mean([found[best] - found[name] for found in draws], axis=0).std()) for name in draws[0]}


def _predictions(scores: AttributionScores, masks: Tensor, split: Split) -> dict[str, Tensor]:
    """Give what every setting predicts of the calibration part, (query, subset) by name."""
    seen = scores.values[:, split.queries]
    return {
        name: predicted_outputs(some, masks[split.subsets]) for name, some in zip(scores.settings, seen, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What calibration chose for generated queries, and what it may have looked at."""

    calibration_queries: Sequence[int]
    """Numbers of the queries."""
    timesteps: Sequence[int]
    """Of gradient methods."""
    settings: Mapping[str, str]
    """By method."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        content = {
            "schema_version": 1,
            "calibration_queries": list(self.calibration_queries),
            "timesteps": list(self.timesteps),
            "settings": dict(self.settings),
        }
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """Read it.

        Raises:
            InputError: It is not there.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing; run `provgen faithfulness` first")
        content = json.loads(path.read_text(encoding="utf-8"))
        names = ("calibration_queries", "timesteps", "settings")
        return cls(**{name: content[name] for name in names})

    def require(self, methods: Sequence[str]) -> None:
        """Refuse methods that were not tuned.

        Raises:
            InputError: Names the first, and those that were.
        """
        unknown = [name for name in methods if name not in self.settings]
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}; tuned are: {'; '.join(self.settings)}")


RIDGE = 1e-2
"""Of the fit, in units of the mean squared prediction: it shares weight out between kinds that say the same."""


@dataclass(frozen=True)
class Ensemble:
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


def fit_ensemble(evidence: Mapping[str, Tensor], masks: Tensor, outputs: Tensor) -> Ensemble:
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
    return Ensemble(dict(zip(evidence, map(float, weights), strict=True)))


def _centred(values: Tensor) -> Tensor:
    """Take the mean over subsets off every query."""
    return values - values.mean(dim=1, keepdim=True)
