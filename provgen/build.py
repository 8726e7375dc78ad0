"""Settings to objects: the images of a run, its networks, its trained pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor

from provgen.data.batches import BatchStream
from provgen.data.dataset import ImageSet, require_different
from provgen.data.images import to_unit_range
from provgen.data.manifest import Manifest
from provgen.data.sources import load_images
from provgen.data.splits import (
    entropy_coverage,
    k_center_coverage,
    stratified_coverage,
    stratified_split,
    stratified_subset,
)
from provgen.errors import InputError, notice
from provgen.generators.classifier import ClassifierGenerator
from provgen.generators.closed_form import Posterior, image_posterior, posterior_entropies
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.protocol import Generator
from provgen.generators.vae import VaeGenerator
from provgen.models.classifier import ImageClassifier
from provgen.models.diffusion import (
    NUM_TRAIN_TIMESTEPS,
    encoder_shapes,
    make_denoiser,
    make_sampling_scheduler,
    make_training_scheduler,
)
from provgen.models.provenance import ProvenanceNetwork
from provgen.models.vae import LATENT_CHANNELS, make_vae
from provgen.pipeline import ProvenancePipeline
from provgen.run import RunFolder, atomic_path, digest, require_run
from provgen.settings import ProvenanceSettings, Settings, flat_settings
from provgen.settings_file import load_settings, save_settings
from provgen.tracing.attribution import Mixtures
from provgen.training.checkpoint import last_step, trained_with
from provgen.training.logging import JsonLinesTracker
from provgen.training.targets import (
    ClassMixing,
    MixedTargets,
    Mixing,
    NeighborMixing,
    OneHotTargets,
    PeriodicPosterior,
    PosteriorTargets,
    SoftTarget,
    Targets,
    nearest_neighbors,
    update_interval,
)
from provgen.training.trainer import CoTrainer, ProvenanceObjective

MAY_CHANGE = {
    "output_dir",
    "data.max_bytes",
    "data.path",  # the images may move: sha256 says whether they are the same
    "training.max_steps",
    "training.log_every",
    "training.evaluate_every",
    "training.checkpoint_every",
}
"""Settings that a resumed run may give another value."""

MOVED_HELP = "data.path=FOLDER, where the images have moved."
"""Help of the argument of commands on a run."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The images of a run, in the order its manifest fixes."""

    train: ImageSet
    holdout: ImageSet
    manifest: Manifest

    @property
    def covered(self) -> Tensor:
        """Training images that the index head can name, bool (train,)."""
        return self.manifest.reachable


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """A run that has a pipeline."""

    folder: RunFolder
    settings: Settings
    data: RunData
    pipeline: ProvenancePipeline

    @property
    def generator(self) -> Generator:
        """The trained generator, with the losses it was trained on."""
        return make_generator(self.settings, self.data.train, self.pipeline.network)

    @property
    def mixtures(self) -> Mixtures:
        """Mixtures of the training images."""
        assert self.pipeline.mixtures is not None, "a run has its training images at hand"
        return self.pipeline.mixtures

    @property
    def weights(self) -> str:
        """Digest of the pipeline's files."""
        return digest(self.folder.pipeline)

    def closed_form(self, *, covered: Tensor | None = None) -> Posterior:
        """Make the closed form over the training images, or over those that are `covered`, on the pipeline's device."""
        device = self.pipeline.device
        return self.generator.closed_form(self.data.train, dtype=torch.float32, device=device, covered=covered)


