"""Settings to objects: the wiring of a training run."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker

from provgen.analysis.index_quality import IndexProbe, IndexQuality, mean_kl_gap
from provgen.attribution.network import NetworkPosterior
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.manifest import Manifest
from provgen.errors import InputError
from provgen.models.diffusion import (
    NUM_TRAIN_TIMESTEPS,
    make_denoiser,
    make_sampling_scheduler,
    make_training_scheduler,
    stage_shapes,
)
from provgen.models.provenance import ProvenanceNetwork
from provgen.pipeline import ProvenancePipeline
from provgen.run_folder import RunFolder, atomic_path
from provgen.runs import RunData, make_closed_form
from provgen.settings import Settings
from provgen.training.batches import BatchStream
from provgen.training.targets import ClassMixedTargets, OneHotTargets, PosteriorTargets, Targets
from provgen.training.tracking import JsonLinesTracker
from provgen.training.trainer import CoTrainer, ProvenanceObjective

T = TypeVar("T")


def make_accelerator(settings: Settings | None = None) -> Accelerator:
    """Make the accelerator of a recipe; without any accelerator device it runs on the CPU.

    Raises:
        InputError: The launch started several processes that do not know of one another.
    """
    precision = "no" if settings is None else settings.training.mixed_precision
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=precision)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"accelerate launch started {launched} processes, but each runs alone and would overwrite the others; "
            f"launch with `--multi_gpu --num_processes {launched}` (on CPU too)"
        )
    return accelerator


def make_trainer(settings: Settings, data: RunData, accelerator: Accelerator) -> CoTrainer:
    """Build both networks, seeded apart so that the denoiser does not depend on the provenance network."""
    train, generator, training = data.train, settings.generator, settings.training
    scheduler = make_training_scheduler(generator.beta_schedule)
    denoiser = _seeded(
        training.seed,
        lambda: make_denoiser(
            generator.size,
            image_size=settings.data.image_size,
            image_channels=train.images.shape[1],
            num_classes=train.num_classes,
        ),
    )
    has_provenance = settings.provenance.index_head != "none"
    return CoTrainer(
        accelerator=accelerator,
        denoiser=denoiser,
        provenance=_make_provenance(settings, data, stage_shapes(denoiser)) if has_provenance else None,
        noise_scheduler=scheduler,
        objective=_make_objective(settings, train, accelerator.device) if has_provenance else None,
        label_dropout=generator.label_dropout,
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        ema_decay=training.ema_decay,
    )


def make_batches(settings: Settings, train: ImageSet, accelerator: Accelerator) -> BatchStream:
    """Make the stream of global batches.

    Raises:
        InputError: The global batch does not divide evenly over the processes.
    """
    size = settings.training.batch_size
    if size % accelerator.num_processes:
        raise InputError(
            f"training.batch_size must be a multiple of the {accelerator.num_processes} processes, got {size}"
        )
    return BatchStream(
        train,
        batch_size=size,
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        label_dropout=settings.generator.label_dropout,
        seed=settings.training.seed,
    )


def make_trackers(folder: RunFolder, accelerator: Accelerator, start_step: int) -> None:
    """Start `metrics.jsonl` and TensorBoard as trackers of `accelerator.log`."""
    accelerator.log_with = [
        JsonLinesTracker(folder.metrics, start_step=start_step),
        # What a killed run logged after its last checkpoint is purged from the curves.
        TensorBoardTracker("tensorboard", logging_dir=folder.root, purge_step=start_step + 1),
    ]
    accelerator.init_trackers("provgen")


def averaged_networks(trainer: CoTrainer) -> dict[str, Any]:
    """Copy the networks with their averaged weights, ready for evaluation."""
    copies = {}
    for name, network in trainer.networks.items():
        copies[name] = deepcopy(network).requires_grad_(requires_grad=False).eval()
        copies[name].load_state_dict(trainer.averaged(name))
    return copies


def averaged_posterior(trainer: CoTrainer) -> NetworkPosterior:
    """Make the posterior of the averaged provenance network, for evaluation during training."""
    networks = averaged_networks(trainer)
    return NetworkPosterior(networks["denoiser"], networks["provenance"])


def make_pipeline(trainer: CoTrainer, manifest: Manifest) -> ProvenancePipeline:
    """Make the pipeline of the averaged weights; the trainer must have a provenance network."""
    networks = averaged_networks(trainer)
    pipeline = ProvenancePipeline(
        unet=networks["denoiser"],
        provenance=networks["provenance"],
        scheduler=make_sampling_scheduler(trainer.noise_scheduler),
    )
    return pipeline.with_manifest(manifest)


def save_pipeline(trainer: CoTrainer, manifest: Manifest, folder: RunFolder) -> None:
    """Write the pipeline of the averaged weights, whole or not at all.

    A denoiser trained without a provenance network has no pipeline; its weights are in the checkpoints.
    """
    if "provenance" in trainer.networks:
        with atomic_path(folder.pipeline) as partial:
            make_pipeline(trainer, manifest).save_pretrained(partial)


def make_probe(settings: Settings, train: ImageSet, trainer: CoTrainer, num_queries: int = 256) -> IndexProbe:
    """Make the fixed queries on which the index metrics are measured."""
    return IndexProbe(
        make_closed_form(train, torch.float64, torch.device("cpu")),
        to_unit_range(train.images),
        train.labels,
        trainer.noise_scheduler.alphas_cumprod,
        num_queries=num_queries,
        label_mixing=settings.provenance.label_mixing,
        seed=settings.training.seed,
    )


def log_quality(accelerator: Accelerator, qualities: list[IndexQuality], step: int) -> None:
    """Log index metrics: every row into `metrics.jsonl`, the mean KL gaps as scalars."""
    kinds = sorted({quality.rows for quality in qualities})
    scalars: dict[str, Any] = {}
    for rows in kinds:
        gap = mean_kl_gap(qualities, rows)
        scalars |= {
            f"kl_gap_{rows}": gap.value,
            f"kl_gap_{rows}_low": gap.low,
            f"kl_gap_{rows}_high": gap.high,
        }
    accelerator.log({"index_quality": [quality.as_row() for quality in qualities], **scalars}, step=step)


def _make_provenance(settings: Settings, data: RunData, stages: list[tuple[int, int]]) -> ProvenanceNetwork:
    chosen = settings.provenance
    if chosen.shared_stages is not None and chosen.shared_stages > len(stages):
        raise InputError(
            f"provenance.shared_stages must be null or 1 to {len(stages)} for generator.size="
            f"{settings.generator.size}, got {chosen.shared_stages}"
        )
    train = data.train
    has_class_head = (
        train.num_classes > 0 and chosen.class_loss_weight > 0 and settings.generator.label_dropout > 0
    )
    network: ProvenanceNetwork = _seeded(
        settings.training.seed + 1,
        lambda: ProvenanceNetwork(
            stages=[list(shape) for shape in stages[: chosen.shared_stages]],
            num_examples=len(train),
            num_classes=train.num_classes,
            width=chosen.width,
            has_class_head=has_class_head,
            fingerprint=data.manifest.fingerprint,
        ),
    )
    network.example_labels.copy_(train.labels)
    network.index_head.start_from_images(to_unit_range(train.images))
    return network


def _make_objective(settings: Settings, train: ImageSet, device: torch.device) -> ProvenanceObjective:
    chosen = settings.provenance
    targets: Targets
    if chosen.targets == "one_hot":
        targets = OneHotTargets(len(train))
    else:
        targets = PosteriorTargets(make_closed_form(train, torch.get_default_dtype(), device))
    if chosen.label_mixing > 0:
        targets = ClassMixedTargets(
            targets, train.labels.to(device), num_classes=train.num_classes, mixing=chosen.label_mixing
        )
    return ProvenanceObjective(
        targets=targets,
        loss_weight=chosen.loss_weight,
        class_loss_weight=chosen.class_loss_weight,
        stops_gradient=chosen.gradient == "stop",
    )


def _seeded(seed: int, make: Callable[[], T]) -> T:
    """Call `make` with torch's CPU generator seeded, and put the generator back after; weights start on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
