"""Generators trained on parts of the training images: the truth that traces are held to."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from provgen import build, evaluation
from provgen.data.dataset import ImageSet
from provgen.data.manifest import Manifest
from provgen.data.splits import stratified_subset
from provgen.errors import InputError
from provgen.pipeline import ProvenancePipeline
from provgen.runs import RunData, TrainedRun
from provgen.settings import Settings


def subset_settings(settings: Settings, *, seed: int, share_of_steps: float = 1.0) -> Settings:
    """Give the settings of a model that is trained on a part of the images.

    Where the provenance network has no gradient into the generator (`provenance.gradient=stop`), the generator is
    bit for bit the one trained alone, so it is trained alone.

    Args:
        settings: Of the run that is explained.
        seed: Of the model's training.
        share_of_steps: Its steps, as a share of the run's.
    """
    steps = max(1, round(share_of_steps * settings.training.max_steps))
    training = replace(settings.training, seed=seed, max_steps=steps)
    chosen = settings.provenance
    if chosen.gradient == "stop":
        chosen = replace(chosen, index_head="none")
    return replace(settings, training=training, provenance=chosen)


def subset_data(data: RunData, mask: Tensor) -> RunData:
    """Keep the training images of `mask`, bool (train,); they are counted anew."""
    train = data.train.select(mask.nonzero().flatten())
    return RunData(train=train, holdout=data.holdout, manifest=Manifest.of(train, data.holdout))


def train_generator(settings: Settings, data: RunData, accelerator: Accelerator) -> Any:
    """Train on this process alone, whatever others do; give the generator with its averaged weights."""
    stream = build.make_stream(settings, data.train)
    trainer = build.make_trainer(settings, data, accelerator, is_shared=False)
    for step in range(settings.training.max_steps):
        trainer.step(stream.batch(step).to(accelerator.device), step)
    return evaluation.averaged_networks(trainer)[trainer.observer.name]


def make_queries(trained: TrainedRun, count: int) -> dict[str, ImageSet]:
    """Make `count` queries of either kind, `generated` (seeds 0, 1, ..., classes in turn) and `holdout`.

    Raises:
        InputError: The run has no generator, or too few held-out images.
    """
    trained.pipeline.require_generator(count)
    holdout = trained.data.holdout
    if len(holdout) < count:
        raise InputError(
            f"the run holds {len(holdout)} images out, fewer than {count} queries; ask for fewer --num-queries"
        )
    output = evaluation.sample(trained.pipeline, trained.settings, trained.data, count=count)
    return {
        "generated": _generated(output.images, trained),
        "holdout": holdout.select(stratified_subset(holdout.labels, count, seed=0)),
    }


def query_losses(network: Any, settings: Settings, queries: Mapping[str, ImageSet]) -> dict[str, Tensor]:
    """Measure a generator's loss on every query with noise that is the same for every generator: (query,) by kind."""
    return {kind: evaluation.losses(network, settings, images) for kind, images in queries.items()}


def regenerate(network: Any, trained: TrainedRun, *, label: int, seed: int) -> Tensor:
    """Sample with another denoiser from the noise of a sample of `trained`: uint8 (channel, height, width)."""
    pipeline = ProvenancePipeline(None, unet=network, scheduler=trained.pipeline.scheduler)
    pipeline = pipeline.with_manifest(trained.data.manifest)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed)]
    images: Tensor = pipeline([label], generator=generator, top_k=None, output_type="pt").images
    return images[0]


def _generated(images: Tensor, trained: TrainedRun) -> ImageSet:
    """Name samples as `evaluation.sample` makes them, classes in turn."""
    count, train = len(images), trained.data.train
    is_told = trained.pipeline.is_told_classes and train.num_classes > 0
    return ImageSet(
        images=images,
        labels=torch.arange(count) % train.num_classes
        if is_told
        else torch.full((count,), train.num_classes),
        class_names=train.class_names,
        paths=tuple(f"generated/{number:05d}" for number in range(count)),
        sha256=tuple(hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in images),
        contributors=(None,) * count,
        licenses=(None,) * count,
    )
