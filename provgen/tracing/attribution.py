"""What attributing an image gives: its sources, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.errors import InputError
from provgen.tracing.explained import Explained


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The top k sources of every query, those with the largest share of credit first.

    The original of a copy comes before all others.
    """

    example_index: Tensor
    """int64 (query, k)."""
    posterior: Tensor
    """Belief that the example is the query's parent, (query, k)."""
    weight: Tensor
    """Share of credit, (query, k), falling but for the original of a copy; equals `posterior` without a credit head."""
    mass_not_shown: Tensor
    """Posterior of all examples outside the top k, (query,)."""
    mass_unreachable: Tensor
    """Posterior of the examples that the index head does not cover, (query,); 0 for the network's own, and under
    full coverage."""
    entropy: Tensor
    """Entropy of the whole posterior in nats, (query,)."""
    commitment_step: Tensor
    """First sampling step (0-based) from which the top source of the last step keeps more than half of the
    posterior; -1 if it never does, or if there was no sampling. That source need not be the first in
    `example_index`, which averages over the window. int64 (query,)."""
    step_entropy: Tensor
    """Entropy of the posterior at every traced noise level in nats, (query, step), from noise to image."""
    alpha_bar: Tensor
    """alpha_bar of those levels, (step,)."""
    explained: Explained
    """How much of every image training images explain; NaN where they were not at hand."""

    def __len__(self) -> int:
        return len(self.entropy)

    @staticmethod
    def concatenate(parts: list[Attribution]) -> Attribution:
        """Join attributions of consecutive queries over the same noise levels."""
        names = [name for name in vars(parts[0]) if name not in ("alpha_bar", "explained")]
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
        explained = Explained.concatenate([part.explained for part in parts])
        return Attribution(**joined, alpha_bar=parts[0].alpha_bar, explained=explained)


def check_top_k(top_k: int, num_examples: int) -> None:
    """Refuse a `top_k` outside of 1 to `num_examples`, those that can be named, with an `InputError`."""
    if not 1 <= top_k <= num_examples:
        raise InputError(
            f"top_k must be between 1 and {num_examples}, the number of training images that can be named, got {top_k}"
        )
