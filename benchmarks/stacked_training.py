"""Many small generators on one device: all in one stack of weights by torch.func, or one after the other?

    python benchmarks/stacked_training.py recipes/digits.yaml

One core, gradients of the denoising loss alone; the two take turns. `provgen retrain` trains one model per process.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

from provgen import build, cli
from provgen.run import RunFolder
from provgen.settings_file import load_settings


def main(
    config: Annotated[Path, typer.Argument()] = Path("recipes/digits.yaml"),
    models: Annotated[int, typer.Option(min=2, help="Generators.")] = 4,
    turns: Annotated[int, typer.Option(min=5)] = 9,
) -> None:
    """Print milliseconds a model and step of both, and their ratio."""
    torch.set_num_threads(1)
    settings = load_settings(config, ["training.batch_size=64"])
    data = build.open_data(settings, RunFolder(Path("nowhere")))
    batch = build.make_stream(settings, data.train).batch(0)
    networks = [build.make_network(settings, data.train) for _ in range(models)]
    weights, buffers = stack_module_state(networks)

    def loss(own: dict[str, Tensor], rest: dict[str, Tensor]) -> Tensor:
        noisy = 0.8 * batch.clean_images + 0.6 * batch.noise
        output = functional_call(networks[0], (own, rest), (noisy, batch.timesteps, batch.labels))
        return F.mse_loss(output.sample, batch.noise)

    def one_by_one() -> None:
        for network in networks:
            network.zero_grad()
            noisy = 0.8 * batch.clean_images + 0.6 * batch.noise
            F.mse_loss(network(noisy, batch.timesteps, batch.labels).sample, batch.noise).backward()

    stacked = vmap(grad(loss))
    variants: dict[str, Callable[[], object]] = {
        "stacked": lambda: stacked(weights, buffers),
        "one by one": one_by_one,
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(turns + 1):
        for name, variant in variants.items():
            start = time.process_time()
            variant()
            if turn:  # the first warms up
                seconds[name].append((time.process_time() - start) / models)
    for name, values in seconds.items():
        low, *_, high = quantiles(values, n=10)
        print(f"{name}: {1e3 * median(values):.1f} ({1e3 * low:.1f} to {1e3 * high:.1f}) ms a model and step")
    print(f"stacked / one by one: {median(seconds['stacked']) / median(seconds['one by one']):.2f}")


if __name__ == "__main__":
    cli.run(main)
