"""Cosines between the generator's own features: the nearest neighbours that it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.attribution.attributor import AttributionScores, Kept, Queries, untuned
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.models.diffusion import encoder_stages
from provgen.training.batches import seeded_generator

SIGNAL = 0.9
"""Level at which features are taken: little noise, which is the same for all images."""

IMAGES_AT_ONCE = 256


class EmbeddingCosine:
    """Cosine of the last encoder stages of the denoiser, told no class."""

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler, *, seed: int) -> None:
        """Take a trained denoiser and its forward process; `seed` is of the noise."""
        self.unet = unet
        self.scheduler = scheduler
        self.timestep = int((scheduler.alphas_cumprod - SIGNAL).abs().argmin())
        self.seed = seed

    def fit(self, train: ImageSet) -> None:
        """Embed the training images."""
        self.null_label = train.num_classes
        self.directions = self._directions(to_unit_range(train.images))

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Compare directions."""
        return untuned(self._directions(queries.images) @ self.directions.T)

    def kept(self) -> Kept:
        """Embeddings."""
        return Kept(num_bytes=self.directions.nbytes)

    def _directions(self, images: Tensor) -> Tensor:
        return torch.cat([F.normalize(self._embed(some), dim=1) for some in images.split(IMAGES_AT_ONCE)])

    @torch.no_grad()
    def _embed(self, images: Tensor) -> Tensor:
        """Give (query, feature)."""
        images = images.to(self.unet.device, self.unet.dtype)
        generator = seeded_generator(self.seed, 8)
        noise = randn_tensor(images.shape[1:], generator=generator, device=images.device, dtype=images.dtype)
        timesteps = torch.full((len(images),), self.timestep, device=images.device)
        noisy = self.scheduler.add_noise(images, noise.expand_as(images), timesteps)
        null = torch.full_like(timesteps, self.null_label)
        return encoder_stages(self.unet, noisy, timesteps, null)[-1].flatten(1).cpu()
