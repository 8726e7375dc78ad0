"""Everything that the tables of variants say about one run, and the file it is kept in."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks

from provgen import build, evaluation
from provgen.data.batches import Batch, fixed_batches
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.splits import stratified_subset
from provgen.errors import InputError
from provgen.generators.losses import generator_losses
from provgen.generators.protocol import Generator
from provgen.metrics.copying import distance_ratio, share_memorized
from provgen.metrics.linear_probe import linear_probe
from provgen.metrics.neighbors import distinct_rows, nearest
from provgen.pipeline import ProvenancePipeline
from provgen.report.format import finite_or_null
from provgen.run import RunFolder, atomic_path, read_json
from provgen.settings import Settings, flat_settings
from provgen.settings_file import load_settings
from provgen.tracing.attribution import Attribution
from provgen.training.checkpoint import resume_latest
from provgen.training.logging import read_metrics
from provgen.training.trainer import CoTrainer

MEASURED_VERSION = 2
"""Version of `measured.json`; grows when a metric changes its name or meaning, and then runs are measured again."""

Row = dict[str, float | int | str | None]

SAMPLES = 200
"""Images generated to look for copies."""

HALF_A_NAT = 0.5
"""The gap for which the first step is reported from which on it is never reached again."""

PROBE_ALPHA_BAR = 0.9
"""alpha_bar at which features of a denoiser are probed."""

MAX_PROBED = 4000
"""Images of either set whose features are probed."""

MAX_TRACED = 1000
"""Held-out images whose sources are looked at; bounds the (query, train) matrices."""

TIMED_STEPS = 10
"""Steps timed with and without the provenance network, in turn."""


def read_measured(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Read the metrics of a run; None if it was not measured by this version, or with other settings."""
    try:
        content = read_json(folder / "measured.json", "")
    except InputError:
        return None  # it is measured again
    wanted = {"schema_version": MEASURED_VERSION, "settings": _kept_settings(settings)}
    if any(content.get(key) != value for key, value in wanted.items()):
        return None
    measured: dict[str, Any] = content["metrics"]
    return measured


def write_measured(folder: Path, settings: Settings, metrics: Mapping[str, Any]) -> None:
    """Write the metrics of a run, whole or not at all; numbers that are not finite become null."""
    content = {
        "schema_version": MEASURED_VERSION,
        "settings": _kept_settings(settings),
        "metrics": {name: finite_or_null(value) for name, value in metrics.items()},
    }
    with atomic_path(folder / "measured.json") as partial:
        partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def is_trained(folder: RunFolder, settings: Settings, last_step: int) -> bool:
    """Whether a run has reached `last_step`, its last checkpoint, with these very settings."""
    if last_step != settings.training.max_steps or not folder.config.is_file():
        return False
    return _kept_settings(load_settings(folder.config, [])) == _kept_settings(settings)


def _kept_settings(settings: Settings) -> dict[str, Any]:
    """Give the settings that a measurement depends on: not where files are."""
    return {k: v for k, v in flat_settings(settings).items() if k not in ("data.path", "output_dir")}


def measure_run(folder: RunFolder) -> Row:
    """Measure a finished run.

    Returns:
        Metrics by name, None where one does not apply; a bound has the metric's name with `_ceiling` or
        `_closed_form`, guessing with `_baseline`. docs/reference/metrics.md defines them.
    """
    settings = load_settings(folder.config, [])
    accelerator = build.make_accelerator(settings)
    data = build.open_data(settings, folder)
    trainer = build.make_trainer(settings, data, accelerator)
    resume_latest(trainer, folder.checkpoints, build.made_by(settings, data))
    generator, has_provenance = evaluation.averaged_generator(trainer), "provenance" in trainer.networks
    row: Row = {"coverage": float(data.covered.double().mean())}
    row |= _costs(trainer, settings, data) | _step_times(settings, data, can_sample=generator.can_sample)
    for name, images in {"train_loss": data.train, "holdout_loss": data.holdout}.items():
        if len(images):
            row[name] = float(generator_losses(generator, images, draws=evaluation.LOSS_DRAWS, seed=0).mean())
    if has_provenance:
        row |= _index_metrics(read_metrics(folder.metrics))
        row |= _class_metrics(trainer, settings, data)
    elif not generator.can_sample:
        row |= _class_accuracy(generator, data)
    if generator.can_sample:
        row |= _sample_metrics(trainer, data)
    return row | _probe_metrics(trainer, data)


