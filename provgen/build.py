"""Settings to objects: the whole wiring, and the only module that knows both."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from diffusers import DDPMScheduler
from diffusers.utils.logging import disable_progress_bar

from provgen.analysis.index_quality import IndexProbe, IndexQuality, mean_kl_gap
from provgen.attribution.network import NetworkPosterior
from provgen.attribution.posterior import ClosedFormPosterior
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.manifest import Manifest
from provgen.data.sources import load_images
from provgen.data.splits import stratified_split, stratified_subset
from provgen.errors import InputError
from provgen.models.diffusion import (
    make_denoiser,
    make_sampling_scheduler,
    make_training_scheduler,
    stage_shapes,
)
from provgen.models.provenance import ProvenanceNetwork
from provgen.pipeline import ProvenancePipeline
from provgen.run_folder import RunFolder, atomic_path, require_run
from provgen.settings import Settings, load_settings, save_settings
from provgen.training.batches import BatchStream
from provgen.training.targets import ClassMixedTargets, OneHotTargets, PosteriorTargets, Targets
from provgen.training.tracking import JsonLinesTracker
from provgen.training.trainer import CoTrainer, ProvenanceObjective

T = TypeVar("T")

MAY_CHANGE = {
    "output_dir",
    "training.max_steps",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
}
"""Settings that a resumed run may give another value."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The images of a run, in the order its manifest fixes."""

    train: ImageSet
    holdout: ImageSet
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that has a pipeline."""

    folder: RunFolder
    settings: Settings
    data: RunData
    pipeline: ProvenancePipeline

    def closed_form(self, dtype: torch.dtype = torch.float32) -> ClosedFormPosterior:
        """Make the closed-form posterior over this run's training images, on the pipeline's device."""
        return make_closed_form(self.data.train, dtype, self.pipeline.device)


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


def open_data(settings: Settings, folder: RunFolder) -> RunData:
    """Load the images; a run that has a manifest keeps its order and its split.

    Raises:
        InputError: The images cannot be read, or are no longer those of the manifest.
    """
    data = settings.data
    images = load_images(data.source, data.path, data.image_size)
    if folder.manifest.is_file():
        manifest = Manifest.load(folder.manifest)
        train, holdout = manifest.align(images)
        return RunData(train=train, holdout=holdout, manifest=manifest)
    train_rows, holdout_rows = stratified_split(images.labels, data.holdout_fraction, data.split_seed)
    train, holdout = images.select(train_rows), images.select(holdout_rows)
    if data.max_train_images is not None:
        train = train.select(stratified_subset(train.labels, data.max_train_images, data.split_seed))
    if len(train) < 2:
        raise InputError(
            f"only {len(train)} training image(s) in {data.path or data.source}; at least 2 are needed"
        )
    manifest = Manifest.of(train, holdout)
    return RunData(train=train, holdout=holdout, manifest=manifest)


def start_run(settings: Settings, data: RunData) -> RunFolder:
    """Create the run folder, or check that the run in it was started with the same settings.

    Raises:
        InputError: It was started with others; names the first that differs.
    """
    folder = RunFolder(Path(settings.output_dir))
    if folder.config.is_file():
        _check_same(load_settings(folder.config, []), settings, folder)
    if not folder.manifest.is_file():
        data.manifest.save(folder.manifest)
    packages = ("provgen", "torch", "diffusers", "accelerate")
    versions = {name: version(name) for name in packages} | {"fingerprint": data.manifest.fingerprint}
    with atomic_path(folder.config) as partial:
        save_settings(settings, partial, versions)
    return folder


def make_trainer(settings: Settings, data: RunData, accelerator: Accelerator) -> CoTrainer:
    """Build both networks, seeded apart so that the denoiser does not depend on the provenance network."""
    train, generator, training = data.train, settings.generator, settings.training
    scheduler = make_training_scheduler(generator.num_train_timesteps, generator.beta_schedule)
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
        num_train_timesteps=settings.generator.num_train_timesteps,
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


def make_probe(
    settings: Settings, train: ImageSet, scheduler: DDPMScheduler, num_queries: int = 256
) -> IndexProbe:
    """Make the fixed queries on which the index metrics are measured."""
    return IndexProbe(
        make_closed_form(train, torch.float64, torch.device("cpu")),
        to_unit_range(train.images),
        train.labels,
        scheduler.alphas_cumprod,
        num_queries=num_queries,
        label_mixing=settings.provenance.label_mixing,
        seed=settings.training.seed,
    )


def log_quality(accelerator: Accelerator, qualities: list[IndexQuality], step: int) -> None:
    """Log index metrics: every row into `metrics.jsonl`, the mean KL gaps as scalars."""
    kinds = sorted({quality.rows for quality in qualities})
    gaps = {f"kl_gap_{rows}": mean_kl_gap(qualities, rows) for rows in kinds}
    accelerator.log({"index_quality": [quality.as_row() for quality in qualities], **gaps}, step=step)


def make_closed_form(train: ImageSet, dtype: torch.dtype, device: torch.device) -> ClosedFormPosterior:
    """Make the closed-form posterior over a training set."""
    images = to_unit_range(train.images, dtype).to(device)
    return ClosedFormPosterior(images, train.labels.to(device), null_label=train.num_classes)


def open_trained_run(root: Path) -> TrainedRun:
    """Open a finished run with its images and its pipeline.

    Raises:
        InputError: No run, no pipeline in it, or images that are not those it was trained on.
    """
    folder = require_run(root)
    settings = replace(load_settings(folder.config, []), output_dir=str(root))
    if not (folder.pipeline / "model_index.json").is_file():
        raise InputError(
            f"{root} has no pipeline yet; finish training with `provgen train --config {folder.config}`"
        )
    data = open_data(settings, folder)
    disable_progress_bar()  # three files load in no time
    pipeline = ProvenancePipeline.from_pretrained(folder.pipeline).with_manifest(data.manifest)
    device = "cpu" if not torch.accelerator.is_available() else torch.accelerator.current_accelerator()
    return TrainedRun(folder=folder, settings=settings, data=data, pipeline=pipeline.to(device))


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
    """Call `make` with torch's global generator seeded, and put the generator back after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def _check_same(started: Settings, given: Settings, folder: RunFolder) -> None:
    before, now = _flat(started), _flat(given)
    for key, value in before.items():
        if key not in MAY_CHANGE and now[key] != value:
            raise InputError(
                f"{folder.root} was started with {key}={value}, now {key}={now[key]}; "
                "use the same settings to resume it, or another output_dir"
            )


def _flat(settings: Settings) -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in asdict(settings).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = value
    return flat
