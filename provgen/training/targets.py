"""What the index head is trained towards: soft targets over training examples."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor

from provgen.training.mixing import Mixing


class Targets(Protocol):
    """A target distribution for every row of a batch."""

    def __call__(self, indices: Tensor, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give target probabilities (batch, train).

        Args:
            indices: Example index of each row, int64 (batch,).
            queries: What the closed form is asked: noisy images, latents or images, (batch, ...).
            signal: a_t of each row, (batch,).
            class_labels: What the generator was told, int64 (batch,).
        """
        ...


class Posterior(Protocol):
    """p(i | query, y); a closed form in practice."""

    def probs(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give probabilities (batch, train)."""
        ...


class OneHotTargets:
    """The very example itself; the cross-entropy's optimum is the closed-form posterior."""

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def __call__(
        self,
        indices: Tensor,
        queries: Tensor,  # noqa: ARG002 - Targets
        signal: Tensor,
        class_labels: Tensor,  # noqa: ARG002 - Targets
    ) -> Tensor:
        """Give one-hot rows (batch, train)."""
        return F.one_hot(indices, self.num_examples).to(signal.dtype)


class PosteriorTargets:
    """The closed-form posterior itself: the same optimum as one-hot targets, with far less variance."""

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def __call__(self, indices: Tensor, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002 - Targets
        """Give posterior rows (batch, train)."""
        return self.posterior.probs(queries, signal, class_labels)


class MixedTargets:
    """Other targets, mixed over like examples."""

    def __init__(self, targets: Targets, mixing: Mixing) -> None:
        self.targets = targets
        self.mixing = mixing

    def __call__(self, indices: Tensor, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give mixed rows (batch, train)."""
        return self.mixing(self.targets(indices, queries, signal, class_labels))
