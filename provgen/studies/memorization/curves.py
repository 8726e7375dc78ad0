"""A sweep over the number of training images as curves, with where they cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log

import torch
from torch import Tensor

from provgen.metrics.copying import MEMORIZED, share_memorized
from provgen.metrics.statistics import Estimate, auroc, mean_estimate, mean_over_seeds, ratio_estimate, stratified_auroc


def halves_agreement(first: Tensor, second: Tensor, class_labels: Tensor) -> Estimate:
    """Measure how alike two generators are that share no training image, by images of the same noise.

    Kadkhodaie et al. 2024 (arXiv 2310.02557). It is 1 minus the distance of the two images of the same noise, in units
    of the mean distance of images of different noises of the same class: 1 for equal images, 0 for no more than that.
    Images are (query, feature), of the same noises and classes in the same order; labels are int64 (query,).
    """
    distances = torch.cdist(first.double(), second.double(), compute_mode="donot_use_mm_for_euclid_dist")
    is_other = ~torch.eye(len(first), dtype=torch.bool)
    of_class = is_other & (class_labels[:, None] == class_labels)
    is_other = of_class if of_class.any() else is_other  # one image of each class
    return mean_estimate(1 - distances.diagonal() / distances[is_other].mean(), seed=0)


def crossing(sizes: Sequence[float], values: Sequence[float], level: float) -> float | None:
    """Give the size at which a curve first crosses a level, from either side; None if never.

    It is interpolated in the logarithm of the size. Sizes (size,) rise; values are (size,).
    """
    for (size, value), (next_size, next_value) in pairwise(zip(sizes, values, strict=True)):
        if value == level:
            return float(size)
        if (value - level) * (next_value - level) <= 0 and value != next_value:
            share = (level - value) / (next_value - value)
            return exp(log(size) + share * (log(next_size) - log(size)))
    return float(sizes[-1]) if len(values) and values[-1] == level else None


Measured = Mapping[str, Tensor]
"""Arrays that `sweep.measure` gave of one model, by name."""

PREDICTORS = ("late_entropy", "entropy", "top", "commitment")
"""Numbers of a trace, by either tracer, that may tell a copy."""

SHARED_PREDICTORS = ("octaves", "explained")
"""Numbers that belong to no tracer: the logarithm of a sample's own temperature, and what the best mixture explains."""

LARGE_TELLS = ("top", "explained")
"""Endings of the names of those that are large where a copy is likely."""

FEWEST = 5
"""Least number of copies, and of samples that are none, that a prediction is judged on."""

FEWEST_MODELS = 3
"""Trainings of one size from which on intervals are over trainings (Student's t)."""


@dataclass(frozen=True, kw_only=True)
class SweepCurves:
    """Everything that a sweep shows."""

    points: Mapping[tuple[int, int], Mapping[str, Estimate]]
    """Summaries by size and training step, then by name (`curve_point`)."""
    predictions: Mapping[int, Mapping[str, Estimate]]
    """AUROC of copies at the last step by size, then by predictor; sizes with too few of either kind are left out."""
    within: Mapping[int, Mapping[str, Estimate]]
    """The same among samples of one generator and class."""
    overall: Mapping[str, Estimate]
    """AUROC by predictor, of all sizes together at the last step."""
    early: Mapping[int, Sequence[tuple[float, Estimate]]]
    """AUROC of the entropy at every sampling step by size, with alpha_bar."""
    resampling: Mapping[int, Mapping[str, tuple[Estimate, Estimate]]]
    """Share of copies left and draws of a sample (`resampling_effect`), by size, then by bound."""


def curve_point(models: Sequence[Measured], halves: Sequence[tuple[Measured, Measured]]) -> dict[str, Estimate]:
    """Summarise the models of one size at one step; `halves` are pairs of them that share no training image.

    Intervals are over trainings if there are `FEWEST_MODELS`, else over samples and images of these very models.
    """
    point = {
        "share_memorized": _share_below([model["ratio"] for model in models]),
        "share_memorized_holdout": _share_below([model["holdout_ratio"] for model in models]),
    }
    if halves and all("images" in model for pair in halves for model in pair):
        point["halves_agreement"] = _agreement(halves)
    train, holdout = ([model[name] for model in models] for name in ("train_loss", "holdout_loss"))
    point |= {"train_loss": _mean(train), "holdout_loss": _mean(holdout), "loss_ratio": _ratio(holdout, train)}
    point["divergence"] = _mean([model["divergence"] for model in models])
    for name in ("entropy", "closed_form_entropy", "octaves", "explained"):
        if all(name in model for model in models):
            point[name] = _mean([model[name] for model in models])
    for name in ("commitment", "closed_form_commitment"):
        if all(name in model for model in models):
            steps = [model[name][model[name] >= 0] for model in models]  # -1 for samples that never commit
            if committed := [of_model for of_model in steps if len(of_model)]:
                point[name] = _mean(committed)
    return point


def copy_prediction(models: Sequence[Measured], *, within: bool = False, pooled: bool = False) -> dict[str, Estimate]:
    """Measure how well each predictor of a trace tells copies under the 1/3 rule from other samples: AUROC by name.

    Entropy, temperature and commitment count as telling where they are small, the top posterior and the explained share
    where they are large. Predictors are left out where they were not measured, or there are too few of either kind.

    Args:
        models: Models of one size, or of several sizes that are pooled.
        within: Whether to compare samples of the same generator and class only. A class of few training images has
            little entropy whatever its samples are, and more copies.
        pooled: Whether to compare samples of different generators too, with an interval over samples.
    """
    if not all("entropy" in model for model in models):
        return {}
    judge, predictions = _pooled_auroc if pooled else _auroc, {}
    names = (f"{tracer}{predictor}" for tracer in ("", "closed_form_") for predictor in PREDICTORS)
    for name in (name for name in (*names, *SHARED_PREDICTORS) if all(name in model for model in models)):
        scores = [_telling(name, model) for model in models]
        if (estimate := judge(models, scores, within=within, resamples=1000)) is not None:
            predictions[name] = estimate
    return predictions