def open_data(settings: Settings, folder: RunFolder) -> RunData:
    """Load the images; a run that has a manifest keeps its order and its split.

    Raises:
        InputError: The images cannot be read, or are no longer those of the manifest.
    """
    data = settings.data
    started = Manifest.load(folder.manifest) if folder.manifest.is_file() else None
    if started is not None and data.path is not None and not Path(data.path).is_dir():
        raise InputError(f"the images of {folder.root} are not in {data.path} any more; give data.path=FOLDER")
    # A run that has begun reads no file but its own: another one may be half copied.
    wanted = None if started is None else set(started.table["sha256"].to_pylist())
    images = load_images(data.source, data.path, data.image_size, wanted=wanted, max_bytes=data.max_bytes)
    if started is not None:
        train, holdout = started.align(images)
        fresh = started.with_names_of(train, holdout)
        if changed := started.count_changed(fresh):
            notice(f"{changed} images have another path, contributor or licence than when {folder.root} began")
        return RunData(train=train, holdout=holdout, manifest=fresh)
    train_rows, holdout_rows = stratified_split(images.labels, data.holdout_fraction, data.split_seed)
    train, holdout = images.select(train_rows), images.select(holdout_rows)
    if data.max_train_images is not None:
        train = train.select(stratified_subset(train.labels, data.max_train_images, data.split_seed))
    _require_images(train, data.path or data.source)
    manifest = Manifest.of(train, holdout)
    if settings.provenance.coverage < 1:
        manifest = manifest.with_reachable(_covered(settings, train))
    return RunData(train=train, holdout=holdout, manifest=manifest)


def start_run(settings: Settings, data: RunData, *, writes: bool) -> RunFolder:
    """Create the run folder, or check that the run in it was started with the same settings.

    Args:
        settings: Settings of this call.
        data: Its images.
        writes: Whether this process writes; only the main process may.

    Raises:
        InputError: It was started with others; names the first that differs.
    """
    folder = RunFolder(Path(settings.output_dir))
    if folder.config.is_file():
        _check_same(load_settings(folder.config, []), settings, folder)
    if not writes:
        return folder
    if not folder.manifest.is_file():
        data.manifest.save(folder.manifest)
    # Never fewer steps than were done: models that are trained again would be trained for fewer.
    most = max(settings.training.max_steps, last_step(folder.checkpoints))
    settings = replace(settings, training=replace(settings.training, max_steps=most))
    packages = ("provgen", "torch", "diffusers", "accelerate")
    versions = {name: version(name) for name in packages} | {"fingerprint": data.manifest.fingerprint}
    with atomic_path(folder.config) as partial:
        save_settings(settings, partial, versions)
    return folder


def made_by(settings: Settings, data: RunData) -> dict[str, Any]:
    """List what must be the same when a run is resumed: settings, and the images."""
    fixed = {key: value for key, value in flat_settings(settings).items() if key not in MAY_CHANGE}
    return {**fixed, "data fingerprint": data.manifest.fingerprint}


def steps_between_stops(settings: Settings) -> int:
    """Give after how many steps training may stop and be resumed as if it had not."""
    # The target of an autoencoder moves with its encoder, and is made anew where training is resumed.
    return update_interval(settings.training.checkpoint_every) if settings.generator.kind == "vae" else 1


def open_trained_run(root: Path, device: torch.device, overrides: Sequence[str] | None = None) -> TrainedRun:
    """Open a run with its images, and its pipeline on `device`.

    Args:
        root: The run folder.
        device: Where the pipeline goes.
        overrides: `data.path=FOLDER` where the images have moved, and nothing else.

    Raises:
        InputError: No run, no pipeline in it, or images that are not those it was trained on.
    """
    folder = require_run(root)
    if other := [given for given in overrides or [] if not given.startswith("data.path=")]:
        raise InputError(f"a command on a run takes no setting but data.path=FOLDER, got {other[0]!r}")
    settings = replace(load_settings(folder.config, list(overrides or [])), output_dir=str(folder.root))
    if settings.provenance.index_head == "none":
        raise InputError(f"{root} was trained without a provenance network; there is nothing to trace with")
    again = f"`provgen train --config {folder.config}`"
    if not (folder.pipeline / "model_index.json").is_file():
        raise InputError(f"{root} has no whole pipeline; {again} goes on with training, or writes it again")
    now = flat_settings(settings)
    for key, value in trained_with(folder.checkpoints).items():
        if now.get(key, value) != value:
            raise InputError(f"{folder.config} says {key}={now[key]}, but the run was trained with {value}; restore it")
    done, most = last_step(folder.checkpoints), settings.training.max_steps
    if 0 < done < most:
        notice(f"{root} is not finished: {done} of {most} steps are trained; {again} goes on")
    data = open_data(settings, folder)
    disable_progress_bar()  # three files load in no time
    pipeline = ProvenancePipeline.from_pretrained(folder.pipeline).with_manifest(data.manifest)
    pipeline = pipeline.to(device).with_training_images(data.train)
    return TrainedRun(folder=folder, settings=settings, data=data, pipeline=pipeline)


