"""What does a trace cost beside a D-TRAK query? Along the trajectory, of an outside image, and by gradients.

    python benchmarks/tracing_cost.py runs/digits

All of them take turns within one run, in seconds of one core, so that a drifting or busy machine slows them alike. A
trace along the trajectory costs what the pipeline takes beyond a loop over the same sampling steps; medians over turns
are printed with their spread.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import typer
from torch import Tensor

from provgen import build, cli, evaluation
from provgen.models.credit import CreditHead, GaussianProcess, Kernel
from provgen.models.diffusion import make_training_scheduler
from provgen.studies.faithfulness.credit import TraceFeatures
from provgen.studies.faithfulness.gradients import GradientFeatures, LossGradients
from provgen.studies.faithfulness.methods import PROJ_DIM
from provgen.tracing.gaussian_process import MAX_LANDMARKS


def main(
    run: Annotated[Path, typer.Argument(help="Run folder of a diffusion model.")],
    images: Annotated[int, typer.Option(min=1, help="Images traced per turn.")] = 64,
    queries: Annotated[int, typer.Option(min=1, help="D-TRAK queries per turn.")] = 4,
    timesteps: Annotated[int, typer.Option(help="Noise levels of a D-TRAK query.")] = 100,
    turns: Annotated[int, typer.Option(min=5)] = 9,
    trace_every: Annotated[int, typer.Option(min=1, help="Trace every so many sampling steps.")] = 1,
    calibrated: Annotated[
        bool,
        typer.Option("--calibrated", help="Give a run without a calibration a credit head first."),
    ] = False,
    gradients: Annotated[bool, typer.Option("--gradients", help="Give it one that wants gradients instead.")] = False,
) -> None:
    """Print milliseconds per image, and ratios."""
    torch.set_num_threads(1)
    trained = build.open_trained_run(run, build.make_accelerator().device)
    if (calibrated or gradients) and trained.pipeline.credit is None:
        credit = empty_credit(trained, finds_gradients=gradients)
        trained.pipeline.register_modules(credit=credit.to(trained.pipeline.device))
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "a trace along the trajectory": along(trained, images, trace_every),
            "a trace of an outside image": outside(trained, images, trace_every),
            f"a D-TRAK query, {timesteps} timesteps": gradient_query(trained, queries, timesteps, Path(folder)),
        }
        for variant in variants.values():
            variant()
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(turns):
            order = list(variants) if turn % 2 == 0 else list(reversed(variants))
            for name in order:
                seconds[name].append(variants[name]())
    for name, values in seconds.items():
        print(f"{name}: {spread(values)} ms an image")
    trajectory, image, query = (median(values) for values in seconds.values())
    print(f"D-TRAK / trace along the trajectory: {query / trajectory:.0f}")
    print(f"D-TRAK / trace of an outside image: {query / image:.0f}")


def empty_credit(trained: build.TrainedRun, *, finds_gradients: bool) -> CreditHead:
    """Make an empty credit head, which takes as long as a fitted one."""
    parts = TraceFeatures(pipeline=trained.pipeline, along="trajectory", has_gradients=finds_gradients).parts
    kernel = Kernel(bandwidth=1.0, across=0.5, shares=(0.5, 0.5), gradient_share=0.25 if finds_gradients else 0.0)
    num_examples = len(trained.data.train)
    head: CreditHead = CreditHead(
        num_examples=num_examples,
        num_landmarks=min(MAX_LANDMARKS, num_examples),
        rank=min(MAX_LANDMARKS, num_examples),
        width=sum(parts.distances) + parts.num_gradients,
        num_classes=trained.data.train.num_classes,
        num_gradients=parts.num_gradients,
        process=asdict(GaussianProcess(kernel, ridge=3.0)),
    )
    head.scale.zero_()  # All distances are 0; kernels that underflow would be slow.
    return head


def along(trained: build.TrainedRun, images: int, trace_every: int) -> Callable[[], float]:
    """Make a function that samples with and without traces and gives the difference in seconds an image."""
    pipeline, num_classes = trained.pipeline, trained.data.train.num_classes
    pipeline.set_progress_bar_config(disable=True)
    labels = [number % max(1, num_classes) for number in range(images)]

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in range(images)]

    def turn() -> float:
        start = time.process_time()
        pipeline(labels, generator=seeded(), top_k=8, trace_every=trace_every, output_type="pt")
        with_traces, start = time.process_time() - start, time.process_time()
        asked = torch.tensor(labels, device=pipeline.device)
        for _ in pipeline.generator.sample(
            asked, null_label=num_classes, generator=seeded(), num_inference_steps=50, guidance_scale=1.0
        ):
            pass
        return (with_traces - (time.process_time() - start)) / images

    return turn


def outside(trained: build.TrainedRun, images: int, trace_every: int) -> Callable[[], float]:
    """Make a function that traces held-out images and gives seconds an image."""
    chosen = trained.data.holdout.images[:images]

    def turn() -> float:
        start = time.process_time()
        trained.pipeline.attribute(chosen, top_k=8, trace_every=trace_every)
        return (time.process_time() - start) / len(chosen)

    return turn


def gradient_query(trained: build.TrainedRun, queries: int, timesteps: int, folder: Path) -> Callable[[], float]:
    """Make a function that asks D-TRAK and gives seconds a query: gradient, projection, products.

    What the products are taken with does not matter for the time, so the training features are random numbers.
    """
    unet, train = trained.pipeline.unet, trained.data.train
    chosen = trained.settings.generator
    scheduler = make_training_scheduler(chosen.beta_schedule, chosen.prediction)
    gradients = LossGradients(unet, scheduler, target="zero", num_timesteps=timesteps, seed=0)
    features = GradientFeatures(gradients, folder, proj_dim=min(PROJ_DIM, gradients.size))
    stored = torch.randn(len(train), min(PROJ_DIM, gradients.size))
    sampled = evaluation.sample(trained.pipeline, trained.data, count=queries).images
    clean = sampled.float() / 127.5 - 1
    labels = torch.arange(queries) % max(1, train.num_classes)

    def turn() -> float:
        start = time.process_time()
        found: Tensor = features.project(clean, labels)
        float((found @ stored.T).sum())
        return (time.process_time() - start) / queries

    return turn


def spread(values: list[float]) -> str:
    """Write median and 10 to 90 % of seconds in milliseconds."""
    low, *_, high = quantiles(values, n=10)
    return f"{1e3 * median(values):.3f} ({1e3 * low:.3f} to {1e3 * high:.3f})"


if __name__ == "__main__":
    cli.run(main)
