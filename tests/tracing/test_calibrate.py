"""A credit head is that of the process and the weights of levels that are found best."""

from functools import partial

import pytest
import torch

from provgen import build
from provgen.metrics.datamodeling import predicted_outputs
from provgen.models.credit import Calibration, GaussianProcess, Kernel
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.credit import TraceFeatures, traced_images
from provgen.studies.faithfulness.methods import trace_queries
from provgen.studies.faithfulness.tuning import Split, tune
from provgen.tracing import calibrate
from provgen.tracing.calibrate import LevelPower
from provgen.tracing.gaussian_process import EVERYTHING

NARROW = GaussianProcess(Kernel(0.7, 0.5, (0.5, 0.5), 0.25), 1.0)
"""Features count for much here, and so do weights of levels."""


@pytest.fixture(scope="module")
def traced(root_of):
    """A trained run, and queries of both kinds."""
    trained = build.open_trained_run(root_of("diffusion"), torch.device("cpu"))
    return trained, trace_queries(trained, retraining.make_queries(trained, 6))


def scores_of(trained, queries, power, process=NARROW):
    """Ask for one process at one weighting of levels."""
    traced = traced_images(trained.pipeline, trained.data.train, queries, power)
    by_kind = traced.variance().scores(traced.queries, {process: 0})
    return {kind: scores.under(process) for kind, scores in by_kind.items()}


@pytest.mark.parametrize("power", [0, 2])
def test_what_is_chosen_is_what_the_head_gives(traced, power):
    trained, queries = traced
    asked, shown = [], []
    images = partial(traced_images, trained.pipeline, trained.data.train, queries)

    def choose(scores):
        asked.append(scores)
        return NARROW if len(asked) == 1 else LevelPower(power)

    def progress_bar(processes):
        shown.extend(processes)
        return processes

    head = calibrate.fit_credit_head(images, choose, calibration_subsets=7, progress_bar=progress_bar)
    assert shown == list(EVERYTHING.settings)
    assert head.calibration == Calibration(NARROW, power)
    assert head.config.calibration_subsets == 7
    assert head.config.calibration_seconds > 0
    processes, levels = asked
    for kind, asked_about in queries.items():
        # Weights of levels are compared under the process that was chosen, the default ones among them.
        distances = dict(zip(levels[kind].settings, levels[kind].distance_to_default, strict=True))
        assert distances == {LevelPower(0): 1, LevelPower(1): 0, LevelPower(2): 1}
        under_power = levels[kind].under(LevelPower(power))
        torch.testing.assert_close(levels[kind].under(LevelPower(1)), processes[kind].under(NARROW))
        torch.testing.assert_close(under_power, scores_of(trained, queries, power)[kind])
        assert not torch.allclose(levels[kind].values[0], levels[kind].values[2], rtol=1e-2)
        features = TraceFeatures(pipeline=trained.pipeline, along="trajectory", level_power=power)(asked_about)
        by_head = head(features.to(head.dtype), asked_about.class_labels)
        torch.testing.assert_close(by_head, under_power, atol=1e-5, rtol=1e-3)


def test_weights_of_levels_that_subset_models_follow_are_found(traced):
    """Planted: what subset models do is what the scores under equal weights predict."""
    trained, queries = traced
    masks = torch.rand(400, len(trained.data.train), generator=torch.Generator().manual_seed(3)) < 0.5
    true = scores_of(trained, queries, 0.0)
    outputs = {kind: predicted_outputs(some, masks) for kind, some in true.items()}
    split = Split.first(torch.arange(400), 6, calibration=400, left=0)
    judge = partial(tune, masks=masks, outputs=outputs, split=split)
    head = calibrate.fit_credit_head(
        partial(traced_images, trained.pipeline, trained.data.train, queries),
        lambda scores: NARROW if NARROW in next(iter(scores.values())).settings else judge(scores),
        calibration_subsets=400,
    )
    assert head.calibration.level_power == 0
