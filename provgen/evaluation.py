"""Trained networks to what is looked at: their averaged weights, the pipeline, and index metrics on fixed queries."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from diffusers import ModelMixin, UNet2DModel
from torch import Tensor

from provgen.build import RunData, TrainedRun, make_mixing
from provgen.data.batches import Batch, fixed_batches
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.generators.closed_form import ClosedFormPosterior, Posterior
from provgen.generators.kinds import DiffusionKind, make_kind
from provgen.generators.losses import denoiser_divergence, generator_losses
from provgen.metrics.agreement import shared_sources
from provgen.metrics.class_quality import ClassQuality, class_quality
from provgen.metrics.index_quality import LEVELS, IndexProbe, mean_kl_gap
from provgen.metrics.statistics import Estimate
from provgen.metrics.verdicts import Evidence, gather_evidence
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler
from provgen.pipeline import ATTRIBUTE_BATCH, ProvenancePipeline, ProvenancePipelineOutput
from provgen.run import RunFolder, atomic_path
from provgen.settings import Settings
from provgen.tracing.network import NetworkPosterior
from provgen.tracing.trace import late_level
from provgen.training.trainer import CoTrainer

COMPARED = 10
"""Most probable sources of an image that are compared with the closed form's."""

LOSS_DRAWS = 20
"""Noise levels at which the generator's loss on an image is measured."""

RECALLED = 10
"""Sources of the exhaustive answer that a beam should find."""

CLASS_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""alpha_bars at which class metrics are measured."""


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
    return NetworkPosterior(trainer.observer, networks[trainer.observer.name], networks["provenance"])


def posterior_of(trained: TrainedRun) -> NetworkPosterior:
    """Make the posterior of a finished run."""
    pipeline = trained.pipeline
    observer = make_kind(trained.settings, trained.data.train).make_observer(pipeline.device)
    return NetworkPosterior(observer, pipeline.network, pipeline.provenance)


def losses(network: ModelMixin, settings: Settings, images: ImageSet) -> Tensor:
    """Measure the generator's own loss on each image with fixed noise, (query,)."""
    return losses_by_draw(network, settings, images, draws=LOSS_DRAWS).mean(dim=1)


def losses_by_draw(network: ModelMixin, settings: Settings, images: ImageSet, *, draws: int) -> Tensor:
    """Measure the generator's own loss on each image at every one of `draws` noise levels, (query, draw)."""
    kind = make_kind(settings, images)
    return generator_losses(
        kind.make_observer(network.device),
        network,
        images,
        noise_shape=kind.noise_shape(),
        draws=1 if settings.generator.kind == "none" else draws,  # without noise one is as good as many
        seed=0,
    )


def make_pipeline(trainer: CoTrainer, settings: Settings, data: RunData) -> ProvenancePipeline:
    """Make the pipeline of the averaged weights, which traces if there is a provenance network."""
    networks = averaged_networks(trainer)
    kind = make_kind(settings, data.train)
    parts = {trainer.observer.component: networks[trainer.observer.name]}
    if isinstance(kind, DiffusionKind):
        parts["scheduler"] = make_sampling_scheduler(kind.noise_scheduler)
    return ProvenancePipeline(networks.get("provenance"), **parts).with_manifest(data.manifest)


def save_pipeline(trainer: CoTrainer, settings: Settings, data: RunData, folder: RunFolder) -> None:
    """Write the pipeline of the averaged weights, whole or not at all.

    A generator trained without a provenance network has no pipeline; its weights are in the checkpoints.
    """
    if "provenance" in trainer.networks:
        with atomic_path(folder.pipeline) as partial:
            make_pipeline(trainer, settings, data).save_pretrained(partial)


def sample(
    pipeline: ProvenancePipeline,
    settings: Settings,
    data: RunData,
    *,
    count: int,
    resample_below: float | None = None,
) -> ProvenancePipelineOutput:
    """Generate images of all classes in turn with seeds 0, 1, ...; traced if there is a provenance network.

    The closed form traces them as well, but for those that are resampled with too little late entropy.
    """
    pipeline.set_progress_bar_config(disable=True)
    classes: list[int | None] = [*range(data.train.num_classes if pipeline.is_class_conditional else 0)] or [None]
    closed_form = None
    if pipeline.provenance is not None and resample_below is None:
        kind = make_kind(settings, data.train)
        closed_form = kind.closed_form(pipeline.network, data.train, dtype=torch.float32, device=pipeline.device)
    return pipeline(
        [classes[number % len(classes)] for number in range(count)],
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
        top_k=None if pipeline.provenance is None else 1,
        closed_form=closed_form,
        resample_below=resample_below,
        output_type="pt",
    )


def evidence_of(trained: TrainedRun, images: Tensor, labels: Tensor) -> Evidence:
    """Gather what is known of images from anywhere, all traced alike: from outside, told no class.

    Args:
        trained: The run.
        images: uint8 (query, channel, height, width).
        labels: The classes they were asked for or have, int64 (query,); the null label for none.
    """
    data, pipeline = trained.data, trained.pipeline
    closed_form = make_kind(trained.settings, data.train).closed_form(
        pipeline.network,
        data.train,
        dtype=torch.float32,
        device=pipeline.device,
        covered=None if data.covered.all() else data.covered,
    )
    parts = zip(images.split(ATTRIBUTE_BATCH), labels.split(ATTRIBUTE_BATCH), strict=True)
    traced = [_traced_evidence(trained, closed_form, *part) for part in parts]
    return gather_evidence(
        to_unit_range(images),
        to_unit_range(data.train.images),
        **{name: torch.cat([part[name] for part in traced]) for name in traced[0]},
    )


