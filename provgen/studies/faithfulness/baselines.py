"""Baselines of attribution: guessing, the class, distances between pixels, cosines of embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.generators.closed_form import impossible
from provgen.studies.faithfulness.attributor import Cache, Queries
from provgen.tracing.calibrate import AttributionScores, Untuned


@dataclass(frozen=True)
class Neighbors:
    """How many nearest training images count."""

    k: int

    def __str__(self) -> str:
        return f"k={self.k}"


@dataclass(frozen=True)
class Bandwidth:
    """The length of the pixel kernel."""

    share: float
    """In root mean squared distances between two training images."""

    def __str__(self) -> str:
        return f"s={self.share:g} apart"


NEIGHBORS = tuple(map(Neighbors, (1, 2, 5, 10, 20, 50)))

BANDWIDTHS = tuple(map(Bandwidth, (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)))


class UntunedScores:
    """A method with nothing to tune."""

    settings = (Untuned(),)

    def attribute(self, queries: Queries, only: Untuned | None = None) -> AttributionScores[Untuned]:  # noqa: ARG002 - there is one
        """Wrap what `scores` gives."""
        return AttributionScores.in_a_row([self.scores(queries)], self.settings)

    def scores(self, queries: Queries) -> Tensor:
        """Give scores (query, train)."""
        raise NotImplementedError


class RandomScores(UntunedScores):
    """Guessing."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def fit(self, train: ImageSet) -> None:
        """Count the examples."""
        self.num_examples = len(train)

    def scores(self, queries: Queries) -> Tensor:
        """Draw scores, the same for a query whatever else is asked."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.stack([torch.rand(self.num_examples, generator=generator) for _ in queries.images])

    def kept(self) -> Cache:
        """Nothing."""
        return Cache(num_bytes=0)


class SameClass(UntunedScores):
    """Everything of the query's class, alike; for a query without a class everything."""

    def fit(self, train: ImageSet) -> None:
        """Keep the labels."""
        self.labels = train.labels
        self.null_label = train.num_classes

    def scores(self, queries: Queries) -> Tensor:
        """Give 1 to the class."""
        same = queries.class_labels[:, None] == self.labels
        return (same | (queries.class_labels == self.null_label)[:, None]).double()

    def kept(self) -> Cache:
        """Labels."""
        return Cache(num_bytes=self.labels.nbytes)


class RandomOfClass(SameClass):
    """Guessing within the query's class: what any of its class would do."""

    def __init__(self, seed: int) -> None:
        self.random = RandomScores(seed)

    def fit(self, train: ImageSet) -> None:
        """Keep the labels."""
        super().fit(train)
        self.random.fit(train)

    def scores(self, queries: Queries) -> Tensor:
        """Draw scores in [0, 1], and add 1 to the class."""
        return super().scores(queries) + self.random.scores(queries)


class PixelMethod:
    """A method that needs nothing but pixels."""

    def fit(self, train: ImageSet) -> None:
        """Keep the pixels."""
        self.pixels = to_unit_range(train.images, torch.float64).flatten(1)

    def kept(self) -> Cache:
        """Pixels."""
        return Cache(num_bytes=self.pixels.numel())


class PixelCosine(PixelMethod, UntunedScores):
    """Cosine of the angle between the pixels, in [-1, 1]: the cheapest baseline of Zheng et al. 2024."""

    def fit(self, train: ImageSet) -> None:
        """Keep the pixels in unit length."""
        super().fit(train)
        self.pixels = F.normalize(self.pixels, dim=1)

    def scores(self, queries: Queries) -> Tensor:
        """Multiply vectors of unit length."""
        return F.normalize(queries.images.flatten(1).double(), dim=1) @ self.pixels.T


class PixelNeighbors(PixelMethod):
    """The k nearest training images in pixels, alike; k is tuned."""

    settings = NEIGHBORS

    def attribute(self, queries: Queries, only: Neighbors | None = None) -> AttributionScores[Neighbors]:  # noqa: ARG002 - all settings take no longer
        """Give 1 to the k nearest, the lowest index first at equal distance."""
        distances = torch.cdist(queries.images.flatten(1).double(), self.pixels)
        ranks = distances.argsort(dim=1, stable=True).argsort(dim=1)
        settings = [setting for setting in NEIGHBORS if setting.k < len(self.pixels)]
        return AttributionScores.in_a_row([(ranks < setting.k).double() for setting in settings], settings)


class PixelKernel(PixelMethod):
    """softmax_i(-|q - x_i|^2 / (2 s^2)) in pixels; s is tuned.

    It is what averaging the log-posteriors of a query that is noised again comes to, so only what knows more than
    the finished image can beat it.
    """

    settings = BANDWIDTHS

    def fit(self, train: ImageSet) -> None:
        """Keep the pixels, and how far apart they are."""
        super().fit(train)
        # The mean squared distance of two draws is twice the total variance.
        self.scale = float((2 * self.pixels.var(dim=0, correction=0).sum()).sqrt())

    def attribute(self, queries: Queries, only: Bandwidth | None = None) -> AttributionScores[Bandwidth]:  # noqa: ARG002 - all settings take no longer
        """Weigh by distance."""
        squares = torch.cdist(queries.images.flatten(1).double(), self.pixels).square()
        bandwidths = [setting.share * self.scale for setting in BANDWIDTHS]
        values = [(-squares / (2 * bandwidth**2)).softmax(dim=1) for bandwidth in bandwidths]
        return AttributionScores.in_a_row(values, BANDWIDTHS)


class ClassPixelKernel(PixelKernel):
    """The pixel kernel within the class that was asked for; a query without a class has all images."""

    def fit(self, train: ImageSet) -> None:
        """Keep the classes as well."""
        super().fit(train)
        self.labels, self.null_label = train.labels, train.num_classes

    def attribute(self, queries: Queries, only: Bandwidth | None = None) -> AttributionScores[Bandwidth]:
        """Weigh by distance, other classes by nothing."""
        scores = super().attribute(queries, only)
        ruled_out = impossible(queries.class_labels, self.labels, self.null_label, None)
        values = scores.values.masked_fill(ruled_out, 0)
        totals = values.sum(dim=2, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
        return replace(scores, values=values / totals)


IMAGES_AT_ONCE = 256


class EmbeddingCosine(UntunedScores):
    """Cosine of the generator's last encoder feature maps."""

    def __init__(self, encode: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Take what gives embeddings (image, feature) of images in [-1, 1], and where images are wanted."""
        self.encode = encode
        self.device = device

    def fit(self, train: ImageSet) -> None:
        """Embed the training images."""
        self.normalised = self._normalised(to_unit_range(train.images))

    def scores(self, queries: Queries) -> Tensor:
        """Multiply vectors of unit length."""
        return self._normalised(queries.images) @ self.normalised.T

    def kept(self) -> Cache:
        """Embeddings."""
        return Cache(num_bytes=self.normalised.nbytes)

    @torch.no_grad()
    def _normalised(self, images: Tensor) -> Tensor:
        embedded = [self.encode(batch.to(self.device)).cpu() for batch in images.split(IMAGES_AT_ONCE)]
        return F.normalize(torch.cat(embedded), dim=1)
