"""The trained provenance network as a posterior over training examples."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor

from provgen.models.diffusion import record_stages
from provgen.models.provenance import ProvenanceNetwork


class NetworkPosterior:
    """log p(i | x_t, t, y) by the provenance network, for any noisy image."""

    def __init__(self, denoiser: UNet2DModel, provenance: ProvenanceNetwork) -> None:
        self.denoiser = denoiser
        self.provenance = provenance

    @torch.no_grad()
    def index_logits(
        self, noisy_images: Tensor, timesteps: Tensor, signal: Tensor, class_labels: Tensor
    ) -> Tensor:
        """Run the denoiser, and the network on its stages: logits (query, train).

        Args:
            noisy_images: x_t, (query, channel, height, width).
            timesteps: int64 (query,).
            signal: a_t of those timesteps, (query,).
            class_labels: int64 (query,); the null label for none.
        """
        with record_stages(self.denoiser) as stages:
            self.denoiser(noisy_images, timesteps, class_labels=class_labels)
        logits: Tensor = self.provenance.index_logits(stages, signal, class_labels)
        return logits