def _covered(settings: Settings, train: ImageSet) -> Tensor:
    """Choose the examples that the index head can name, int64 (covered,)."""
    chosen, seed = settings.provenance, settings.data.split_seed
    count = round(chosen.coverage * len(train))
    if chosen.coverage_rule == "stratified":
        return stratified_coverage(train.labels, count, seed)
    if chosen.coverage_rule == "k_center":
        return k_center_coverage(to_unit_range(train.images).flatten(1), train.labels, count)
    closed_form = image_posterior(train, dtype=torch.get_default_dtype(), device=torch.device("cpu"))
    return entropy_coverage(posterior_entropies(closed_form, seed=seed), train.labels, count)


def _require_images(train: ImageSet, place: str) -> None:
    if len(train) < 2:
        raise InputError(f"only {len(train)} training image(s) in {place}; at least 2 are needed")
    present = set(train.labels.tolist())
    missing = [name for label, name in enumerate(train.class_names) if label not in present]
    if missing:
        raise InputError(
            f"no training image of class {missing[0]!r} is left ({len(missing)} such classes); "
            "raise data.max_train_images"
        )
    require_different(train)


def _check_same(started: Settings, given: Settings, folder: RunFolder) -> None:
    before, now = flat_settings(started), flat_settings(given)
    for key, value in before.items():
        if key not in MAY_CHANGE and now[key] != value:
            raise InputError(
                f"{folder.root} was started with {key}={value}, now {key}={now[key]}; "
                "use the same settings to resume it, or another output_dir"
            )


T = TypeVar("T")

HEADS: dict[str, Callable[[Settings, Tensor, int], dict[str, Any]]] = {
    "class_independent": lambda _settings, _labels, _num_classes: {"kind": "ClassIndependentHead"},
    "class_conditional": lambda settings, labels, num_classes: {
        "kind": "ClassConditionalHead",
        "num_classes": num_classes,
        "num_slots": int(labels.bincount().max()),
        "has_unlabelled": bool((labels == num_classes).any()),
        "has_class_branch": settings.generator.kind != "none",  # that generator is the class branch
    },
    "two_stage": lambda settings, labels, num_classes: {
        "kind": "TwoStageHead",
        "num_classes": num_classes,
        "cells": settings.provenance.cells,
        "num_cells": _num_cells(settings.provenance, labels),
    },
}
"""`provenance.index_head` to the arguments of a class in `models/index_heads.py`, given the labels of the covered
examples and the number of classes. A new head is one class there and one line here."""


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


def make_trainer(settings: Settings, data: RunData, accelerator: Accelerator, *, is_shared: bool = True) -> CoTrainer:
    """Build both networks, seeded apart so that the denoiser does not depend on the provenance network."""
    training = settings.training
    if settings.generator.kind == "none":
        _require_something_to_learn(settings.provenance, data.train.num_classes)
    network = _seeded(training.seed, lambda: make_network(settings, data.train))
    generator = make_generator(settings, data.train, network)
    has_provenance = settings.provenance.index_head != "none"
    return CoTrainer(
        accelerator=accelerator,
        generator=generator,
        provenance=_make_provenance(settings, data) if has_provenance else None,
        objective=_make_objective(settings, data, generator, accelerator.device) if has_provenance else None,
        label_dropout=label_dropout(settings),
        learning_rate=training.learning_rate,
        warmup_steps=training.warmup_steps,
        ema_decay=training.ema_decay,
        is_shared=is_shared,
    )


def make_network(settings: Settings, train: ImageSet) -> Any:
    """Make the generator's network, randomly initialised."""
    size, (channels, image_size) = settings.generator.size, train.images.shape[1:3]
    if settings.generator.kind == "diffusion":
        return make_denoiser(size, image_size=image_size, image_channels=channels, num_classes=train.num_classes)
    if settings.generator.kind == "vae":
        return make_vae(size, image_size=image_size, image_channels=channels)
    chosen = settings.provenance
    # The two-branch head needs p(y) even where no class loss is wanted.
    has_classes = chosen.class_loss_weight > 0 or chosen.index_head == "class_conditional"
    stages = [list(shape) for shape in stage_shapes(settings, train)]
    return ImageClassifier(stages=stages, num_classes=train.num_classes * has_classes)


