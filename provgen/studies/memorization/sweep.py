"""One generator of a sweep over the number of training images: its images, what it is trained on, what is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provgen import evaluation
from provgen.build import RunData
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.splits import stratified_subset
from provgen.errors import InputError
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.losses import generator_losses
from provgen.metrics.copying import distance_ratio
from provgen.metrics.neighbors import distinct_rows, nearest
from provgen.pipeline import ProvenancePipeline
from provgen.settings import Settings
from provgen.studies.jobs import ResultStore, require_no_npz
from provgen.studies.memorization.curves import (
    RATIO,
    RESAMPLINGS,
    Measured,
    SweepCurves,
    bounds_of,
    copy_prediction,
    curve_point,
    early_prediction,
    resampling_effect,
)
from provgen.tracing.attribution import Attribution, Mixtures
from provgen.tracing.calibrate import NUM_INFERENCE_STEPS
from provgen.tracing.temperatures import OwnTemperature
from provgen.tracing.trace import late_level, trace
from provgen.training.trainer import CoTrainer

MAX_LOSSES = 200
"""Training images, and held-out ones, that losses are measured on."""

RESAMPLED_BELOW = (0.01, 0.05, 0.25)
"""Shares of the held-out images that have less late entropy than samples that are kept."""

Arrays = dict[str, Any]
"""NumPy arrays by name."""


@dataclass(frozen=True, order=True)
class SweepModel:
    """One generator."""

    size: int
    """Training images."""
    half: int
    """0, or 1 for images that the first half of this size and seed has none of."""
    seed: int
    """Of the images and of the training."""

    def __str__(self) -> str:
        return f"{self.size} images, half {self.half}, seed {self.seed}"


def plan(sizes: Sequence[int], seeds: int, *, num_train: int, num_classes: int) -> list[SweepModel]:
    """List all models: two halves of every size that leaves room for them, small sizes first.

    Raises:
        InputError: A size that is no number of training images, or leaves classes without any.
    """
    least = max(2, num_classes)
    if bad := [size for size in sizes if not least <= size <= num_train]:
        raise InputError(
            f"--size must be {least} to {num_train}, an image of each class to all training images, got {bad[0]}"
        )
    return [
        SweepModel(size, half, seed)
        for seed in range(seeds)
        for size in sorted(set(sizes))
        for half in range(2 if 2 * size <= num_train else 1)
    ]


def images_of(labels: Tensor, model: SweepModel) -> Tensor:
    """Choose a model's training images in the proportions of the classes, bool (train,)."""
    chosen, first = torch.zeros(2, len(labels), dtype=torch.bool)
    both = stratified_subset(labels, min(2 * model.size, len(labels)), model.seed)
    first[both[stratified_subset(labels[both], model.size, model.seed)]] = True
    chosen[both] = True
    mask: Tensor = first if model.half == 0 else chosen & ~first
    return mask


def own_settings(settings: Settings, model: SweepModel) -> Settings:
    """Give the settings of one model."""
    return replace(settings, training=replace(settings.training, seed=model.seed))


def measure(trainer: CoTrainer, data: RunData, *, num_images: int, is_last: bool) -> Arrays:
    """Generate with a trainer's averaged weights, trace, and measure losses.

    Returns:
        By name: `images`, `labels` and `ratio` (query,) of samples, `holdout_ratio` (image,), losses and divergence
        (image,); of the traces `entropy` and `commitment` (query,) of the network, and with `closed_form_` before them
        of the closed form. At the last step also `top` and `late_entropy` (query,) of both, the network's
        `step_entropy` (query, step) and `alpha_bar` (step,), and ratios and redraws of samples that were resampled
        (`curves.bounds_of`). Of samples also `explained` and `octaves` (query,), binary logarithms of own temperatures.
    """
    pipeline = evaluation.make_pipeline(trainer, data)
    sampled = evaluation.sample(pipeline, data, count=num_images)
    arrays: dict[str, Tensor] = {
        "images": sampled.images,
        "labels": torch.arange(num_images) % max(1, data.train.num_classes),
        "ratio": _ratios(sampled.images, data.train),
        "holdout_ratio": _ratios(_subset(data.holdout).images, data.train),
        "explained": Mixtures(data.train, pipeline.device).explain(to_unit_range(sampled.images)).share,
        "octaves": _own_octaves(pipeline.denoiser, data, num_images),
    }
    for name, attribution in (("", sampled.attribution), ("closed_form_", sampled.closed_form)):
        if attribution is not None:
            traced = _trace(attribution, pipeline.window, is_last=is_last)
            arrays |= {f"{name}{key}": values for key, values in traced.items()}
    if sampled.attribution is not None and is_last:
        arrays |= _at_every_step(sampled.attribution, pipeline.generator.alpha_bars(NUM_INFERENCE_STEPS))
        arrays |= _resampled(pipeline, data, num_images)
    for name, images in (("train", data.train), ("holdout", data.holdout)):
        losses = generator_losses(pipeline.denoiser, _subset(images), draws=evaluation.LOSS_DRAWS, seed=0)
        arrays[f"{name}_loss"] = losses.mean(dim=1)
    by_step = evaluation.divergence_by_step(pipeline.denoiser, data.train, _subset(data.train))
    arrays["divergence"] = torch.stack(list(by_step.values()), dim=1).mean(dim=1)
    return {name: values.cpu().numpy() for name, values in arrays.items()}


