"""What a sweep over the number of training images shows, as rows: one for every size and training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.analysis.memorization import MEMORIZED, share_memorized
from provgen.analysis.statistics import Estimate, auroc, mean_estimate, stratified_auroc
from provgen.analysis.transition import halves_agreement
from provgen.attribution.trajectory import late_level

Measured = Mapping[str, Tensor]
"""What `sweep.measure` gave of one model."""

PREDICTORS = ("late_entropy", "entropy", "top", "commitment")
"""Of a trace: what may tell a copy."""

FEWEST = 5
"""Copies, and samples that are none, that a prediction is judged on."""


@dataclass(frozen=True, kw_only=True)
class SweepCurves:
    """Everything a sweep shows."""

    points: Mapping[tuple[int, int], Mapping[str, Estimate]]
    """By size and training step, then by name (`curve_point`)."""
    predictions: Mapping[int, Mapping[str, Estimate]]
    """AUROC of copies at the last step by size, then by predictor; sizes with too few of either kind are left out."""
    within: Mapping[int, Mapping[str, Estimate]]
    """The same among samples of one generator and class."""
    overall: Mapping[str, Estimate]
    """AUROC by predictor, of all sizes together at the last step."""
    early: Mapping[int, Sequence[tuple[float, Estimate]]]
    """AUROC of the entropy at every sampling step by size, with a_t."""
    redrawing: Mapping[int, Mapping[float, tuple[Estimate, float]]]
    """What drawing again does (`redraw_effect`), by size, then by bound."""


def curve_point(
    models: Sequence[Measured], halves: Sequence[tuple[Measured, Measured]]
) -> dict[str, Estimate]:
    """Summarise the models of one size at one step.

    Intervals are over samples and images of these very models, and not over trainings.

    Args:
        models: All of them; their samples are pooled, and held-out images, which are the same for all, averaged.
        halves: Pairs that share no training image.
    """
    point = {"share_memorized": share_memorized(torch.cat([model["ratio"] for model in models]))}
    held = torch.stack([model["holdout_ratio"] < MEMORIZED for model in models]).double().mean(dim=0)
    point["share_memorized_holdout"] = mean_estimate(held, seed=0)
    if halves:
        first, second = (torch.cat([pair[n]["images"] for pair in halves]).flatten(1) / 127.5 for n in (0, 1))
        labels = _strata([pair[0] for pair in halves])
        point["halves_agreement"] = halves_agreement(first, second, labels)
    train = torch.cat([model["train_losses"] for model in models]).mean(dim=1)
    holdout = torch.stack([model["holdout_losses"] for model in models]).mean(dim=(0, 2))
    point["train_loss"], point["holdout_loss"] = (
        mean_estimate(values, seed=0) for values in (train, holdout)
    )
    point["loss_ratio"] = _ratio(holdout, train)
    point["divergence"] = mean_estimate(torch.cat([m["divergence"].mean(dim=1) for m in models]), seed=0)
    for name in ("entropy", "closed_form_entropy"):
        if all(name in model for model in models):
            point[name] = mean_estimate(torch.cat([model[name] for model in models]), seed=0)
    for name in ("commitment", "closed_form_commitment"):
        if all(name in model for model in models):
            steps = torch.cat([model[name] for model in models]).double()
            if (steps >= 0).any():
                point[name] = mean_estimate(steps[steps >= 0], seed=0)
    return point


def copy_prediction(models: Sequence[Measured], *, within: bool = False) -> dict[str, Estimate]:
    """Say how well each predictor of a trace tells copies under the 1/3 rule from other samples: AUROC by name.

    Entropy and commitment count as telling where they are small, the top posterior where it is large. Nothing where
    there are too few of either kind.

    Args:
        models: Their samples are pooled.
        within: Compare samples of the same generator and class only. A class of few training images has little entropy
            whatever its samples are, and more copies.
    """
    is_copy = torch.cat([model["ratio"] for model in models]) < MEMORIZED
    if min(int(is_copy.sum()), int((~is_copy).sum())) < FEWEST:
        return {}
    found: dict[str, Estimate] = {}
    for name in [f"{who}{what}" for who in ("", "closed_form_") for what in PREDICTORS]:
        if all("entropy" in model for model in models):
            scores = torch.cat([_telling(name, model) for model in models])
            if not within:
                found[name] = auroc(scores[is_copy], scores[~is_copy], seed=0)
            elif (estimate := stratified_auroc(scores, is_copy, _strata(models), seed=0)) is not None:
                found[name] = estimate
    return found


def _strata(models: Sequence[Measured]) -> Tensor:
    """Number the classes of all models, each model's apart: int64 (query,)."""
    classes = 1 + max(int(model["labels"].max()) for model in models)
    return torch.cat([model["labels"] + classes * number for number, model in enumerate(models)])


def early_prediction(models: Sequence[Measured]) -> list[tuple[float, Estimate]]:
    """Say how well the entropy at every sampling step tells copies: (a_t, AUROC), from noise to image."""
    is_copy = torch.cat([model["ratio"] for model in models]) < MEMORIZED
    if min(int(is_copy.sum()), int((~is_copy).sum())) < FEWEST or not all(
        "step_entropy" in model for model in models
    ):
        return []
    entropies = -torch.cat([model["step_entropy"] for model in models])
    levels = models[0]["signal"].tolist()
    return [
        (level, auroc(entropies[is_copy, n], entropies[~is_copy, n], seed=0, resamples=200))
        for n, level in enumerate(levels)
    ]


def redrawn_names(below: float) -> tuple[str, str]:
    """Name what is measured of samples that were drawn again below a bound: distance ratios and redraws."""
    return f"ratio_below_{below:g}", f"redraws_below_{below:g}"


def redraw_effect(models: Sequence[Measured], *, below: float) -> tuple[Estimate, float]:
    """Give the share of copies among samples that were drawn again below a bound, and the draws a sample took."""
    ratios, redraws = (torch.cat([model[name] for model in models]) for name in redrawn_names(below))
    return share_memorized(ratios), 1 + float(redraws.double().mean())


def _telling(name: str, model: Measured) -> Tensor:
    """Give scores that are large where a copy is likely."""
    if name.endswith("late_entropy"):
        return -_late_entropy(model, name.removesuffix("late_entropy"))
    values = model[name]
    if name.endswith("top"):
        return values
    # Never committed is later than any step.
    return -values.double().masked_fill(values < 0, torch.inf) if name.endswith("commitment") else -values


def _late_entropy(model: Measured, who: str = "") -> Tensor:
    return model[f"{who}step_entropy"][:, late_level(model["signal"].tolist())]


def _ratio(holdout: Tensor, train: Tensor, *, resamples: int = 1000) -> Estimate:
    """Give the ratio of two means with a bootstrap interval."""
    generator = torch.Generator().manual_seed(0)
    draws = [
        side[torch.randint(len(side), (resamples, len(side)), generator=generator)].mean(dim=1)
        for side in (holdout, train)
    ]
    low, high = (
        (draws[0] / draws[1]).double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    )
    return Estimate(float(holdout.mean() / train.mean()), low, high, min(len(holdout), len(train)))