def make_generator(settings: Settings, train: ImageSet, network: Any) -> Generator:
    """Make the generator of a network; a new kind of generator is one file in `generators/` and one line here."""
    chosen = settings.generator
    if chosen.kind == "diffusion":
        scheduler = make_sampling_scheduler(make_training_scheduler(chosen.beta_schedule, chosen.prediction))
        return DiffusionGenerator(network=network, scheduler=scheduler)
    if chosen.kind == "vae":
        return VaeGenerator(network=network, kl_weight=chosen.kl_weight)
    weight = settings.provenance.class_loss_weight
    return ClassifierGenerator(network=network, image_shape=tuple(train.images.shape[1:]), class_loss_weight=weight)


def require_noise_levels(settings: Settings, what: str) -> None:
    """Refuse generators without noise levels for `what`.

    Raises:
        InputError: It is one.
    """
    if settings.generator.kind != "diffusion":
        raise InputError(f"{what} needs generator.kind=diffusion, got {settings.generator.kind}")


def label_dropout(settings: Settings) -> float:
    """Share of rows whose label the generator is not given: all, unless it is class-conditional."""
    return settings.generator.label_dropout if settings.generator.kind == "diffusion" else 1.0


def stage_shapes(settings: Settings, train: ImageSet) -> list[tuple[int, int]]:
    """List `(channels, height)` of the image and of every encoder stage."""
    channels, image_size = train.images.shape[1:3]
    return encoder_shapes(settings.generator.size, image_size, channels)


def make_batches(settings: Settings, train: ImageSet, accelerator: Accelerator) -> BatchStream:
    """Make the stream of global batches, which the processes share.

    Raises:
        InputError: The global batch does not divide evenly over the processes.
    """
    size = settings.training.batch_size
    if size % accelerator.num_processes:
        raise InputError(
            f"training.batch_size must be a multiple of the {accelerator.num_processes} processes, got {size}"
        )
    return make_stream(settings, train)


def make_stream(settings: Settings, train: ImageSet) -> BatchStream:
    """Make the stream of batches that one optimiser step is made of each."""
    is_latent = settings.generator.kind == "vae"
    return BatchStream(
        train,
        batch_size=settings.training.batch_size,
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        label_dropout=label_dropout(settings),
        seed=settings.training.seed,
        noise_shape=(LATENT_CHANNELS, 1, 1) if is_latent else None,
    )


def make_trackers(folder: RunFolder, accelerator: Accelerator, start_step: int) -> None:
    """Start `metrics.jsonl` and TensorBoard as trackers of `accelerator.log`."""
    accelerator.log_with = [
        JsonLinesTracker(folder.metrics, start_step=start_step),
        # What a killed run logged after its last checkpoint is purged from the curves.
        TensorBoardTracker("tensorboard", logging_dir=folder.root, purge_step=start_step + 1),
    ]
    accelerator.init_trackers("provgen")


def make_mixing(chosen: ProvenanceSettings, data: RunData, device: torch.device) -> Mixing | None:
    """Make what spreads the targets over like examples; None for no label mixing."""
    train = data.train
    if chosen.label_mixing == 0:
        return None
    if chosen.mixing == "class":
        labels, covered = train.labels.to(device), data.covered.to(device)
        return ClassMixing(labels, num_classes=train.num_classes, share=chosen.label_mixing, covered=covered)
    rows = to_unit_range(train.images).flatten(1)
    neighbors = nearest_neighbors(rows, train.labels, chosen.num_neighbors, covered=data.covered)
    return NeighborMixing(neighbors.to(device), share=chosen.label_mixing)


def _require_something_to_learn(chosen: ProvenanceSettings, num_classes: int) -> None:
    learns_classes = chosen.class_loss_weight > 0 and num_classes > 0
    if chosen.index_head == "none" and not learns_classes:
        raise InputError(
            "generator.kind=none with provenance.index_head=none needs classes and a positive "
            "provenance.class_loss_weight, or there is nothing to learn; choose an index head"
        )
    if chosen.index_head == "class_conditional" and chosen.gradient == "stop" and not learns_classes:
        raise InputError(
            "generator.kind=none with provenance.index_head=class_conditional and provenance.gradient=stop needs a "
            "positive provenance.class_loss_weight, or nothing trains its class branch"
        )


