"""Credit for what nothing else in the training set tells: the leave-one-out variance of a Gaussian process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import sqrt

import torch
from torch import Tensor

from provgen.attribution.attributor import AttributionScores, Kept, Queries, untuned
from provgen.attribution.diffusion_tracer import DiffusionTracer
from provgen.attribution.posterior_attributor import Along
from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.models.credit import CreditHead, class_kernel, credit_shares

BANDWIDTHS = (0.7, 1.0, 1.5)
"""Of the kernel, in root mean squared distances between two training images."""

ACROSS = (1.0, 0.5, 0.0)
"""Factors of the kernel between two classes."""

SHARES = {1: ((1.0,),), 2: ((1.0, 0.0), (0.5, 0.5), (0.0, 1.0))}
"""Weights of the parts of coordinates in squared distances, by the number of parts."""

RIDGES = (1.0, 3.0, 10.0)
"""lambda, in units of the kernel of an image with itself."""

MAX_LANDMARKS = 2048
"""Training images that others are compared with; up to so many the process is exact. On digits, a third of the
training images as landmarks cost 1 point of LDS, a sixth 4."""

SMALLEST_VARIANCE = 1e-10
"""Of the landmarks' kernel matrix, relative to the largest; directions below are rounding."""


@dataclass(frozen=True)
class Kernel:
    """Which images tell of one another."""

    bandwidth: float
    """In root mean squared distances between two training images."""
    across: float
    """Factor between two classes."""
    shares: tuple[float, ...] = (1.0,)
    """Weight of each part of the coordinates in squared distances, every part in units of its own mean."""

    def scale(self, points: Tensor, widths: Sequence[int]) -> Tensor:
        """Give the factors (feature,) under which the kernel is exp(-d^2 / 2).

        Args:
            points: Coordinates of the training images, (train, feature).
            widths: Features of every part; one that is the same for all images counts for nothing.
        """
        # The mean squared distance of two draws is twice the total variance.
        spreads = [float((2 * p.var(dim=0, correction=0).sum()).sqrt()) for p in points.split(widths, dim=1)]
        factors = [
            points.new_full((width,), sqrt(share) / (spread * self.bandwidth) if spread else 0.0)
            for width, share, spread in zip(widths, self.shares, spreads, strict=True)
        ]
        return torch.cat(factors)


@dataclass(frozen=True)
class Process:
    """A Gaussian process."""

    kernel: Kernel
    """Covariance of what is to be known."""
    ridge: float
    """Variance of an observation, in units of the kernel of an image with itself."""

    @property
    def name(self) -> str:
        """All of it in words."""
        kernel = self.kernel
        parts = "" if len(kernel.shares) == 1 else f", pixels {kernel.shares[1]:g}"
        return f"s={kernel.bandwidth:g} apart, across classes {kernel.across:g}{parts}, lambda={self.ridge:g}"


