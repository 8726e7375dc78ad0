"""Generators trained on parts of the training images: the truth that traces are held to."""

from __future__ import annotations

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
from provgen.retrained_files import QueryImages
from provgen.runs import MAY_CHANGE, RunData, TrainedRun
from provgen.settings import Settings, flat_settings

LEVELS = 20
"""Equal parts of the schedule in which a subset model's loss on a query is kept."""

DRAWS_PER_LEVEL = 5
"""Timesteps and noises in each part. On digits the mean over 20 draws has a rank correlation of 0.80 (generated
queries) and 0.84 (held-out ones) over subsets with the mean over 100 draws, that over 50 one of 0.93 and 0.95."""


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
    accelerator.free_memory()  # it would hold on to every model it has prepared
    return evaluation.averaged_networks(trainer)[trainer.observer.name]


def make_queries(trained: TrainedRun, count: int) -> dict[str, QueryImages]:
    """Make `count` queries of either kind, `generated` (seeds 0, 1, ..., classes in turn) and `holdout`.

    Raises:
        InputError: The run is no diffusion model, or holds too few images out.
    """
    if trained.pipeline.unet is None:
        raise InputError(
            "traces are tested on diffusion models, and this run is none; train one with generator.kind=diffusion"
        )
    holdout, train = trained.data.holdout, trained.data.train
    if len(holdout) < count:
        raise InputError(
            f"the run holds {len(holdout)} images out, fewer than {count} queries; ask for fewer --num-queries"
        )
    samples = evaluation.sample(trained.pipeline, trained.settings, trained.data, count=count).images
    classes = torch.arange(count) % train.num_classes if train.num_classes else torch.zeros(count).long()
    rows = stratified_subset(holdout.labels, count, seed=0)
    return {
        "generated": QueryImages(images=samples, labels=classes),
        "holdout": QueryImages(images=holdout.images[rows], labels=holdout.labels[rows]),
    }


def query_losses(
    network: Any, settings: Settings, train: ImageSet, queries: Mapping[str, QueryImages]
) -> dict[str, Tensor]:
    """Measure a generator's loss on every query at every level, with noise that is the same for every generator.

    Returns:
        (query, level) by kind, from clean to noisy.
    """
    draws = LEVELS * DRAWS_PER_LEVEL
    losses = {
        kind: evaluation.losses_by_draw(network, settings, as_image_set(some, train), draws=draws)
        for kind, some in queries.items()
    }
    return {kind: some.unflatten(1, (LEVELS, DRAWS_PER_LEVEL)).mean(dim=2) for kind, some in losses.items()}


def as_image_set(queries: QueryImages, train: ImageSet) -> ImageSet:
    """Give queries the classes of the training images."""
    count = len(queries.images)
    return ImageSet(
        images=queries.images,
        labels=queries.labels,
        class_names=train.class_names,
        paths=tuple(f"query/{number:05d}" for number in range(count)),
        sha256=("",) * count,
        contributors=(None,) * count,
        licenses=(None,) * count,
    )


def made_of(settings: Settings, **more: Any) -> dict[str, Any]:
    """Say what models depend on, so that those of other settings are never mixed with them."""
    free = MAY_CHANGE - {"training.max_steps"}
    return {**{key: value for key, value in flat_settings(settings).items() if key not in free}, **more}


def regenerate(network: Any, trained: TrainedRun, *, label: int, seed: int) -> Tensor:
    """Sample with another denoiser from the noise of a sample of `trained`: uint8 (channel, height, width)."""
    pipeline = ProvenancePipeline(None, unet=network, scheduler=trained.pipeline.scheduler)
    pipeline = pipeline.with_manifest(trained.data.manifest)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed)]
    images: Tensor = pipeline([label], generator=generator, top_k=None, output_type="pt").images
    return images[0]
