"""Baselines of attribution: guessing, the class, distances between pixels, cosines of embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.studies.faithfulness.attributor import (
    AttributionScores,
    Cache,
    Queries,
    steps_from_middle,
    untuned,
)
from provgen.tracing.tracer import Tracer

NEIGHBORS = (1, 2, 5, 10, 20, 50)

BANDWIDTHS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
"""Of the pixel kernel, in root mean squared distances between two training images."""


class RandomScores:
    """Guessing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, train: ImageSet) -> None:
        """Count the examples."""
        self.num_examples = len(train)

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Draw scores, the same for a query whatever else is asked."""
        generator = torch.Generator().manual_seed(self.seed)
        return untuned(torch.stack([torch.rand(self.num_examples, generator=generator) for _ in queries.images]))

    def kept(self) -> Cache:
        """Nothing."""
        return Cache(num_bytes=0)


class SameClass:
    """Everything of the query's class, alike; for a query without a class everything."""

    def fit(self, train: ImageSet) -> None:
        """Keep the labels."""
        self.labels = train.labels
        self.null_label = train.num_classes

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Give 1 to the class."""
        same = queries.class_labels[:, None] == self.labels
        return untuned((same | (queries.class_labels == self.null_label)[:, None]).double())

    def kept(self) -> Cache:
        """Labels."""
        return Cache(num_bytes=self.labels.nbytes)


class PixelCosine:
    """Cosine of the angle between the pixels, in [-1, 1]: the cheapest baseline of Zheng et al. 2024."""

    def fit(self, train: ImageSet) -> None:
        """Keep the directions."""
        self.directions = F.normalize(_pixels(train), dim=1)

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Compare directions."""
        return untuned(F.normalize(queries.images.flatten(1).double(), dim=1) @ self.directions.T)

    def kept(self) -> Cache:
        """Pixels."""
        return Cache(num_bytes=self.directions.numel())


class PixelNeighbors:
    """The k nearest training images in pixels, alike; k is tuned."""

    def fit(self, train: ImageSet) -> None:
        """Keep the pixels."""
        self.pixels = _pixels(train)

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Give 1 to the k nearest, the lowest index first at equal distance."""
        distances = torch.cdist(queries.images.flatten(1).double(), self.pixels)
        ranks = distances.argsort(dim=1, stable=True).argsort(dim=1)
        counts = [k for k in NEIGHBORS if k < len(self.pixels)]
        values = torch.stack([(ranks < k).double() for k in counts])
        names = tuple(f"k={k}" for k in counts)
        return AttributionScores(values=values, settings=names, distance_to_default=steps_from_middle(len(names)))

    def kept(self) -> Cache:
        """Pixels."""
        return Cache(num_bytes=self.pixels.numel())


class PixelKernel:
    """softmax_i(-|q - x_i|^2 / (2 s^2)) in pixels; s is tuned.

    It is what averaging the log-posteriors of a query that is noised again comes to, so only what knows more than
    the finished image can beat it.
    """

    def fit(self, train: ImageSet) -> None:
        """Keep the pixels, and how far apart they are."""
        self.pixels = _pixels(train)
        # The mean squared distance of two draws is twice the total variance.
        self.scale = float((2 * self.pixels.var(dim=0, correction=0).sum()).sqrt())

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Weigh by distance."""
        squares = torch.cdist(queries.images.flatten(1).double(), self.pixels).square()
        values = [_kernel(squares, share * self.scale) for share in BANDWIDTHS]
        names = tuple(f"s={share:g} apart" for share in BANDWIDTHS)
        return AttributionScores(
            values=torch.stack(values), settings=names, distance_to_default=steps_from_middle(len(names))
        )

    def kept(self) -> Cache:
        """Pixels."""
        return Cache(num_bytes=self.pixels.numel())


def _kernel(squares: Tensor, bandwidth: float) -> Tensor:
    return (-squares / (2 * bandwidth**2)).softmax(dim=1)


def _pixels(train: ImageSet) -> Tensor:
    return to_unit_range(train.images, torch.float64).flatten(1)


IMAGES_AT_ONCE = 256


class EmbeddingCosine:
    """Cosine of the generator's last encoder feature maps."""

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

    def kept(self) -> Cache:
        """Embeddings."""
        return Cache(num_bytes=self.directions.nbytes)

    @torch.no_grad()
    def _directions(self, images: Tensor) -> Tensor:
        embedded = [self.tracer.encode(some.to(self.device)).cpu() for some in images.split(IMAGES_AT_ONCE)]
        return F.normalize(torch.cat(embedded), dim=1)
