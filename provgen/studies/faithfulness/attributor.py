"""What every attribution method offers, so that all of them meet on the same queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, Protocol

from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.tracing.calibrate import AttributionScores
from provgen.tracing.trace import NoisyImages

LEAST_ALPHA_BAR = 0.01
"""Noise level from which on methods may look at an image, unless the window of its trace begins before."""

Along = Literal["trajectory", "noised"]
"""Where an image is looked at: at the steps that the sampler passed through, or noised again."""

ALONG: tuple[Along, ...] = ("noised", "trajectory")


@dataclass(frozen=True, kw_only=True)
class Queries:
    """Images whose sources are asked for, on the CPU; who needs another device moves them."""

    images: Tensor
    """In [-1, 1], (query, channel, height, width)."""
    class_labels: Tensor
    """int64 (query,), the null label where there is none."""
    noisy: NoisyImages
    """The images noised to several levels with common noise."""
    trajectory: NoisyImages | None = None
    """For generated images: what the sampler passed through on the way to them."""

    def __len__(self) -> int:
        return len(self.images)

    def along(self, along: Along) -> NoisyImages:
        """Give the steps to look at; an image that was not generated has no trajectory and is always noised."""
        return self.trajectory if along == "trajectory" and self.trajectory is not None else self.noisy

    def first(self, count: int) -> Queries:
        """Keep the first `count`."""
        images, labels, noisy = self.images[:count], self.class_labels[:count], self.noisy.first(count)
        trajectory = None if self.trajectory is None else self.trajectory.first(count)
        return Queries(images=images, class_labels=labels, noisy=noisy, trajectory=trajectory)


@dataclass(frozen=True, kw_only=True)
class Cache:
    """What a fitted method keeps of the training set."""

    num_bytes: int
    """Bytes in the smallest form that would do, such as pixels of one byte."""
    seconds: float = 0.0
    """Seconds that were spent before `fit` on what it found, such as gradients on disk or a calibration."""


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

    @property
    def settings(self) -> Sequence[Any]:
        """Every setting that may be tried: frozen dataclasses."""
        ...

    def fit(self, train: ImageSet) -> None:
        """Prepare for a training set."""
        ...

    def attribute(self, queries: Queries, only: Any = None) -> AttributionScores[Any]:
        """Score every training example for every query, each query by itself.

        Where settings take time, `only` is the one that is wanted; others may be there all the same.
        """
        ...

    def kept(self) -> Cache:
        """Say what answers need."""
        ...


class Role(StrEnum):
    """What a method is to the comparison."""

    CALIBRATED_TRACE = "calibrated trace"
    TRACE = "trace"
    """The posterior of the provenance network."""
    CHANCE = "chance"
    """A method that does not look at the image."""
    COMPARISON = "comparison"
    ENSEMBLE = "ensemble"


@dataclass(frozen=True, kw_only=True)
class MethodLabel:
    """What tables and figures need to know of a method."""

    name: str
    """Name in tables; it is printed and never parsed."""
    along: Along | None = None
    """Where images are looked at; None where that makes no difference."""
    uses_provenance: bool = False
    """Whether the provenance network has a part in it."""
    is_reference: bool = False
    """Whether every other method is compared with it, pair by pair."""
    role: Role = Role.COMPARISON


@dataclass(frozen=True)
class Method:
    """An attribution method of the comparison."""

    label: MethodLabel
    attributor: Attributor

    @property
    def name(self) -> str:
        """Name in tables."""
        return self.label.name
