"""Gaussian processes over training images, and the leave-one-out variance that credit follows from."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from math import sqrt

import torch
from torch import Tensor

from provgen.models.credit import CreditHead, GaussianProcess, Kernel, credit_shares, kernel_matrix

BANDWIDTHS = (0.7, 1.0, 1.5)
"""Bandwidths of the kernel, in root mean squared distances between two training images."""
ACROSS = (1.0, 0.5, 0.0)
"""Factors of the kernel between two classes."""
ONE_PART = ((1.0,),)
"""Weights in squared distances of features that have one part."""
TWO_PARTS = ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))
"""Weights in squared distances of an embedding and pixels."""
GRADIENT_SHARES = (0.0, 0.25, 0.5)
"""Shares of cosines of gradients in the kernel."""
RIDGES = (1.0, 3.0, 10.0)
"""Values of lambda, in units of the mean kernel of an image with itself."""
DEFAULT_PROCESS = GaussianProcess(Kernel(bandwidth=1.0, across=0.5, shares=(0.5, 0.5)), ridge=3.0)
"""Process of runs that are not calibrated, the middle of what calibration tries."""
MAX_READOUT = 2**24
"""Numbers in a read-out, 64 MB in float32; with more training images its rank is smaller."""
MAX_LANDMARKS = 2048
"""Training images that others are compared with; with no more training images than that the process is exact."""
SMALLEST_VARIANCE = 1e-10
"""Eigenvalues of the landmarks' kernel matrix, relative to the largest, below which all is rounding."""


