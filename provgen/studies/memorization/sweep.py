"""One generator of a sweep over the number of training images: its images, what it is trained on, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from provgen.metrics.copying import distance_ratio
from provgen.metrics.neighbors import distinct_rows, nearest
from provgen.run import atomic_path
from provgen.settings import Settings
from provgen.studies.memorization.curves import (
    SweepCurves,
    copy_prediction,
    curve_point,
    early_prediction,
    resampled_names,
    resampling_effect,
)
from provgen.tracing.attribution import Attribution
from provgen.training.trainer import CoTrainer

MAX_LOSSES = 200
"""Training images, and held-out ones, that losses are measured on."""

BOUNDS = (1e-4, 1e-3, 1e-2)
"""Of the late entropy in nats, below which samples are resampled."""

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


def measure(trainer: CoTrainer, settings: Settings, data: RunData, *, num_images: int) -> Arrays:
    """Generate with a trainer's averaged weights, trace, and measure losses.

    Returns:
        By name; of the traces `entropy`, `top` (query,), `commitment` (query,) and `step_entropy` (query, step) of the
        network, and with `closed_form_` before them of the closed form.
    """
    pipeline = evaluation.make_pipeline(trainer, settings, data)
    sampled = evaluation.sample(pipeline, settings, data, count=num_images)
    arrays: dict[str, Tensor] = {
        "images": sampled.images,
        "labels": torch.arange(num_images) % max(1, data.train.num_classes),
        "ratio": _ratios(sampled.images, data.train),
        "holdout_ratio": _ratios(_some(data.holdout).images, data.train),
    }
    for name, attribution in (("", sampled.attribution), ("closed_form_", sampled.closed_form)):
        if attribution is not None:
            arrays |= {f"{name}{key}": values for key, values in _trace(attribution).items()}
    for name, images in (("train", data.train), ("holdout", data.holdout)):
        arrays[f"{name}_losses"] = evaluation.losses_by_draw(
            pipeline.unet, settings, _some(images), draws=evaluation.LOSS_DRAWS
        )
    by_step = evaluation.divergence_by_step(pipeline.unet, settings, data.train, _some(data.train))
    arrays["divergence"] = torch.stack(list(by_step.values()), dim=1)
    return {name: values.cpu().numpy() for name, values in arrays.items()}


def measure_resampled(trainer: CoTrainer, settings: Settings, data: RunData, *, num_images: int) -> Arrays:
    """Generate the same images again, but draw once more what has less late entropy than each of `BOUNDS`.

    Returns:
        `ratio` and `redraws` (query,) for each bound, as `redrawn_names` calls them; nothing without a provenance
        network.
    """
    if "provenance" not in trainer.networks:
        return {}
    pipeline = evaluation.make_pipeline(trainer, settings, data)
    arrays: Arrays = {}
    for below in BOUNDS:
        made = evaluation.sample(pipeline, settings, data, count=num_images, resample_below=below)
        found = (_ratios(made.images, data.train), made.resamplings)
        arrays |= {name: values.cpu().numpy() for name, values in zip(resampled_names(below), found, strict=True)}
    return arrays


def _ratios(images: Tensor, train: ImageSet) -> Tensor:
    distinct = distinct_rows(to_unit_range(train.images).flatten(1))
    return distance_ratio(nearest(to_unit_range(images).flatten(1), distinct, 2))


def _trace(attribution: Attribution) -> dict[str, Tensor]:
    return {
        "entropy": attribution.entropy,
        "top": attribution.posterior[:, 0],
        "commitment": attribution.commitment_step,
        "step_entropy": attribution.step_entropy,
        "alpha_bar": attribution.alpha_bar,
    }


def _some(images: ImageSet) -> ImageSet:
    return images.select(stratified_subset(images.labels, MAX_LOSSES, 0))


def curves(folder: SweepFolder, models: Sequence[SweepModel], steps: Sequence[int]) -> SweepCurves:
    """Summarise models that have been measured at all `steps`."""
    points, last = {}, {}
    for size in sorted({model.size for model in models}):
        for step in steps:
            measured = {model: folder.load(model, step) for model in models if model.size == size}
            pairs = [
                (measured[first], measured[replace(first, half=1)])
                for first in measured
                if first.half == 0 and replace(first, half=1) in measured
            ]
            points[size, step] = curve_point(list(measured.values()), pairs)
            last[size] = list(measured.values())
    predictions = {size: copy_prediction(some) for size, some in last.items()}
    early = {size: early_prediction(some) for size, some in last.items()}
    return SweepCurves(
        points=points,
        predictions={size: found for size, found in predictions.items() if found},
        within={size: copy_prediction(some, within=True) for size, some in last.items() if predictions[size]},
        overall=copy_prediction([model for some in last.values() for model in some], pooled=True),
        early={size: found for size, found in early.items() if found},
        resampling={
            size: {below: resampling_effect(some, below=below) for below in BOUNDS}
            for size, some in last.items()
            if all("entropy" in model for model in some)
        },
    )


class SweepFolder:
    """A small file for every model and step it was measured at, whole or not there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, model: SweepModel, step: int) -> bool:
        """Whether a model has been measured at a step."""
        return self._path(model, step).is_file()

    def save(self, model: SweepModel, step: int, arrays: Arrays) -> None:
        """Write what was measured."""
        with atomic_path(self._path(model, step)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def load(self, model: SweepModel, step: int) -> dict[str, Tensor]:
        """Read it."""
        with np.load(self._path(model, step)) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def _path(self, model: SweepModel, step: int) -> Path:
        name = f"images-{model.size:05d}-half-{model.half}-seed-{model.seed}-step-{step:06d}.npz"
        return self.root / "measured" / name
