"""Gaussian processes over training images: which images tell of one another, and the credit that follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import sqrt

import torch
from torch import Tensor

from provgen.models.credit import CreditHead, credit_kernel, credit_shares
from provgen.studies.faithfulness.attributor import steps_from_middle

BANDWIDTHS = (0.7, 1.0, 1.5)
"""Of the kernel, in root mean squared distances between two training images."""

ACROSS = (1.0, 0.5, 0.0)
"""Factors of the kernel between two classes."""

ONE_PART = ((1.0,),)
"""Weights in squared distances of coordinates that have one part."""

TWO_PARTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
"""Of an embedding and pixels."""

GRADIENT_SHARES = (0.0, 0.25, 0.5)
"""Of cosines of gradients in the kernel."""

RIDGES = (1.0, 3.0, 10.0)
"""lambda, in units of the mean kernel of an image with itself."""

MAX_LANDMARKS = 2048
"""Training images that others are compared with; up to so many the process is exact. On digits, a third of the
training images as landmarks cost 1 point of LDS, a sixth 4."""

SMALLEST_VARIANCE = 1e-10
"""Of the landmarks' kernel matrix, relative to the largest; directions below are rounding."""


@dataclass(frozen=True)
class Parts:
    """What coordinates are made of."""

    places: tuple[int, ...]
    """Features of every part whose distances count."""
    num_gradients: int = 0
    """Features whose products count: directions of gradients. They come last."""


@dataclass(frozen=True)
class Kernel:
    """Which images tell of one another."""

    bandwidth: float
    """In root mean squared distances between two training images."""
    across: float
    """Factor between two classes."""
    shares: tuple[float, ...] = (1.0,)
    """Weight of each part of the places in squared distances, every part in units of its own mean."""
    gradient_share: float = 0.0
    """Of the cosine of gradients."""

    def scale(self, points: Tensor, parts: Parts) -> Tensor:
        """Give the factors (feature,) under which the kernel is that of `credit_kernel`; 0 for what does not count.

        Args:
            points: Coordinates of the training images, (train, feature).
            parts: Of the coordinates; one that is the same for all images counts for nothing.
        """
        *places, _ = points.split([*parts.places, parts.num_gradients], dim=1)
        # The mean squared distance of two draws is twice the total variance.
        spreads = [float((2 * p.var(dim=0, correction=0).sum()).sqrt()) for p in places]
        factors = [
            points.new_full((part.shape[1],), sqrt(share) / (spread * self.bandwidth) if spread else 0.0)
            for part, share, spread in zip(places, self.shares, spreads, strict=True)
        ]
        return torch.cat([*factors, points.new_full((parts.num_gradients,), float(self.gradient_share > 0))])


@dataclass(frozen=True)
class Process:
    """A Gaussian process."""

    kernel: Kernel
    """Covariance of what is to be known."""
    ridge: float
    """Variance of an observation, in units of the mean kernel of an image with itself."""

    @property
    def name(self) -> str:
        """All of it in words."""
        kernel = self.kernel
        pixels = "" if len(kernel.shares) == 1 else f", pixels {kernel.shares[1]:g}"
        gradients = f", gradients {kernel.gradient_share:g}" if kernel.gradient_share else ""
        return (
            f"s={kernel.bandwidth:g} apart, across classes {kernel.across:g}{pixels}{gradients}, lambda={self.ridge:g}"
        )


@dataclass(frozen=True)
class Grid:
    """The processes that are tried."""

    shares: tuple[tuple[float, ...], ...] = ONE_PART
    """Of the parts in squared distances."""
    gradient_shares: tuple[float, ...] = (0.0,)
    """Of gradients in the kernel."""

    @property
    def processes(self) -> list[Process]:
        """All of them."""
        kernels = product(BANDWIDTHS, ACROSS, self.shares, self.gradient_shares)
        return [Process(Kernel(*values), ridge) for values, ridge in product(kernels, RIDGES)]

    @property
    def steps(self) -> list[int]:
        """Steps of every process from the usual one, which few subset models seldom speak against."""
        places = [steps_from_middle(len(axis)) for axis in (BANDWIDTHS, ACROSS, self.shares)]
        # Usual is the middle, but of gradients, which cost a pass of the decoder: usual are none.
        axes = (*places, range(len(self.gradient_shares)), steps_from_middle(len(RIDGES)))
        return [sum(steps) for steps in product(*axes)]