def distances_from_middle(count: int) -> tuple[int, ...]:
    """Give the distance of each of `count` settings in a row from the middle one."""
    return tuple(abs(position - count // 2) for position in range(count))


@dataclass(frozen=True)
class FeatureParts:
    """What the features of an image are made of."""

    distances: tuple[int, ...]
    """Widths of the parts whose distances count."""
    num_gradients: int = 0
    """Number of the last features, normalised gradients, whose products count."""


@dataclass(frozen=True)
class Grid:
    """The Gaussian processes that are tried."""

    shares: tuple[tuple[float, ...], ...] = ONE_PART
    """Weights of the parts in squared distances."""
    gradient_shares: tuple[float, ...] = (0.0,)
    """Shares of gradients in the kernel."""

    @property
    def settings(self) -> dict[GaussianProcess, int]:
        """All processes, and the steps of each from the default one."""
        settings = product(BANDWIDTHS, ACROSS, self.shares, self.gradient_shares, RIDGES)
        *middle, ridges = (distances_from_middle(len(axis)) for axis in (BANDWIDTHS, ACROSS, self.shares, RIDGES))
        # The default is the middle, but of gradients, which cost a pass of the decoder: the default is none.
        distances = map(sum, product(*middle, range(len(self.gradient_shares)), ridges))
        return {
            GaussianProcess(Kernel(bandwidth, across, shares, gradient_share), ridge): distance
            for (bandwidth, across, shares, gradient_share, ridge), distance in zip(settings, distances, strict=True)
        }


PIXELS = Grid()
"""Processes on features of one part, without gradients."""
PIXELS_AND_GRADIENTS = Grid(((0.0, 1.0),), GRADIENT_SHARES)
"""Processes on what is known without a provenance network."""
EVERYTHING = Grid(TWO_PARTS, GRADIENT_SHARES)
"""Processes that calibration tries."""


def feature_scale(kernel: Kernel, features: Tensor, parts: FeatureParts) -> Tensor:
    """Give the factors (feature,) under which a kernel is that of `kernel_matrix`; 0 for what does not count.

    Units are the spread of the training images' features (train, feature); a part without spread counts for nothing.
    """
    *distances, _ = features.split([*parts.distances, parts.num_gradients], dim=1)
    # The mean squared distance of two draws is twice the total variance.
    spreads = [float((2 * part.var(dim=0, correction=0).sum()).sqrt()) for part in distances]
    factors = [
        features.new_full((part.shape[1],), sqrt(share) / (spread * kernel.bandwidth) if spread else 0.0)
        for part, share, spread in zip(distances, kernel.shares, spreads, strict=True)
    ]
    return torch.cat([*factors, features.new_full((parts.num_gradients,), float(kernel.gradient_share > 0))])


class FittedKernel:
    """What all processes of one kernel share on a training set: vectors whose products are the kernel (Nystroem)."""

    def __init__(
        self, features: Tensor, labels: Tensor, kernel: Kernel, *, null_label: int, parts: FeatureParts | None = None
    ) -> None:
        """Diagonalise the kernel of features float64 (train, feature); without `parts` they are one part."""
        self.kernel, self.null_label = kernel, null_label
        self.parts = parts or FeatureParts((features.shape[1],))
        self.scale = feature_scale(kernel, features, self.parts)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
        rows = order[:MAX_LANDMARKS].sort().values
        self.landmarks, self.landmark_labels = features[rows] * self.scale, labels[rows]
        similarity = self._similarity(features, labels)
        variances, eigenvectors = torch.linalg.eigh(similarity[rows])
        is_kept = variances > SMALLEST_VARIANCE * variances[-1]
        whitening = eigenvectors[:, is_kept] / variances[is_kept].sqrt()
        self.vectors, self.whitening, self.variances = similarity @ whitening, whitening, variances[is_kept]
        if len(rows) < len(features):  # with all images as landmarks the vectors are uncorrelated already
            self.variances, turn = torch.linalg.eigh(self.vectors.T @ self.vectors)
            self.vectors, self.whitening = self.vectors @ turn, self.whitening @ turn

    def credit(self, features: Tensor, labels: Tensor, ridge: float) -> Tensor:
        """Give the shares of `credit_head` for queries with features (query, feature), float64 (query, train)."""
        whitened, readout = self._factors(ridge)
        return credit_shares((self._similarity(features, labels) @ whitened) @ readout)

    def credit_head(self, ridge: float) -> CreditHead:
        """Give the head of one process; it wants gradients only where they count.

        With vectors f, A = (sum of f_i f_i^T + lambda I)^-1 and leverages h_i = f_i A f_i, the variance at a query is
        lambda f_q A f_q, and without example i it is larger by lambda (f_q A f_i)^2 / (1 - h_i) (Sherman and Morrison
        1950, Annals of Mathematical Statistics 21). Of very many images only the directions of largest variance are
        kept.
        """
        whitened, readout = self._factors(ridge)
        kept = self.variances.argsort(descending=True)[: max(1, MAX_READOUT // len(self.vectors))]
        num_gradients = self.parts.num_gradients if self.kernel.gradient_share else 0
        width = sum(self.parts.distances) + num_gradients
        head: CreditHead = CreditHead(
            num_examples=len(self.vectors),
            num_landmarks=len(self.landmarks),
            rank=len(kept),
            width=width,
            num_classes=self.null_label,
            num_gradients=num_gradients,
            process=asdict(GaussianProcess(self.kernel, ridge)),
        )
        head.scale.copy_(self.scale[:width])
        head.landmarks.copy_(self.landmarks[:, :width])
        head.landmark_labels.copy_(self.landmark_labels)
        head.projection.copy_(whitened[:, kept])
        head.readout.copy_(readout[kept])
        return head

    def _similarity(self, features: Tensor, labels: Tensor) -> Tensor:
        """Give the kernel of images and landmarks, (image, landmark)."""
        images, landmarks = (features * self.scale, labels), (self.landmarks, self.landmark_labels)
        num_gradients = self.parts.num_gradients
        return kernel_matrix(*images, *landmarks, self.kernel, null_label=self.null_label, num_gradients=num_gradients)

    def _factors(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Give factors (landmark, vector) and (vector, train) of the read-out."""
        inverse = 1 / (self.variances.clamp_min(0) + ridge)
        leverages = self.vectors.square() @ inverse
        return self.whitening * inverse, (self.vectors / (1 - leverages).sqrt()[:, None]).T
