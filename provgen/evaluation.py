"""Trained networks to what is looked at: their averaged weights, the pipeline, and index metrics on fixed queries."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from provgen.build import RunData, TrainedRun, make_mixing
from provgen.data.batches import Batch, fixed_batches
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError
from provgen.generators.closed_form import Posterior, entropy, image_posterior
from provgen.generators.diffusion import DiffusionGenerator
from provgen.generators.losses import denoiser_divergence
from provgen.generators.protocol import Generator, Output
from provgen.metrics.agreement import beam_recall, shared_sources
from provgen.metrics.class_quality import ClassQuality, class_quality
from provgen.metrics.index_quality import LEVELS, IndexQuality, index_hits, index_quality, mean_kl_gap
from provgen.metrics.statistics import Estimate
from provgen.metrics.verdicts import Evidence, gather_evidence
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.provenance import ProvenanceNetwork, ProvenanceOutput
from provgen.models.temperatures import Temperatures, Tracer
from provgen.pipeline import ATTRIBUTE_BATCH, ProvenancePipeline, ProvenancePipelineOutput
from provgen.run import CHECKSUMS, RunFolder, atomic_path, check_seal
from provgen.settings import Settings
from provgen.tracing.calibrate import NUM_INFERENCE_STEPS, default_credit_head
from provgen.tracing.temperatures import fit_temperatures, informative_levels
from provgen.tracing.trace import Levels, MeanPosterior, ask_closed_form, ask_network, late_level, trace
from provgen.training.targets import Mixing
from provgen.training.trainer import CoTrainer

COMPARED = 10
"""Most probable sources of an image that are compared with the closed form's."""

NUM_LEVELS = 12
"""Noise levels at which index metrics are measured."""

FEWEST_PROBED, MOST_PROBED = 32, 256
"""Training images on which they are measured."""

PROBED_PIXELS = 200_000
"""Numbers in these images together; fewer large ones are taken."""

LATE_IMAGES = 256
"""Held-out images whose entropy samples are compared with, at most."""

LOSS_DRAWS = 20
"""Noise levels at which the generator's loss on an image is measured."""

EVIDENCE_EVERY = 4
"""Noise levels of the sampler from one that evidence is read off to the next."""

RECALLED = 10
"""Sources of the exhaustive answer that a beam should find."""

