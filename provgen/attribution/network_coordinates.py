"""Where a generator and its provenance network place images, for a credit head."""

from __future__ import annotations

import torch
from torch import Tensor

from provgen.attribution.attributor import Queries
from provgen.attribution.credit_process import Parts
from provgen.attribution.diffusion_tracer import DiffusionTracer
from provgen.attribution.posterior_attributor import Along
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.models.last_layer import num_last_layer

NETWORK_BATCH = 256
"""Training images noised at a time."""


class NetworkCoordinates:
    """What the provenance network sees of images at clear levels, their pixels, and gradients of the last layer."""

    def __init__(
        self, tracer: DiffusionTracer, *, along: Along, num_inference_steps: int, level_power: float
    ) -> None:
        """Take a tracer that finds coordinates; images without a trajectory are noised to the sampler's levels."""
        self.tracer = tracer
        self.along = along
        self.num_inference_steps = num_inference_steps
        self.level_power = level_power

    @property
    def parts(self) -> Parts:
        """Features of the embedding, of the pixels, and of gradients where the tracer finds them."""
        unet, provenance = self.tracer.unet, self.tracer.provenance
        assert provenance is not None
        places = provenance.config.width, unet.config.in_channels * unet.config.sample_size**2
        return Parts(places, num_last_layer(unet) if self.tracer.finds_gradients else 0)

    @torch.no_grad()
    def __call__(self, images: Queries | ImageSet) -> Tensor:
        """Give coordinates, (image, feature)."""
        device = self.tracer.unet.device
        if isinstance(images, Queries):
            is_along = self.along == "trajectory" and images.trajectory is not None
            noisy = images.trajectory if is_along and images.trajectory is not None else images.noisy
            return self.tracer.coordinates(noisy, images.class_labels.to(device), self.level_power)
        batches = zip(images.images.split(NETWORK_BATCH), images.labels.split(NETWORK_BATCH), strict=True)
        found = []
        for pixels, labels in batches:
            clean = to_unit_range(pixels).to(device)
            noisy = self.tracer.noised(clean, num_inference_steps=self.num_inference_steps, seed=0)
            found.append(self.tracer.coordinates(noisy, labels.to(device), self.level_power))
        return torch.cat(found)
