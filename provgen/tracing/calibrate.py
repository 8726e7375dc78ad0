"""Fitting a credit head on the subset models of a run: the process first, then the weights of noise levels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from provgen.models.credit import CreditHead, GaussianProcess, Kernel
from provgen.tracing.gaussian_process import EVERYTHING, FeatureParts, FittedKernel, distances_from_middle
from provgen.tracing.trace import INVERSE_VARIANCE

S = TypeVar("S")
"""A setting: a frozen dataclass whose text is printed and never parsed."""


@dataclass(frozen=True)
class Untuned:
    """The one setting of a method with nothing to tune."""

    def __str__(self) -> str:
        return ""


@dataclass(frozen=True)
class LevelPower:
    """Weights of the clear noise levels."""

    power: float
    """Power of alpha_bar / (1 - alpha_bar)."""

    def __str__(self) -> str:
        return f"{self.power:g}"


LEVEL_POWERS = (LevelPower(0.0), LevelPower(INVERSE_VARIANCE), LevelPower(2.0))
"""All levels alike, by noise, nearly the cleanest alone."""


@dataclass(frozen=True, kw_only=True)
class AttributionScores(Generic[S]):
    """Scores of all training examples, larger is more responsible, under every setting a method can be tuned over."""

    values: Tensor
    """Floating (setting, query, train)."""
    settings: tuple[S, ...]
    """The settings, in the order of `values`."""
    distance_to_default: tuple[int, ...]
    """Steps of each setting from the default: of settings that may be equally good, the nearest one is taken."""

    @classmethod
    def in_a_row(cls, values: Sequence[Tensor], settings: Sequence[S]) -> AttributionScores[S]:
        """Join scores (query, train) under settings of one number, whose default is the middle one."""
        distances = distances_from_middle(len(settings))
        return cls(values=torch.stack([*values]), settings=tuple(settings), distance_to_default=distances)

    def under(self, setting: S) -> Tensor:
        """Give the scores (query, train) under one setting."""
        scores: Tensor = self.values[self.settings.index(setting)]
        return scores


class Choose(Protocol):
    """Judges scores by kind of query."""

    def __call__(self, scores: Mapping[str, AttributionScores[S]]) -> S:
        """Give the best setting."""


Progress = Callable[[Iterable[GaussianProcess]], Iterable[GaussianProcess]]
"""Shows how far along it is."""


@dataclass(frozen=True, kw_only=True)
class LabelledFeatures:
    """Features of images, and the classes they are attributed with."""

    features: Tensor
    """Floating (image, feature)."""
    labels: Tensor
    """int64 (image,), the null label where there is none."""


class LeaveOneOutVariance:
    """How much less would be known of a query without example i.

    A network does the worse on an image, the less its training set says of it: the loss follows the variance of a
    Gaussian process at the query, which every example that is left out enlarges. Like examples share the credit.
    """

    def __init__(self, train: LabelledFeatures, *, null_label: int, parts: FeatureParts | None = None) -> None:
        """Keep the training images; `parts` of None is one part whose distances count."""
        self.features, self.labels = train.features.double().cpu(), train.labels
        self.null_label, self.parts = null_label, parts
        self._fitted: FittedKernel | None = None

    def scores(
        self,
        queries: Mapping[str, LabelledFeatures],
        settings: Mapping[GaussianProcess, int],
        *,
        progress_bar: Progress = list,
    ) -> dict[str, AttributionScores[GaussianProcess]]:
        """Leave every example out under every process, for queries by kind; `settings` gives steps from the default."""
        features = {kind: asked.features.double().cpu() for kind, asked in queries.items()}
        values: dict[str, list[Tensor]] = {kind: [] for kind in queries}
        for process in progress_bar(settings):
            fitted = self.fitted(process.kernel)
            for kind, asked in queries.items():
                values[kind].append(fitted.credit(features[kind], asked.labels, process.ridge).float())
        processes, distances = tuple(settings), tuple(settings.values())
        return {
            kind: AttributionScores(values=torch.stack(scores), settings=processes, distance_to_default=distances)
            for kind, scores in values.items()
        }

    def fitted(self, kernel: Kernel) -> FittedKernel:
        """Fit a kernel; only the last one stays in memory."""
        if self._fitted is None or self._fitted.kernel != kernel:
            train = self.features, self.labels
            self._fitted = FittedKernel(*train, kernel, null_label=self.null_label, parts=self.parts)
        return self._fitted


@dataclass(frozen=True, kw_only=True)
class TracedImages:
    """Training images and queries as traces see them under some weights of noise levels."""

    train: LabelledFeatures
    """The training images."""
    queries: Mapping[str, LabelledFeatures]
    """Images that subset models were asked about, by kind."""
    parts: FeatureParts
    """What the features are made of."""
    null_label: int
    """The label that stands for no label."""

    def variance(self) -> LeaveOneOutVariance:
        """Prepare for the training images."""
        return LeaveOneOutVariance(self.train, null_label=self.null_label, parts=self.parts)


def fit_credit_head(
    images: Callable[[float], TracedImages], choose: Choose, *, calibration_subsets: int, progress_bar: Progress = list
) -> CreditHead:
    """Fit the head whose process is chosen under the default weights of levels, then weights of levels under that.

    `images` gives features under a power of alpha_bar / (1 - alpha_bar) in the weights of levels.
    """
    start = time.perf_counter()
    traced = images(INVERSE_VARIANCE)
    process = choose(traced.variance().scores(traced.queries, EVERYTHING.settings, progress_bar=progress_bar))
    values: dict[str, list[Tensor]] = {kind: [] for kind in traced.queries}
    for setting in LEVEL_POWERS:
        traced = images(setting.power)
        for kind, scores in traced.variance().scores(traced.queries, {process: 0}).items():
            values[kind].append(scores.values[0])
    power = choose({kind: AttributionScores.in_a_row(scores, LEVEL_POWERS) for kind, scores in values.items()}).power
    head = images(power).variance().fitted(process.kernel).credit_head(process.ridge, power)
    seconds = time.perf_counter() - start
    head.register_to_config(calibration_subsets=calibration_subsets, calibration_seconds=seconds)
    return head
