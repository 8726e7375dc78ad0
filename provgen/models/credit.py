"""The credit head: how much less would be known of a query without each training example."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

# ModelMixin must stand in this module's own namespace, as in `models/provenance.py`.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """How much one image says of another."""

    bandwidth: float
    """Length of the kernel, in root mean squared distances between two training images."""
    across: float
    """Factor of the kernel between two classes."""
    shares: tuple[float, ...] = (1.0,)
    """Weight of each part of the features in squared distances, every part in units of its own mean."""
    gradient_share: float = 0.0
    """Share of the cosine of gradients in the kernel."""


@dataclass(frozen=True)
class GaussianProcess:
    """A kernel and the variance of an observation."""

    kernel: Kernel
    """Covariance of the process."""
    ridge: float
    """Variance of an observation, in units of the mean kernel of an image with itself."""

    def __str__(self) -> str:
        kernel = self.kernel
        pixels = "" if len(kernel.shares) == 1 else f", pixels {kernel.shares[1]:g}"
        parts = pixels + (f", gradients {kernel.gradient_share:g}" if kernel.gradient_share else "")
        return f"s={kernel.bandwidth:g} apart, across classes {kernel.across:g}{parts}, lambda={self.ridge:g}"

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> GaussianProcess:
        """Read it back from `dataclasses.asdict`, through JSON or not."""
        kernel = {**fields["kernel"], "shares": tuple(fields["kernel"]["shares"])}
        return cls(Kernel(**kernel), fields["ridge"])


class CreditHead(ModelMixin, ConfigMixin):
    """Squared read-outs of kernels at landmarks: `(k(query, landmarks) @ projection @ readout)^2`, as shares.

    `tracing/gaussian_process.py` fits it in closed form on features of the training images.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_examples: int,
        num_landmarks: int,
        rank: int,
        width: int,
        num_classes: int,  # noqa: ARG002 - register_to_config keeps it, and the three below
        num_gradients: int,  # noqa: ARG002
        process: dict[str, Any],
        calibration_subsets: int = 0,  # noqa: ARG002
        calibration_seconds: float = 0.0,  # noqa: ARG002
    ) -> None:
        """Make an empty head, which compares queries with `num_landmarks` of the training examples.

        The read-out has `rank` directions. An image has `width` features. The last `num_gradients` are normalised
        gradients, whose products count instead of distances. `num_classes` is without the null label. `process` is
        `dataclasses.asdict` of a `GaussianProcess` chosen on `calibration_subsets` subset models, or of the default
        one where that is 0; `calibration_seconds` are those of the search.
        """
        super().__init__()
        self.process = GaussianProcess.read(process)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(width))
        self.landmarks: Tensor
        self.register_buffer("landmarks", torch.zeros(num_landmarks, width))
        self.landmark_labels: Tensor
        self.register_buffer("landmark_labels", torch.zeros(num_landmarks, dtype=torch.int64))
        self.projection: Tensor
        self.register_buffer("projection", torch.zeros(num_landmarks, rank))
        self.readout: Tensor
        self.register_buffer("readout", torch.zeros(rank, num_examples))

    @property
    def wants_gradients(self) -> bool:
        """Whether features end in gradients of the generator's last layer."""
        return bool(self.config.num_gradients)

    def forward(self, features: Tensor, class_labels: Tensor) -> Tensor:
        """Give shares of credit (query, train), which sum to 1, for features (query, width) before scaling.

        `class_labels` is int64 (query,), the null label where there is none.
        """
        images, landmarks = (features * self.scale, class_labels), (self.landmarks, self.landmark_labels)
        kernel, null_label = self.process.kernel, self.config.num_classes
        similarity = kernel_matrix(
            *images, *landmarks, kernel, null_label=null_label, num_gradients=self.config.num_gradients
        )
        return credit_shares(similarity @ self.projection @ self.readout)


def credit_shares(readouts: Tensor) -> Tensor:
    """Square the read-outs (query, train), and give their shares, which sum to 1."""
    credit: Tensor = readouts.square()
    total: Tensor = credit.sum(dim=1, keepdim=True)
    # So far from everything that the kernel is 0 in these digits: nothing is more responsible than anything else.
    return torch.where(total > 0, credit / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / credit.shape[1])


def kernel_matrix(
    first: Tensor,
    first_labels: Tensor,
    second: Tensor,
    second_labels: Tensor,
    kernel: Kernel,
    *,
    null_label: int,
    num_gradients: int = 0,
) -> Tensor:
    """Give exp(-d^2 / 2) of most features, smaller between two classes, and products of the last ones, (first, second).

    Images are alike because they look alike, or because they ask the same of the generator's weights. The matrix is
    positive semidefinite on images with classes. An image of `first` without a class is near every class alike, unless
    `second` has such images: those are a class among themselves.

    Features are scaled, (first, feature) and (second, feature), so the kernel's bandwidth and shares are in them
    already. The last `num_gradients` are normalised gradients, whose products are cosines.
    """
    num_distances = first.shape[1] - num_gradients
    distances = first[:, :num_distances], second[:, :num_distances]
    squares = torch.cdist(*distances, compute_mode="use_mm_for_euclid_dist").square()
    is_same = first_labels[:, None] == second_labels
    if not (second_labels == null_label).any():
        is_same = is_same | (first_labels == null_label)[:, None]
    similarity: Tensor = (-squares / 2).exp() * torch.where(is_same, 1.0, kernel.across).to(squares)
    cosines = first[:, num_distances:] @ second[:, num_distances:].T
    return (1 - kernel.gradient_share) * similarity + kernel.gradient_share * cosines
