"""DDIM sampling with traces along the trajectory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn import functional as F

from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError
from provgen.generators.closed_form import Posterior
from provgen.models.diffusion import (
    encoder_feature_maps,
    last_layer_gradients,
    record_feature_maps,
    record_features,
)
from provgen.models.provenance import ProvenanceNetwork
from provgen.tracing.noisy_queries import NoisyQueries
from provgen.tracing.sampling_step import SamplingStep
from provgen.tracing.trace import CLEAR_ALPHA_BAR, LEAST_ALPHA_BAR, WINDOW, TrajectoryTrace
from provgen.tracing.tracer import Generated, Request, network_probs


class DiffusionTracer:
    """Traces follow the labelled branch of the denoiser, whose features are computed anyway."""

    def __init__(
        self,
        unet: UNet2DModel,
        provenance: ProvenanceNetwork | None,
        scheduler: DDIMScheduler,
        *,
        finds_coordinates: bool = False,
        finds_gradients: bool = False,
    ) -> None:
        """Take the parts of a pipeline; coordinates, with gradients or without, are for a credit head."""
        self.unet = unet
        self.provenance = provenance
        self.scheduler = scheduler
        self.finds_coordinates = finds_coordinates or finds_gradients
        self.finds_gradients = finds_gradients

    def generate(self, request: Request) -> Generated:
        """Sample by DDIM; see `Tracer`."""
        labels, every = request.class_labels, request.trace_every
        traced = self._traced_steps(request.num_inference_steps, every) if request.is_traced else range(1)
        trace, closed_trace = (TrajectoryTrace(traced[0], every=every) for _ in range(2))
        for step in self.steps(request):
            level, alpha_bar = float(step.level), step.level.to(step.images.device).expand(len(labels))
            if request.is_traced and step.number in traced:
                trace.add(network_probs(self.provenance, step.feature_maps, alpha_bar, labels), level)
                if request.closed_form is not None:
                    closed_trace.add(request.closed_form.probs(step.images, alpha_bar, labels), level)
            if request.is_traced and self._is_clear(step.level):
                is_wanted = self._wants_directions(trace)
                directions = self._directions(step.features, step.noise) if is_wanted else None
                self._place(trace, step.feature_maps, alpha_bar, directions)
        return Generated(images=step.denoised, trace=trace, closed_trace=closed_trace, is_trajectory=True)

    def steps(self, request: Request) -> Iterator[SamplingStep]:
        """Sample by DDIM, and show every step."""
        labels = request.class_labels
        self._set_timesteps(request.num_inference_steps)
        images = self._initial_noise(len(labels), request.generator)
        for number, timestep in enumerate(request.progress_bar(self.scheduler.timesteps)):
            with record_feature_maps(self.unet) as feature_maps, record_features(self.unet) as features:
                noise = self.unet(images, timestep, class_labels=labels).sample
            guided = self._guided(noise, images, timestep, request)
            denoised = self.scheduler.step(guided, timestep, images).prev_sample
            yield SamplingStep(
                number=number,
                timestep=timestep,
                level=self.scheduler.alphas_cumprod[timestep],
                images=images,
                feature_maps=feature_maps,
                features=features[0],
                noise=noise,
                denoised=denoised,
            )
            images = denoised

    def sampled(self, request: Request) -> tuple[Tensor, NoisyQueries]:
        """Sample by DDIM; give the images, and what each was at every step that is worth tracing."""
        first_step = self._first_step(request.num_inference_steps)
        images = []
        for step in self.steps(request):
            images += [step.images] * (step.number >= first_step)
        return step.denoised, self._noisy(torch.stack(images))

    def noised(self, clean_images: Tensor, *, num_inference_steps: int, seed: int) -> NoisyQueries:
        """Noise images to the sampler's levels, the same noise for every image, which then depends on no batch.

        Args:
            clean_images: In [-1, 1], (query, channel, height, width).
            num_inference_steps: Sampling steps whose levels are used.
            seed: Of the noise.
        """
        first_step = self._first_step(num_inference_steps)
        timesteps = self.scheduler.timesteps[first_step:]
        return self._noisy(torch.stack([self._noised(clean_images, int(t), seed) for t in timesteps]))

    def trace(
        self,
        clean_images: Tensor,
        class_labels: Tensor,
        *,
        closed_form: Posterior | None,
        num_inference_steps: int,
        trace_every: int,
        seed: int,
    ) -> TrajectoryTrace:
        """Noise the images to the sampler's levels inside the window; see `Tracer`."""
        traced = self._traced_steps(num_inference_steps, trace_every)
        trace = TrajectoryTrace()
        for number, (timestep, level) in enumerate(zip(self.scheduler.timesteps, self._levels(), strict=True)):
            is_inside = number in traced and bool(WINDOW[0] < level < WINDOW[1])
            is_placed = self._is_clear(level) and self.finds_coordinates and closed_form is None
            if not is_inside and not is_placed:
                continue
            noisy = self._noised(clean_images, int(timestep), seed)
            alpha_bar = level.to(noisy.device).expand(len(noisy))
            if closed_form is not None:
                trace.add(closed_form.probs(noisy, alpha_bar, class_labels), float(level))
                continue
            is_wanted = is_placed and self._wants_directions(trace)
            feature_maps, directions = self._look(noisy, timestep, class_labels, finds_directions=is_wanted)
            if is_inside:
                trace.add(network_probs(self.provenance, feature_maps, alpha_bar, class_labels), float(level))
            if is_placed:
                self._place(trace, feature_maps, alpha_bar, directions)
        return trace

    def encode(self, clean_images: Tensor) -> Tensor:
        """Give the last stage of images with little noise, told no class; see `Tracer`."""
        timestep = (self.scheduler.alphas_cumprod - CLEAR_ALPHA_BAR).abs().argmin()
        noisy = self._noised(clean_images, int(timestep), seed=0)
        null = torch.full((len(noisy),), self.unet.config.num_class_embeds - 1, device=noisy.device)
        return encoder_feature_maps(self.unet, noisy, timestep, null)[-1].flatten(1)

    def coordinates(self, noisy: NoisyQueries, class_labels: Tensor, level_power: float) -> Tensor:
        """Give the coordinates of queries, (query, feature), as traces find them.

        First what the index head compares with its prototypes, then the pixels, then the directions of gradients where
        they are wanted.
        """
        trace = TrajectoryTrace()
        for images, timestep, level in zip(noisy.images, noisy.timesteps, noisy.alpha_bar, strict=True):
            if level >= noisy.alpha_bar.max().clamp_max(CLEAR_ALPHA_BAR):
                feature_maps, directions = self._look(
                    images.to(self.unet.device),
                    timestep,
                    class_labels,
                    finds_directions=self._wants_directions(trace),
                )
                self._place(trace, feature_maps, level.to(self.unet.device).expand(len(images)), directions)
        return trace.coordinates(level_power)

    def _wants_directions(self, trace: TrajectoryTrace) -> bool:
        """Whether the next clear level is the one whose gradients are found: the first."""
        return self.finds_gradients and not trace.has_place

    def _directions(self, features: Tensor, noise: Tensor) -> Tensor:
        """Give the last layer's gradients in unit length.

        Those of samples are longer than those of training images, and their products would count for everything.
        """
        return F.normalize(last_layer_gradients(self.unet, features, noise).float(), dim=1)

    def _look(
        self, noisy: Tensor, timestep: Tensor, class_labels: Tensor, *, finds_directions: bool
    ) -> tuple[list[Tensor], Tensor | None]:
        """Give the encoder's feature maps, and with the decoder too the directions of the last layer's gradients."""
        if not finds_directions:
            return encoder_feature_maps(self.unet, noisy, timestep, class_labels), None
        with record_feature_maps(self.unet) as feature_maps, record_features(self.unet) as features:
            noise = self.unet(noisy, timestep, class_labels=class_labels).sample
        return feature_maps, self._directions(features[0], noise)

    def _place(
        self, trace: TrajectoryTrace, feature_maps: list[Tensor], alpha_bar: Tensor, directions: Tensor | None
    ) -> None:
        if self.finds_coordinates and self.provenance is not None:
            embedding, pixels = self.provenance.embed(feature_maps, alpha_bar), feature_maps[0].flatten(1)
            seen = torch.cat([embedding, pixels.to(embedding.dtype)], dim=1)
            trace.place(seen, float(alpha_bar[0]), directions)

    def _noisy(self, images: Tensor) -> NoisyQueries:
        """Name the last steps, as many as there are `images`."""
        timesteps = self.scheduler.timesteps[-len(images) :]
        return NoisyQueries(images=images, timesteps=timesteps, alpha_bar=self.scheduler.alphas_cumprod[timesteps])

    def _first_step(self, num_inference_steps: int) -> int:
        """Give the first sampling step that is worth tracing."""
        self._set_timesteps(num_inference_steps)
        return int((self._levels() < LEAST_ALPHA_BAR).sum())

    def _traced_steps(self, num_inference_steps: int, every: int) -> range:
        """List the sampling steps that are traced: every so many, back from the last."""
        first = self._first_step(num_inference_steps)
        traced = range(first + (num_inference_steps - 1 - first) % every, num_inference_steps, every)
        levels = self._levels()[list(traced)]
        if not ((levels > WINDOW[0]) & (levels < WINDOW[1])).any():
            raise InputError(
                f"trace_every={every} passes over all of {num_inference_steps} steps whose posteriors are averaged; "
                "give a smaller one"
            )
        return traced

    def _noised(self, clean: Tensor, timestep: int, seed: int) -> Tensor:
        """Add the same seeded noise to every image, so that a trace does not depend on its batch."""
        level = self.scheduler.alphas_cumprod[timestep].to(clean)
        generator = seeded_generator(seed, Stream.RENOISE, timestep)
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
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.unet.device, dtype=self.unet.dtype)
        return noise

    def _is_clear(self, level: Tensor) -> bool:
        return bool(level >= self._levels().max().clamp_max(CLEAR_ALPHA_BAR))

    def _levels(self) -> Tensor:
        levels: Tensor = self.scheduler.alphas_cumprod[self.scheduler.timesteps]
        return levels

    def _set_timesteps(self, num_inference_steps: int) -> None:
        most = self.scheduler.config.num_train_timesteps
        if not 10 <= num_inference_steps <= most:
            raise InputError(f"num_inference_steps must be 10 to {most}, got {num_inference_steps}")
        self.scheduler.set_timesteps(num_inference_steps)
