"""What the index head is trained towards: soft targets over training examples."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.training.batches import Batch


class Targets(Protocol):
    """A target distribution for every row of a batch."""

    def __call__(self, batch: Batch, noisy_images: Tensor, signal: Tensor) -> Tensor:
        """Give target probabilities (batch, train); `signal` is a_t of each row, (batch,)."""
        ...


class Posterior(Protocol):
    """p(i | x_t, y); `attribution.posterior.ClosedFormPosterior` in practice."""

    def probs(self, noisy_images: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give probabilities (batch, train)."""
        ...


class OneHotTargets:
    """The very example that was noised; the cross-entropy's optimum is the closed-form posterior."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def __call__(self, batch: Batch, noisy_images: Tensor, signal: Tensor) -> Tensor:  # noqa: ARG002 - protocol
        """Give one-hot rows (batch, train)."""
        return F.one_hot(batch.indices, self.num_examples).to(noisy_images.dtype)


class PosteriorTargets:
    """The closed-form posterior itself: the same optimum as one-hot targets, with far less variance."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def __call__(self, batch: Batch, noisy_images: Tensor, signal: Tensor) -> Tensor:
        """Give posterior rows (batch, train)."""
        return self.posterior.probs(noisy_images, signal, batch.labels)


class ClassMixedTargets:
    """Targets with the share `mixing` spread evenly over each example's class (alpha of arXiv 2510.03361)."""

    def __init__(self, targets: Targets, example_labels: Tensor, *, num_classes: int, mixing: float) -> None:
        self.targets = targets
        self.example_labels = example_labels
        self.num_classes = num_classes
        self.mixing = mixing

    def __call__(self, batch: Batch, noisy_images: Tensor, signal: Tensor) -> Tensor:
        """Give mixed rows (batch, train)."""
        probs = self.targets(batch, noisy_images, signal)
        return mix_classes(probs, self.example_labels, num_classes=self.num_classes, mixing=self.mixing)


def mix_classes(probs: Tensor, example_labels: Tensor, *, num_classes: int, mixing: float) -> Tensor:
    """Spread the share `mixing` of each probability evenly over its example's class.

    Column j becomes (1 - mixing) p_j + mixing P(class of j) / (size of that class). Applied to the closed-form
    posterior this is the optimum of training with mixed targets, so its entropy is the cross-entropy's floor.

    Args:
        probs: (query, train).
        example_labels: int64 (train,), at most `num_classes`, which stands for "no label".
        num_classes: Classes without the null label.
        mixing: alpha in [0, 1].

    Returns:
        (query, train), rows summing to what they summed to.
    """
    membership = F.one_hot(example_labels, num_classes + 1).to(probs)
    sizes = membership.sum(0).clamp_min(1)
    spread = ((probs @ membership) / sizes) @ membership.T
    return torch.lerp(probs, spread, mixing)
