"""Attribution methods side by side: the same queries, the same subset models, the same budget to be tuned with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from provgen.build import TrainedRun
from provgen.data.dataset import ImageSet
from provgen.data.images import to_uint8, to_unit_range
from provgen.errors import InputError
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.models.diffusion import NUM_TRAIN_TIMESTEPS, make_training_scheduler
from provgen.pipeline import ProvenancePipeline
from provgen.studies.faithfulness.attributor import AttributionScores, Attributor, Cost, Queries
from provgen.studies.faithfulness.baselines import (
    EmbeddingCosine,
    PixelCosine,
    PixelKernel,
    PixelNeighbors,
    RandomScores,
    SameClass,
)
from provgen.studies.faithfulness.credit import (
    CalibratedTrace,
    NetworkCoordinates,
    VarianceCredit,
    pixel_coordinates,
)
from provgen.studies.faithfulness.gradients import (
    DasWithoutResidual,
    GradientDot,
    GradientFeatures,
    LossGradients,
    Target,
    Trak,
)
from provgen.studies.faithfulness.posteriors import (
    ALONG,
    Along,
    PatchPosterior,
    PosteriorAttributor,
    StepPosterior,
    closed_form_steps,
    network_steps,
)
from provgen.studies.faithfulness.retraining import QueryImages
from provgen.tracing.diffusion_tracer import DiffusionTracer
from provgen.tracing.gaussian_process import EVERYTHING, PIXELS_AND_GRADIENTS
from provgen.tracing.trace import INVERSE_VARIANCE
from provgen.tracing.tracer import Request

PROJ_DIM = 32768
"""Columns that gradients are projected to, as published; fewer parameters are kept whole."""

NUM_INFERENCE_STEPS = 50

PATCH_SIZES = (3, 5)

NUM_TIMED = 16
"""Queries that are asked together while the clock runs."""

SAME_IMAGE = 3
"""Levels of 255 by which two samples of the same noise may differ: another machine rounds otherwise."""


def make_methods(trained: TrainedRun, folder: Path, *, num_timesteps: tuple[int, ...]) -> dict[str, Attributor]:
    """Make every method that can explain a run.

    Args:
        trained: The run; its generator is a denoiser.
        folder: Where gradients are kept.
        num_timesteps: Noise levels that gradients are averaged over, each a method of its own.

    Raises:
        InputError: A number that does not divide the noise levels.
    """
    if bad := [steps for steps in num_timesteps if steps < 1 or NUM_TRAIN_TIMESTEPS % steps]:
        raise InputError(f"--timesteps must divide {NUM_TRAIN_TIMESTEPS}, such as 10 or 100, got {bad[0]}")
    methods: dict[str, Attributor] = {
        "random": RandomScores(seed=0),
        "same class": SameClass(),
        "pixel cosine": PixelCosine(),
        "pixel neighbours": PixelNeighbors(),
        "pixel kernel": PixelKernel(),
    }
    for name, (make_posterior, num_bytes) in _posteriors(trained).items():
        for along in ALONG:
            methods[f"{name}, {along}"] = PosteriorAttributor(make_posterior, along=along, num_bytes=num_bytes)
    methods |= _variance_methods(trained)
    return methods | _gradient_methods(trained, folder, num_timesteps)


def _variance_methods(trained: TrainedRun) -> dict[str, Attributor]:
    pipeline = trained.pipeline
    methods: dict[str, Attributor] = {"variance credit of pixels": VarianceCredit(pixel_coordinates)}
    for along in ALONG:
        coordinates = credit_coordinates(pipeline, along)
        for name, grid in (
            ("pixels and gradients", PIXELS_AND_GRADIENTS),
            ("the provenance network", EVERYTHING),
        ):
            method = VarianceCredit(coordinates, coordinates.parts, grid)
            methods[f"variance credit of {name}, {along}"] = method
        if (credit := pipeline.credit) is not None:
            asked = credit_coordinates(
                pipeline,
                along,
                finds_gradients=credit.wants_gradients,
                level_power=credit.config.level_power,
            )
            methods[f"calibrated trace, {along}"] = CalibratedTrace(credit, asked)
    return methods


def credit_coordinates(
    pipeline: ProvenancePipeline,
    along: Along,
    *,
    finds_gradients: bool = True,
    level_power: float = INVERSE_VARIANCE,
) -> NetworkCoordinates:
    """Give everything that a credit head may ask for, or all but gradients."""
    tracer = DiffusionTracer(
        pipeline.unet,
        pipeline.provenance,
        pipeline.scheduler,
        finds_coordinates=True,
        finds_gradients=finds_gradients,
    )
    return NetworkCoordinates(tracer, along=along, num_inference_steps=NUM_INFERENCE_STEPS, level_power=level_power)


def _posteriors(trained: TrainedRun) -> dict[str, tuple[Callable[[ImageSet], StepPosterior], int]]:
    """Name all posteriors: how each is made for a training set, and the bytes it needs."""
    unet, provenance = trained.pipeline.unet, trained.pipeline.provenance
    pixels = trained.data.train.images.numel()
    weights = sum(parameter.nbytes for parameter in provenance.parameters())
    made: dict[str, tuple[Callable[[ImageSet], StepPosterior], int]] = {
        "closed form": (_closed_form, pixels),
        "provenance network": (lambda _: network_steps(unet, provenance), weights),
    }
    for size in sorted({min(trained.settings.data.image_size, size) for size in PATCH_SIZES}):
        made[f"patches of {size}"] = (partial(_patch_posterior, patch_size=size), pixels)
    return made


def _closed_form(train: ImageSet) -> StepPosterior:
    pixels = to_unit_range(train.images)
    return closed_form_steps(ClosedFormPosterior(pixels, train.labels, null_label=train.num_classes))


def _gradient_methods(trained: TrainedRun, folder: Path, num_timesteps: tuple[int, ...]) -> dict[str, Attributor]:
    unet = trained.pipeline.unet
    scheduler = make_training_scheduler(trained.settings.generator.beta_schedule)
    methods: dict[str, Attributor] = {
        "embedding cosine": EmbeddingCosine(trained.pipeline.tracer, trained.pipeline.device)
    }
    targets: dict[str, Target] = {"TRAK": "noise", "D-TRAK": "zero"}
    for steps in num_timesteps:
        for name, target in targets.items():
            gradients = LossGradients(unet, scheduler, target=target, num_timesteps=steps, seed=0)
            proj_dim = PROJ_DIM if gradients.size > PROJ_DIM else None
            store = folder / f"{name.lower()}-{steps}"
            features = GradientFeatures(gradients, store, proj_dim=proj_dim)
            if name == "TRAK":
                methods[f"gradient dot, {steps} timesteps"] = GradientDot(features)
            methods[f"{name}, {steps} timesteps"] = Trak(features)
            methods[f"{name}, {steps} timesteps, squared"] = DasWithoutResidual(features)
    return methods


def _patch_posterior(train: ImageSet, *, patch_size: int) -> PatchPosterior:
    pixels = to_unit_range(train.images)
    return PatchPosterior(pixels, train.labels, null_label=train.num_classes, patch_size=patch_size)


@torch.no_grad()
def trace_queries(trained: TrainedRun, queries: Mapping[str, QueryImages]) -> dict[str, Queries]:
    """Noise the queries of subset models, and sample the generated ones again to see where they came along.

    Raises:
        InputError: The run does not generate them any more.
    """
    pipeline = trained.pipeline
    tracer = DiffusionTracer(pipeline.unet, pipeline.provenance, pipeline.scheduler)
    made = {}
    for kind, some in queries.items():
        clean, trajectory = to_unit_range(some.images), None
        if kind == "generated":
            again, trajectory = tracer.sampled(_request(some.labels.to(pipeline.device), pipeline.null_label))
            if (to_uint8(again.cpu()).int() - some.images.int()).abs().max() > SAME_IMAGE:
                raise InputError(
                    "the run does not generate the queries that its subset models were asked about; was it trained "
                    "further? remove its folder of subset models and run `provgen retrain` again"
                )
        noisy = tracer.noised(clean.to(pipeline.device), num_inference_steps=NUM_INFERENCE_STEPS, seed=0)
        made[kind] = Queries(
            images=clean,
            class_labels=some.labels,
            noisy=noisy.cpu(),
            trajectory=None if trajectory is None else trajectory.cpu(),
        )
    return made


def _request(labels: Tensor, null_label: int) -> Request:
    """Ask for the samples of `evaluation.sample`."""
    return Request(
        class_labels=labels,
        null_label=null_label,
        generator=[torch.Generator().manual_seed(number) for number in range(len(labels))],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=1.0,
        is_traced=False,
        trace_every=1,
        closed_form=None,
        progress_bar=lambda steps: steps,
    )


@dataclass(frozen=True, kw_only=True)
class TunedScores:
    """What a method says under the setting that was chosen."""

    settings: Mapping[str, str]
    """By kind of query."""
    scores: Mapping[str, Tensor]
    """(query, train) by kind."""
    cost: Cost


def tuned_scores(
    method: Attributor,
    train: ImageSet,
    queries: Mapping[str, Queries],
    choose: Callable[[str, AttributionScores], str],
) -> TunedScores:
    """Fit a method, ask it under all settings, and choose one for each kind of query; with a stopwatch.

    Args:
        method: Not fitted yet.
        train: The training set.
        queries: By kind; the first kind is timed.
        choose: Gives a setting, for the scores of a kind.
    """
    start = time.perf_counter()
    method.fit(train)
    fit_seconds = time.perf_counter() - start
    settings, scores = {}, {}
    for kind, some in queries.items():
        found = method.attribute(some)
        settings[kind] = choose(kind, found)
        scores[kind] = found.of(settings[kind])
    kind, some = next(iter(queries.items()))
    first, again = (_seconds(method, some.first(NUM_TIMED), settings[kind]) for _ in range(2))
    kept = method.kept()
    cost = Cost(
        fit_seconds=fit_seconds + kept.seconds + max(0.0, first - again),
        seconds_per_query=again / min(NUM_TIMED, len(some)),
        stored_bytes=kept.num_bytes,
    )
    return TunedScores(settings=settings, scores=scores, cost=cost)


def _seconds(method: Attributor, queries: Queries, setting: str) -> float:
    start = time.perf_counter()
    method.attribute(queries, setting)
    return time.perf_counter() - start
