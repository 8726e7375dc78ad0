"""How well does a generator learn in a given time? Its error and its drawings against held-out images.

    python benchmarks/generators.py --config recipes/folder.yaml --minutes 60 data.path=photos
    python benchmarks/generators.py --config recipes/folder.yaml --minutes 60 --diffusers-example data.path=photos

Trains the denoiser alone for some minutes of processor time, so that what else runs on the machine does not count.
With --diffusers-example the same network is trained as the unconditional training example of diffusers trains one by
default: noise predicted, linear schedule, batches of 16, AdamW at 1e-4 with a cosine decay, averaged weights, flips, no
class, and sampling by DDPM in 1,000 steps.

Prints the error of the predicted noise on held-out images by signal-to-noise ratio, and its integral (Kingma et al.
2021, arXiv 2107.00630, eq. 11: the bound on negative log-likelihood, up to a constant); Frechet and kernel distance of
samples to held-out images, between features of a classifier that was trained on the training images.
"""

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torchvision.utils import make_grid

from provgen import build, cli, evaluation
from provgen.data.dataset import ImageSet
from provgen.data.images import to_uint8, to_unit_range
from provgen.generators.diffusion import DiffusionGenerator
from provgen.metrics.set_measures import set_measures
from provgen.models.diffusion import denoised, make_training_scheduler
from provgen.report.encoders import Encoder, features_of
from provgen.report.format import interval, markdown_table
from provgen.run import RunFolder
from provgen.settings import Settings
from provgen.settings_file import load_settings

LOG_SNR = torch.linspace(-6, 8, 15, dtype=torch.float64)
"""Log signal-to-noise ratios at which errors are measured."""

BATCH = 128
CLASSIFIER_STEPS = 600


def main(
    config: Annotated[Path, typer.Option()],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    minutes: Annotated[float, typer.Option(help="Processor time of training, of all cores together.")] = 6.0,
    images: Annotated[int, typer.Option(help="Samples.")] = 512,
    picture: Annotated[Path | None, typer.Option(help="PNG of the first 64 samples.")] = None,
    *,
    diffusers_example: Annotated[bool, typer.Option("--diffusers-example")] = False,
) -> None:
    """Train one generator, and print what it has learned."""
    settings = load_settings(config, overrides or [])
    settings = replace(settings, provenance=replace(settings.provenance, index_head="none"))
    data = build.open_data(settings, RunFolder(Path("does-not-exist")))
    train = train_example if diffusers_example else train_own
    generator, steps = train(settings, data, 60 * minutes)
    errors = noise_errors(generator, data.holdout, told=not diffusers_example)
    samples = ddpm_samples(generator, images) if diffusers_example else own_samples(generator, data, images)
    if picture is not None:
        grid = make_grid(samples[:64], nrow=16)
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(picture)
    parameters = sum(parameter.numel() for parameter in generator.network.parameters())
    print(f"{parameters} parameters, {steps} steps in {minutes:g} minutes")
    print(
        markdown_table(
            ["log SNR", *(f"{level:g}" for level in LOG_SNR.tolist())],
            [["error", *(f"{error:.4f}" for error in errors)]],
        )
    )
    print(f"integral: {float(torch.trapezoid(errors, LOG_SNR)) / 2 / math.log(2):.4f} bits per number")
    encode = classifier_features(settings, data)
    measures = set_measures(
        *(features_of(some, encode) for some in (samples, data.holdout.images, data.train.images)),
    )
    for name in ("frechet_distance", "kernel_distance"):
        columns = measures[name].generated, measures[name].holdout, measures[name].copies
        generated, holdout, copies = (interval(estimate, ".3g") for estimate in columns)
        print(f"{name}: {generated}, held-out {holdout}, copies {copies}")


def train_own(settings: Settings, data: build.RunData, seconds: float) -> tuple[DiffusionGenerator, int]:
    """Train as `provgen train` does."""
    accelerator = build.make_accelerator(settings)
    trainer = build.make_trainer(settings, data, accelerator)
    batches, start, step = build.make_batches(settings, data.train, accelerator), time.process_time(), 0
    while time.process_time() - start < seconds:
        trainer.step(batches.batch(step).to(accelerator.device), step)
        step += 1
    generator = evaluation.averaged_generator(trainer)
    assert isinstance(generator, DiffusionGenerator)
    return generator, step


