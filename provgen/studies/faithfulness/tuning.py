"""What methods are tuned on, what is reported of them, and ensembles of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.datamodeling import LdsComparison, datamodeling_scores, predicted_outputs
from provgen.run import atomic_path, read_json
from provgen.studies.faithfulness.attributor import Method
from provgen.tracing.calibrate import AttributionScores, S

RESAMPLES = 500
"""Resamples of the calibration part, for the standard error of a difference."""


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

        Subset models may be added later: what was calibrated on stays the same. `subsets` are the numbers of those
        whose models there are, int64 (subset,), and `left` says how many must be left to report.

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


def tune(scores: Mapping[str, AttributionScores[S]], masks: Tensor, outputs: Mapping[str, Tensor], split: Split) -> S:
    """Choose a setting by the LDS on the calibration part, mean over kinds of queries.

    The setting with the largest is not taken, but the one nearest to a method's default that is not worse by more than
    a standard error of the difference (the one-standard-error rule of Breiman et al. 1984, Classification and
    Regression Trees): the calibration part is small, and the best of many is so by luck.

    Masks are bool (subset, train) of all subsets, and outputs (query, subset) minus the losses, by kind.
    """
    predicted = {
        kind: [predicted_outputs(values, masks[split.subsets]) for values in of_kind.values[:, split.queries]]
        for kind, of_kind in scores.items()
    }
    measured = {kind: outputs[kind][split.queries][:, split.subsets] for kind in scores}
    of_any = next(iter(scores.values()))
    means = [
        float(np.mean([datamodeling_scores(predicted[kind][n], measured[kind]).mean() for kind in scores]))
        for n in range(len(of_any.settings))
    ]
    best = max(range(len(means)), key=lambda n: means[n])
    errors = _standard_errors(predicted, measured, best)
    good = [n for n, mean in enumerate(means) if means[best] - mean <= errors[n]]
    return of_any.settings[min(good, key=lambda n: (of_any.distance_to_default[n], -means[n]))]


def best_in_hindsight(scores: AttributionScores[Any], masks: Tensor, outputs: Tensor, split: Split) -> float:
    """Give the LDS of the setting that is best on the reported part: what no tuning could surpass.

    Masks are bool (subset, train), and outputs (query, subset) minus the losses of the queries that `scores` are of.
    """
    measured = outputs[~split.queries][:, ~split.subsets]
    reported = (predicted_outputs(values, masks[~split.subsets]) for values in scores.values[:, ~split.queries])
    return max(float(datamodeling_scores(predicted, measured).mean()) for predicted in reported)


def _standard_errors(
    predicted: Mapping[str, Sequence[Tensor]], measured: Mapping[str, Tensor], best: int
) -> list[float]:
    """Give the standard error of by how much the best setting is better than each."""
    draws = []
    for kind, outputs in measured.items():
        by_setting = {str(n): values for n, values in enumerate(predicted[kind])}
        # The same seed draws the same subsets for all kinds.
        draws.append(LdsComparison(by_setting, outputs, seed=0, resamples=RESAMPLES).draws)
    return [float(np.mean([of_kind[str(best)] - of_kind[n] for of_kind in draws], axis=0).std()) for n in draws[0]]


def fields_of(setting: Any) -> dict[str, Any]:
    """Give the fields of a setting as JSON has them."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(setting)))
    return fields


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What calibration chose for generated queries, and what it may have looked at."""

    calibration_queries: Sequence[int]
    """Numbers of the queries."""
    timesteps: Sequence[int]
    """Numbers of noise levels, each of which is a gradient method of its own."""
    settings: Mapping[str, Mapping[str, Any]]
    """Fields of the chosen setting by name of the method."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with atomic_path(path) as partial:
            partial.write_text(json.dumps({"schema_version": 2, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """Read it.

        Raises:
            InputError: It is not there, or of an earlier version.
        """
        content = read_json(path, "run `provgen faithfulness` first") if path.is_file() else {}
        if content.pop("schema_version", None) != 2 or content.keys() != cls.__dataclass_fields__.keys():
            raise InputError(f"{path} is missing, damaged or of an earlier version; run `provgen faithfulness` first")
        return cls(**content)

    def with_added(self, settings: Mapping[str, Mapping[str, Any]], timesteps: Sequence[int]) -> Tuned:
        """Add methods, in the place of those of the same names, with the numbers of noise levels they may have."""
        levels = sorted({*self.timesteps, *timesteps})
        return replace(self, timesteps=levels, settings={**self.settings, **settings})

    def require(self, methods: Sequence[str]) -> None:
        """Refuse methods that were not tuned.

        Raises:
            InputError: Names the first, and those that were.
        """
        unknown = [name for name in methods if name not in self.settings]
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}; tuned are: {'; '.join(self.settings)}")

    def setting(self, method: Method) -> Any:
        """Give the chosen setting of a method.

        Raises:
            InputError: The method has no such setting any more.
        """
        for setting in method.attributor.settings:
            if fields_of(setting) == self.settings[method.name]:
                return setting
        raise InputError(
            f"{method.name} has another setting since `provgen faithfulness`, perhaps by another calibration; "
            "run that first"
        )

    def ranking_key(self, method: str) -> str:
        """Give text that tells the chosen setting of a method from all others, for what is kept of its ranking."""
        return json.dumps(self.settings[method], sort_keys=True)


RIDGE = 1e-2
"""Ridge of the fit, in units of the mean squared prediction: methods that say the same share their weight."""


@dataclass(frozen=True)
class Ensemble:
    """Weights of methods, none negative, that sum to 1: stacking by non-negative least squares."""

    weights: Mapping[str, float]

    def __call__(self, scores: Mapping[str, Tensor]) -> Tensor:
        """Give scores (query, train) from those of every method that has a weight."""
        weighted = [weight * standardised(scores[name]) for name, weight in self.weights.items() if weight > 0]
        return torch.stack(weighted).sum(dim=0)

    def __str__(self) -> str:
        ranked = sorted(self.weights.items(), key=lambda item: -item[1])
        return "; ".join(f"{weight:.2f} {name}" for name, weight in ranked if weight >= 0.005)


def standardised(scores: Tensor) -> Tensor:
    """Give every query's scores (query, train) mean 0 and deviation 1, in float64; 0 where all are equal.

    What a random half of the examples adds up to then varies equally for all queries and methods.
    """
    centred = scores.double() - scores.double().mean(dim=1, keepdim=True)
    deviation = centred.square().mean(dim=1, keepdim=True).sqrt()
    return torch.where(deviation > 0, centred / deviation.clamp_min(1e-300), 0.0)


def fit_ensemble(scores: Mapping[str, Tensor], masks: Tensor, outputs: Tensor) -> Ensemble:
    """Fit the weights of methods that predict the outputs of subset models best, by non-negative least squares.

    Scores are (query, train) by method, masks bool (subset, train), and outputs (query, subset), larger where the
    subset model does better. Every query counts the same. Weights are equal where nothing predicts anything.
    """
    predicted = [_centred(standardised(values) @ masks.double().T) for values in scores.values()]
    columns = torch.stack([values.flatten() for values in predicted], dim=1)
    centred = _centred(outputs.double())
    target = (centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-300)).flatten()
    count = columns.shape[1]
    scale = float((RIDGE * columns.square().sum() / count).sqrt())
    left = np.vstack([columns.numpy(), scale * np.eye(count)])
    solution, _ = nnls(left, np.concatenate([target.numpy(), np.zeros(count)]))
    total = solution.sum()
    weights = solution / total if total > 0 else np.full(count, 1 / count)
    return Ensemble(dict(zip(scores, map(float, weights), strict=True)))


def _centred(values: Tensor) -> Tensor:
    """Take the mean over subsets off every query."""
    return values - values.mean(dim=1, keepdim=True)
