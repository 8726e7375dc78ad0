"""DDIM sampling with traces along the trajectory."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.attribution.posterior import Oracle
from provgen.attribution.tracer import Generated, Request, network_probs
from provgen.attribution.trajectory import LEAST_SIGNAL, WINDOW, TrajectoryTrace
from provgen.errors import InputError
from provgen.models.diffusion import record_stages
from provgen.models.provenance import ProvenanceNetwork
from provgen.training.batches import seeded_generator


class DiffusionTracer:
    """Traces follow the labelled branch of the denoiser, whose features are computed anyway."""

    def __init__(
        self, unet: UNet2DModel, provenance: ProvenanceNetwork | None, scheduler: DDIMScheduler
    ) -> None:
        self.unet = unet
        self.provenance = provenance
        self.scheduler = scheduler

    def generate(self, request: Request) -> Generated:
        """Sample by DDIM; see `Tracer`."""
        labels = request.class_labels
        images = self._initial_noise(len(labels), request.generator)
        self._set_timesteps(request.num_inference_steps)
        first_step = int((self._levels() < LEAST_SIGNAL).sum())
        trace, closed_trace = TrajectoryTrace(first_step), TrajectoryTrace(first_step)
        for step, timestep in enumerate(request.progress_bar(self.scheduler.timesteps)):
            is_traced = request.is_traced and step >= first_step
            level = self.scheduler.alphas_cumprod[timestep]
            signal = level.to(images.device).expand(len(images))
            with record_stages(self.unet) as stages:
                noise = self.unet(images, timestep, class_labels=labels).sample
            if is_traced:
                trace.add(network_probs(self.provenance, stages, signal, labels), float(level))
            if is_traced and request.closed_form is not None:
                closed_trace.add(request.closed_form.probs(images, signal, labels), float(level))
            noise = self._guided(noise, images, timestep, request)
            images = self.scheduler.step(noise, timestep, images).prev_sample
        return Generated(images=images, trace=trace, closed_trace=closed_trace, is_trajectory=True)

    def trace(
        self,
        clean_images: Tensor,
        class_labels: Tensor,
        *,
        closed_form: Oracle | None,
        num_inference_steps: int,
        seed: int,
    ) -> TrajectoryTrace:
        """Noise the images to the sampler's levels inside the window; see `Tracer`."""
        self._set_timesteps(num_inference_steps)
        trace = TrajectoryTrace()
        for timestep, level in zip(self.scheduler.timesteps, self._levels(), strict=True):
            if not WINDOW[0] < level < WINDOW[1]:
                continue
            noisy = self._noised(clean_images, int(timestep), seed)
            signal = level.to(noisy.device).expand(len(noisy))
            if closed_form is not None:
                trace.add(closed_form.probs(noisy, signal, class_labels), float(level))
                continue
            with record_stages(self.unet) as stages:
                self.unet(noisy, timestep, class_labels=class_labels)
            trace.add(network_probs(self.provenance, stages, signal, class_labels), float(level))
        return trace

    def _noised(self, clean: Tensor, timestep: int, seed: int) -> Tensor:
        """Add the same seeded noise to every image, so that a trace does not depend on its batch."""
        level = self.scheduler.alphas_cumprod[timestep].to(clean)
        generator = seeded_generator(seed, 4, timestep)
        noise = randn_tensor(clean.shape[1:], generator=generator, device=clean.device, dtype=clean.dtype)
        noisy: Tensor = level.sqrt() * clean + (1 - level).sqrt() * noise
        return noisy

    def _guided(self, noise: Tensor, images: Tensor, timestep: Tensor, request: Request) -> Tensor:
        if request.guidance_scale == 1:
            return noise
        null = torch.full_like(request.class_labels, self.unet.config.num_class_embeds - 1)
        unlabelled: Tensor = self.unet(images, timestep, class_labels=null).sample
        guided: Tensor = torch.lerp(unlabelled, noise, request.guidance_scale)
        return guided

    def _initial_noise(self, count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
        config = self.unet.config
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        noise: Tensor = randn_tensor(
            shape, generator=generator, device=self.unet.device, dtype=self.unet.dtype
        )
        return noise

    def _levels(self) -> Tensor:
        levels: Tensor = self.scheduler.alphas_cumprod[self.scheduler.timesteps]
        return levels

    def _set_timesteps(self, num_inference_steps: int) -> None:
        most = self.scheduler.config.num_train_timesteps
        if not 10 <= num_inference_steps <= most:
            raise InputError(f"num_inference_steps must be 10 to {most}, got {num_inference_steps}")
        self.scheduler.set_timesteps(num_inference_steps)
