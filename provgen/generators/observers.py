"""One forward pass of each kind of generator: its loss, and everything its provenance network is shown."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from provgen.data.batches import Batch
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.diffusion import record_feature_maps
from provgen.training.losses import denoising_loss, vae_loss


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What one forward pass of a generator gives."""

    loss: Tensor
    """The generator's own loss of every row, (batch,)."""
    parts: dict[str, Tensor]
    """What that loss is made of, by the name it is logged under, (batch,) each."""
    feature_maps: list[Tensor]
    """The image and every encoder stage, (batch, channel, height, width) each."""
    alpha_bar: Tensor
    """alpha_bar of every row, (batch,); `CLEAN_ALPHA_BAR` where no noise was added."""
    class_labels: Tensor
    """What the generator was told, int64 (batch,); the null label for nothing."""
    query: Tensor
    """What the closed form is asked, (batch, ...): the noisy image, the latent or the image."""
    class_logits: Tensor | None = field(default=None)
    """Of a generator that is a classifier, (batch, class)."""


class Observer(Protocol):
    """How one kind of generator is run on a batch."""

    name: str
    """Of its network in checkpoints and logs."""
    component: str
    """Of its network in a pipeline."""

    def observe(self, network: nn.Module, batch: Batch, *, with_feature_maps: bool = True) -> Observation:
        """Run `network`, wrapped by Accelerate or not, on a batch; feature maps that nobody reads need not be shown."""
        ...


class DiffusionObserver:
    """A denoiser on noised images."""

    name = "denoiser"
    component = "unet"

    def __init__(self, noise_scheduler: DDPMScheduler, device: torch.device) -> None:
        self.noise_scheduler = noise_scheduler
        self.alpha_bars = noise_scheduler.alphas_cumprod.to(device)

    def observe(self, network: nn.Module, batch: Batch, *, with_feature_maps: bool = True) -> Observation:
        """Noise the images to the batch's timesteps and predict the noise."""
        noisy_images = self.noise_scheduler.add_noise(batch.clean_images, batch.noise, batch.timesteps)
        recording: AbstractContextManager[list[Tensor]] = (
            record_feature_maps(network) if with_feature_maps else nullcontext([])
        )
        with recording as feature_maps:
            predicted = network(noisy_images, batch.timesteps, class_labels=batch.labels).sample
        loss = denoising_loss(predicted, batch.noise)
        return Observation(
            loss=loss,
            parts={"denoising_loss": loss},
            feature_maps=feature_maps,
            alpha_bar=self.alpha_bars[batch.timesteps],
            class_labels=batch.labels,
            query=noisy_images,
        )


class VaeObserver:
    """An autoencoder on clean images; its provenance network sees what it decodes."""

    name = "vae"
    component = "vae"

    def __init__(self, kl_weight: float) -> None:
        self.kl_weight = kl_weight

    def observe(self, network: nn.Module, batch: Batch, *, with_feature_maps: bool = True) -> Observation:
        """Encode, sample the latent with the batch's noise, decode, and encode what was decoded."""
        output = network(batch.clean_images, batch.noise, with_feature_maps=with_feature_maps)
        reconstruction, divergence = vae_loss(
            output.reconstruction, batch.clean_images, output.mean, output.log_variance
        )
        return Observation(
            loss=reconstruction + self.kl_weight * divergence,
            parts={"reconstruction_loss": reconstruction, "latent_divergence": divergence},
            feature_maps=output.feature_maps,
            alpha_bar=batch.clean_images.new_full((len(batch.indices),), CLEAN_ALPHA_BAR),
            class_labels=batch.labels,
            query=output.latents,
        )


class ClassifierObserver:
    """A classifier of clean images."""

    name = "classifier"
    component = "classifier"

    def __init__(self, class_loss_weight: float) -> None:
        self.class_loss_weight = class_loss_weight

    def observe(
        self,
        network: nn.Module,
        batch: Batch,
        *,
        with_feature_maps: bool = True,  # noqa: ARG002 - they cost nothing here
    ) -> Observation:
        """Predict the class of the clean images; images without a class have no loss."""
        output = network(batch.clean_images)
        # Zero, but of every weight: processes that train together wait for the gradient of each.
        loss = 0 * output.feature_maps[-1].flatten(1).sum(dim=1)
        parts = {}
        if output.class_logits is not None:
            parts["class_loss"] = _class_losses(output.class_logits, batch.clean_labels)
            loss = self.class_loss_weight * parts["class_loss"]
        return Observation(
            loss=loss,
            parts=parts,
            feature_maps=output.feature_maps,
            alpha_bar=batch.clean_images.new_full((len(batch.indices),), CLEAN_ALPHA_BAR),
            class_labels=batch.labels,
            query=batch.clean_images,
            class_logits=output.class_logits,
        )


def _class_losses(class_logits: Tensor, labels: Tensor) -> Tensor:
    has_class = labels < class_logits.shape[1]
    losses = F.cross_entropy(class_logits, labels.clamp_max(class_logits.shape[1] - 1), reduction="none")
    return losses * has_class
