"""Trace images whose sources are known, beside the best that any tracer could do.

    provgen planted --run runs/digits

Planted are draws from a kernel density around the training images, with their parents; samples of the closed-form
denoiser, which end on training images; held-out images with what no training image supports; and, on the folder that
recipes/data/planted_digits.py writes, samples that bear the mark of a cluster. Exact copies count as one source. Writes
planted.md into RUN.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from provgen import build, cli, evaluation
from provgen.data.images import to_unit_range
from provgen.generators.closed_form import ClosedFormPosterior
from provgen.metrics.statistics import auroc, mean_estimate, proportion
from provgen.report.format import interval, markdown_table
from provgen.run import atomic_path
from provgen.studies.faithfulness.attributor import Queries
from provgen.studies.faithfulness.baselines import Bandwidth
from provgen.studies.faithfulness.credit import noised_steps
from provgen.studies.faithfulness.methods import make_methods
from provgen.studies.faithfulness.planted import (
    FIRST,
    RANKS,
    bayes_hits,
    ideal_samples,
    plant,
    precision_table,
    reliability_table,
    source_groups,
)
from provgen.studies.faithfulness.posteriors import DEFAULT, closed_form_steps, network_steps
from provgen.tracing.calibrate import NUM_INFERENCE_STEPS, Untuned

LEVELS = (0.5, 0.8, 0.95)
"""alpha_bars a that give the bandwidths sqrt((1 - a) / a) of the kernel density."""

MARK = "-marked"


CLEAN_LEVEL = 0.9
"""Noise level below which the cleanest is taken by itself."""


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a trained denoiser.")],
    num_queries: Annotated[int, typer.Option(min=10, help="Of every kind.")] = 400,
) -> None:
    """Write how often planted sources are named, and how reliable beliefs are."""
    trained = build.open_trained_run(run, build.make_accelerator().device)
    pixels = to_unit_range(trained.data.train.images)
    groups = source_groups(pixels)
    title = f"{num_queries} queries of every kind; {len(pixels)} training images, {int(groups.max()) + 1} distinct\n"
    parts, no_class = [title], torch.full((num_queries,), trained.pipeline.null_label)
    for level in LEVELS:
        parts += kernel_density(trained, pixels, groups, no_class, level)
    parts += ideal_denoiser(trained, pixels, groups, no_class)
    if classes := trained.data.train.num_classes:
        parts += ideal_denoiser(trained, pixels, groups, torch.arange(num_queries) % classes)
    if len(trained.data.holdout):
        parts += unsupported(trained, num_queries)
    if any(MARK in path for path in trained.data.train.paths):
        parts += marked_cluster(trained, num_queries)
    with atomic_path(trained.folder.planted) as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    print("\n".join(parts))


def kernel_density(
    trained: build.TrainedRun, pixels: Tensor, groups: Tensor, labels: Tensor, level: float
) -> list[str]:
    """Draw images around training images, and trace them as images from outside; and by their own level alone."""
    levels = trained.pipeline.scheduler.alphas_cumprod
    timestep, num_queries = (levels - level).abs().argmin(), len(labels)
    alpha_bar = levels[timestep]
    planted = plant(pixels, num_queries, bandwidth=float(((1 - alpha_bar) / alpha_bar).sqrt()), seed=0)
    best = [proportion(int(bayes_hits(planted, pixels, groups, k)[0].sum()), num_queries) for k in RANKS]
    noisy = noised_steps(trained.pipeline, planted.images)
    beliefs, others = traced(trained, Queries(images=planted.images, class_labels=labels, noisy=noisy))
    ask = network_steps(trained.pipeline.unet, trained.pipeline.provenance)
    logits = ask(alpha_bar.sqrt() * planted.images, timestep, alpha_bar, labels)
    beliefs = {"provenance network, that level alone": logits.softmax(dim=1), **beliefs}
    return [
        f"## Kernel density of bandwidth {planted.bandwidth:.2f} (a = {alpha_bar:.3f})\n",
        precision_table(beliefs | others, planted.parents, groups, best),
        reliability_table(beliefs, planted.parents, groups),
    ]


def ideal_denoiser(trained: build.TrainedRun, pixels: Tensor, groups: Tensor, labels: Tensor) -> list[str]:
    """Sample with the closed-form denoiser asked for classes, and trace the samples along their trajectories."""
    num_queries, is_conditional = len(labels), bool((labels != trained.pipeline.null_label).all())
    closed_form = ClosedFormPosterior(pixels, trained.data.train.labels, null_label=trained.data.train.num_classes)
    noise = torch.randn((num_queries, *pixels.shape[1:]), generator=torch.Generator().manual_seed(0))
    scheduler, steps = trained.pipeline.scheduler, NUM_INFERENCE_STEPS
    images, trajectory = ideal_samples(closed_form, scheduler, noise, labels, num_inference_steps=steps)
    distances, parents = torch.cdist(images.flatten(1), pixels.flatten(1)).min(dim=1)
    queries = Queries(images=images, class_labels=labels, noisy=trajectory, trajectory=trajectory)
    # A level by itself at which samples are decided, as this denoiser copies.
    late = int((trajectory.alpha_bars < CLEAN_LEVEL).sum()) - 1
    late_query = (trajectory.images[late], trajectory.timesteps[late], trajectory.alpha_bars[late], labels)
    asked = {
        "provenance network": network_steps(trained.pipeline.unet, trained.pipeline.provenance),
        "closed form": closed_form_steps(closed_form),
    }
    beliefs, others = traced(trained, queries, is_conditional=is_conditional)
    beliefs = {f"{name}, cleanest level": ask(*late_query).softmax(dim=1) for name, ask in asked.items()} | beliefs
    told = "asked for classes in turn" if is_conditional else "unconditional"
    return [
        f"## Samples of the closed-form denoiser, along their trajectories, {told}\n",
        f"Farthest sample from its nearest training image: {distances.max():.3f} (Euclidean, pixels in [-1, 1])\n",
        precision_table(beliefs | others, parents, groups, [proportion(num_queries, num_queries)] * len(RANKS)),
        reliability_table(beliefs, parents, groups),
    ]


def unsupported(trained: build.TrainedRun, num_queries: int) -> list[str]:
    """Plant what no training image supports into held-out images, and see whether the evidence tells."""
    train, holdout = trained.data.train, trained.data.holdout
    has_class = holdout.labels < max(1, train.num_classes)  # without classes the null label is 0
    chosen = torch.randperm(int(has_class.sum()), generator=torch.Generator().manual_seed(0))[:num_queries]
    rows = has_class.nonzero().flatten()[chosen]
    images, labels = holdout.images[rows], holdout.labels[rows]
    known = evaluation.evidence_of(trained, images, labels)
    lines = []
    for name, (changed, asked) in without_support(images, labels, train.num_classes).items():
        evidence = evaluation.evidence_of(trained, changed, asked)
        columns = [(e.distance, e.sources, e.late_entropy, -e.of_class) for e in (evidence, known)]
        cells = [interval(auroc(*pair, seed=0)) for pair in zip(*columns, strict=True)]
        lines.append([name, *cells] if train.num_classes else [name, *cells[:-1], None])
    header = ["planted", "distance", "effective sources", "entropy at little noise", "posterior of the class"]
    return [
        "## Unsupported images\n",
        f"AUROC of telling them from the {len(rows)} held-out images they were made of\n",
        markdown_table(header, lines),
    ]


def without_support(images: Tensor, labels: Tensor, num_classes: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Make images, and classes they are asked for, that no training image supports, by what was done to them."""
    order = torch.randperm(images[0, 0].numel(), generator=torch.Generator().manual_seed(1))
    planted = {"pixels shuffled": (images.flatten(2)[..., order].view_as(images), labels)}
    if num_classes > 1:
        by_class, partner = labels.argsort(), torch.empty_like(labels)
        partner[by_class] = by_class.roll(len(labels) // 2)  # of another class, unless one has half of the images
        blended = ((images.int() + images[partner].int()) // 2).to(torch.uint8)
        planted["mean of two classes"] = (blended, labels)
        planted["told another class"] = (images, (labels + 1) % num_classes)
    return planted


def marked_cluster(trained: build.TrainedRun, num_queries: int) -> list[str]:
    """Generate the class whose images bear the mark in part; see whether samples with it have sources with it."""
    train = trained.data.train
    is_marked = torch.tensor([MARK in path for path in train.paths])
    mark = train.images[is_marked].min(dim=0).values == 255
    label = int(train.labels[is_marked].mode().values)
    trained.pipeline.set_progress_bar_config(disable=True)
    made = trained.pipeline(
        [label] * num_queries,
        generator=[torch.Generator().manual_seed(seed) for seed in range(num_queries)],
        top_k=FIRST,
        closed_form=trained.closed_form(),
        output_type="pt",
    )
    bears = made.images[:, mark].float().mean(dim=1) > 255 / 2
    of_class = train.labels == label
    guess = 100 * float(is_marked[of_class].float().mean())
    lines = []
    for name, attribution in (("provenance network", made.attribution), ("closed form", made.closed_form)):
        share = is_marked[attribution.example_index].double().mean(dim=1)
        shares = [100 * share[samples] for samples in (bears, ~bears) if samples.any()]
        cells = [interval(mean_estimate(values, seed=0), ".1f") for values in shares]
        lines.append([name, f"{int(bears.sum())} + {int((~bears).sum())}", *cells])
    return [
        f"## A marked cluster: {int(is_marked.sum())} of {int(of_class.sum())} training images of class "
        f"{train.class_names[label]!r}\n",
        f"Share of the first {FIRST} sources that bear the mark, %; by guessing {guess:.1f}\n",
        markdown_table(["tracer", "samples", "with the mark", "without it"], lines),
    ]


def traced(
    trained: build.TrainedRun, queries: Queries, *, is_conditional: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Ask every tracer: beliefs that sum to 1, and other scores, (query, train) each."""
    made = make_methods(trained, trained.folder.root, num_timesteps=())
    methods = {method.name: method.attributor for method in made}

    def scores(name: str, setting: Any) -> Tensor:
        methods[name].fit(trained.data.train)
        return methods[name].attribute(queries, only=setting).under(setting)

    average = replace(DEFAULT, is_conditional=is_conditional)
    names = ("provenance network", "closed form")
    beliefs = {name: scores(f"{name}, trajectory", average) for name in names}
    others = {"pixel distance": scores("pixel kernel", Bandwidth(1.0)), "random": scores("random", Untuned())}
    if (credit := trained.pipeline.credit) is not None:
        name = "calibrated trace" if credit.config.calibration_subsets else "default trace"
        others["weight"] = scores(f"{name}, trajectory", credit.process)
    return beliefs, others


if __name__ == "__main__":
    cli.run(main)
