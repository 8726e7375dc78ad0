"""What the index head is trained towards: soft targets over training examples, and how they are mixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from provgen.generators.closed_form import Posterior


class Mixing(Protocol):
    """(1 - share) p + share p K with a row-stochastic K; the entropy of the mixed posterior is the loss's floor."""

    def __call__(self, probs: Tensor) -> Tensor:
        """Mix probabilities (query, train); rows keep their sum."""


class ClassMixing:
    """Spreads a share of every example's probability evenly over the (covered) examples of its class."""

    def __init__(
        self, example_labels: Tensor, *, num_classes: int, share: float, covered: Tensor | None = None
    ) -> None:
        """Keep the classes of the examples, int64 (train,); the null label, `num_classes`, is a class too.

        `share` is alpha in [0, 1]. Only examples that are `covered`, bool (train,), receive; None for all.
        """
        self.share = share
        self.members = example_labels[:, None] == torch.arange(num_classes + 1, device=example_labels.device)
        covered_members = self.members if covered is None else self.members & covered[:, None]
        # A class without any covered example mixes among itself, so that rows keep their sum.
        self.receivers = torch.where(covered_members.any(dim=0), covered_members, self.members)

    def __call__(self, probs: Tensor) -> Tensor:
        """Mix probabilities (query, train)."""
        receivers = self.receivers.to(probs)
        sizes = receivers.sum(0).clamp_min(1)
        spread = ((probs @ self.members.to(probs)) / sizes) @ receivers.T
        return torch.lerp(probs, spread, self.share)


class NeighborMixing:
    """Spreads a share of every example's probability evenly over its nearest neighbours."""

    def __init__(self, neighbors: Tensor, *, share: float) -> None:
        """Keep `neighbors`, int64 (train, k), where one may stand twice and then counts twice; `share` is alpha."""
        self.share = share
        self.num_neighbors = neighbors.shape[1]
        receivers, order = neighbors.flatten().sort(stable=True)
        # Sources of example 0, of example 1, ...: integers only, so they serve every dtype.
        self.sources = order // self.num_neighbors
        self.starts = torch.searchsorted(receivers, torch.arange(len(neighbors), device=neighbors.device))

    def __call__(self, probs: Tensor) -> Tensor:
        """Mix probabilities (query, train); nothing larger than them is made."""
        # Like a sparse product, which is slower as COO and warns of being a beta as CSR.
        sums = F.embedding_bag(self.sources, probs.T.contiguous(), self.starts, mode="sum")
        return torch.lerp(probs, sums.T / self.num_neighbors, self.share)


def nearest_neighbors(points: Tensor, labels: Tensor, k: int, *, covered: Tensor | None = None) -> Tensor:
    """Find the `k` nearest other examples of the same label, int64 (train, k), so that it never rules a target out.

    A label with k or fewer others repeats them in turn; an example without any other stands for itself. Exact copies
    of an image are neighbours like any other. Distances of points (train, feature) are Euclidean, and the search is
    exact. The null label counts as one; if `covered`, bool (train,), is given, only such examples are neighbours.
    """
    neighbors = torch.arange(len(points))[:, None].repeat(1, k)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        allowed = members if covered is None else members[covered[members]]
        if len(allowed):
            neighbors[members] = _nearest(points, members, allowed, k)
    return neighbors


def _nearest(points: Tensor, members: Tensor, allowed: Tensor, k: int) -> Tensor:
    """Find k nearest of `allowed` for each of `members`, never itself where there is another: (member, k)."""
    search = NearestNeighbors(n_neighbors=min(k + 1, len(allowed))).fit(points[allowed].double().numpy())
    order = allowed[torch.from_numpy(search.kneighbors(points[members].double().numpy(), return_distance=False))]
    # Itself goes last; with exact duplicates it need not be the first that was found.
    last = (order == members[:, None]).long().argsort(dim=1, stable=True)
    order = order.gather(1, last)
    others = max(1, int((order != members[:, None]).sum(1).min()))
    return order[:, torch.arange(k) % min(k, others)]


class Targets(Protocol):
    """A target distribution for every row of a batch."""

    def __call__(self, indices: Tensor, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give target probabilities (batch, train) of the examples `indices`, int64 (batch,).

        `queries` are what the closed form is asked: noisy images, latents or images, (batch, ...). `alpha_bar` (batch,)
        are noise levels, `class_labels`, int64 (batch,), what the generator was given.
        """


class SoftTarget(Protocol):
    """p(i | query, y); a closed form in practice."""

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give probabilities (batch, train)."""


@dataclass(frozen=True)
class OneHotTargets:
    """The very example itself; the cross-entropy's optimum is the closed-form posterior."""

    num_examples: int

    def __call__(self, indices: Tensor, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002 - Targets
        """Give one-hot rows (batch, train)."""
        return F.one_hot(indices, self.num_examples).to(alpha_bar.dtype)


@dataclass(frozen=True)
class PosteriorTargets:
    """The closed-form posterior itself: the same optimum as one-hot targets, with far less variance."""

    posterior: SoftTarget

    def __call__(self, indices: Tensor, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002 - Targets
        """Give posterior rows (batch, train)."""
        return self.posterior.probs(queries, alpha_bar, class_labels)


@dataclass(frozen=True)
class MixedTargets:
    """Other targets, mixed over like examples."""

    targets: Targets
    mixing: Mixing

    def __call__(self, indices: Tensor, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give mixed rows (batch, train)."""
        return self.mixing(self.targets(indices, queries, alpha_bar, class_labels))


UPDATE_EVERY = 20
"""Optimiser steps between two closed forms, at most."""


def update_interval(checkpoint_every: int) -> int:
    """Give the largest number of steps up to UPDATE_EVERY that checkpoints are a multiple of."""
    return max(number for number in range(1, UPDATE_EVERY + 1) if checkpoint_every % number == 0)


class PeriodicPosterior:
    """Asks the closed form that `make` gave at most UPDATE_EVERY calls ago.

    A resumed run makes it anew, and is the same as one that was never stopped only if that one did so too: so it is
    made at every checkpoint, at equal distances in between.
    """

    def __init__(self, make: Callable[[], Posterior], *, checkpoint_every: int) -> None:
        """Keep how it is made; `checkpoint_every` counts optimiser steps, which are calls."""
        self.make = make
        self.every = update_interval(checkpoint_every)
        self._calls = 0
        self._latest: Posterior | None = None

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Compute probabilities (batch, train); one call per optimiser step."""
        if self._latest is None or self._calls % self.every == 0:
            self._latest = self.make()
        self._calls += 1
        return self._latest.probs(queries, alpha_bar, class_labels)
