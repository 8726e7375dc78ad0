"""Write report.json and report.html of a run that has generated samples.

provgen analyze --run runs/digits
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from provgen import build, cli, evaluation
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.errors import notice
from provgen.generators.losses import generator_losses
from provgen.metrics.set_measures import FEWEST, common_size, set_measures
from provgen.metrics.verdicts import FEWEST_HELD_OUT, Evidence, Limits, verdicts
from provgen.report.encoders import features_of, make_encoder
from provgen.report.format import write_report_json
from provgen.report.grid import draw_samples, load_pixels
from provgen.report.html import render_report
from provgen.report.sections import Part
from provgen.report.sections.networks import (
    classes_section,
    generalization_section,
    index_section,
    temperature_section,
    training_section,
)
from provgen.report.sections.samples import agreement_section, entropy_section, explained_section, samples_section
from provgen.report.sections.sets import memorization_section, sets_section
from provgen.report.sections.verdicts import gallery_rows, verdicts_section, write_verdicts
from provgen.run import RunFolder, only_writer, replace_path, writing
from provgen.studies.faithfulness.comparison import faithfulness_section, read_lds_rows
from provgen.tracing import records
from provgen.training.checkpoint import last_step
from provgen.training.logging import read_metrics

GRID_SAMPLES = 32
MAX_IMAGES = 2000
LEAST_TRACED, MAX_TRACED = 200, 500
MAX_PRODUCTS = 2**31  # numbers of traced images times numbers of all training images
FEWEST_LOSSES, LOSS_NUMBERS = 100, 2**17  # images whose losses are measured, and numbers in all of these

Rows = list[dict[str, Any]]

Sections = list[tuple[bool, Callable[[], Part]]]
"""Sections of the report: whether each applies, and what makes it."""


def main(
    run: Annotated[Path, typer.Option(help="Run folder with samples.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=build.MOVED_HELP)] = None,
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
    trained = build.open_trained_run(run, accelerator.device, overrides)
    with only_writer(trained.folder.root, "provgen analyze"):
        write_report(trained, run, features)


def write_report(trained: build.TrainedRun, run: Path, features: str) -> None:
    """Make all sections aside, and put page, numbers and verdicts in place at once."""
    folder, logged = trained.folder, logged_rows(trained)
    generation = records.open_generation(folder) if trained.generator.can_sample else None
    samples = [] if generation is None else records.read_parts(folder.samples, ["sample"], generation)
    with staged_report(folder) as report:
        sections = run_sections(trained, logged)
        if samples:
            traces = records.read_parts(folder.traces, ["sample", "rank"], generation)
            sections = [*sample_sections(trained, samples, traces, features, report), *sections]
        makers = [make for applies, make in sections if applies]
        parts = [make() for make in track(makers, "sections of the report", console=Console(stderr=True))]
        page = render_report(
            title=f"provgen: {run.name}",
            facts=facts(trained, len(samples), logged),
            sections=[section for section, _ in parts],
        )
        with writing(report):
            (report / folder.report_html.name).write_text(page, encoding="utf-8")
        metrics = [metric for _, metrics in parts for metric in metrics]
        write_report_json(report / folder.report_json.name, run.name, metrics, generation)
    cli.say(f"report in {folder.report_html}, numbers in {folder.report_json}")


@contextmanager
def staged_report(folder: RunFolder) -> Iterator[Path]:
    """Give a folder to write a report into; it takes the place of the earlier one when the block ends well."""
    with TemporaryDirectory(dir=folder.root, prefix=".report.", suffix=".partial") as aside:
        report = Path(aside) / "report"
        report.mkdir()
        yield report
        with writing(folder.report):
            replace_path(report, folder.report)
            folder.link_report()


def facts(trained: build.TrainedRun, num_samples: int, logged: Rows) -> dict[str, str]:
    """Say what the run is."""
    data = trained.data
    return {
        "run": str(trained.folder.root),
        "images": f"{len(data.train)} training and {len(data.holdout)} held-out, {trained.settings.data.source}",
        "samples": str(num_samples),
        "steps trained": str(logged[-1]["step"]) if logged else "not kept",
        "data fingerprint": data.manifest.fingerprint[:16],
    }


def run_sections(trained: build.TrainedRun, logged: Rows) -> Sections:
    """List the sections about the trained networks."""
    data, num_classes = trained.data, trained.data.train.num_classes
    evaluations = [row for row in logged if "index_quality" in row]
    labelled = data.holdout.select((data.holdout.labels < num_classes).nonzero().flatten())
    num_covered, lds = int(data.covered.sum()), trained.folder.faithfulness / "retrained.parquet"
    return [
        (bool(evaluations), lambda: index_section(evaluations[-1], num_covered, num_classes)),
        (
            trained.pipeline.temperatures is not None and trained.generator.has_noise_levels,
            lambda: temperature_section(
                evaluation.temperature_rows(trained.pipeline.temperatures), trained.pipeline.window
            ),
        ),
        (len(labelled) > 0, lambda: classes_part(trained, labelled)),
        (len(data.holdout) > 0 and has_loss(trained), lambda: generalization_part(trained)),
        (lds.is_file(), lambda: faithfulness_section(read_lds_rows(lds))),
        (bool(logged), lambda: training_section(logged)),
    ]


def sample_sections(trained: build.TrainedRun, samples: Rows, traces: Rows, features: str, report: Path) -> Sections:
    """List the sections about generated samples; that on verdicts writes them into the folder of the report."""
    folder, train, holdout = trained.folder, trained.data.train, trained.data.holdout
    generated = load_pixels(folder, samples, trained.data.manifest)
    size = common_size(len(generated), len(holdout), len(train))
    if size < FEWEST:
        cli.say(f"sets are not measured: {size} images of each kind, after halving the held-out ones; {FEWEST} needed")
    return [
        (True, lambda: samples_part(trained, samples, traces)),
        (True, lambda: explained_part(trained, generated)),
        (True, lambda: memorization_part(trained, generated)),
        (size >= FEWEST, lambda: sets_part(trained, generated, features)),
        (len(holdout) >= FEWEST_HELD_OUT, lambda: verdicts_part(trained, samples, traces, generated, report)),
        (trained.generator.has_noise_levels, lambda: entropy_section(samples)),
        (folder.closed_form_traces.is_dir(), lambda: agreement_part(trained, samples, traces)),
    ]


def samples_part(trained: build.TrainedRun, samples: Rows, traces: Rows) -> Part:
    """Draw the first samples with their sources."""
    grid = draw_samples(trained.folder, samples[:GRID_SAMPLES], traces, trained.data.train)
    credit = trained.pipeline.credit
    return samples_section(
        grid,
        min(GRID_SAMPLES, len(samples)),
        len(samples),
        is_trajectory=trained.generator.has_noise_levels,
        calibration_subsets=0 if credit is None else credit.config.calibration_subsets,
    )


def explained_part(trained: build.TrainedRun, generated: Tensor) -> Part:
    """Measure how much training images explain of generated, held-out and copied images, and of noise."""
    data, count = trained.data, len(generated)
    noise = torch.randint(256, generated.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    copies, held_out = some_of(data.train, count).images, some_of(data.holdout, count).images
    sets = {"generated": generated, "held-out": held_out, "copied": copies, "noise": noise}
    explain = trained.mixtures.explain
    return explained_section({name: explain(to_unit_range(images)) for name, images in sets.items() if len(images)})


def memorization_part(trained: build.TrainedRun, generated: Tensor) -> Part:
    """Look for copies among generated, held-out and training images."""
    train, holdout = trained.data.train, trained.data.holdout
    copies = some_of(train, len(generated)).images
    pixels = [to_unit_range(images).flatten(1) for images in (generated, holdout.images, copies, train.images)]
    return memorization_section(*pixels)


def sets_part(trained: build.TrainedRun, generated: Tensor, features: str) -> Part:
    """Compare whole sets of images by some features."""
    encoder = make_encoder(features, trained.pipeline)
    sets = (generated, trained.data.holdout.images, trained.data.train.images)
    return sets_section(set_measures(*(features_of(images, encoder) for images in sets)), features)


def agreement_part(trained: build.TrainedRun, samples: Rows, traces: Rows) -> Part:
    """Compare the network's sources with the closed form's."""
    closed_traces = records.read_parts(trained.folder.closed_form_traces, ["sample", "rank"])
    return agreement_section(samples, traces, closed_traces, len(trained.data.train))


def classes_part(trained: build.TrainedRun, labelled: ImageSet) -> Part:
    """Measure whether the sources of held-out images share their class."""
    network, chosen = evaluation.posterior_of(trained), some_of(labelled, affordable(trained.data.train))
    return classes_section(evaluation.class_qualities(network, trained.settings, trained.data.train, chosen))


def has_loss(trained: build.TrainedRun) -> bool:
    """Whether the generator has a loss of its own; a classifier without a class to learn has none."""
    learns_classes = trained.data.train.num_classes > 0 and trained.settings.provenance.class_loss_weight > 0
    return trained.generator.can_sample or learns_classes


def generalization_part(trained: build.TrainedRun) -> Part:
    """Measure losses on training and held-out images, and how far a denoiser is from having learned by heart."""
    generator, train = trained.generator, trained.data.train
    count = max(FEWEST_LOSSES, min(MAX_IMAGES, LOSS_NUMBERS // train.images[0].numel()))
    losses = [
        generator_losses(generator, some_of(images, count), draws=evaluation.LOSS_DRAWS, seed=0)
        for images in (train, trained.data.holdout)
    ]
    divergence = None
    if generator.has_noise_levels:
        divergence = evaluation.divergence_by_step(trained.pipeline.denoiser, train, some_of(train, affordable(train)))
    return generalization_section(generator.loss_name, generator.loss_text, losses[0], losses[1], divergence)


def verdicts_part(trained: build.TrainedRun, samples: Rows, traces: Rows, generated: Tensor, report: Path) -> Part:
    """Judge up to `MAX_IMAGES` samples, and as many held-out and training images; write verdicts.parquet."""
    samples = samples[:MAX_IMAGES]
    evidence = evidence_of_sets(trained, samples, generated[:MAX_IMAGES])
    limits = Limits.of(evidence["held-out"].select(slice(0, None, 2)))
    evidence["held-out"] = evidence["held-out"].select(slice(1, None, 2))
    judged = {name: verdicts(known, limits) for name, known in evidence.items()}
    steps = [sample["commitment_step"] for sample in samples]
    write_verdicts(report / trained.folder.verdicts.name, evidence["generated"], judged["generated"], steps)
    shown = gallery_rows(judged["generated"])
    captions = [judged["generated"][row].kind for row in shown]
    gallery = draw_samples(trained.folder, [samples[row] for row in shown], traces, trained.data.train, captions)
    return verdicts_section(judged, evidence, limits, gallery)


def evidence_of_sets(trained: build.TrainedRun, samples: Rows, generated: Tensor) -> dict[str, Evidence]:
    """Gather evidence of generated, held-out and training images; without classes asked for, none is given."""
    train, no_class = trained.data.train, trained.data.train.num_classes
    asked = [no_class if sample["class_label"] is None else sample["class_label"] for sample in samples]
    sets = {"held-out": some_of(trained.data.holdout, affordable(train)), "copies": some_of(train, len(generated))}
    evidence = {"generated": evaluation.evidence_of(trained, generated, torch.tensor(asked))}
    for name, images in sets.items():
        labels = images.labels if set(asked) != {no_class} else torch.full_like(images.labels, no_class)
        evidence[name] = evaluation.evidence_of(trained, images.images, labels)
    return evidence


def affordable(train: ImageSet) -> int:
    """Give how many images can be traced in bounded time; fewer where training images are many or large."""
    return max(LEAST_TRACED, min(MAX_TRACED, MAX_PRODUCTS // train.images.numel()))


def some_of(images: ImageSet, count: int) -> ImageSet:
    """Choose `count` images by a fixed seed; all of them if there are fewer."""
    return images.select(torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count])


def logged_rows(trained: build.TrainedRun) -> Rows:
    """Read what was logged up to the last checkpoint; nothing in a copy of a run without its checkpoints."""
    folder = trained.folder
    rows, last = read_metrics(folder.metrics), last_step(folder.checkpoints)
    lines = folder.metrics.read_bytes().count(b"\n") if folder.metrics.is_file() else 0
    is_evaluated = any(row["step"] == last and "index_quality" in row for row in rows)
    is_finished = last == trained.settings.training.max_steps
    is_whole = is_evaluated if is_finished else any(row["step"] == last for row in rows)
    if last and (lines > len(rows) or not is_whole):
        notice(f"{folder.metrics} is damaged: the report lacks some or all of the training")
    return [row for row in rows if row["step"] <= last]


if __name__ == "__main__":
    cli.run(main)
