"""A credit head is that of the process and the weights of levels that are found best."""

from functools import partial

import pytest
import torch

from provgen import build
from provgen.metrics.datamodeling import predicted_outputs
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.credit import VarianceCredit
from provgen.studies.faithfulness.methods import credit_coordinates, trace_queries
from provgen.studies.faithfulness.tuning import Split, tune
from provgen.tracing import calibrate
from provgen.tracing.gaussian_process import EVERYTHING, Kernel, Process

NARROW = Process(Kernel(0.7, 0.5, (0.5, 0.5), 0.25), 1.0)
"""Where an image lies counts for much: so do weights of levels."""


@pytest.fixture(scope="module")
def traced(root_of):
    """A trained run, and queries of both kinds."""
    trained = build.open_trained_run(root_of("diffusion"), torch.device("cpu"))
    return trained, trace_queries(trained, retraining.make_queries(trained, 6))


def scores_of(trained, queries, power, process=NARROW):
    """Ask for one process at one weighting of levels."""
    coordinates = credit_coordinates(trained.pipeline, "trajectory", level_power=power)
    method = VarianceCredit(coordinates, coordinates.parts, EVERYTHING)
    method.fit(trained.data.train)
    found = method.attribute_all(queries, process.name)
    return {kind: some.of(process.name) for kind, some in found.items()}


@pytest.mark.parametrize("power", [0, 2])
def test_what_is_chosen_is_what_the_head_gives(traced, power):
    trained, queries = traced
    asked, shown = [], []

    def choose(scores):
        asked.append(scores)
        return NARROW.name if len(asked) == 1 else f"{power}"

    def progress_bar(processes):
        shown.extend(processes)
        return processes

    head = calibrate.fit_credit_head(trained, queries, choose, calibration_subsets=7, progress_bar=progress_bar)
    assert shown == EVERYTHING.processes
    assert (head.config.level_power, head.config.calibration_subsets) == (power, 7)
    assert head.setting == f"{NARROW.name}, levels by (a / (1 - a))^{power}"
    processes, levels = asked
    for kind, some in queries.items():
        # Weights of levels are compared under the process that was chosen, the usual ones among them.
        assert (levels[kind].settings, levels[kind].distance_to_default) == (("0", "1", "2"), (1, 0, 1))
        torch.testing.assert_close(levels[kind].of("1"), processes[kind].of(NARROW.name))
        torch.testing.assert_close(levels[kind].of(f"{power}"), scores_of(trained, queries, power)[kind])
        assert not torch.allclose(levels[kind].of("0"), levels[kind].of("2"), rtol=1e-2)
        at = credit_coordinates(trained.pipeline, "trajectory", level_power=power)(some)
        by_head = head(at.to(head.dtype), some.class_labels)
        torch.testing.assert_close(by_head, levels[kind].of(f"{power}"), atol=1e-5, rtol=1e-3)


def test_weights_of_levels_that_subset_models_follow_are_found(traced):
    """Planted: what subset models do is what the scores under equal weights predict."""
    trained, queries = traced
    masks = torch.rand(400, len(trained.data.train), generator=torch.Generator().manual_seed(3)) < 0.5
    true = scores_of(trained, queries, 0.0)
    outputs = {kind: predicted_outputs(some, masks) for kind, some in true.items()}
    split = Split.first(torch.arange(400), 6, calibration=400, left=0)
    judge = partial(tune, masks=masks, outputs=outputs, split=split)
    head = calibrate.fit_credit_head(
        trained,
        queries,
        lambda scores: NARROW.name if NARROW.name in next(iter(scores.values())).settings else judge(scores),
        calibration_subsets=400,
    )
    assert head.config.level_power == 0