CLASS_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels alpha_bar at which class metrics are measured."""


def averaged_networks(trainer: CoTrainer) -> dict[str, Any]:
    """Copy the networks with their averaged weights, ready for evaluation."""
    return {name: averaged_network(trainer, name) for name in trainer.networks}


def averaged_network(trainer: CoTrainer, name: str) -> Any:
    """Copy one network with its averaged weights, ready for evaluation."""
    copy = deepcopy(trainer.networks[name]).requires_grad_(requires_grad=False).eval()
    copy.load_state_dict(trainer.averaged(name))
    return copy


def averaged_generator(trainer: CoTrainer) -> Generator:
    """Give the generator with a copy of its averaged weights, ready for evaluation."""
    return trainer.generator.with_network(averaged_network(trainer, trainer.generator.name))


@dataclass(frozen=True)
class NetworkPosterior:
    """p(i | query, y) by a provenance network, for any batch its generator can be run on."""

    generator: Generator
    provenance: ProvenanceNetwork

    @torch.no_grad()
    def forward(self, batch: Batch) -> tuple[Output, ProvenanceOutput]:
        """Run the generator, and the network on its feature maps."""
        output = self.generator.forward(batch.to(self.provenance.device))
        return output, self.provenance(output.feature_maps, output.alpha_bar, output.class_labels, output.class_logits)

    @torch.no_grad()
    def index_logits(self, output: Output, beam: int | None = None) -> Tensor:
        """Give index logits (query, train), of the best `beam` cells only if given."""
        logits: Tensor = self.provenance.index_logits(
            output.feature_maps, output.alpha_bar, output.class_labels, output.class_logits, beam
        )
        return logits


def averaged_posterior(trainer: CoTrainer) -> NetworkPosterior:
    """Make the posterior of the averaged provenance network, for evaluation during training."""
    return NetworkPosterior(averaged_generator(trainer), averaged_network(trainer, "provenance"))


def posterior_of(trained: TrainedRun) -> NetworkPosterior:
    """Make the posterior of a finished run."""
    return NetworkPosterior(trained.generator, trained.pipeline.provenance)


def make_pipeline(
    trainer: CoTrainer, data: RunData, *, temperatures: Temperatures | None = None, has_credit: bool = False
) -> ProvenancePipeline:
    """Make the pipeline of the averaged weights, which traces if there is a provenance network.

    Without `temperatures` they are fitted. With `has_credit` so is a credit head under default hyperparameters.
    """
    generator = averaged_generator(trainer)
    if "provenance" not in trainer.networks:
        return ProvenancePipeline(**generator.components).with_manifest(data.manifest)
    provenance = averaged_network(trainer, "provenance")
    fitted = fit(generator, provenance, data) if temperatures is None else temperatures
    credit = default_credit_head(generator, provenance, data.train).to(provenance.device) if has_credit else None
    pipeline = ProvenancePipeline(provenance, **generator.components, temperatures=fitted, credit=credit)
    return pipeline.with_manifest(data.manifest)


def fit(generator: Generator, provenance: ProvenanceNetwork, data: RunData) -> Temperatures:
    """Fit the temperatures of a trained generator and its provenance network."""
    device = provenance.device
    closed_form = generator.closed_form(data.train, dtype=torch.float32, device=device)
    found = fit_temperatures(generator, provenance, data.train, data.holdout, closed_form=closed_form, seed=0)
    fitted: Temperatures = found.to(device)
    return fitted


def save_pipeline(
    trainer: CoTrainer, data: RunData, folder: RunFolder, *, temperatures: Temperatures | None, has_credit: bool
) -> None:
    """Write the pipeline of the averaged weights, whole or not at all; see `make_pipeline`.

    A generator trained without a provenance network has no pipeline; its weights are in the checkpoints.
    """
    if "provenance" in trainer.networks:
        with atomic_path(folder.pipeline) as partial:
            make_pipeline(trainer, data, temperatures=temperatures, has_credit=has_credit).save_pretrained(partial)


def has_whole_pipeline(folder: RunFolder) -> bool:
    """Whether the pipeline of a run is there, and is what was saved."""
    if not all((folder.pipeline / name).is_file() for name in ("model_index.json", CHECKSUMS)):
        return False
    try:
        check_seal(folder.pipeline, "")
    except InputError:
        return False
    return True


def sample(
    pipeline: ProvenancePipeline,
    data: RunData,
    *,
    count: int,
    resample_below: float | None = None,
) -> ProvenancePipelineOutput:
    """Generate images of all classes in turn with seeds 0, 1, ...; traced if there is a provenance network.

    The closed form traces them as well, but for those that are resampled with too little late entropy.
    """
    pipeline.set_progress_bar_config(disable=True)
    generator = pipeline.generator
    closed_form = None
    if pipeline.provenance is not None and resample_below is None:
        closed_form = generator.closed_form(data.train, dtype=torch.float32, device=pipeline.device)
    return pipeline(
        classes_in_turn(data.train, count, is_conditional=generator.is_class_conditional),
        generator=[torch.Generator().manual_seed(number) for number in range(count)],
        top_k=None if pipeline.provenance is None else 1,
        closed_form=closed_form,
        resample_below=resample_below,
        output_type="pt",
    )


def classes_in_turn(train: ImageSet, count: int, *, is_conditional: bool) -> list[int | None]:
    """Give a class for each of `count` images, all in turn; None for a generator that is given none."""
    classes: list[int | None] = [*range(train.num_classes if is_conditional else 0)] or [None]
    return [classes[number % len(classes)] for number in range(count)]


def evidence_of(trained: TrainedRun, images: Tensor, labels: Tensor) -> Evidence:
    """Gather what is known of images from anywhere, all traced alike: from outside, told no class.

    Args:
        trained: The run.
        images: uint8 (query, channel, height, width).
        labels: The classes they were asked for or have, int64 (query,); the null label for none.
    """
    data = trained.data
    closed_form = trained.closed_form(covered=None if data.covered.all() else data.covered)
    parts = zip(images.split(ATTRIBUTE_BATCH), labels.split(ATTRIBUTE_BATCH), strict=True)
    traced = [_traced_evidence(trained, closed_form, *part) for part in parts]
    return gather_evidence(
        to_unit_range(images),
        to_unit_range(data.train.images),
        **{name: torch.cat([part[name] for part in traced]) for name in traced[0]},
    )


@torch.no_grad()
def _traced_evidence(trained: TrainedRun, closed_form: Posterior, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Take the evidence of few images from whole posteriors at some levels, whatever credit ranks first."""
    pipeline, train = trained.pipeline, trained.data.train
    clean = to_unit_range(images, pipeline.network.dtype).to(pipeline.device)
    told_nothing = torch.full((len(images),), pipeline.null_label, device=pipeline.device)
    levels = Levels.of(pipeline.generator, NUM_INFERENCE_STEPS, EVIDENCE_EVERY, pipeline.window)
    asks = (
        ask_network(pipeline.provenance, pipeline.temperatures),
        ask_closed_form(closed_form, pipeline.temperatures),
    )
    looks = [MeanPosterior(ask, levels, only_window=True) for ask in asks]
    trace(pipeline.generator.renoise(clean, told_nothing, num_inference_steps=NUM_INFERENCE_STEPS, seed=0), *looks)
    posterior, exact = (look.posterior().cpu() for look in looks)
    believed, others = (
        probs.topk(min(COMPARED, int(trained.data.covered.sum())), dim=1) for probs in (posterior, exact)
    )
    of_class = (posterior * (train.labels == labels[:, None])).sum(dim=1) / posterior.sum(dim=1)
    return {
        "entropy": entropy(posterior),
        "late_entropy": looks[0].late_entropy().cpu(),
        "of_class": torch.where(labels < train.num_classes, of_class, 1.0),
        "top": believed.values[:, 0],
        "agreement": shared_sources(believed.indices, others.indices),
    }