def train_example(settings: Settings, data: build.RunData, seconds: float) -> tuple[DiffusionGenerator, int]:
    """Train the same network with the defaults of diffusers' example."""
    torch.manual_seed(0)
    network = build.make_network(settings, data.train)
    scheduler = make_training_scheduler("linear")
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=True)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True)
    null, start, step = data.train.num_classes, time.process_time(), 0
    while (used := time.process_time() - start) < seconds:
        rows = torch.randint(len(data.train), (16,))
        images = to_unit_range(data.train.images[rows])
        flipped = torch.rand(16) < 0.5
        images[flipped] = images[flipped].flip(-1)
        noise, timesteps = torch.randn_like(images), torch.randint(1000, (16,))
        noisy = scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(network(noisy, timesteps, class_labels=torch.full((16,), null)).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, (step + 1) / 500) * (1 + math.cos(math.pi * used / seconds)) / 2
        optimizer.step()
        average.step(network.parameters())
        step += 1
    average.copy_to(network.parameters())
    generator = build.make_generator(settings, data.train, network.eval())
    assert isinstance(generator, DiffusionGenerator)
    return generator, step


@torch.no_grad()
def noise_errors(generator: DiffusionGenerator, images: ImageSet, *, told: bool) -> Tensor:
    """Mean squared error of the predicted noise at every one of `LOG_SNR`, (level,), over up to 512 images."""
    clean, scheduler = to_unit_range(images.images[:512]), generator.scheduler
    labels = images.labels[:512] if told else torch.full((len(clean),), images.num_classes)
    errors = []
    for number, timestep in enumerate(generator.timesteps(LOG_SNR.sigmoid().tolist())):
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
        timesteps = torch.full((len(clean),), timestep)
        noisy, level = scheduler.add_noise(clean, noise, timesteps), scheduler.alphas_cumprod[timestep]
        passes = zip(noisy.split(BATCH), timesteps.split(BATCH), labels.split(BATCH), strict=True)
        output = torch.cat([generator.network(x, t, class_labels=y).sample for x, t, y in passes])
        errors.append((denoised(scheduler, noisy, output, level)[1] - noise).square().mean().double())
    return torch.stack(errors)


@torch.no_grad()
def own_samples(generator: DiffusionGenerator, data: build.RunData, count: int) -> Tensor:
    """Sample as `provgen generate` does, classes in the proportions of the training images: uint8."""
    random = torch.Generator().manual_seed(0)
    labels = data.train.labels[torch.randint(len(data.train), (count,), generator=random)]
    asked: dict[str, Any] = {"num_inference_steps": 50, "guidance_scale": 1.0, "generator": random}
    drawn = []
    for some in labels.split(BATCH):
        *_, last = generator.sample(some, null_label=data.train.num_classes, **asked)
        drawn.append(last.images)
    return to_uint8(torch.cat(drawn))


@torch.no_grad()
def ddpm_samples(generator: DiffusionGenerator, count: int) -> Tensor:
    """Sample as diffusers' example does: uint8."""
    scheduler, random, drawn = make_training_scheduler("linear"), torch.Generator().manual_seed(0), []
    scheduler.set_timesteps(1000)
    null = torch.full((BATCH,), generator.network.config.num_class_embeds - 1)
    for size in [BATCH] * (count // BATCH) + [count % BATCH] * (count % BATCH > 0):
        images = torch.randn((size, *generator.noise_shape), generator=random)
        for timestep in scheduler.timesteps:
            output = generator.network(images, timestep, class_labels=null[:size]).sample
            images = scheduler.step(output, timestep, images, generator=random).prev_sample
        drawn.append(images)
    return to_uint8(torch.cat(drawn).clamp(-1, 1))


def classifier_features(settings: Settings, data: build.RunData) -> Encoder:
    """Train a classifier on the training images; give the mean of its last feature map over places."""
    chosen = replace(settings.generator, kind="none")
    provenance = replace(settings.provenance, class_loss_weight=1.0)
    settings = replace(settings, generator=chosen, provenance=provenance)
    accelerator = build.make_accelerator(settings)
    trainer = build.make_trainer(settings, data, accelerator)
    batches = build.make_batches(settings, data.train, accelerator)
    for step in range(CLASSIFIER_STEPS):
        trainer.step(batches.batch(step), step)
    network = evaluation.averaged_generator(trainer).network
    return lambda images: network(images).feature_maps[-1].mean(dim=(2, 3))


if __name__ == "__main__":
    cli.run(main)
