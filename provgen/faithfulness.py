"""Attribution methods side by side: the same queries, the same subset models, the same budget to be tuned with."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from provgen.analysis.datamodeling import datamodeling_scores, predicted_outputs
from provgen.attribution.attributor import AttributionScores, Attributor, Queries
from provgen.attribution.diffusion_tracer import DiffusionTracer
from provgen.attribution.embeddings import EmbeddingCosine
from provgen.attribution.gradients import GradientDot, GradientFeatures, Trak
from provgen.attribution.loss_gradients import LossGradients, Target
from provgen.attribution.patches import PatchPosterior
from provgen.attribution.posterior_attributor import (
    Along,
    PosteriorAttributor,
    closed_form_steps,
    network_steps,
)
from provgen.attribution.rivals import PixelCosine, PixelKernel, PixelNeighbors, RandomScores, SameClass
from provgen.attribution.tracer import Request
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.errors import InputError
from provgen.models.diffusion import make_training_scheduler
from provgen.run_folder import atomic_path
from provgen.runs import TrainedRun

SKETCH_SIZE = 32768
"""Columns that gradients are projected to, as published; fewer parameters are kept whole."""

NUM_INFERENCE_STEPS = 50

PATCH_SIZES = (3, 5)


def make_methods(
    trained: TrainedRun, folder: Path, *, num_timesteps: tuple[int, ...]
) -> dict[str, Attributor]:
    """Make every method that can explain a run.

    Args:
        trained: The run; its generator is a denoiser.
        folder: Where gradients are kept.
        num_timesteps: Noise levels that gradients are averaged over, each a method of its own.

    Raises:
        InputError: It has another kind of generator.
    """
    unet, provenance = trained.pipeline.unet, trained.pipeline.provenance
    if unet is None:
        raise InputError(
            "faithfulness is measured of diffusion models; train one with generator.kind=diffusion"
        )
    methods: dict[str, Attributor] = {
        "random": RandomScores(seed=0),
        "same class": SameClass(),
        "pixel cosine": PixelCosine(),
        "pixel neighbours": PixelNeighbors(),
        "pixel kernel": PixelKernel(),
    }
    oracle = trained.closed_form()
    pixels = trained.data.train.images.numel()
    weights = sum(parameter.nbytes for parameter in provenance.parameters())
    ways: tuple[Along, ...] = ("noised", "trajectory")
    for along in ways:
        methods[f"closed form, {along}"] = PosteriorAttributor(
            lambda _: closed_form_steps(oracle), along=along, num_bytes=pixels
        )
        methods[f"provenance network, {along}"] = PosteriorAttributor(
            lambda _: network_steps(unet, provenance), along=along, num_bytes=weights
        )
    side = trained.settings.data.image_size
    for patch_size in sorted({min(side, size) for size in PATCH_SIZES}):
        methods[f"patch posterior {patch_size}x{patch_size}, trajectory"] = PosteriorAttributor(
            partial(_patch_posterior, patch_size=patch_size), along="trajectory", num_bytes=pixels
        )
    scheduler = make_training_scheduler(trained.settings.generator.beta_schedule)
    methods["embedding cosine"] = EmbeddingCosine(unet, scheduler, seed=0)
    targets: dict[str, Target] = {"TRAK": "noise", "D-TRAK": "zero"}
    for steps in num_timesteps:
        for name, target in targets.items():
            gradients = LossGradients(unet, scheduler, target=target, num_timesteps=steps, seed=0)
            sketch_size = SKETCH_SIZE if gradients.size > SKETCH_SIZE else None
            store = folder / f"{name.lower()}-{steps}"
            features = GradientFeatures(gradients, store, sketch_size=sketch_size)
            if name == "TRAK":
                methods[f"gradient dot, {steps} timesteps"] = GradientDot(features)
            methods[f"{name}, {steps} timesteps"] = Trak(features)
    return methods


def _patch_posterior(train: ImageSet, *, patch_size: int) -> PatchPosterior:
    pixels = to_unit_range(train.images)
    return PatchPosterior(pixels, train.labels, null_label=train.num_classes, patch_size=patch_size)


@torch.no_grad()
def trace_queries(trained: TrainedRun, queries: Mapping[str, ImageSet]) -> dict[str, Queries]:
    """Noise the queries of subset models, and sample the generated ones again to see where they came along."""
    pipeline = trained.pipeline
    tracer = DiffusionTracer(pipeline.unet, pipeline.provenance, pipeline.scheduler)
    made = {}
    for kind, images in queries.items():
        clean = to_unit_range(images.images).to(pipeline.device)
        labels = images.labels.to(pipeline.device)
        trajectory = None
        if kind == "generated":
            _, trajectory = tracer.sampled(_request(labels, images.num_classes))
        noisy = tracer.noised(clean, num_inference_steps=NUM_INFERENCE_STEPS, seed=0)
        made[kind] = Queries(images=clean, class_labels=labels, noisy=noisy, trajectory=trajectory)
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
        closed_form=None,
        progress_bar=lambda steps: steps,
    )


@dataclass(frozen=True, kw_only=True)
class MethodScores:
    """What one method says, and what it costs."""

    scores: dict[str, AttributionScores]
    """By kind of query."""
    fit_seconds: float
    """Once for a training set, earlier calls included."""
    seconds_per_query: float
    """Mean over all queries, taken together; a posterior along a trajectory needs what sampling computes anyway."""
    stored_bytes: int
    """What answers need beside the generator."""


def score(method: Attributor, train: ImageSet, queries: Mapping[str, Queries]) -> MethodScores:
    """Fit a method and ask it, with a stopwatch."""
    start = time.perf_counter()
    method.fit(train)
    fitted = time.perf_counter()
    scores = {kind: method.attribute(some) for kind, some in queries.items()}
    asked = time.perf_counter() - fitted
    kept = method.kept()
    return MethodScores(
        scores=scores,
        fit_seconds=fitted - start + kept.seconds,
        seconds_per_query=asked / sum(len(some) for some in queries.values()),
        stored_bytes=kept.num_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which subset models and queries methods are tuned on, and which are reported."""

    subsets: Tensor
    """bool (subset,), true for calibration."""
    queries: Tensor
    """bool (query,), true for calibration."""

    @classmethod
    def draw(cls, num_subsets: int, num_queries: int, *, calibration: int, seed: int) -> Split:
        """Take `calibration` subsets, and the same share of the queries, at least one of either and not all.

        Raises:
            InputError: Fewer than two subsets are left to report.
        """
        if not 2 <= calibration <= num_subsets - 2:
            raise InputError(
                f"{num_subsets} subset models cannot be split into {calibration} for calibration and 2 or more to "
                "report; train more with `provgen retrain`, or choose another --calibration-subsets"
            )
        share = max(1, num_queries * calibration // num_subsets)
        generator = torch.Generator().manual_seed(seed)
        subsets, queries = (torch.randperm(n, generator=generator) for n in (num_subsets, num_queries))
        return cls(subsets=subsets < calibration, queries=queries < share)


def tune(scores: AttributionScores, masks: Tensor, outputs: Tensor, split: Split) -> str:
    """Choose the setting with the largest mean LDS on the calibration half.

    Args:
        scores: Of all queries.
        masks: bool (subset, train), of all subsets.
        outputs: (query, subset), minus the losses.
        split: What may be looked at.
    """
    wanted = outputs[split.queries][:, split.subsets]
    means = [
        float(datamodeling_scores(predicted_outputs(v[split.queries], masks[split.subsets]), wanted).mean())
        for v in scores.values
    ]
    return scores.settings[max(range(len(means)), key=means.__getitem__)]


def reported(scores: Tensor, masks: Tensor, split: Split) -> Tensor:
    """Predict the outputs that are reported, float64 (query, subset), from scores (query, train)."""
    return predicted_outputs(scores[~split.queries], masks[~split.subsets])


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What calibration chose for generated queries."""

    calibration_subsets: int
    """How many subset models were looked at."""
    settings: Mapping[str, str]
    """By method."""

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with atomic_path(path) as partial:
            partial.write_text(
                json.dumps({"schema_version": 1, **asdict(self)}, indent=1) + "\n", encoding="utf-8"
            )

    @classmethod
    def load(cls, path: Path) -> Tuned:
        """Read it.

        Raises:
            InputError: It is not there.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing; run `provgen faithfulness` first")
        content = json.loads(path.read_text(encoding="utf-8"))
        return cls(calibration_subsets=content["calibration_subsets"], settings=content["settings"])

    def require(self, methods: Sequence[str]) -> None:
        """Refuse methods that were not tuned.

        Raises:
            InputError: Names the first, and those that were.
        """
        unknown = [name for name in methods if name not in self.settings]
        if unknown:
            raise InputError(f"unknown method {unknown[0]!r}; tuned are: {'; '.join(self.settings)}")
