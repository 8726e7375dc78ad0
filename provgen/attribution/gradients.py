"""Attribution by gradients of the trained generator: dot products, and TRAK and D-TRAK in exact dual form."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from provgen.attribution.attributor import AttributionScores, Kept, Queries, steps_from_middle, untuned
from provgen.attribution.count_sketch import CountSketch
from provgen.attribution.gradient_store import GradientStore
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Of the kernel matrix, in units of its mean diagonal: the published values depend on the projection's scale."""

IMAGES_AT_ONCE = 32


class Gradients(Protocol):
    """Gradients of single images with respect to everything that is trained."""

    size: int
    """Numbers of a gradient."""

    @property
    def device(self) -> torch.device:
        """Where images are wanted."""
        ...

    def __call__(self, images: Tensor, class_labels: Tensor) -> Tensor:
        """Give float32 (query, parameter) for images (query, channel, height, width) with labels (query,)."""
        ...

    def made_of(self) -> dict[str, str | int]:
        """Say everything that they depend on."""
        ...


class GradientFeatures:
    """Projected loss gradients of training images, kept on disk, and of queries.

    A generated image is treated like any other: noised again.
    """

    def __init__(self, gradients: Gradients, folder: Path, *, sketch_size: int | None, seed: int = 0) -> None:
        """Choose the features.

        Args:
            gradients: Of the generator that is explained.
            folder: Of the store.
            sketch_size: Columns of the projection; None keeps the whole gradient, exact and large.
            seed: Of the projection.
        """
        self.gradients = gradients
        self.folder = folder
        self.seed = seed
        self.sketch = None
        if sketch_size is not None:
            device = gradients.device
            self.sketch = CountSketch(gradients.size, sketch_size, seed=seed, device=device)

    def fit(self, train: ImageSet) -> None:
        """Make, or finish, the features of the training images."""
        size = self.gradients.size if self.sketch is None else self.sketch.size
        self.store = GradientStore(self.folder, shape=(len(train), size), made_of=self._made_of(train))

        def make_rows(start: int, stop: int) -> Tensor:
            some = slice(start, stop)
            return self.project(to_unit_range(train.images[some]), train.labels[some])

        self.store.fill(make_rows, batch_size=IMAGES_AT_ONCE)

    def products(self, queries: Queries) -> Tensor:
        """Give inner products of queries and training images, float64 (query, train)."""
        batches = zip(
            queries.images.split(IMAGES_AT_ONCE), queries.class_labels.split(IMAGES_AT_ONCE), strict=True
        )
        return torch.cat([self.store.products(self.project(*batch)) for batch in batches])

    def kept(self) -> Kept:
        """The store."""
        return Kept(num_bytes=self.store.num_bytes(), seconds=self.store.seconds_before)

    def project(self, images: Tensor, labels: Tensor) -> Tensor:
        """Give the features (query, feature) of images in [-1, 1] with labels (query,), on the CPU."""
        device = self.gradients.device
        found = self.gradients(images.to(device), labels.to(device))
        return (found if self.sketch is None else self.sketch(found)).cpu()

    def _made_of(self, train: ImageSet) -> dict[str, str | int]:
        images = hashlib.sha256()
        for tensor in (train.images, train.labels):
            images.update(tensor.cpu().numpy().tobytes())
        return self.gradients.made_of() | {"images": images.hexdigest(), "projection_seed": self.seed}


class GradientDot:
    """Inner products of gradients (TracIn with one checkpoint, Pruthi et al. 2020, arXiv 2002.08484)."""

    def __init__(self, features: GradientFeatures) -> None:
        self.features = features

    def fit(self, train: ImageSet) -> None:
        """Make the features."""
        self.features.fit(train)

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - all settings take no longer
        """Multiply."""
        return untuned(self.features.products(queries))

    def kept(self) -> Kept:
        """Gradients."""
        return self.features.kept()


class Trak:
    """tau(q, i) = phi_q (Phi^T Phi + lambda I)^-1 phi_i (Park et al. 2023, arXiv 2303.14186), lambda tuned.

    TRAK or D-TRAK by the gradients it is given. The dual form phi_q Phi^T (Phi Phi^T + lambda I)^-1 is the same
    number from a (train, train) matrix, in float64: in float32 the primal form loses small lambdas.
    """

    def __init__(self, features: GradientFeatures) -> None:
        self.features = features

    def fit(self, train: ImageSet) -> None:
        """Make the features, and diagonalise their kernel matrix once for every lambda."""
        self.features.fit(train)
        self.values, self.vectors = torch.linalg.eigh(self.features.store.gram())

    def attribute(
        self,
        queries: Queries,
        only: str | None = None,  # noqa: ARG002 - all settings take no longer
    ) -> AttributionScores:
        """Solve for every lambda."""
        turned = self.features.products(queries) @ self.vectors
        inverses = 1 / (self.values + torch.tensor(RIDGES)[:, None] * self.values.mean())
        scores = torch.stack([self._scores(turned, inverse) for inverse in inverses])
        names = tuple(f"lambda={ridge:g}" for ridge in RIDGES)
        return AttributionScores(
            values=scores, settings=names, steps_from_usual=steps_from_middle(len(names))
        )

    def _scores(self, turned: Tensor, inverse: Tensor) -> Tensor:
        """Give (query, train) from products with eigenvectors (query, eigenvector) and inverse eigenvalues."""
        scores: Tensor = (turned * inverse) @ self.vectors.T
        return scores

    def kept(self) -> Kept:
        """Gradients."""
        return self.features.kept()


class SquaredTrak(Trak):
    """What the variance of a linear model in the gradients grows by at the query without example i.

    With alpha = phi_q Phi^T B of TRAK and B = (Phi Phi^T + lambda I)^-1 that is alpha_i^2 / B_ii, as in
    `variance_credit.py`: a loss that is already small grows with the square of what is taken away.
    """

    def _scores(self, turned: Tensor, inverse: Tensor) -> Tensor:
        scores: Tensor = super()._scores(turned, inverse).square() / (self.vectors.square() @ inverse)
        return scores
