"""Fitting a credit head: of the default process, or of the one that subset models of a run are best told by."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.generators.protocol import Generator
from provgen.models.credit import CreditHead, GaussianProcess, Kernel
from provgen.models.provenance import ProvenanceNetwork
from provgen.tracing.gaussian_process import (
    DEFAULT_PROCESS,
    EVERYTHING,
    FeatureParts,
    FittedKernel,
    distances_from_middle,
)
from provgen.tracing.trace import CreditFeatures, trace

S = TypeVar("S")
"""A setting: a frozen dataclass whose text is printed and never parsed."""


@dataclass(frozen=True)
class Untuned:
    """The one setting of a method with nothing to tune."""

    def __str__(self) -> str:
        return ""


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


NUM_INFERENCE_STEPS = 50
"""Sampling steps whose last level training images are noised to."""

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
    """Training images and queries as traces see them."""

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
    traced: TracedImages, choose: Choose, *, calibration_subsets: int, progress_bar: Progress = list
) -> CreditHead:
    """Fit the head of the process that is chosen for its scores of queries."""
    start = time.perf_counter()
    variance = traced.variance()
    process = choose(variance.scores(traced.queries, EVERYTHING.settings, progress_bar=progress_bar))
    head = variance.fitted(process.kernel).credit_head(process.ridge)
    seconds = time.perf_counter() - start
    head.register_to_config(calibration_subsets=calibration_subsets, calibration_seconds=seconds)
    return head


FEATURE_BATCH = 256
"""Training images looked at a time."""


def default_credit_head(generator: Generator, provenance: ProvenanceNetwork, train: ImageSet) -> CreditHead:
    """Fit the head of `DEFAULT_PROCESS` on what the network sees of the training images; no model is trained again."""
    device = provenance.device
    features = []
    for pixels, labels in zip(train.images.split(FEATURE_BATCH), train.labels.split(FEATURE_BATCH), strict=True):
        images, look = to_unit_range(pixels).to(device), CreditFeatures(provenance)
        trace(generator.renoise(images, labels.to(device), num_inference_steps=NUM_INFERENCE_STEPS, seed=0), look)
        features.append(look.features().double().cpu())
    width = provenance.config.width
    parts = FeatureParts((width, features[0].shape[1] - width))
    kernel, ridge = DEFAULT_PROCESS.kernel, DEFAULT_PROCESS.ridge
    fitted = FittedKernel(torch.cat(features), train.labels, kernel, null_label=train.num_classes, parts=parts)
    return fitted.credit_head(ridge)