def early_prediction(models: Sequence[Measured]) -> list[tuple[float, Estimate]]:
    """Measure how well the entropy at every sampling step tells copies: (alpha_bar, AUROC), from noise to image."""
    if not all("step_entropy" in model for model in models):
        return []
    predictions = []
    for step, alpha_bar in enumerate(models[0]["alpha_bar"].tolist()):
        scores = [-model["step_entropy"][:, step] for model in models]
        if (estimate := _auroc(models, scores, within=False, resamples=200)) is not None:
            predictions.append((alpha_bar, estimate))
    return predictions


RATIO, RESAMPLINGS = "ratio_below_", "resamplings_below_"
"""Beginnings of the names of what is measured of resampled samples; a bound follows."""


def bounds_of(model: Measured) -> list[str]:
    """List the bounds of the late entropy below which samples of a model were resampled.

    `1%` is the entropy that this share of held-out images are below; a mere number is nats.
    """
    bounds = [name.removeprefix(RATIO) for name in model if name.startswith(RATIO)]
    return sorted(bounds, key=lambda bound: float(bound.rstrip("%")))


def resampling_effect(models: Sequence[Measured], bound: str) -> tuple[Estimate, Estimate]:
    """Give the share of copies among samples that were resampled below a bound, and the draws a sample took."""
    return (
        _share_below([model[RATIO + bound] for model in models]),
        _mean([1 + model[RESAMPLINGS + bound].double() for model in models]),
    )


def _telling(name: str, model: Measured) -> Tensor:
    """Give scores that are large where a copy is likely."""
    values = model[name]
    if name.endswith(LARGE_TELLS):
        return values
    # Never committed is later than any step.
    return -values.double().masked_fill(values < 0, torch.inf) if name.endswith("commitment") else -values


def _mean(by_model: Sequence[Tensor]) -> Estimate:
    """Give the mean: with an interval over trainings where there are enough, else over what was measured of them."""
    if len(by_model) < FEWEST_MODELS:
        return mean_estimate(torch.cat(list(by_model)), seed=0)
    return mean_over_seeds([float(values.double().mean()) for values in by_model])


def _share_below(by_model: Sequence[Tensor]) -> Estimate:
    """Give the share of copies, with the wider ends of the exact interval over images and that over trainings."""
    pooled = share_memorized(torch.cat(list(by_model)))
    if len(by_model) < FEWEST_MODELS:
        return pooled
    means = _mean([ratios < MEMORIZED for ratios in by_model])
    low, high = min(pooled.low, means.low), max(pooled.high, means.high)
    return _within_bounds(Estimate(means.value, low, high, means.n))


def _within_bounds(share: Estimate) -> Estimate:
    """Cut an interval to what a share or an AUROC can be."""
    return Estimate(share.value, max(0.0, share.low), min(1.0, share.high), share.n)


def _agreement(halves: Sequence[tuple[Measured, Measured]]) -> Estimate:
    """Compare what two halves make of the same noise."""

    def agree(pairs: Sequence[tuple[Measured, Measured]]) -> Estimate:
        first, second = (torch.cat([pair[n]["images"] for pair in pairs]).flatten(1) / 127.5 for n in (0, 1))
        return halves_agreement(first, second, _strata([pair[0] for pair in pairs]))

    if len(halves) < FEWEST_MODELS:
        return agree(halves)
    return mean_over_seeds([agree([pair]).value for pair in halves])


def _ratio(above: Sequence[Tensor], below: Sequence[Tensor]) -> Estimate:
    """Give the ratio of two means, each of values by model."""
    if len(above) >= FEWEST_MODELS:
        return mean_over_seeds([float(a.mean() / b.mean()) for a, b in zip(above, below, strict=True)])
    # Held-out images are the same for all models, training images are not.
    return ratio_estimate(torch.stack(list(above)).mean(dim=0), torch.cat(list(below)))


def _auroc(models: Sequence[Measured], scores: Sequence[Tensor], *, within: bool, resamples: int) -> Estimate | None:
    """Measure how well scores tell copies from other samples; None where there are too few of either kind.

    Where enough models have both kinds, the mean of theirs with an interval over trainings; else of all pooled.
    """
    each = [
        _pooled_auroc([model], [scores_of_model], within=within, resamples=10)
        for model, scores_of_model in zip(models, scores, strict=True)
    ]
    values = [estimate.value for estimate in each if estimate is not None]
    if len(values) < FEWEST_MODELS:
        return _pooled_auroc(models, scores, within=within, resamples=resamples)
    return _within_bounds(mean_over_seeds(values))


def _pooled_auroc(
    models: Sequence[Measured], scores: Sequence[Tensor], *, within: bool, resamples: int
) -> Estimate | None:
    is_copy, pooled = torch.cat([model["ratio"] for model in models]) < MEMORIZED, torch.cat(list(scores))
    if min(int(is_copy.sum()), int((~is_copy).sum())) < FEWEST:
        return None
    if within:
        return stratified_auroc(pooled, is_copy, _strata(models), resamples=resamples)
    return auroc(pooled[is_copy], pooled[~is_copy], seed=0, resamples=resamples)


def _strata(models: Sequence[Measured]) -> Tensor:
    """Number the classes of all models, each model's apart: int64 (query,)."""
    classes = 1 + max(int(model["labels"].max()) for model in models)
    return torch.cat([model["labels"] + classes * number for number, model in enumerate(models)])