def late_entropy_limit(pipeline: ProvenancePipeline, holdout: ImageSet, share: float) -> float:
    """Give the entropy in nats, at the cleanest level of the window, that a share of held-out images are below.

    Raises:
        InputError: There are no held-out images.
    """
    if not len(holdout):
        raise InputError("--resample-below compares samples with held-out images, and this run has none")
    chosen = torch.randperm(len(holdout), generator=seeded_generator(0, Stream.PROBE))[:LATE_IMAGES]
    labels = holdout.labels[chosen] if pipeline.generator.is_class_conditional else None
    traced = pipeline.attribute(holdout.images[chosen], top_k=1, class_labels=labels)
    late = traced.step_entropy[:, late_level(traced.alpha_bar.tolist(), pipeline.window)]
    # A copier's may be 0, which nothing is below.
    return max(float(late.double().quantile(share)), torch.finfo(torch.float32).tiny)


def divergence_by_step(generator: DiffusionGenerator, train: ImageSet, images: ImageSet) -> dict[int, Tensor]:
    """Measure how far a denoiser is from the one that has learned `train` by heart: nats (query,) by timestep.

    Args:
        generator: The denoiser.
        train: Its training images.
        images: Images that are noised.
    """
    closed_form = image_posterior(train, dtype=torch.float64, device=torch.device("cpu"))
    steps = generator.timesteps(LEVELS)
    divergence = denoiser_divergence(generator, closed_form, images, timesteps=steps, seed=0)
    return dict(zip(steps, divergence.T, strict=True))


