"""How long do all measures of a set of images take, and how much memory?

    python benchmarks/set_measures.py

Three columns, on random numbers in place of pixels: what they are does not matter for the time. Twice as many images
are held out as are generated, so that nothing is cut.
"""

import resource
import time
from typing import Annotated

import torch
import typer

from provgen import cli
from provgen.metrics.set_measures import set_measures


def main(
    generated: Annotated[int, typer.Option(min=20)] = 10_000,
    train: Annotated[int, typer.Option(min=40)] = 60_000,
    features: Annotated[int, typer.Option(min=2)] = 784,
) -> None:
    """Print seconds and peak memory."""
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(count, features, generator=generator) for count in (generated, 2 * generated, train)]
    before, start = peak_gigabytes(), time.perf_counter()
    found = set_measures(*sets)
    seconds = time.perf_counter() - start
    print(f"{len(found)} measures of {generated} images against {train} of {features} features: {seconds:.0f} s")
    print(f"peak memory {peak_gigabytes():.2f} GB, {before:.2f} GB of it before")


def peak_gigabytes() -> float:
    """Give the largest resident set of this process so far (Linux counts kilobytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    cli.run(main)
