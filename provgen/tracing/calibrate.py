"""Fitting a credit head on the subset models of a run: the process first, then the weights of noise levels."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from provgen.build import TrainedRun
from provgen.models.credit import CreditHead
from provgen.studies.faithfulness.attributor import AttributionScores, Queries, steps_from_middle
from provgen.studies.faithfulness.credit import Progress, VarianceCredit, no_progress
from provgen.studies.faithfulness.methods import credit_coordinates
from provgen.tracing.gaussian_process import EVERYTHING, Process
from provgen.tracing.trace import INVERSE_VARIANCE

LEVEL_POWERS = (0.0, INVERSE_VARIANCE, 2.0)
"""Of alpha_bar / (1 - alpha_bar) in the weights of clear levels: all alike, by noise, nearly the cleanest alone."""

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
    """Fit the head whose process is chosen under the usual weights of levels, and its weights of levels under that.

    Args:
        trained: A run with a denoiser and a provenance network.
        queries: By kind.
        choose: What judges.
        calibration_subsets: How many subset models that looks at.
        progress_bar: Over processes.
    """
    method = _method(trained, INVERSE_VARIANCE)
    name = choose(method.attribute_all(queries, progress_bar=progress_bar))
    process = next(process for process in method.processes if process.name == name)
    power = float(choose(_scores_by_power(trained, queries, process)))
    head = _method(trained, power).credit_head(process)
    head.register_to_config(level_power=power, calibration_subsets=calibration_subsets)
    return head


def _scores_by_power(
    trained: TrainedRun, queries: Mapping[str, Queries], process: Process
) -> dict[str, AttributionScores]:
    """Ask one process under all weights of levels, by kind of query."""
    found = [_method(trained, power).attribute_all(queries, process.name) for power in LEVEL_POWERS]
    return {
        kind: AttributionScores(
            values=torch.cat([some[kind].values for some in found]),
            settings=tuple(f"{power:g}" for power in LEVEL_POWERS),
            distance_to_default=steps_from_middle(len(LEVEL_POWERS)),
        )
        for kind in queries
    }


def _method(trained: TrainedRun, level_power: float) -> VarianceCredit:
    """Make variance credit on everything that a trace sees, and fit it."""
    coordinates = credit_coordinates(trained.pipeline, "trajectory", level_power=level_power)
    method = VarianceCredit(coordinates, coordinates.parts, EVERYTHING)
    method.fit(trained.data.train)
    return method