def _traced_evidence(trained: TrainedRun, closed_form: Posterior, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Take the evidence of few images from whole posteriors, whatever a calibration ranks first."""
    pipeline, num_covered = trained.pipeline, int(trained.data.covered.sum())
    traced = pipeline.attribute(images, top_k=num_covered)
    believed = traced.posterior.topk(min(COMPARED, num_covered), dim=1)
    others = pipeline.attribute(images, top_k=believed.indices.shape[1], closed_form=closed_form)
    is_own = trained.data.train.labels[traced.example_index] == labels[:, None]
    of_class = (traced.posterior * is_own).sum(dim=1) / traced.posterior.sum(dim=1)
    return {
        "entropy": traced.entropy,
        "late_entropy": traced.step_entropy[:, late_level(traced.alpha_bar.tolist())],
        "of_class": torch.where(labels < trained.data.train.num_classes, of_class, 1.0),
        "top": believed.values[:, 0],
        "agreement": shared_sources(traced.example_index.gather(1, believed.indices), others.example_index),
    }


def divergence_by_step(unet: UNet2DModel, settings: Settings, train: ImageSet, images: ImageSet) -> dict[int, Tensor]:
    """Measure how far a denoiser is from the one that has learned `train` by heart: nats (query,) by timestep.

    Args:
        unet: The denoiser.
        settings: Of the run.
        train: Its training images.
        images: What is noised.
    """
    pixels = to_unit_range(train.images, torch.float64)
    steps = make_kind(settings, train).timesteps(LEVELS)
    found = denoiser_divergence(
        unet,
        ClosedFormPosterior(pixels, train.labels, null_label=train.num_classes),
        make_training_scheduler(settings.generator.beta_schedule),
        images,
        timesteps=steps,
        seed=0,
    )
    return {step: found[:, place] for place, step in enumerate(steps)}


def make_probe(settings: Settings, data: RunData, num_queries: int = 256) -> IndexProbe:
    """Make the fixed queries on which the index metrics are measured."""
    kind = make_kind(settings, data.train)
    covered = data.covered.nonzero().flatten()
    seed = settings.training.seed
    order = torch.randperm(len(covered), generator=seeded_generator(seed, Stream.PROBE))
    rows = covered[order[:num_queries]]
    return IndexProbe(
        fixed_batches(data.train, rows, kind.timesteps(LEVELS), noise_shape=kind.noise_shape(), seed=seed),
        null_label=data.train.num_classes,
        is_conditional=isinstance(kind, DiffusionKind),
        mixing=make_mixing(settings.provenance, data, torch.device("cpu")),
    )


def make_ceiling(settings: Settings, data: RunData, network: Any) -> Posterior:
    """Make the closed form over the covered examples, exactly: in float64 on the CPU."""
    kind, cpu = make_kind(settings, data.train), torch.device("cpu")
    covered = None if data.covered.all() else data.covered
    return kind.closed_form(network, data.train, dtype=torch.float64, device=cpu, covered=covered)


def class_qualities(
    network: NetworkPosterior, settings: Settings, train: ImageSet, images: ImageSet
) -> dict[float, ClassQuality]:
    """Measure what the sources and the class head say about the class of images the network is told nothing of.

    Args:
        network: Generator and provenance network.
        settings: Of the run.
        train: The training images.
        images: The queries: held-out images, or training images, which may name themselves.

    Returns:
        One result for each alpha_bar of `CLASS_LEVELS`; a generator without noise levels has one level.
    """
    kind = make_kind(settings, train)
    cpu = torch.device("cpu")
    closed_form = kind.closed_form(network.network, train, dtype=torch.float64, device=cpu)
    batches = fixed_batches(
        images,
        torch.arange(len(images)),
        kind.timesteps(CLASS_LEVELS),
        noise_shape=kind.noise_shape(),
        seed=settings.training.seed,
    )
    return dict(_class_quality(network, closed_form, train, batch) for batch in batches)


def _class_quality(
    network: NetworkPosterior, closed_form: Posterior, train: ImageSet, batch: Batch
) -> tuple[float, ClassQuality]:
    told_nothing = replace(batch, labels=torch.full_like(batch.labels, train.num_classes))
    observation, output = network.observe(told_nothing)
    alpha_bar = observation.alpha_bar.cpu()
    quality = class_quality(
        output.index_logits.cpu().double().log_softmax(dim=1),
        closed_form.logits(observation.query.cpu(), alpha_bar, told_nothing.labels),
        train_labels=train.labels,
        query_labels=batch.clean_labels,
        class_logits=None if output.class_logits is None else output.class_logits.cpu(),
        num_classes=train.num_classes,
    )
    return float(alpha_bar[0]), quality


def evaluate(probe: IndexProbe, trainer: CoTrainer, settings: Settings, data: RunData) -> dict[str, Any]:
    """Measure the index metrics of the averaged weights, as they are logged.

    Returns:
        `index_quality`, a list of rows; the mean KL gaps with their intervals, in nats; for a two-stage head, how
        much of its own answer it finds with the beam it traces with.
    """
    network = averaged_posterior(trainer)
    qualities = probe.measure(network, make_ceiling(settings, data, network.network))
    measured: dict[str, Any] = {"index_quality": [quality.as_row() for quality in qualities]}
    for rows in sorted({quality.rows for quality in qualities}):
        measured |= _named(f"kl_gap_{rows}", mean_kl_gap(qualities, rows))
    beam = network.provenance.config.beam
    if beam is not None:
        measured |= _named(f"beam_recall{RECALLED}", probe.beam_recall(network, beam, RECALLED))
    return measured


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
