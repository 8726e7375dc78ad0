"""The credit head: how much less would be known of a query without each training example."""

from __future__ import annotations

import torch

# ModelMixin must stand in this module's own namespace, as in `models/provenance.py`.
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor


class CreditHead(ModelMixin, ConfigMixin):
    """Squared read-outs of kernels at landmarks: `(k(query, landmarks) @ readout)^2`, as shares.

    `tracing/gaussian_process.py` fits it in closed form, on coordinates of the training images. Everything it needs
    of them is in the read-out, so a trace costs two small products.
    """

    @register_to_config
    def __init__(
        self,
        *,
        num_examples: int,
        num_landmarks: int,
        width: int,
        num_classes: int,  # noqa: ARG002 - register_to_config keeps it, and all others
        across: float,  # noqa: ARG002
        num_gradients: int = 0,  # noqa: ARG002
        gradient_share: float = 0.0,  # noqa: ARG002
        level_power: float = 1.0,  # noqa: ARG002
        calibration_subsets: int = 0,  # noqa: ARG002
        process: str = "",  # noqa: ARG002
    ) -> None:
        """Make an empty head.

        Args:
            num_examples: Training examples.
            num_landmarks: Those of them that queries are compared with.
            width: Of coordinates.
            num_classes: Classes without the null label.
            across: Factor of the kernel between two classes.
            num_gradients: The last coordinates, of which products count instead of distances: directions of gradients.
            gradient_share: Of these products in the kernel.
            level_power: Of alpha_bar / (1 - alpha_bar) in the weights of the noise levels.
            calibration_subsets: Subset models it was calibrated on.
            process: Kernel and ridge in words.
        """
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(width))
        self.landmarks: Tensor
        self.register_buffer("landmarks", torch.zeros(num_landmarks, width))
        self.landmark_labels: Tensor
        self.register_buffer("landmark_labels", torch.zeros(num_landmarks, dtype=torch.int64))
        self.readout: Tensor
        self.register_buffer("readout", torch.zeros(num_landmarks, num_examples))

    @property
    def setting(self) -> str:
        """Everything that calibration chose, in words."""
        return f"{self.config.process}, levels by (a / (1 - a))^{self.config.level_power:g}"

    @property
    def wants_gradients(self) -> bool:
        """Whether coordinates end in gradients of the generator's last layer."""
        return bool(self.config.num_gradients)

    def forward(self, coordinates: Tensor, class_labels: Tensor) -> Tensor:
        """Give shares of credit (query, train) that sum to 1.

        Args:
            coordinates: (query, width), before scaling.
            class_labels: int64 (query,), the null label where there is none.
        """
        near = credit_kernel(
            coordinates * self.scale,
            class_labels,
            self.landmarks,
            self.landmark_labels,
            across=self.config.across,
            null_label=self.config.num_classes,
            num_gradients=self.config.num_gradients,
            gradient_share=self.config.gradient_share,
        )
        return credit_shares(near @ self.readout)


def credit_shares(found: Tensor) -> Tensor:
    """Square what was read out, (query, train), and give its shares, which sum to 1."""
    credit: Tensor = found.square()
    total: Tensor = credit.sum(dim=1, keepdim=True)
    # So far from everything that the kernel is 0 in these digits: nothing is more responsible than anything else.
    return torch.where(total > 0, credit / total.clamp_min(torch.finfo(total.dtype).tiny), 1 / credit.shape[1])


def credit_kernel(
    first: Tensor,
    first_labels: Tensor,
    second: Tensor,
    second_labels: Tensor,
    *,
    across: float,
    null_label: int,
    num_gradients: int = 0,
    gradient_share: float = 0.0,
) -> Tensor:
    """Give exp(-d^2 / 2) of most coordinates, smaller between two classes, and products of the last ones.

    Images are alike because they look alike, or because they ask the same of the generator's weights. Positive
    semidefinite on points with labels of their own, being made of sums and products of kernels.

    Args:
        first: Scaled coordinates, (first, feature).
        first_labels: int64 (first,).
        second: (second, feature).
        second_labels: int64 (second,).
        across: Factor between two classes; products have none.
        null_label: The label that stands for no label.
        num_gradients: The last features, of which products count; of directions, the cosine of two gradients.
        gradient_share: Of these products in the kernel.

    Returns:
        (first, second).
    """
    places = first.shape[1] - num_gradients
    squares = torch.cdist(first[:, :places], second[:, :places], compute_mode="use_mm_for_euclid_dist").square()
    is_same = _is_same_class(first_labels, second_labels, null_label)
    near: Tensor = (-squares / 2).exp() * torch.where(is_same, 1.0, across).to(squares)
    products = first[:, places:] @ second[:, places:].T
    return (1 - gradient_share) * near + gradient_share * products


def _is_same_class(first_labels: Tensor, second_labels: Tensor, null_label: int) -> Tensor:
    """Compare classes, bool (first, second).

    A point of `first` without a class is near every class alike, unless `second` has such points: those are a class
    among themselves.
    """
    is_same = first_labels[:, None] == second_labels
    if not (second_labels == null_label).any():
        is_same = is_same | (first_labels == null_label)[:, None]
    return is_same
