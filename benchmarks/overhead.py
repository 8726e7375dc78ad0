"""What does provenance cost? Step time with and without the network, sampling time with and without traces.

    python benchmarks/overhead.py [recipes/fashion_mnist.yaml data.path=...]

Variants take turns within one run, so that a drifting machine slows them alike; medians and their ratio are
printed, with the spread of the ratio over turns.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import typer

from provgen import build, cli, evaluation
from provgen.run import RunFolder
from provgen.settings import Settings
from provgen.settings_file import load_settings


def main(
    config: Annotated[Path, typer.Argument()] = Path("recipes/digits.yaml"),
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    turns: Annotated[int, typer.Option(min=5)] = 20,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps per turn.")] = 5,
    images: Annotated[int, typer.Option(min=1, help="Images sampled per turn.")] = 64,
) -> None:
    """Print both ratios."""
    settings = load_settings(config, overrides or [])
    alone = replace(settings, provenance=replace(settings.provenance, index_head="none"))
    print(f"{config}: batch {settings.training.batch_size}, {torch.get_num_threads()} threads")
    report("training step", train_turn(settings, steps), train_turn(alone, steps), turns)
    with_traces, without = sampling_turns(settings, images)
    report(f"sampling {images} images, 50 steps", with_traces, without, turns)


def train_turn(settings: Settings, steps: int) -> Callable[[], float]:
    """Make a function that trains some steps and gives seconds per step."""
    accelerator = build.make_accelerator(settings)
    data = build.open_data(settings, RunFolder(Path("does-not-exist")))
    trainer = build.make_trainer(settings, data, accelerator)
    batches = build.make_batches(settings, data.train, accelerator)
    done = 0

    def turn() -> float:
        nonlocal done
        drawn = [batches.batch(done + number).to(accelerator.device) for number in range(steps)]
        start = time.perf_counter()
        for batch in drawn:
            losses = trainer.step(batch, done)
            done += 1
        float(losses["denoising_loss"])  # waits for an asynchronous device
        return (time.perf_counter() - start) / steps

    return turn


def sampling_turns(settings: Settings, images: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Make two functions that sample with and without traces and give seconds."""
    accelerator = build.make_accelerator(settings)
    data = build.open_data(settings, RunFolder(Path("does-not-exist")))
    pipeline = evaluation.make_pipeline(build.make_trainer(settings, data, accelerator), data)
    pipeline.set_progress_bar_config(disable=True)
    num_classes = data.train.num_classes
    labels = [number % max(1, num_classes) for number in range(images)]

    def seeded() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in range(images)]

    def with_traces() -> float:
        start = time.perf_counter()
        pipeline(labels, generator=seeded(), top_k=8, output_type="pt")
        return time.perf_counter() - start

    def without() -> float:
        asked, start = torch.tensor(labels, device=pipeline.device), time.perf_counter()
        for _ in pipeline.generator.sample(
            asked, null_label=num_classes, generator=seeded(), num_inference_steps=50, guidance_scale=1.0
        ):
            pass
        return time.perf_counter() - start

    return with_traces, without


def report(what: str, variant: Callable[[], float], plain: Callable[[], float], turns: int) -> None:
    """Run both in turn, once more to warm up, and print medians and the ratio."""
    variant(), plain()
    pairs = []
    for number in range(turns):
        # Whoever goes first finds the other's caches; take turns in that too.
        first, second = (variant, plain) if number % 2 == 0 else (plain, variant)
        times = (first(), second())
        pairs.append(times if number % 2 == 0 else times[::-1])
    ratios = [with_it / without for with_it, without in pairs]
    low, *_, high = quantiles(ratios, n=10)
    print(
        f"{what}: {median(p[0] for p in pairs) * 1e3:.1f} ms with, {median(p[1] for p in pairs) * 1e3:.1f} ms without; "
        f"ratio {median(ratios):.3f} (10-90 % of turns: {low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    cli.run(main)
