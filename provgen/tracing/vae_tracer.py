"""Sampling an autoencoder's prior, with a trace of what it decodes."""

from __future__ import annotations

from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError
from provgen.generators.closed_form import Posterior
from provgen.models.classifier import CLEAN_ALPHA_BAR
from provgen.models.provenance import ProvenanceNetwork
from provgen.models.vae import ImageVae, latent_shape
from provgen.tracing.trace import TrajectoryTrace
from provgen.tracing.tracer import ALL_LEVELS, Generated, Request, network_probs

LATENT_DRAWS = 8
"""Latents drawn for an image from outside; the posteriors of what they decode to are averaged."""


class VaeTracer:
    """Traces read the encoder's feature maps on the decoded image; there is no trajectory and no commitment."""

    def __init__(self, vae: ImageVae, provenance: ProvenanceNetwork | None) -> None:
        self.vae = vae
        self.provenance = provenance

    def generate(self, request: Request) -> Generated:
        """Decode latents from the prior; see `Tracer`."""
        labels = request.class_labels
        if (labels != request.null_label).any():
            raise InputError("an autoencoder is not told a class; generate without class labels")
        if request.guidance_scale != 1:
            raise InputError(f"an autoencoder has no guidance; guidance_scale must be 1, got {request.guidance_scale}")
        shape = (len(labels), *latent_shape(self.vae))
        latents = randn_tensor(shape, generator=request.generator, device=self.vae.device, dtype=self.vae.dtype)
        images = self.vae.decode(latents).sample
        trace, closed_trace = TrajectoryTrace(window=ALL_LEVELS), TrajectoryTrace(window=ALL_LEVELS)
        if request.is_traced:
            trace.add(self._probs(images, labels), CLEAN_ALPHA_BAR)
        if request.is_traced and request.closed_form is not None:
            closed_trace.add(self._exact(request.closed_form, latents, labels), CLEAN_ALPHA_BAR)
        return Generated(images=images, trace=trace, closed_trace=closed_trace, is_trajectory=False)

    def trace(
        self,
        clean_images: Tensor,
        class_labels: Tensor,
        *,
        closed_form: Posterior | None,
        num_inference_steps: int,  # noqa: ARG002 - Tracer
        trace_every: int,  # noqa: ARG002 - Tracer
        seed: int,
    ) -> TrajectoryTrace:
        """Draw latents of the images, decode and trace; see `Tracer`."""
        trace = TrajectoryTrace(window=ALL_LEVELS)
        for draw in range(LATENT_DRAWS):
            generator = seeded_generator(seed, Stream.LATENT, draw)
            noise = randn_tensor(
                latent_shape(self.vae), generator=generator, device=self.vae.device, dtype=self.vae.dtype
            )
            output = self.vae(clean_images, noise.expand(len(clean_images), *noise.shape), with_feature_maps=False)
            if closed_form is not None:
                trace.add(self._exact(closed_form, output.latents, class_labels), CLEAN_ALPHA_BAR)
            else:
                trace.add(self._probs(output.reconstruction, class_labels), CLEAN_ALPHA_BAR)
        return trace

    def encode(self, clean_images: Tensor) -> Tensor:
        """Give the last stage of the encoder; see `Tracer`."""
        return self.vae.feature_maps_of(clean_images)[-1].flatten(1)

    def _probs(self, images: Tensor, class_labels: Tensor) -> Tensor:
        alpha_bar = images.new_full((len(images),), CLEAN_ALPHA_BAR)
        return network_probs(self.provenance, self.vae.feature_maps_of(images), alpha_bar, class_labels)

    def _exact(self, closed_form: Posterior, latents: Tensor, class_labels: Tensor) -> Tensor:
        alpha_bar = latents.new_full((len(latents),), CLEAN_ALPHA_BAR)
        return closed_form.probs(latents, alpha_bar, class_labels)