def _costs(trainer: CoTrainer, settings: Settings, data: build.RunData) -> Row:
    parameters = {name: _count(net) for name, net in trainer.networks.items()}
    index_head = trainer.networks["provenance"].index_head if "provenance" in parameters else None
    # Weights, gradients, the two moments of AdamW and the running average, four bytes each.
    state = 5 * 4 * sum(parameters.values())
    return {
        "generator_parameters": parameters[trainer.generator.name],
        "provenance_parameters": parameters.get("provenance", 0),
        "index_head_parameters": 0 if index_head is None else _count(index_head),
        "training_megabytes": (state + _activation_bytes(settings, data)) / 1e6,
    }


def _activation_bytes(settings: Settings, data: build.RunData) -> int:
    """Count what one step of a fresh trainer keeps for its backward pass: the same on every machine."""
    trainer, batch = _fresh(settings, data)
    parameters = [p for network in trainer.networks.values() for p in network.parameters()]
    return _kept_for_backward(lambda: trainer.step(batch, 0), parameters)


def _fresh(settings: Settings, data: build.RunData) -> tuple[CoTrainer, Batch]:
    """Make a trainer that has not learned anything yet, and its first batch."""
    accelerator = build.make_accelerator(settings)
    trainer = build.make_trainer(settings, data, accelerator)
    return trainer, build.make_batches(settings, data.train, accelerator).batch(0).to(accelerator.device)


