"""Write report.json and report.html of a run that has generated samples.

provgen analyze --run runs/digits
"""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from provgen import build, cli, evaluation
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.metrics.set_measures import FEWEST, common_size, set_measures
from provgen.metrics.verdicts import FEWEST_HELD_OUT, Limits, verdicts
from provgen.report.encoders import features_of, make_encoder
from provgen.report.format import write_report_json
from provgen.report.grid import draw_samples, load_pixels
from provgen.report.html import render_report
from provgen.report.sections import Part
from provgen.report.sections.generalization import generalization_section, training_section
from provgen.report.sections.provenance import classes_section, index_section
from provgen.report.sections.samples import agreement_section, entropy_section, samples_section
from provgen.report.sections.sets import memorization_section, sets_section
from provgen.report.sections.verdicts import gallery_rows, verdicts_section, write_verdicts
from provgen.run import RunFolder, atomic_path
from provgen.settings import Settings
from provgen.studies.faithfulness.section import faithfulness_section, read_lds_rows
from provgen.tracing import records
from provgen.training.checkpoint import list_checkpoints
from provgen.training.logging import read_metrics

GRID_SAMPLES = 32
MAX_IMAGES = 2000
MAX_TRACED = 500  # (query, train) matrices in float64


def main(
    run: Annotated[Path, typer.Option(help="Run folder with samples.")],
    features: Annotated[
        str,
        typer.Option(
            help="What sets are compared by: pixels, own (encoder), a torchvision classifier, or module:function."
        ),
    ] = "pixels",
) -> None:
    """Write report.json and report.html: what was generated, from which sources, copied or not."""
    accelerator = build.make_accelerator()
    if not accelerator.is_main_process:
        return
    trained = build.open_trained_run(run, accelerator.device)
    folder, train, holdout = trained.folder, trained.data.train, trained.data.holdout
    logged = logged_rows(folder)
    parts = []
    samples = [] if trained.settings.generator.kind == "none" else records.read_parts(folder.samples, ["sample"])
    if samples:
        parts += sample_parts(trained, samples, features)
    evaluations = [row for row in logged if "index_quality" in row]
    if evaluations:
        parts.append(index_section(evaluations[-1], int(trained.data.covered.sum()), train.num_classes))
    labelled = holdout.select((holdout.labels < train.num_classes).nonzero().flatten())
    if len(labelled):
        network = evaluation.posterior_of(trained)
        some = some_of(labelled, MAX_TRACED)
        parts.append(classes_section(evaluation.class_qualities(network, trained.settings, train, some)))
    if len(holdout) and has_loss(trained.settings, train.num_classes):
        parts.append(generalization_part(trained))
    if (measured := run / "faithfulness" / "retrained.parquet").is_file():
        parts.append(faithfulness_section(read_lds_rows(measured)))
    if logged:
        parts.append(training_section(logged))

    facts = {
        "run": str(run),
        "images": f"{len(train)} training and {len(holdout)} held-out, {trained.settings.data.source}",
        "samples": str(len(samples)),
        "steps trained": str(logged[-1]["step"]) if logged else "not kept",
        "data fingerprint": trained.data.manifest.fingerprint[:16],
    }
    page = render_report(title=f"provgen: {run.name}", facts=facts, sections=[section for section, _ in parts])
    with atomic_path(folder.report_html) as partial:
        partial.write_text(page, encoding="utf-8")
    write_report_json(folder.report_json, run.name, [metric for _, metrics in parts for metric in metrics])
    print(f"report in {folder.report_html}, numbers in {folder.report_json}")


def pixel_rows(images: Tensor) -> Tensor:
    """Flatten uint8 (query, channel, height, width) to (query, feature) in [-1, 1]."""
    return to_unit_range(images).flatten(1)


def some_of(images: ImageSet, count: int) -> ImageSet:
    """Choose `count` images by a fixed seed; all of them if there are fewer."""
    return images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count])


def logged_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """Read what was logged up to the last checkpoint; nothing in a copy of a run without its checkpoints."""
    checkpoints = list_checkpoints(folder.checkpoints)
    last = int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
    return [row for row in read_metrics(folder.metrics) if row["step"] <= last]