def _own_octaves(generator: DiffusionGenerator, data: RunData, count: int) -> Tensor:
    """Give the logarithm of every sample's own temperature to base 2, (query,), along the trajectories of `sample`."""
    train, device = data.train, generator.network.device
    closed_form = generator.closed_form(train, dtype=torch.float32, device=device)
    classes = evaluation.classes_in_turn(train, count, is_conditional=True)
    labels = torch.tensor([train.num_classes if label is None else label for label in classes], device=device)
    own = OwnTemperature(Mixtures(train, device), closed_form)
    steps = generator.sample(
        labels,
        null_label=train.num_classes,
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=1.0,
    )
    trace(steps, own)
    return own.octaves()


def _resampled(pipeline: ProvenancePipeline, data: RunData, count: int) -> dict[str, Tensor]:
    """Sample again under every bound of the late entropy: ratios and redraws (query,), by names that end in it."""
    arrays: dict[str, Tensor] = {}
    for share in RESAMPLED_BELOW:
        below, bound = evaluation.late_entropy_limit(pipeline, data.holdout, share), f"{share:.0%}"
        again = evaluation.sample(pipeline, data, count=count, resample_below=below)
        arrays |= {RATIO + bound: _ratios(again.images, data.train), RESAMPLINGS + bound: again.resamplings}
    return arrays


def _ratios(images: Tensor, train: ImageSet) -> Tensor:
    distinct = distinct_rows(to_unit_range(train.images).flatten(1))
    return distance_ratio(nearest(to_unit_range(images).flatten(1), distinct, 2))


def _at_every_step(attribution: Attribution, alpha_bars: Tensor) -> dict[str, Tensor]:
    """Give entropies at all sampling steps; those that are too noisy to be traced have that of the first that is not.

    Models have windows of their own, and are compared at the same steps.
    """
    traced = attribution.step_entropy
    before = traced[:, :1].expand(-1, len(alpha_bars) - traced.shape[1])
    return {"step_entropy": torch.cat([before, traced], dim=1), "alpha_bar": alpha_bars}


def _trace(attribution: Attribution, window: tuple[float, float], *, is_last: bool) -> dict[str, Tensor]:
    trace = {"entropy": attribution.entropy, "commitment": attribution.commitment_step}
    if is_last:
        late = late_level(attribution.alpha_bar.tolist(), window)
        trace |= {"top": attribution.posterior[:, 0], "late_entropy": attribution.step_entropy[:, late]}
    return trace


def _subset(images: ImageSet) -> ImageSet:
    return images.select(stratified_subset(images.labels, MAX_LOSSES, 0))


def curves(measured: Mapping[SweepModel, Mapping[int, Measured]]) -> SweepCurves:
    """Summarise models by the training steps at which they were measured, which are the same for all of them."""
    points, last = {}, {}
    for size in sorted({model.size for model in measured}):
        models = {model: by_step for model, by_step in measured.items() if model.size == size}
        pairs = [
            (model, second) for model in models if (second := replace(model, half=1)) in models and model.half == 0
        ]
        for step in next(iter(models.values())):
            last[size] = [by_step[step] for by_step in models.values()]
            halves = [(models[first][step], models[second][step]) for first, second in pairs]
            points[size, step] = curve_point(last[size], halves)
    predictions = {size: copy_prediction(of_size) for size, of_size in last.items()}
    early = {size: early_prediction(of_size) for size, of_size in last.items()}
    return SweepCurves(
        points=points,
        predictions={size: by_name for size, by_name in predictions.items() if by_name},
        within={size: copy_prediction(of_size, within=True) for size, of_size in last.items() if predictions[size]},
        overall=copy_prediction([model for of_size in last.values() for model in of_size], pooled=True),
        early={size: by_level for size, by_level in early.items() if by_level},
        resampling={
            size: {bound: resampling_effect(of_size, bound) for bound in bounds_of(of_size[0])}
            for size, of_size in last.items()
            if all("entropy" in model for model in of_size)
        },
    )


class SweepFolder:
    """fingerprint.json and measured/, a store with a row for every model and step it was measured at."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._store = ResultStore(root / "measured", ("size", "half", "seed", "step"))

    def save(self, model: SweepModel, step: int, arrays: Arrays) -> None:
        """Write what was measured."""
        self._store.save({**asdict(model), "step": step, **arrays})

    def measured(self) -> set[tuple[SweepModel, int]]:
        """Read which models have been measured at which steps."""
        require_no_npz(self.root / "measured")
        return {(SweepModel(size, half, seed), step) for size, half, seed, step in self._store.saved_keys()}

    def load(self) -> dict[SweepModel, dict[int, dict[str, Tensor]]]:
        """Read the models that have been measured at the last step, by step; those with the first seed first."""
        require_no_npz(self.root / "measured")
        models: dict[SweepModel, dict[int, dict[str, Tensor]]] = {}
        for (size, half, seed, step), row in self._store.rows().items():
            arrays = {name: torch.from_numpy(values) for name, values in row.items() if isinstance(values, np.ndarray)}
            models.setdefault(SweepModel(size, half, seed), {})[step] = arrays
        last = max((step for by_step in models.values() for step in by_step), default=0)
        in_order = sorted(models.items(), key=lambda item: (item[0].seed, item[0]))
        return {model: by_step for model, by_step in in_order if last in by_step}

    def compact(self) -> None:
        """Put what is there into few files."""
        self._store.compact()
