"""Fitting a credit head on the subset models of a run: the process first, then the weights of noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from provgen.attribution.attributor import AttributionScores, Queries, steps_from_middle
from provgen.attribution.credit_process import EVERYTHING, Process
from provgen.attribution.trajectory import INVERSE_VARIANCE
from provgen.attribution.variance_credit import Progress, VarianceCredit, no_progress
from provgen.faithfulness import credit_coordinates
from provgen.models.credit import CreditHead
from provgen.runs import TrainedRun

LEVEL_POWERS = (0.0, INVERSE_VARIANCE, 2.0)
"""Of a_t / (1 - a_t) in the weights of clear levels: all alike, by their noise, and nearly the cleanest alone."""

Choose = Callable[[Mapping[str, AttributionScores]], str]
"""Gives a setting, for scores by kind of query."""


def fit_credit_head(
    trained: TrainedRun,
    queries: Mapping[str, Queries],
    choose: Choose,
    *,
    calibration_subsets: int,
    progress_bar: Progress = no_progress,
) -> CreditHead:
    """Fit the head whose process and weights of levels are chosen, each with the others as usual.

    Args:
        trained: A run with a denoiser and a provenance network.
        queries: By kind.
        choose: What judges.
        calibration_subsets: How many subset models that looks at.
        progress_bar: Over processes.
    """
    process = _chosen_process(trained, queries, choose, progress_bar)
    methods = {f"{power:g}": _method(trained, power) for power in LEVEL_POWERS}
    found = [method.attribute_all(queries, process.name) for method in methods.values()]
    scores = {
        kind: AttributionScores(
            values=torch.cat([some[kind].values for some in found]),
            settings=tuple(methods),
            steps_from_usual=steps_from_middle(len(methods)),
        )
        for kind in queries
    }
    power = choose(scores)
    return methods[power].credit_head(
        process, level_power=float(power), calibration_subsets=calibration_subsets
    )


def _chosen_process(
    trained: TrainedRun, queries: Mapping[str, Queries], choose: Choose, progress_bar: Progress
) -> Process:
    method = _method(trained, INVERSE_VARIANCE)
    name = choose(method.attribute_all(queries, progress_bar=progress_bar))
    return next(process for process in method.processes if process.name == name)


def _method(trained: TrainedRun, level_power: float) -> VarianceCredit:
    """Make variance credit on everything that a trace sees, and fit it."""
    coordinates = credit_coordinates(trained.pipeline, "trajectory", level_power=level_power)
    method = VarianceCredit(coordinates, coordinates.parts, EVERYTHING)
    method.fit(trained.data.train)
    return method
