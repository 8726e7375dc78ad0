"""The autoencoder as a generator: latents from the prior are decoded, and there is one step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from provgen.data.batches import Batch
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError
from provgen.generators.closed_form import LatentPosterior, Posterior
from provgen.generators.protocol import Generator, Output, Step
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.vae import latent_shape

LATENT_DRAWS = 8
"""Latents drawn for an image from outside, a step each."""


@dataclass(frozen=True, kw_only=True)
class VaeGenerator(Generator):
    """An autoencoder; its provenance network sees what it decodes."""

    network: Any
    """ImageVae, wrapped by Accelerate or not."""
    kl_weight: float = 1.0
    """Weight of the latent's divergence against the squared error, in training."""

    name: ClassVar[str] = "vae"
    loss_name: ClassVar[str] = "autoencoder_loss"
    loss_text: ClassVar[str] = "Squared error of the reconstruction, plus the weighted divergence of the latent"

    @property
    def components(self) -> dict[str, Any]:
        """Parts of a pipeline, by their names in it."""
        return {"vae": self.network}

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of a latent."""
        return latent_shape(self.network)

    def forward(self, batch: Batch, *, with_feature_maps: bool = True) -> Output:
        """Encode, sample the latent with the batch's noise, decode, and encode what was decoded."""
        output = self.network(batch.clean_images, batch.noise, with_feature_maps=with_feature_maps)
        reconstruction, divergence = vae_loss(
            output.reconstruction, batch.clean_images, output.mean, output.log_variance
        )
        return Output(
            loss=reconstruction + self.kl_weight * divergence,
            parts={"reconstruction_loss": reconstruction, "latent_divergence": divergence},
            feature_maps=output.feature_maps,
            alpha_bar=batch.clean_images.new_full((len(batch.indices),), CLEAN_ALPHA_BAR),
            class_labels=batch.labels,
            query=output.latents,
        )

    @torch.no_grad()
    def sample(
        self,
        class_labels: Tensor,
        *,
        null_label: int,
        generator: torch.Generator | list[torch.Generator] | None,
        num_inference_steps: int,  # noqa: ARG002 - see DiffusionGenerator
        guidance_scale: float,
    ) -> Iterator[Step]:
        """Decode latents from the prior, in one step.

        Raises:
            InputError: A class label, or guidance.
        """
        if (class_labels != null_label).any():
            raise InputError("an autoencoder is not given a class; generate without class labels")
        if guidance_scale != 1:
            raise InputError(f"an autoencoder has no guidance; guidance_scale must be 1, got {guidance_scale}")
        latents = self.draw_noise(generator, len(class_labels))
        yield self._step(0, latents, self.network.decode(latents).sample, class_labels)

    @torch.no_grad()
    def renoise(
        self,
        images: Tensor,
        class_labels: Tensor,
        *,
        num_inference_steps: int,  # noqa: ARG002 - see DiffusionGenerator
        seed: int,
    ) -> Iterator[Step]:
        """Draw latents of the images and decode them, one draw a step."""
        for draw in range(LATENT_DRAWS):
            noise = self.draw_noise(seeded_generator(seed, Stream.LATENT, draw))
            output = self.network(images, noise.expand(len(images), *noise.shape), with_feature_maps=False)
            yield self._step(draw, output.latents, output.reconstruction, class_labels)

    def _step(self, number: int, latents: Tensor, images: Tensor, class_labels: Tensor) -> Step:
        return Step(
            number=number,
            timestep=0,
            alpha_bar=images.new_tensor(CLEAN_ALPHA_BAR),
            query=latents,
            class_labels=class_labels,
            encode=torch.no_grad()(lambda: self.network.feature_maps_of(images)),
            predict=lambda: images,
            images=images,
        )

    def encode(self, images: Tensor) -> Tensor:
        """Give the last feature map of images in [-1, 1], flattened, (query, feature)."""
        feature_maps: list[Tensor] = self.network.feature_maps_of(images)
        return feature_maps[-1].flatten(1)

    def closed_form(
        self, train: ImageSet, *, dtype: torch.dtype, device: torch.device, covered: Tensor | None = None
    ) -> Posterior:
        """Make the posterior over training images given a latent, by the encoder as it stands."""
        return LatentPosterior.of(
            self.network,
            to_unit_range(train.images),
            train.labels,
            null_label=train.num_classes,
            covered=covered,
            dtype=dtype,
            device=device,
        )


def vae_loss(reconstruction: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and divergence of an autoencoder (Kingma and Welling 2014, arXiv 1312.6114, appendix B).

    Args:
        reconstruction: (batch, channel, height, width).
        images: Same shape.
        mean: Mean of the latent's Gaussian, (batch, ...).
        log_variance: Log-variance of the same, in nats.

    Returns:
        Mean squared error over pixels, and KL(q(z|x), N(0, 1)) in nats per pixel and channel, each (batch,): their
        ratio does not depend on the resolution.
    """
    errors = (reconstruction - images).square().flatten(1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1) / 2
    return errors.mean(dim=1), divergence / errors.shape[1]