PIXELS = Grid()
"""One part, without gradients."""

PIXELS_AND_GRADIENTS = Grid(((0.0, 1.0),), GRADIENT_SHARES)
"""What is known without a provenance network."""

EVERYTHING = Grid(TWO_PARTS, GRADIENT_SHARES)
"""What calibration tries."""


class FittedKernel:
    """What all processes of one kernel share on a training set: features whose products are the kernel (Nystroem)."""

    def __init__(
        self, points: Tensor, labels: Tensor, kernel: Kernel, *, null_label: int, parts: Parts | None = None
    ) -> None:
        """Diagonalise.

        Args:
            points: Coordinates of the training images, float64 (train, feature).
            labels: int64 (train,).
            kernel: In units of the points' own spread.
            null_label: The label that stands for no label.
            parts: Of the coordinates; None for one of places.
        """
        self.kernel, self.null_label = kernel, null_label
        self.parts = parts or Parts(places=(points.shape[1],))
        self.scale = kernel.scale(points, self.parts)
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        rows = order[:MAX_LANDMARKS].sort().values
        self.landmarks, self.landmark_labels = points[rows] * self.scale, labels[rows]
        near = self._near(points, labels)
        variances, directions = torch.linalg.eigh(near[rows])
        is_kept = variances > SMALLEST_VARIANCE * variances[-1]
        whitening = directions[:, is_kept] / variances[is_kept].sqrt()
        self.features, self.whitening, self.variances = near @ whitening, whitening, variances[is_kept]
        if len(rows) < len(points):  # with all images as landmarks the features are uncorrelated already
            self.variances, turn = torch.linalg.eigh(self.features.T @ self.features)
            self.features, self.whitening = self.features @ turn, self.whitening @ turn

    def credit(self, points: Tensor, labels: Tensor, ridge: float) -> Tensor:
        """Give the shares of credit of `credit_head` for queries at points (query, feature), float64 (query, train)."""
        whitened, read = self._factors(ridge)
        return credit_shares((self._near(points, labels) @ whitened) @ read)

    def credit_head(self, ridge: float) -> CreditHead:
        """Give the head of one process; it wants gradients only where they count.

        With features f, A = (sum of f_i f_i^T + lambda I)^-1 and leverages h_i = f_i A f_i, the variance at a query is
        lambda f_q A f_q, and without example i it is larger by lambda (f_q A f_i)^2 / (1 - h_i) (Sherman and Morrison
        1950, Annals of Mathematical Statistics 21).
        """
        whitened, read = self._factors(ridge)
        num_gradients = self.parts.num_gradients if self.kernel.gradient_share else 0
        width = sum(self.parts.places) + num_gradients
        head: CreditHead = CreditHead(
            num_examples=len(self.features),
            num_landmarks=len(self.landmarks),
            width=width,
            num_classes=self.null_label,
            across=self.kernel.across,
            num_gradients=num_gradients,
            gradient_share=self.kernel.gradient_share,
            process=Process(self.kernel, ridge).name,
        )
        head.scale.copy_(self.scale[:width])
        head.landmarks.copy_(self.landmarks[:, :width])
        head.landmark_labels.copy_(self.landmark_labels)
        head.readout.copy_(whitened @ read)
        return head

    def _near(self, points: Tensor, labels: Tensor) -> Tensor:
        """Give the kernel of points and landmarks, (point, landmark)."""
        return credit_kernel(
            points * self.scale,
            labels,
            self.landmarks,
            self.landmark_labels,
            across=self.kernel.across,
            null_label=self.null_label,
            num_gradients=self.parts.num_gradients,
            gradient_share=self.kernel.gradient_share,
        )

    def _factors(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Give factors (landmark, feature) and (feature, train) of the read-out."""
        inverse = 1 / (self.variances.clamp_min(0) + ridge)
        leverages = self.features.square() @ inverse
        return self.whitening * inverse, (self.features / (1 - leverages).sqrt()[:, None]).T