def has_loss(settings: Settings, num_classes: int) -> bool:
    """Whether the generator has a loss of its own; a classifier without a class to learn has none."""
    return settings.generator.kind != "none" or (num_classes > 0 and settings.provenance.class_loss_weight > 0)


def sample_parts(trained: build.TrainedRun, samples: list[dict[str, Any]], features: str) -> list[Part]:
    """Make the sections about generated samples."""
    folder, train, holdout = trained.folder, trained.data.train, trained.data.holdout
    traces = records.read_parts(folder.traces, ["sample", "rank"])
    grid = draw_samples(folder, samples[:GRID_SAMPLES], traces, train)
    generated = load_pixels(folder, samples, trained.data.manifest)
    copies = some_of(train, len(generated)).images
    is_trajectory = len(samples[0]["step_alpha_bar"]) > 1
    sets = [pixel_rows(images) for images in (generated, holdout.images, copies, train.images)]
    credit = trained.pipeline.credit
    parts: list[Part] = [
        samples_section(
            grid,
            min(GRID_SAMPLES, len(samples)),
            len(samples),
            is_trajectory=is_trajectory,
            calibration_subsets=0 if credit is None else credit.config.calibration_subsets,
        ),
        memorization_section(*sets),
    ]
    encoder = make_encoder(features, trained.pipeline)
    size = common_size(len(generated), len(holdout), len(train))
    if size >= FEWEST:
        encoded = [features_of(images, encoder) for images in (generated, holdout.images, train.images)]
        parts.append(sets_section(set_measures(*encoded), features))
    else:
        print(
            f"sets are not measured: {size} images of each kind, after halving the held-out ones; {FEWEST} are needed"
        )
    if len(holdout) >= FEWEST_HELD_OUT:
        parts.append(verdict_part(trained, samples[:MAX_IMAGES], traces, generated[:MAX_IMAGES]))
    if is_trajectory:
        parts.append(entropy_section(samples))
    if folder.closed_form_traces.is_dir():
        closed_traces = records.read_parts(folder.closed_form_traces, ["sample", "rank"])
        parts.append(agreement_section(samples, traces, closed_traces, len(train)))
    return parts


def generalization_part(trained: build.TrainedRun) -> Part:
    """Measure losses on training and held-out images, and how far a denoiser is from having learned by heart."""
    settings, train, pipeline = trained.settings, trained.data.train, trained.pipeline
    seen, unseen = (
        evaluation.losses_by_draw(pipeline.network, settings, some_of(images, MAX_IMAGES), draws=evaluation.LOSS_DRAWS)
        for images in (train, trained.data.holdout)
    )
    divergence = None
    if pipeline.unet is not None:
        divergence = evaluation.divergence_by_step(pipeline.unet, settings, train, some_of(train, MAX_TRACED))
    return generalization_section(settings.generator.kind, seen, unseen, divergence)


def verdict_part(
    trained: build.TrainedRun, samples: list[dict[str, Any]], traces: list[dict[str, Any]], generated: Tensor
) -> Part:
    """Judge every sample, and as many held-out and training images; write verdicts.parquet."""
    train, holdout = trained.data.train, trained.data.holdout
    null = train.num_classes
    asked = [null if sample["class_label"] is None else sample["class_label"] for sample in samples]
    is_conditional = any(label != null for label in asked)
    held, copies = some_of(holdout, MAX_IMAGES), some_of(train, len(generated))
    evidence = {
        "generated": evaluation.evidence_of(trained, generated, torch.tensor(asked)),
        **{
            name: evaluation.evidence_of(
                trained, some.images, some.labels if is_conditional else torch.full_like(some.labels, null)
            )
            for name, some in (("held-out", held), ("copies", copies))
        },
    }
    limits = Limits.of(evidence["held-out"].select(slice(0, None, 2)))
    evidence["held-out"] = evidence["held-out"].select(slice(1, None, 2))
    judged = {name: verdicts(known, limits) for name, known in evidence.items()}
    ours = judged["generated"]
    steps = [sample["commitment_step"] for sample in samples]
    write_verdicts(trained.folder.verdicts, evidence["generated"], ours, steps)
    rows = gallery_rows(ours)
    gallery = draw_samples(
        trained.folder, [samples[row] for row in rows], traces, train, [ours[row].kind for row in rows]
    )
    return verdicts_section(judged, evidence, limits, gallery)


if __name__ == "__main__":
    cli.run(main)
