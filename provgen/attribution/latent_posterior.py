"""The closed form of an autoencoder: which training image does a latent come from?"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from provgen.attribution.posterior import MAX_CHUNK_BYTES, impossible
from provgen.models.vae import ImageVae

ENCODE_BATCH = 256
"""Images encoded at a time."""


class LatentPosterior:
    """p(i | z) = q(z | x_i) / sum_j q(z | x_j), exactly, for a latent drawn from q(z | x_i) of a random i."""

    def __init__(
        self,
        means: Tensor,
        log_variances: Tensor,
        labels: Tensor,
        *,
        null_label: int,
        covered: Tensor | None = None,
    ) -> None:
        """Keep the Gaussians in the dtype that the posterior shall be computed in.

        Args:
            means: (train, feature).
            log_variances: (train, feature), in nats.
            labels: int64 (train,).
            null_label: The label that stands for no label.
            covered: bool (train,), examples that may be the parent; None for all.
        """
        precision = (-log_variances).exp()
        # log N(z; m, v) = -z^2/2v + z m/v - (m^2/v + log v)/2 + const: two matrix products.
        self.factors = torch.cat([-precision / 2, means * precision], dim=1)
        self.offsets = -(means.square() * precision + log_variances).sum(dim=1) / 2
        self.labels = labels
        self.null_label = null_label
        self.covered = covered

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        vae: ImageVae,
        images: Tensor,
        labels: Tensor,
        *,
        null_label: int,
        dtype: torch.dtype,
        device: torch.device,
        covered: Tensor | None = None,
    ) -> LatentPosterior:
        """Encode the training images, (train, channel, height, width) in [-1, 1]; other arguments as above."""
        parts = [vae.encode(some.to(vae.device)).latent_dist for some in images.split(ENCODE_BATCH)]
        means, log_variances = (
            torch.cat([getattr(part, name).flatten(1) for part in parts]).to(device, dtype)
            for name in ("mean", "logvar")
        )
        mask = None if covered is None else covered.to(device)
        return cls(means, log_variances, labels.to(device), null_label=null_label, covered=mask)

    def probs(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002 - Oracle
        """Compute p(i | z, y).

        Args:
            queries: Latents, (query, ...).
            signal: Not used; there are no noise levels.
            class_labels: int64 (query,).

        Returns:
            (query, train) in the dtype of the Gaussians; rows sum to 1, ruled-out examples get 0.
        """
        latents = queries.flatten(1).to(self.factors)
        logits = torch.cat([latents.square(), latents], dim=1) @ self.factors.T + self.offsets
        ruled_out = impossible(class_labels, self.labels, self.null_label, self.covered)
        return logits.masked_fill(ruled_out, torch.finfo(logits.dtype).min).softmax(dim=1)

    def chunks(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that stay under MAX_CHUNK_BYTES each."""
        size = max(1, MAX_CHUNK_BYTES // (len(self.labels) * self.factors.element_size()))
        parts = zip(queries.split(size), signal.split(size), class_labels.split(size), strict=True)
        for some, levels, labels in parts:
            yield self.probs(some, levels, labels)
