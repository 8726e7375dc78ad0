"""A credit head is that of the process that is found best, or of the default one, and gives what traces see."""

from functools import partial

import pytest
import torch

from provgen import build
from provgen.data.images import to_unit_range
from provgen.metrics.datamodeling import predicted_outputs
from provgen.models.credit import GaussianProcess, Kernel
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.credit import TraceFeatures, traced_images
from provgen.studies.faithfulness.methods import trace_queries
from provgen.studies.faithfulness.tuning import Split, tune
from provgen.tracing import calibrate
from provgen.tracing.calibrate import AttributionScores, default_credit_head
from provgen.tracing.gaussian_process import DEFAULT_PROCESS, EVERYTHING, FeatureParts, FittedKernel
from provgen.tracing.trace import CreditFeatures, trace

NARROW = GaussianProcess(Kernel(0.7, 0.5, (0.5, 0.5), 0.25), 1.0)
"""Features and gradients count for much here."""


@pytest.fixture(scope="module")
def run(root_of):
    """A trained run, and queries of both kinds."""
    trained = build.open_trained_run(root_of("diffusion"), torch.device("cpu"))
    return trained, trace_queries(trained, retraining.make_queries(trained, 6))


@pytest.fixture(scope="module")
def traced(run):
    """What traces see of its training images and of the queries."""
    trained, queries = run
    return traced_images(trained.pipeline, trained.data.train, queries)


def test_what_is_chosen_is_what_the_head_gives(run, traced):
    trained, queries = run
    asked, shown = [], []

    def choose(scores):
        asked.append(scores)
        return NARROW

    def progress_bar(processes):
        shown.extend(processes)
        return processes

    head = calibrate.fit_credit_head(traced, choose, calibration_subsets=7, progress_bar=progress_bar)
    assert shown == list(EVERYTHING.settings)
    assert head.process == NARROW
    assert head.config.calibration_subsets == 7
    assert head.config.calibration_seconds > 0
    (scores,) = asked
    for kind, asked_about in queries.items():
        assert scores[kind].settings == tuple(EVERYTHING.settings)
        features = TraceFeatures(pipeline=trained.pipeline, along="trajectory")(asked_about)
        by_head = head(features.to(head.dtype), asked_about.class_labels)
        torch.testing.assert_close(by_head, scores[kind].under(NARROW), atol=1e-5, rtol=1e-3)


def test_the_process_that_subset_models_follow_is_found(traced):
    """Planted: what subset models do is what the scores under one process predict."""
    true = traced.variance().scores(traced.queries, {NARROW: 0})
    num_examples = len(traced.train.labels)
    masks = torch.rand(400, num_examples, generator=torch.Generator().manual_seed(3)) < 0.5
    outputs = {kind: predicted_outputs(some.under(NARROW), masks) for kind, some in true.items()}
    split = Split.first(torch.arange(400), 6, calibration=400, left=0)
    judge = partial(tune, masks=masks, outputs=outputs, split=split)

    def few(scores):
        """Leave ten others to choose from, the default among them; all of them take seconds."""
        others = [process for process in scores.settings if process != NARROW]
        kept = (DEFAULT_PROCESS, NARROW, *others[::27])
        rows = [scores.settings.index(process) for process in kept]
        distances = tuple(scores.distance_to_default[row] for row in rows)
        return AttributionScores(values=scores.values[rows], settings=kept, distance_to_default=distances)

    head = calibrate.fit_credit_head(
        traced, lambda scores: judge({kind: few(some) for kind, some in scores.items()}), calibration_subsets=400
    )
    assert head.process == NARROW
    assert head.wants_gradients


@pytest.mark.parametrize("kind", ["diffusion", "vae", "none"])
def test_the_default_head_is_that_of_what_the_network_sees_of_the_training_images(kind, trained_of, monkeypatch):
    trained = trained_of(kind)
    train, pipeline = trained.data.train, trained.pipeline
    monkeypatch.setattr(calibrate, "FEATURE_BATCH", 7)  # in parts that do not divide the training set
    head = default_credit_head(trained.generator, pipeline.provenance, train)
    assert (head.config.calibration_subsets, head.process, head.wants_gradients) == (0, DEFAULT_PROCESS, False)
    null, look = torch.full((len(train),), train.num_classes), CreditFeatures(pipeline.provenance)
    steps = trained.generator.renoise(to_unit_range(train.images), train.labels, num_inference_steps=50, seed=0)
    with torch.no_grad():
        trace(steps, look)
    parts = FeatureParts((16, 64))  # the embedding of the tiny network, and 8x8 pixels
    features, process = look.features().double(), DEFAULT_PROCESS
    fitted = FittedKernel(features, train.labels, process.kernel, null_label=train.num_classes, parts=parts)
    for labels in (train.labels, null):
        expected = fitted.credit(features, labels, process.ridge).float()
        torch.testing.assert_close(head(look.features(), labels), expected, atol=1e-4, rtol=1e-3)
        # It is the one that was saved with the run.
        torch.testing.assert_close(pipeline.credit(look.features(), labels), expected, atol=1e-4, rtol=1e-3)