class IndexProbe:
    """Fixed batches of training images on which index metrics are measured again and again."""

    def __init__(self, batches: list[Batch], *, null_label: int, is_conditional: bool, mixing: Mixing | None) -> None:
        """Keep what is measured.

        Args:
            batches: One per noise level, of covered examples; a generator without noise levels has one.
            null_label: The label that stands for no label.
            is_conditional: Whether this generator can be told a class label.
            mixing: Label mixing of the targets the network was trained towards; None for none.
        """
        self.batches = batches
        self.null_label = null_label
        self.is_conditional = is_conditional
        self.mixing = mixing

    def measure(self, network: NetworkPosterior, closed_form: Posterior) -> list[IndexQuality]:
        """Measure every level, conditional rows (where there are labels) and unconditional rows apart.

        Args:
            network: Generator and provenance network.
            closed_form: In float64 on the CPU, over the covered examples: the ceilings come from it.
        """
        return [
            self._level(network, closed_form, rows, part) for batch in self.batches for rows, part in self.parts(batch)
        ]

    def beam_recall(self, network: NetworkPosterior, beam: int, k: int) -> Estimate:
        """Share of the `k` best of the exhaustive answer found in the best `beam` cells; unconditional rows.

        Both answers are averaged over the levels first, as traces are.
        """
        answers: dict[int | None, list[Tensor]] = {None: [], beam: []}
        for batch in self.batches:
            output, _ = network.forward(dict(self.parts(batch))["unconditional"])
            for cells, probs in answers.items():
                probs.append(network.index_logits(output, cells).softmax(dim=1))
        lowest = torch.finfo(answers[None][0].dtype).min
        whole, searched = (torch.stack(answers[cells]).mean(dim=0).log().clamp_min(lowest) for cells in (None, beam))
        return beam_recall(searched, whole, k)

    def parts(self, batch: Batch) -> list[tuple[str, Batch]]:
        """Split a batch into `labelled` rows, told their class, and `null` rows, told nothing."""
        null = torch.full_like(batch.clean_labels, self.null_label)
        parts = [("unconditional", replace(batch, labels=null))]
        has_label = (batch.clean_labels != self.null_label).nonzero().flatten()
        if self.is_conditional and len(has_label):
            parts.insert(0, ("conditional", replace(batch, labels=batch.clean_labels).select(has_label)))
        return parts

    def _level(self, network: NetworkPosterior, closed_form: Posterior, rows: str, batch: Batch) -> IndexQuality:
        output, predicted = network.forward(batch)
        log_probs = predicted.index_logits.cpu().double().log_softmax(dim=1)
        alpha_bar = output.alpha_bar.cpu()
        start, hits = 0, []
        for posterior in closed_form.chunks(output.query.cpu(), alpha_bar, batch.labels):
            stop = start + len(posterior)
            hits.append(index_hits(log_probs[start:stop], posterior, self.mixing))
            start = stop
        return index_quality(float(alpha_bar[0]), rows, torch.cat(hits))


