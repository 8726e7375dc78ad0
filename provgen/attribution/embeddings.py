"""Cosines between the generator's own features: the nearest neighbours that it sees."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.attribution.attributor import AttributionScores, Kept, Queries, untuned
from provgen.attribution.tracer import Tracer
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range

IMAGES_AT_ONCE = 256


class EmbeddingCosine:
    """Cosine of the generator's last encoder stages."""

    def __init__(self, tracer: Tracer, device: torch.device) -> None:
        """Take the tracer of a generator, and where its networks are."""
        self.tracer = tracer
        self.device = device

    def fit(self, train: ImageSet) -> None:
        """Embed the training images."""
        self.directions = self._directions(to_unit_range(train.images))

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Compare directions."""
        return untuned(self._directions(queries.images) @ self.directions.T)

    def kept(self) -> Kept:
        """Embeddings."""
        return Kept(num_bytes=self.directions.nbytes)

    @torch.no_grad()
    def _directions(self, images: Tensor) -> Tensor:
        embedded = [self.tracer.encode(some.to(self.device)).cpu() for some in images.split(IMAGES_AT_ONCE)]
        return F.normalize(torch.cat(embedded), dim=1)