def usual_process(num_parts: int) -> Process:
    """Give the middle of all that are tried, which few subset models seldom speak against."""
    shares = SHARES[num_parts]
    return Process(Kernel(BANDWIDTHS[1], ACROSS[1], shares[len(shares) // 2]), RIDGES[1])


def processes(num_parts: int) -> list[Process]:
    """List the processes that are tried on coordinates of one or two parts."""
    kernels = [Kernel(*values) for values in product(BANDWIDTHS, ACROSS, SHARES[num_parts])]
    return [Process(kernel, ridge) for kernel, ridge in product(kernels, RIDGES)]


class FittedKernel:
    """What all processes of one kernel share on a training set: features whose products are the kernel (Nystroem)."""

    def __init__(
        self,
        points: Tensor,
        labels: Tensor,
        kernel: Kernel,
        *,
        null_label: int,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Diagonalise.

        Args:
            points: Coordinates of the training images, float64 (train, feature).
            labels: int64 (train,).
            kernel: In units of the points' own spread.
            null_label: The label that stands for no label.
            widths: Features of every part; None for one part.
        """
        self.kernel, self.null_label = kernel, null_label
        self.scale = kernel.scale(points, widths or [points.shape[1]])
        points = points * self.scale
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
        rows = order[:MAX_LANDMARKS].sort().values
        self.landmarks, self.landmark_labels = points[rows], labels[rows]
        near = class_kernel(
            points, labels, self.landmarks, self.landmark_labels, across=kernel.across, null_label=null_label
        )
        variances, directions = torch.linalg.eigh(near[rows])
        is_kept = variances > SMALLEST_VARIANCE * variances[-1]
        whitening = directions[:, is_kept] / variances[is_kept].sqrt()
        self.features, self.whitening, self.variances = near @ whitening, whitening, variances[is_kept]
        if len(rows) < len(points):  # with all images as landmarks the features are uncorrelated already
            self.variances, turn = torch.linalg.eigh(self.features.T @ self.features)
            self.features, self.whitening = self.features @ turn, self.whitening @ turn

    def credit(self, points: Tensor, labels: Tensor, ridge: float) -> Tensor:
        """Give the shares of credit of `credit_head` for queries at points (query, feature), float64 (query, train)."""
        near = class_kernel(
            points * self.scale, labels, self.landmarks, self.landmark_labels,
            across=self.kernel.across, null_label=self.null_label,
        )  # fmt: skip
        whitened, read = self._factors(ridge)
        return credit_shares((near @ whitened) @ read)

    def credit_head(self, ridge: float, *, calibration_subsets: int = 0) -> CreditHead:
        """Give the head of one process.

        With features f, A = (sum of f_i f_i^T + lambda I)^-1 and leverages h_i = f_i A f_i, the variance at a query is
        lambda f_q A f_q, and without example i it is larger by lambda (f_q A f_i)^2 / (1 - h_i) (Sherman and Morrison
        1950, Annals of Mathematical Statistics 21).
        """
        whitened, read = self._factors(ridge)
        head: CreditHead = CreditHead(
            num_examples=len(self.features),
            num_landmarks=len(self.landmarks),
            width=self.landmarks.shape[1],
            num_classes=self.null_label,
            across=self.kernel.across,
            calibration_subsets=calibration_subsets,
        )
        head.scale.copy_(self.scale)
        head.landmarks.copy_(self.landmarks)
        head.landmark_labels.copy_(self.landmark_labels)
        head.readout.copy_(whitened @ read)
        return head

    def _factors(self, ridge: float) -> tuple[Tensor, Tensor]:
        """Give factors (landmark, feature) and (feature, train) of the read-out."""
        inverse = 1 / (self.variances.clamp_min(0) + ridge)
        leverages = self.features.square() @ inverse
        return self.whitening * inverse, (self.features / (1 - leverages).sqrt()[:, None]).T


NETWORK_BATCH = 256
"""Training images noised at a time."""

Coordinates = Callable[[Queries | ImageSet], Tensor]
"""Where images lie, floating (image, feature); the same space for training images and queries."""


class VarianceCredit:
    """How much less would be known of the query without example i.

    A network does the worse on an image, the less its training set says of it: the loss follows the variance of a
    Gaussian process at the query, which every example that is left out enlarges. Examples that stand for one another
    share the credit, and the sign of an influence does not matter, only its square.
    """

    def __init__(self, coordinates: Coordinates, widths: Sequence[int] | None = None) -> None:
        """Take where images lie, and the features of every part of that; None for one part."""
        self.coordinates = coordinates
        self.widths = widths
        num_parts = 1 if widths is None else len(widths)
        self.processes, self.usual = processes(num_parts), usual_process(num_parts).name

    def fit(self, train: ImageSet) -> None:
        """Keep where the training images lie."""
        self.points = self.coordinates(train).double().cpu()
        self.labels, self.null_label = train.labels, train.num_classes
        self.fitted: dict[Kernel, FittedKernel] = {}

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:
        """Leave every example out under every process, or under the `only` one."""
        return self.attribute_all({"": queries}, only)[""]

    def attribute_all(
        self, queries: Mapping[str, Queries], only: str | None = None
    ) -> dict[str, AttributionScores]:
        """Attribute several kinds of queries, each process fitted once for all of them."""
        wanted = [process for process in self.processes if only in (None, process.name)]
        places = {kind: self.coordinates(some).double().cpu() for kind, some in queries.items()}
        values: dict[str, list[Tensor]] = {kind: [] for kind in queries}
        for process in wanted:
            fitted = self._fitted(process.kernel)
            for kind, some in queries.items():
                values[kind].append(fitted.credit(places[kind], some.class_labels, process.ridge).float())
        names = tuple(process.name for process in wanted)
        usual = self.usual if self.usual in names else None
        return {
            kind: AttributionScores(values=torch.stack(some), settings=names, usual=usual)
            for kind, some in values.items()
        }

    def credit_head(self, process: Process, *, calibration_subsets: int = 0) -> CreditHead:
        """Give the head that a pipeline keeps."""
        fitted = self._fitted(process.kernel)
        return fitted.credit_head(process.ridge, calibration_subsets=calibration_subsets)

    def _fitted(self, kernel: Kernel) -> FittedKernel:
        """Fit a kernel; only the last one stays in memory."""
        if kernel not in self.fitted:
            fitted = FittedKernel(
                self.points, self.labels, kernel, null_label=self.null_label, widths=self.widths
            )
            self.fitted = {kernel: fitted}
        return self.fitted[kernel]

    def kept(self) -> Kept:
        """Landmarks and read-out, in four bytes a number."""
        landmarks = min(MAX_LANDMARKS, len(self.points))
        return Kept(num_bytes=4 * landmarks * (self.points.shape[1] + len(self.points)))


class CalibratedTrace:
    """The weights of a calibrated pipeline."""

    def __init__(self, credit: CreditHead, coordinates: Coordinates) -> None:
        self.credit = credit
        self.coordinates = coordinates

    def fit(self, train: ImageSet) -> None:
        """Nothing is left to do."""

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - there is one
        """Ask the credit head."""
        points = self.coordinates(queries).to(self.credit.dtype)
        return untuned(self.credit(points, queries.class_labels.to(points.device)).cpu())

    def kept(self) -> Kept:
        """The credit head."""
        return Kept(num_bytes=sum(buffer.nbytes for buffer in self.credit.buffers()))


def pixel_coordinates(images: Queries | ImageSet) -> Tensor:
    """Take pixels in [-1, 1], (image, feature)."""
    found = images.images if isinstance(images, Queries) else to_unit_range(images.images)
    return found.flatten(1)


class NetworkCoordinates:
    """What the provenance network sees of images at clear levels, and their pixels: where traces place them."""

    def __init__(self, tracer: DiffusionTracer, *, along: Along, num_inference_steps: int) -> None:
        """Take a tracer that finds coordinates; images without a trajectory are noised to the sampler's levels."""
        self.tracer = tracer
        self.along = along
        self.num_inference_steps = num_inference_steps

    @property
    def widths(self) -> tuple[int, int]:
        """Features of the embedding, and of the pixels."""
        config = self.tracer.unet.config
        assert self.tracer.provenance is not None
        return self.tracer.provenance.config.width, config.in_channels * config.sample_size**2

    @torch.no_grad()
    def __call__(self, images: Queries | ImageSet) -> Tensor:
        """Give coordinates, (image, feature)."""
        device = self.tracer.unet.device
        if isinstance(images, Queries):
            is_along = self.along == "trajectory" and images.trajectory is not None
            noisy = images.trajectory if is_along and images.trajectory is not None else images.noisy
            return self.tracer.coordinates(noisy, images.class_labels.to(device))
        batches = zip(images.images.split(NETWORK_BATCH), images.labels.split(NETWORK_BATCH), strict=True)
        found = []
        for pixels, labels in batches:
            clean = to_unit_range(pixels).to(device)
            noisy = self.tracer.noised(clean, num_inference_steps=self.num_inference_steps, seed=0)
            found.append(self.tracer.coordinates(noisy, labels.to(device)))
        return torch.cat(found)