def _make_provenance(settings: Settings, data: RunData) -> ProvenanceNetwork:
    chosen, train = settings.provenance, data.train
    shapes = stage_shapes(settings, train)
    shared = len(shapes) - 1 if chosen.shared_stages is None else chosen.shared_stages
    if shared >= len(shapes):
        raise InputError(
            f"provenance.shared_stages must be null or 0 to {len(shapes) - 1} for generator.size="
            f"{settings.generator.size}, got {shared}"
        )
    covered = data.covered.nonzero().flatten()
    head = _head_arguments(settings, train.labels[covered], train.num_classes)
    # A classifier has a class head itself; others learn the class of what they are told nothing of.
    has_class_head = chosen.class_loss_weight > 0 and settings.generator.kind != "none" and label_dropout(settings) > 0
    network: ProvenanceNetwork = _seeded(
        settings.training.seed + 1,
        lambda: ProvenanceNetwork(
            stages=[list(shape) for shape in shapes],
            shared_stages=shared,
            head=head,
            num_examples=len(train),
            num_covered=len(covered),
            num_classes=train.num_classes,
            width=chosen.width,
            has_class_head=has_class_head and train.num_classes > 0,
            beam=chosen.beam if chosen.index_head == "two_stage" else None,
            fingerprint=data.manifest.fingerprint,
        ),
    )
    images = to_unit_range(train.images)
    network.start(images, train.labels, covered, at_images=chosen.start == "images")
    return network


def _head_arguments(settings: Settings, labels: Tensor, num_classes: int) -> dict[str, Any]:
    chosen = settings.provenance
    if chosen.index_head not in HEADS:
        known = ", ".join(HEADS)
        raise InputError(f"provenance.index_head must be {known} or none, got {chosen.index_head}")
    needs_classes = chosen.index_head == "class_conditional" or (
        chosen.index_head == "two_stage" and chosen.cells == "classes"
    )
    if needs_classes and num_classes == 0:
        raise InputError(
            f"provenance.index_head={chosen.index_head} with these cells needs class labels, and the images have "
            "none; use class_independent, or two_stage with provenance.cells=kmeans"
        )
    return HEADS[chosen.index_head](settings, labels, num_classes)


def _num_cells(chosen: ProvenanceSettings, labels: Tensor) -> int:
    if chosen.cells == "classes":
        return len(labels.unique())
    cells = chosen.num_cells or min(len(labels), max(2, round(len(labels) ** 0.5 / 5)))
    if cells > len(labels):
        raise InputError(
            f"provenance.num_cells must be null or at most the {len(labels)} examples covered, got {cells}"
        )
    return cells


def _make_objective(
    settings: Settings, data: RunData, generator: Generator, device: torch.device
) -> ProvenanceObjective:
    chosen, train = settings.provenance, data.train
    targets: Targets = OneHotTargets(len(train))
    if chosen.targets == "posterior":
        targets = PosteriorTargets(_target_posterior(settings, data, generator, device))
    mixing = make_mixing(chosen, data, device)
    if mixing is not None:
        targets = MixedTargets(targets, mixing)
    return ProvenanceObjective(
        targets=targets,
        loss_weight=chosen.loss_weight,
        class_loss_weight=chosen.class_loss_weight,
        stops_gradient=chosen.gradient == "stop",
        covered=data.covered.to(device),
        coverage=float(data.covered.double().mean()),
    )


def _target_posterior(settings: Settings, data: RunData, generator: Generator, device: torch.device) -> SoftTarget:
    """Make the posterior that is trained towards; that of an autoencoder moves with its encoder."""
    covered = None if data.covered.all() else data.covered

    def make() -> Posterior:
        dtype = torch.get_default_dtype()
        return generator.closed_form(data.train, dtype=dtype, device=device, covered=covered)

    if settings.generator.kind != "vae":
        return make()
    return PeriodicPosterior(make, checkpoint_every=settings.training.checkpoint_every)


def _seeded(seed: int, make: Callable[[], T]) -> T:
    """Call `make` with torch's CPU generator seeded, and put the generator back after; weights start on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
