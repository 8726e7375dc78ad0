"""Attribution methods side by side: the same queries, the same subset models, the same budget to be tuned with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from provgen.build import TrainedRun
from provgen.data.dataset import ImageSet
from provgen.data.images import to_uint8, to_unit_range
from provgen.errors import InputError
from provgen.generators.closed_form import image_posterior
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS, make_training_scheduler
from provgen.models.temperatures import Tracer
from provgen.pipeline import ProvenancePipeline
from provgen.studies.faithfulness import baselines, gradients, posteriors
from provgen.studies.faithfulness.attributor import (
    ALONG,
    Attributor,
    Cost,
    Method,
    MethodLabel,
    Queries,
    Role,
)
from provgen.studies.faithfulness.credit import (
    CalibratedTrace,
    TraceFeatures,
    VarianceAttributor,
    least_alpha_bar,
    noised_steps,
    pixel_features,
)
from provgen.studies.faithfulness.retraining import QueryImages
from provgen.tracing.calibrate import NUM_INFERENCE_STEPS, AttributionScores
from provgen.tracing.gaussian_process import EVERYTHING, PIXELS_AND_GRADIENTS
from provgen.tracing.trace import NoisyImages, Recorder, trace

PROJ_DIM = 32768
"""Columns that gradients are projected to, as published; fewer parameters are kept whole."""

PATCH_SIZES = (3, 5)

NUM_TIMED = 16
"""Queries that are asked together while the clock runs."""

SAME_IMAGE = 3
"""Levels of 255 by which two samples of the same noise may differ: another machine rounds otherwise."""


def make_methods(trained: TrainedRun, folder: Path, *, num_timesteps: Sequence[int]) -> list[Method]:
    """Make every method that can explain the run of a denoiser, with gradients kept in `folder`.

    Each of `num_timesteps` that gradients are averaged over gives methods of its own.

    Raises:
        InputError: A number that does not divide the noise levels.
    """
    if bad := [steps for steps in num_timesteps if steps < 1 or NUM_TRAIN_TIMESTEPS % steps]:
        raise InputError(f"--timesteps must divide {NUM_TRAIN_TIMESTEPS}, such as 10 or 100, got {bad[0]}")
    return [
        *_pixel_methods(),
        *_posterior_methods(trained),
        *_variance_methods(trained.pipeline),
        *_gradient_methods(trained, folder, num_timesteps),
    ]


def _method(name: str, attributor: Attributor, **label: Any) -> Method:
    return Method(MethodLabel(name=name, **label), attributor)


def _pixel_methods() -> Iterator[Method]:
    yield _method("random", baselines.RandomScores(seed=0), is_reference=True, role=Role.CHANCE)
    yield _method("random of the class", baselines.RandomOfClass(seed=1), role=Role.CHANCE)
    yield _method("same class", baselines.SameClass(), role=Role.CHANCE)
    yield _method("pixel cosine", baselines.PixelCosine())
    yield _method("pixel neighbours", baselines.PixelNeighbors())
    yield _method("pixel kernel", baselines.PixelKernel(), is_reference=True)
    yield _method("pixel kernel of the class", baselines.ClassPixelKernel())


def _posterior_methods(trained: TrainedRun) -> Iterator[Method]:
    """Make posteriors, the trace before calibration among them."""
    unet, provenance = trained.pipeline.unet, trained.pipeline.provenance
    pixels = trained.data.train.images.numel()
    weights = sum(parameter.nbytes for parameter in provenance.parameters())
    network = {"uses_provenance": True, "role": Role.TRACE}
    made: dict[str, tuple[Callable[[ImageSet], posteriors.StepPosterior], int, dict[str, Any]]] = {
        "closed form": (_closed_form, pixels, {}),
        "provenance network": (lambda _: posteriors.network_steps(unet, provenance), weights, network),
    }
    for size in sorted({min(trained.settings.data.image_size, size) for size in PATCH_SIZES}):
        made[f"patches of {size}"] = (partial(_patch_posterior, patch_size=size), pixels, {})
    for name, (make_posterior, num_bytes, label) in made.items():
        for along in ALONG:
            attributor = posteriors.PosteriorAttributor(make_posterior, along=along, num_bytes=num_bytes)
            yield _method(f"{name}, {along}", attributor, along=along, **label)
    if (temperatures := trained.pipeline.temperatures) is not None:
        for name, tracer in (("closed form", Tracer.CLOSED_FORM), ("provenance network", Tracer.NETWORK)):
            make_posterior, num_bytes, label = made[name]
            for along in ALONG:
                tempered = posteriors.TemperedPosterior(
                    make_posterior, tracer, temperatures, along=along, num_bytes=num_bytes
                )
                yield _method(f"tempered {name}, {along}", tempered, along=along, **label)


def _closed_form(train: ImageSet) -> posteriors.StepPosterior:
    return posteriors.closed_form_steps(image_posterior(train, dtype=torch.float32, device=torch.device("cpu")))


def _patch_posterior(train: ImageSet, *, patch_size: int) -> posteriors.StepPosterior:
    pixels = to_unit_range(train.images)
    return posteriors.PatchPosterior(pixels, train.labels, null_label=train.num_classes, patch_size=patch_size)


def _variance_methods(pipeline: ProvenancePipeline) -> Iterator[Method]:
    """Make leave-one-out variances, the calibrated trace among them."""
    yield _method("leave-one-out variance of pixels", VarianceAttributor(pixel_features))
    for along in ALONG:
        features = TraceFeatures(pipeline=pipeline, along=along)
        for name, grid in (("pixels and gradients", PIXELS_AND_GRADIENTS), ("the provenance network", EVERYTHING)):
            yield _method(
                f"leave-one-out variance of {name}, {along}",
                VarianceAttributor(features, features.parts, grid),
                along=along,
                uses_provenance=grid is EVERYTHING,
            )
        if (credit := pipeline.credit) is not None:
            features = TraceFeatures(pipeline=pipeline, along=along, has_gradients=credit.wants_gradients)
            label = {"along": along, "uses_provenance": True, "role": Role.CALIBRATED_TRACE}
            name = "calibrated trace" if credit.config.calibration_subsets else "default trace"
            yield _method(f"{name}, {along}", CalibratedTrace(credit, features), **label)


def _gradient_methods(trained: TrainedRun, folder: Path, num_timesteps: Sequence[int]) -> Iterator[Method]:
    encode, device = trained.pipeline.denoiser.encode, trained.pipeline.device
    yield _method("embedding cosine", baselines.EmbeddingCosine(encode, device))
    for steps in num_timesteps:
        features = _gradient_features(trained, folder / f"trak-{steps}", "own", steps)
        yield _method(f"gradient dot, {steps} timesteps", gradients.GradientDot(features))
        yield _method(f"TRAK, {steps} timesteps", gradients.Trak(features))
        yield _method(f"TRAK squared, {steps} timesteps", gradients.DasWithoutResidual(features))
        features = _gradient_features(trained, folder / f"d-trak-{steps}", "zero", steps)
        yield _method(f"D-TRAK, {steps} timesteps", gradients.Trak(features))
        yield _method(f"DAS without residual, {steps} timesteps", gradients.DasWithoutResidual(features))


def _gradient_features(
    trained: TrainedRun, folder: Path, target: gradients.Target, steps: int
) -> gradients.GradientFeatures:
    unet, chosen = trained.pipeline.unet, trained.settings.generator
    scheduler = make_training_scheduler(chosen.beta_schedule, chosen.prediction)
    made = gradients.LossGradients(unet, scheduler, target=target, num_timesteps=steps, seed=0)
    return gradients.GradientFeatures(made, folder, proj_dim=PROJ_DIM if made.size > PROJ_DIM else None)


@torch.no_grad()
def trace_queries(trained: TrainedRun, queries: Mapping[str, QueryImages]) -> dict[str, Queries]:
    """Noise the queries of subset models, and sample the generated ones again to see where they came along.

    Raises:
        InputError: The run does not generate them any more.
    """
    return {kind: _traced(trained.pipeline, asked, is_generated=kind == "generated") for kind, asked in queries.items()}


def _traced(pipeline: ProvenancePipeline, queries: QueryImages, *, is_generated: bool) -> Queries:
    images = to_unit_range(queries.images)
    noisy = noised_steps(pipeline, images)
    trajectory = _sampled_steps(pipeline, queries) if is_generated else None
    return Queries(images=images, class_labels=queries.labels, noisy=noisy, trajectory=trajectory)


def _sampled_steps(pipeline: ProvenancePipeline, queries: QueryImages) -> NoisyImages:
    """Make the samples of `evaluation.sample` again, and give the steps on the way to them."""
    recorder = Recorder(least_alpha_bar=least_alpha_bar(pipeline))
    steps = pipeline.denoiser.sample(
        queries.labels.to(pipeline.device),
        null_label=pipeline.null_label,
        generator=[torch.Generator().manual_seed(number) for number in range(len(queries.labels))],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=1.0,
    )
    images = trace(steps, recorder).images
    assert images is not None, "sampling ends in images"
    if (to_uint8(images.cpu()).int() - queries.images.int()).abs().max() > SAME_IMAGE:
        raise InputError(
            "the run does not generate the queries that its subset models were asked about; was it trained "
            "further? remove its folder of subset models and run `provgen retrain` again"
        )
    return recorder.noisy_images()


@dataclass(frozen=True, kw_only=True)
class TunedScores:
    """What a method says under the setting that was chosen."""

    settings: Mapping[str, Any]
    """The setting by kind of query."""
    scores: Mapping[str, Tensor]
    """(query, train) by kind."""
    hindsight: Mapping[str, float]
    """LDS of the setting that turned out best, by kind."""
    cost: Cost
    """What the method costs."""


def tuned_scores(
    method: Attributor,
    train: ImageSet,
    queries: Mapping[str, Queries],
    choose: Callable[[str, AttributionScores[Any]], Any],
    look_back: Callable[[str, AttributionScores[Any]], float],
) -> TunedScores:
    """Fit a method, ask it under all settings, and choose one for each kind of query; the first kind is timed.

    `choose` gives a setting for the scores of a kind, and `look_back` the LDS of the one that turned out best.
    """
    start = time.perf_counter()
    method.fit(train)
    fit_seconds = time.perf_counter() - start
    settings, scores, hindsight = {}, {}, {}
    for kind, asked in queries.items():
        under_all = method.attribute(asked)
        settings[kind], hindsight[kind] = choose(kind, under_all), look_back(kind, under_all)
        scores[kind] = under_all.under(settings[kind])
    kind, timed = next((kind, asked.first(NUM_TIMED)) for kind, asked in queries.items())
    first, again = (_seconds(method, timed, settings[kind]) for _ in range(2))
    kept = method.kept()
    cost = Cost(
        fit_seconds=fit_seconds + kept.seconds + max(0.0, first - again),
        seconds_per_query=again / len(timed),
        stored_bytes=kept.num_bytes,
    )
    return TunedScores(settings=settings, scores=scores, hindsight=hindsight, cost=cost)


def _seconds(method: Attributor, queries: Queries, setting: Any) -> float:
    start = time.perf_counter()
    method.attribute(queries, setting)
    return time.perf_counter() - start
