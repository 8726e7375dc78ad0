"""What every attribution method offers, so that all of them meet on the same queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.tracing.noisy_queries import NoisyQueries


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Images whose sources are asked for, on the CPU; who needs another device moves them."""

    images: Tensor
    """In [-1, 1], (query, channel, height, width)."""
    class_labels: Tensor
    """int64 (query,), the null label where there is none."""
    noisy: NoisyQueries
    """The images noised to several levels with common noise."""
    trajectory: NoisyQueries | None = None
    """For generated images: what the sampler passed through on the way to them."""

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> Queries:
        """Keep the first `count`."""
        return Queries(
            images=self.images[:count],
            class_labels=self.class_labels[:count],
            noisy=self.noisy.first(count),
            trajectory=None if self.trajectory is None else self.trajectory.first(count),
        )


@dataclass(frozen=True, kw_only=True)
class AttributionScores:
    """Scores of all training examples, larger is more responsible, under every setting a method can be tuned over."""

    values: Tensor
    """Floating (setting, query, train)."""
    settings: tuple[str, ...]
    """Their names, such as `lambda=0.01`; a single empty one where there is nothing to tune."""
    distance_to_default: tuple[int, ...]
    """How many steps each is from the usual one, such as the middle of what is tried: one that is no worse, for all
    that is known, is taken rather than one further off."""

    def of(self, setting: str) -> Tensor:
        """Give the scores (query, train) under one setting."""
        scores: Tensor = self.values[self.settings.index(setting)]
        return scores


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What a fitted method keeps of the training set."""

    num_bytes: int
    """In the smallest form that would do, such as pixels of one byte."""
    seconds: float = 0.0
    """Spent by earlier calls of `fit` on what this one found on disk."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a method costs."""

    fit_seconds: float
    """Once for a training set, earlier calls and what the first query sets up included."""
    seconds_per_query: float
    """Under the setting that was chosen, of queries asked together."""
    stored_bytes: int
    """What answers need beside the generator."""


class Attributor(Protocol):
    """An attribution method: what it needs of the training set once, and what it says of queries."""

    def fit(self, train: ImageSet) -> None:
        """Prepare for a training set."""
        ...

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:
        """Score every training example for every query, each query by itself.

        Args:
            queries: What is asked about.
            only: The one setting that is wanted, where others would take time; they may be there all the same.
        """
        ...

    def kept(self) -> Cache:
        """Say what answers need."""
        ...


def untuned(values: Tensor) -> AttributionScores:
    """Wrap scores (query, train) of a method with nothing to tune."""
    return AttributionScores(values=values[None], settings=("",), distance_to_default=(0,))


def steps_from_middle(count: int) -> tuple[int, ...]:
    """Give the distance of each of `count` settings in a row from the middle one."""
    return tuple(abs(place - count // 2) for place in range(count))