def _kept_for_backward(computation: Callable[[], object], parameters: Iterable[Tensor]) -> int:
    """Count the bytes that `computation` keeps for gradients, shared ones once and `parameters` not at all."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    # The storages are held until the end: the address of one that was freed may be given to the next.
    kept: dict[int, UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        computation()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def _count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _step_times(settings: Settings, data: build.RunData, *, can_sample: bool) -> Row:
    """Time optimiser steps with and without the provenance network, in turn, on fresh trainers."""
    chosen = settings.provenance
    learns_alone = can_sample or chosen.class_loss_weight > 0
    if chosen.index_head == "none" or not learns_alone:
        return {}
    alone = replace(settings, provenance=replace(chosen, index_head="none"))
    steppers = {"step_ms": _stepper(settings, data), "step_ms_alone": _stepper(alone, data)}
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for number in range(TIMED_STEPS + 2):
        for name, stepper in steppers.items():
            start = time.perf_counter()
            stepper(number)
            seconds[name].append(time.perf_counter() - start)
    # The first two steps warm up.
    return {name: 1e3 * median(times[2:]) for name, times in seconds.items()}


def _stepper(settings: Settings, data: build.RunData) -> Callable[[int], None]:
    trainer, batch = _fresh(settings, data)

    def step(number: int) -> None:
        losses = trainer.step(batch, number)
        float(sum(losses.values(), torch.tensor(0.0)))  # waits for an asynchronous device

    return step


def _index_metrics(logged: list[dict[str, Any]]) -> Row:
    """Average the last evaluation over its levels, unconditional rows."""
    evaluations = [line for line in logged if "index_quality" in line]
    last = evaluations[-1]
    inside = [quality for quality in last["index_quality"] if quality["rows"] == "unconditional"]
    above = [line["step"] for line in evaluations if line["kl_gap_unconditional"] >= HALF_A_NAT]
    reached = [line["step"] for line in evaluations if line["step"] > max(above, default=0)]
    return {
        **{f"index_{name}": _mean(inside, name) for name in ("top1", "top1_ceiling", "top5", "top5_ceiling")},
        **{name: _mean(inside, name) for name in ("cross_entropy", "cross_entropy_ceiling")},
        "kl_gap": last["kl_gap_unconditional"],
        "kl_gap_conditional": last.get("kl_gap_conditional"),
        "steps_to_gap_half": min(reached, default=None),
        "beam_recall10": last.get("beam_recall10"),
    }


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return fmean(row[name] for row in rows)


def _class_metrics(trainer: CoTrainer, settings: Settings, data: build.RunData) -> Row:
    """Average the class metrics on held-out images over the levels."""
    if not (data.holdout.labels < data.train.num_classes).any():
        return {}
    network = evaluation.averaged_posterior(trainer)
    measured = evaluation.class_qualities(network, settings, data.train, _some_labelled(data.holdout, MAX_TRACED))
    rows = [quality.as_row() for quality in measured.values()]
    names = [name for name, value in rows[0].items() if isinstance(value, float)]
    return {name: _mean(rows, name) for name in names if not name.endswith(("_low", "_high"))}


@torch.no_grad()
def _class_accuracy(generator: Generator, data: build.RunData) -> Row:
    """Measure a classifier that was trained without a provenance network."""
    holdout = _some_labelled(data.holdout, MAX_PROBED)
    if not len(holdout):
        return {}
    logits = generator.forward(_unlabelled_batch(generator, holdout).to(generator.network.device)).class_logits
    assert logits is not None, "a classifier alone has a class head"
    return {"class_accuracy": float((logits.argmax(dim=1).cpu() == holdout.labels).double().mean())}


def _sample_metrics(trainer: CoTrainer, data: build.RunData) -> Row:
    """Generate, look for copies, and compare how sure the sources are with how real the samples look."""
    pipeline = evaluation.make_pipeline(trainer, data)
    sampled = evaluation.sample(pipeline, data, count=SAMPLES)
    train, holdout, generated = (
        to_unit_range(images).flatten(1) for images in (data.train.images, data.holdout.images, sampled.images)
    )
    distinct = distinct_rows(train)
    row: Row = {}
    for end, images in (("", generated), ("_baseline", holdout)):
        if len(images):
            neighbors = nearest(images, distinct, 2)
            row[f"share_memorized{end}"] = share_memorized(distance_ratio(neighbors)).value
            row[f"nearest_distance{end}"] = float(neighbors.distances[:, 0].mean())
    if sampled.attribution is None or len(holdout) < 2:
        return row
    realism = -nearest(generated, holdout, 1).distances[:, 0]
    row["confidence_realism"] = _confidence_with(realism, sampled.attribution)
    row["confidence_realism_closed_form"] = _confidence_with(realism, sampled.closed_form)
    return row | {"confidence_realism_baseline": _confidence_baseline(pipeline, data.holdout)}


def _confidence_with(realism: Tensor, sources: Attribution) -> float:
    return float(spearmanr(-sources.entropy.double(), realism).statistic)


def _confidence_baseline(pipeline: ProvenancePipeline, holdout: ImageSet) -> float:
    """Correlate the same for images that are real: as many held-out ones, each with the nearest other one."""
    chosen = stratified_subset(holdout.labels, SAMPLES, seed=0)
    labels = [
        int(label) if pipeline.generator.is_class_conditional and label < holdout.num_classes else None
        for label in holdout.labels[chosen]
    ]
    sources = pipeline.attribute(holdout.images[chosen], top_k=1, class_labels=labels)
    pixels = to_unit_range(holdout.images).flatten(1)
    # The nearest is the image itself; a duplicate has distance 0, too.
    return _confidence_with(-nearest(pixels[chosen], pixels, 2).distances[:, 1], sources)


def _probe_metrics(trainer: CoTrainer, data: build.RunData) -> Row:
    """Probe the last encoder stage of the generator, and that of the provenance network, for the class."""
    train, holdout = (_some_labelled(images, MAX_PROBED) for images in (data.train, data.holdout))
    if not len(holdout):
        return {}
    seen, unseen = (_features(trainer, images) for images in (train, holdout))
    row: Row = {}
    for name in seen:
        result = linear_probe(seen[name], train.labels, unseen[name], holdout.labels, seed=0)
        row[f"linear_probe_{name}"] = result.accuracy.value
        row["linear_probe_baseline"] = result.baseline
    return row


def _some_labelled(images: ImageSet, count: int) -> ImageSet:
    labelled = images.select((images.labels < images.num_classes).nonzero().flatten())
    return labelled.select(stratified_subset(labelled.labels, count, seed=0))


def _unlabelled_batch(generator: Generator, images: ImageSet) -> Batch:
    """Make one batch of all images with little noise, without a class."""
    rows, timesteps = torch.arange(len(images)), generator.timesteps([PROBE_ALPHA_BAR])
    (batch,) = fixed_batches(images, rows, timesteps, noise_shape=generator.noise_shape, seed=0)
    return replace(batch, labels=torch.full_like(batch.labels, images.num_classes))


@torch.no_grad()
def _features(trainer: CoTrainer, images: ImageSet) -> dict[str, Tensor]:
    """Flatten the last feature map of both encoders, told no class: (query, feature) each."""
    networks, generator = evaluation.averaged_networks(trainer), evaluation.averaged_generator(trainer)
    batch = _unlabelled_batch(generator, images)
    features: dict[str, list[Tensor]] = {}
    for rows in torch.arange(len(images)).split(256):
        part = batch.select(rows).to(trainer.accelerator.device)
        output = generator.forward(part)
        features.setdefault("accuracy", []).append(output.feature_maps[-1].flatten(1).cpu())
        if "provenance" in networks:
            own = networks["provenance"].last_feature_map(output.feature_maps, output.alpha_bar)
            features.setdefault("own_accuracy", []).append(own.flatten(1).cpu())
    return {name: torch.cat(chunks) for name, chunks in features.items()}
