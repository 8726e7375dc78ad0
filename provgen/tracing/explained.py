"""How much of an image is explained by training images: whatever mixture of them gives it best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.generators.closed_form import Posterior
from provgen.generators.protocol import Step

COPY = 0.95
"""Share of an image that one training image alone explains, from which on it is a copy."""

OCTAVES = 16
"""Temperatures 1, 2, 4, ... that are tried for every image."""


class Mixtures:
    """Mixtures of training images, weighted by a tempered posterior."""

    def __init__(
        self, closed_form: Posterior, train: ImageSet, device: torch.device, *, least_explained: float = 0.0
    ) -> None:
        """Keep the training images with their exact posterior, and the share that they must explain of an image."""
        self.closed_form, self.least_explained = closed_form, least_explained
        self.images = to_unit_range(train.images).flatten(1).to(device)
        self.mean = self.images.mean(dim=0)
        members = [self.images[train.labels == label] for label in range(train.num_classes)]
        self.class_means = torch.stack([self.mean, *(images.mean(dim=0) for images in members if len(images))])
        self.null_label = train.num_classes

    def logits(self, step: Step) -> Tensor:
        """Give the exact posterior's logits of a step, whatever class it was told, (query, train)."""
        null = torch.full_like(step.class_labels, self.null_label)
        return self.closed_form.logits(step.query, step.alpha_bars, null)

    def errors(self, logits: Tensor, predicted: Tensor, temperature: float | Tensor) -> Tensor:
        """Give the squared error of the mixture under a temperature, (query,), for images (query, feature)."""
        mixed = (logits / temperature).softmax(dim=1).to(self.images) @ self.images
        return (mixed - predicted).square().sum(dim=1)


class Support(StrEnum):
    """What an image is made of, as far as training images go."""

    COPY = "copy"
    MIXTURE = "mixture"
    NONE = "no sources"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Shares of the squared distance of images to the mean training image that others account for, (query,) each."""

    share: Tensor
    """By the best mixture of training images."""
    by_nearest: Tensor
    """By the nearest training image alone."""
    by_class_mean: Tensor
    """By the nearest mean of a class."""
    least: Tensor
    """Share below which an image has no sources."""

    def support(self, query: int) -> Support:
        """Say what one image is made of."""
        share, by_nearest, least = (float(x[query]) for x in (self.share, self.by_nearest, self.least))
        if math.isnan(share):
            return Support.UNKNOWN
        if by_nearest >= COPY:
            return Support.COPY
        return Support.NONE if share < least else Support.MIXTURE

    def describe(self, query: int) -> str:
        """Say in words how much of one image is explained; nothing where it is not known."""
        return {
            Support.UNKNOWN: "",
            Support.COPY: f"a copy: {float(self.by_nearest[query]):.0%} explained by one training image alone",
            Support.NONE: f"no sources: {float(self.share[query]):.0%} explained by training images",
            Support.MIXTURE: f"{float(self.share[query]):.0%} explained by training images",
        }[self.support(query)]

    @classmethod
    def unknown(cls, count: int) -> Explained:
        """Give NaN for so many images."""
        return cls(**{field.name: torch.full((count,), math.nan) for field in fields(cls)})

    @classmethod
    def concatenate(cls, parts: Sequence[Explained]) -> Explained:
        """Join those of consecutive images."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    def cpu(self) -> Explained:
        """Move it to the CPU."""
        return Explained(**{name: values.cpu() for name, values in vars(self).items()})


class ExplainedLook:
    """Looks at the last step, where the image is finished."""

    def __init__(self, mixtures: Mixtures) -> None:
        self.mixtures = mixtures
        self._step: Step | None = None
        self._explained: Explained | None = None

    def __call__(self, step: Step) -> None:
        """Keep a step; what it predicts costs a pass, and only the last one counts."""
        self._step = step

    def put(self, rows: Tensor, other: ExplainedLook) -> None:
        """Put what is explained of other queries in the place of some rows."""
        mine, theirs = vars(self.explained()), vars(other.explained())
        self._explained = Explained(**{name: mine[name].index_copy(0, rows, theirs[name]) for name in mine})

    def explained(self) -> Explained:
        """Give the shares, from 0 to 1."""
        if self._explained is None:
            assert self._step is not None, "every generator has a step"
            self._explained = explained_shares(self.mixtures, self._step)
        return self._explained


def explained_shares(mixtures: Mixtures, step: Step) -> Explained:
    """Measure how much of the predicted images of a step training images account for."""
    predicted = step.predicted_image.flatten(1).to(mixtures.images)
    logits = mixtures.logits(step)
    total = (predicted - mixtures.mean).square().sum(dim=1).clamp_min(torch.finfo(predicted.dtype).tiny)

    def share(errors: Tensor) -> Tensor:
        return (1 - errors / total).clamp(0, 1)

    tried = [mixtures.errors(logits, predicted, 2.0**octave) for octave in range(OCTAVES)]
    nearest = (mixtures.images[logits.argmax(dim=1)] - predicted).square().sum(dim=1)
    of_class = torch.cdist(predicted, mixtures.class_means).square().amin(dim=1)
    best = torch.stack([*tried, nearest]).amin(dim=0)
    return Explained(
        share=share(best),
        by_nearest=share(nearest),
        by_class_mean=share(of_class),
        least=torch.full_like(total, mixtures.least_explained),
    )
