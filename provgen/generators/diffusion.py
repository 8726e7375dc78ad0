"""The diffusion generator: a denoiser of noised images, sampled by DDIM."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.batches import Batch
from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError
from provgen.generators.protocol import Generator, LastLayer, Output, Step
from provgen.models.diffusion import (
    denoised,
    denoiser_target,
    encoder_feature_maps,
    record_feature_maps,
    record_features,
)

CLEAR_ALPHA_BAR = 0.9
"""Noise level at which images are encoded."""


@dataclass(frozen=True, kw_only=True)
class DiffusionGenerator(Generator):
    """A denoiser with its sampler, whose noise levels are those of training."""

    network: Any
    """UNet2DModel, wrapped by Accelerate or not."""
    scheduler: DDIMScheduler

    name: ClassVar[str] = "denoiser"
    loss_name: ClassVar[str] = "denoising_loss"
    loss_text: ClassVar[str] = "Mean squared error of the predicted noise, or velocity"
    is_class_conditional: ClassVar[bool] = True
    has_noise_levels: ClassVar[bool] = True

    @property
    def components(self) -> dict[str, Any]:
        """Parts of a pipeline, by their names in it."""
        return {"unet": self.network, "scheduler": self.scheduler}

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        config = self.network.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def timesteps(self, alpha_bars: Sequence[float]) -> list[int]:
        """Give the timesteps nearest to noise levels."""
        return [int((self.scheduler.alphas_cumprod - level).abs().argmin()) for level in alpha_bars]

    def alpha_bars(self, num_inference_steps: int) -> Tensor:
        """Give the cumulative alphas of sampling steps, rising, (step,)."""
        scheduler = self.sampler(num_inference_steps)
        levels: Tensor = scheduler.alphas_cumprod[scheduler.timesteps]
        return levels

    def sampler(self, num_inference_steps: int) -> DDIMScheduler:
        """Give a scheduler of so many steps, apart from those of other runs that are under way."""
        most = self.scheduler.config.num_train_timesteps
        if not 10 <= num_inference_steps <= most:
            raise InputError(f"num_inference_steps must be 10 to {most}, got {num_inference_steps}")
        scheduler = copy(self.scheduler)
        scheduler.set_timesteps(num_inference_steps)
        return scheduler

    def forward(self, batch: Batch, *, with_feature_maps: bool = True) -> Output:
        """Noise the images to the batch's timesteps and predict the noise, or velocity."""
        noisy = self.scheduler.add_noise(batch.clean_images, batch.noise, batch.timesteps)
        recording: AbstractContextManager[list[Tensor]] = (
            record_feature_maps(self.network) if with_feature_maps else nullcontext([])
        )
        with recording as feature_maps:
            predicted = self.network(noisy, batch.timesteps, class_labels=batch.labels).sample
        loss = denoising_loss(
            predicted, denoiser_target(self.scheduler, batch.clean_images, batch.noise, batch.timesteps)
        )
        return Output(
            loss=loss,
            parts={"denoising_loss": loss},
            feature_maps=feature_maps,
            alpha_bar=self.scheduler.alphas_cumprod.to(batch.timesteps.device)[batch.timesteps],
            class_labels=batch.labels,
            query=noisy,
        )

    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor,
        *,
        null_label: int,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,
        guidance_scale: float,
    ) -> Iterator[Step]:
        """Sample by DDIM; steps show the conditional branch."""
        scheduler = self.sampler(num_inference_steps)
        images = self.draw_noise(generator, len(class_labels))
        for number, timestep in enumerate(scheduler.timesteps):
            step = self.step_at(images, timestep, class_labels, number=number)
            output = step.last_layer.output
            if guidance_scale != 1:
                null = torch.full_like(class_labels, null_label)
                unconditional = self.network(images, timestep, class_labels=null).sample
                output = torch.lerp(unconditional, output, guidance_scale)
            images = scheduler.step(output, timestep, images).prev_sample
            step.images = images
            yield step

    @torch.no_grad()
    def renoise(self, images: Tensor, class_labels: Tensor, *, num_inference_steps: int, seed: int) -> Iterator[Step]:
        """Noise images to the levels of the sampler, from noise to image."""
        for number, timestep in enumerate(self.sampler(num_inference_steps).timesteps):
            yield self.step_at(self.noised(images, timestep, seed), timestep, class_labels, number=number)

    def step_at(self, noisy: Tensor, timestep: Tensor, class_labels: Tensor, *, number: int) -> Step:
        """Make the step of given noisy images.

        Args:
            noisy: (query, channel, height, width).
            timestep: int64 scalar.
            class_labels: int64 (query,).
            number: Place of the step in its run.
        """

        def encode() -> list[Tensor]:
            return encoder_feature_maps(self.network, noisy, timestep, class_labels)

        def decode() -> LastLayer:
            with record_feature_maps(self.network) as feature_maps, record_features(self.network) as inputs:
                output = self.network(noisy, timestep, class_labels=class_labels).sample
            step.feature_maps = feature_maps  # a whole pass has them too
            return LastLayer(inputs[0], output)

        alpha_bar = self.scheduler.alphas_cumprod[timestep]
        step = Step(
            number=number,
            timestep=int(timestep),
            alpha_bar=alpha_bar,
            query=noisy,
            class_labels=class_labels,
            encode=torch.no_grad()(encode),
            predict=lambda: denoised(self.scheduler, noisy, step.last_layer.output, alpha_bar)[0].clamp(-1, 1),
            decode=torch.no_grad()(decode),
        )
        return step

    def noised(self, images: Tensor, timestep: Tensor, seed: int) -> Tensor:
        """Add the same seeded noise to every image."""
        level = self.scheduler.alphas_cumprod[timestep].to(images)
        generator = seeded_generator(seed, Stream.RENOISE, int(timestep))
        noise = randn_tensor(images.shape[1:], generator=generator, device=images.device, dtype=images.dtype)
        noisy: Tensor = level.sqrt() * images + (1 - level).sqrt() * noise
        return noisy

    def encode(self, images: Tensor) -> Tensor:
        """Give the last feature map of images with little noise and no class, flattened, (query, feature)."""
        timestep = (self.scheduler.alphas_cumprod - CLEAR_ALPHA_BAR).abs().argmin()
        null = torch.full((len(images),), self.network.config.num_class_embeds - 1, device=images.device)
        noisy = self.noised(images, timestep, seed=0)
        return encoder_feature_maps(self.network, noisy, timestep, null)[-1].flatten(1)


def denoising_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of what every row predicts, (batch,) (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""
    return (output - target).square().flatten(1).mean(dim=1)