def make_probe(generator: Generator, settings: Settings, data: RunData) -> IndexProbe:
    """Make the fixed queries on which the index metrics are measured, at levels where there is something to know."""
    covered, seed = data.covered.nonzero().flatten(), settings.training.seed
    order = torch.randperm(len(covered), generator=seeded_generator(seed, Stream.PROBE))
    num_queries = max(FEWEST_PROBED, min(MOST_PROBED, PROBED_PIXELS // data.train.images[0].numel()))
    steps, shape = generator.timesteps(probe_levels(generator, data)), generator.noise_shape
    return IndexProbe(
        fixed_batches(data.train, covered[order[:num_queries]], steps, noise_shape=shape, seed=seed),
        null_label=data.train.num_classes,
        is_conditional=generator.is_class_conditional,
        mixing=make_mixing(settings.provenance, data, torch.device("cpu")),
    )


def probe_levels(generator: Generator, data: RunData) -> list[float]:
    """Find the noise levels of the probe; a generator without noise levels has one."""
    if not generator.has_noise_levels:
        return [CLEAN_ALPHA_BAR]
    device = generator.network.device
    images = (data.holdout if len(data.holdout) else data.train).images[:FEWEST_PROBED]
    closed_form = generator.closed_form(data.train, dtype=torch.float32, device=device)
    clean, null_label = to_unit_range(images).to(device), data.train.num_classes
    return informative_levels(generator, closed_form, clean, null_label=null_label, count=NUM_LEVELS)


def make_ceiling(generator: Generator, data: RunData) -> Posterior:
    """Make the closed form over the covered examples, exactly: in float64 on the CPU."""
    covered = None if data.covered.all() else data.covered
    return generator.closed_form(data.train, dtype=torch.float64, device=torch.device("cpu"), covered=covered)


def class_qualities(
    network: NetworkPosterior, settings: Settings, train: ImageSet, images: ImageSet
) -> dict[float, ClassQuality]:
    """Measure what the sources and the class head say about the class of images the network is told nothing of.

    Args:
        network: Generator and provenance network.
        settings: Settings of the run.
        train: The training images.
        images: The queries: held-out images, or training images, which may name themselves.

    Returns:
        One result for each alpha_bar of `CLASS_LEVELS`; a generator without noise levels has one level.
    """
    generator, seed = network.generator, settings.training.seed
    closed_form = generator.closed_form(train, dtype=torch.float64, device=torch.device("cpu"))
    steps, shape = generator.timesteps(CLASS_LEVELS), generator.noise_shape
    batches = fixed_batches(images, torch.arange(len(images)), steps, noise_shape=shape, seed=seed)
    return dict(_class_quality(network, closed_form, train, batch) for batch in batches)


def _class_quality(
    network: NetworkPosterior, closed_form: Posterior, train: ImageSet, batch: Batch
) -> tuple[float, ClassQuality]:
    told_nothing = replace(batch, labels=torch.full_like(batch.labels, train.num_classes))
    output, predicted = network.forward(told_nothing)
    alpha_bar = output.alpha_bar.cpu()
    quality = class_quality(
        predicted.index_logits.cpu().double().log_softmax(dim=1),
        closed_form.logits(output.query.cpu(), alpha_bar, told_nothing.labels),
        train_labels=train.labels,
        query_labels=batch.clean_labels,
        class_logits=None if predicted.class_logits is None else predicted.class_logits.cpu(),
        num_classes=train.num_classes,
    )
    return float(alpha_bar[0]), quality


def evaluate(probe: IndexProbe, trainer: CoTrainer, data: RunData) -> tuple[dict[str, Any], Temperatures]:
    """Fit the temperatures of the averaged weights, and measure the index metrics.

    Returns:
        What is logged: `index_quality` and `temperatures`, lists of rows; the mean KL gaps with their intervals, in
        nats; for a two-stage head, how much of its own answer it finds with the beam it traces with. And the
        temperatures.
    """
    network = averaged_posterior(trainer)
    temperatures = fit(network.generator, network.provenance, data)
    qualities = probe.measure(network, make_ceiling(network.generator, data))
    measured: dict[str, Any] = {
        "index_quality": [quality.as_row() for quality in qualities],
        "temperatures": temperature_rows(temperatures),
    }
    for rows in sorted({quality.rows for quality in qualities}):
        measured |= _named(f"kl_gap_{rows}", mean_kl_gap(qualities, rows))
    beam = network.provenance.config.beam
    if beam is not None:
        measured |= _named(f"beam_recall{RECALLED}", probe.beam_recall(network, beam, RECALLED))
    return measured, temperatures


def temperature_rows(temperatures: Temperatures) -> list[dict[str, Any]]:
    """List the fitted temperatures by noise level, of the network and of the closed form."""
    fitted = temperatures.log_temperatures.exp().double()
    return [
        {
            "alpha_bar": float(alpha_bar),
            **{
                f"{tracer.name.lower()}_{rows}": float(fitted[tracer, row, level])
                for tracer in Tracer
                for row, rows in enumerate(("conditional", "unconditional"))
            },
        }
        for level, alpha_bar in enumerate(temperatures.alpha_bars)
        if alpha_bar >= temperatures.window[0]
    ]


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
