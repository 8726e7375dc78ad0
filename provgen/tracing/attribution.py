"""What attributing an image gives: its sources, how far they can be trusted, and how much of it they explain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum

import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.errors import InputError

OCTAVES = range(16)
"""Halvings of the kernel's variance, from the spread of the training images on, that are tried for every image."""

FEWEST_JUDGED, MOST_JUDGED = 48, 256
"""Held-out images, and as many of pure noise, that limits are read off."""

MAX_PRODUCTS = 2**31
"""Numbers of judged images times numbers of all training images; with many or large ones fewer are judged."""

TAIL = 0.01
"""Share of the held-out images beyond a limit, and of pure noise that is explained better."""

LEAST_COPY = 0.95
"""Share of an image that one training image alone must explain at least, or it is no copy."""

MAX_MATRIX = 2**25
"""Largest (query, train) matrix that is held at once."""


class Support(StrEnum):
    """What an image is made of, as far as training images go."""

    COPY = "copy"
    MIXTURE = "mixture"
    NONE = "no sources"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class SupportLimits:
    """Shares that tell copies and images without sources from others."""

    least: float = 0.0
    """Share that the best mixture must explain, or an image has no sources."""
    copy: float = LEAST_COPY
    """Share that one training image alone explains of copies."""


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Shares of the contrast of images that training images account for, (query,) each.

    Contrast is the squared distance to the mean training image, or to an even grey where that is nearer. Differences
    of brightness, which is the mean of a channel, do not count. Otherwise noise would be explained by even images.
    """

    share: Tensor
    """By the best mixture of training images."""
    by_nearest: Tensor
    """By the nearest training image alone."""
    by_class_mean: Tensor
    """By the nearest mean of a class."""
    nearest: Tensor
    """Example index of the nearest training image, int64; -1 where it is not known."""
    least: Tensor
    """Share below which an image has no sources."""
    copy: Tensor
    """Share by the nearest from which on an image is a copy."""

    @classmethod
    def unknown(cls, count: int) -> Explained:
        """Give NaN for so many images."""
        nan = torch.full((count,), math.nan)
        nearest = torch.full((count,), -1)
        return cls(share=nan, by_nearest=nan, by_class_mean=nan, nearest=nearest, least=nan, copy=nan)

    @classmethod
    def concatenate(cls, parts: Sequence[Explained]) -> Explained:
        """Join those of consecutive images."""
        return cls(**{field.name: torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)})

    @property
    def is_copy(self) -> Tensor:
        """Whether an image is a copy of the nearest, bool (query,)."""
        return self.by_nearest >= self.copy

    def support(self, query: int) -> Support:
        """Say what one image is made of."""
        if math.isnan(self.share[query]):
            return Support.UNKNOWN
        if self.is_copy[query]:
            return Support.COPY
        return Support.NONE if self.share[query] < self.least[query] else Support.MIXTURE

    def describe(self, query: int) -> str:
        """Say in words how much of one image is explained; nothing where it is not known."""
        share, by_nearest = float(self.share[query]), float(self.by_nearest[query])
        return {
            Support.UNKNOWN: "",
            Support.COPY: f"a copy: {by_nearest:.0%} explained by one training image alone",
            Support.NONE: f"no sources: {share:.0%} explained by training images",
            Support.MIXTURE: f"{share:.0%} explained by training images",
        }[self.support(query)]


class Mixtures:
    """Mixtures of training images."""

    def __init__(self, train: ImageSet, device: torch.device, limits: SupportLimits | None = None) -> None:
        """Keep the training images, and the limits of what they must explain."""
        self.limits = limits or SupportLimits()
        self.images = to_unit_range(train.images).flatten(1).to(device)
        self.channels = train.images.shape[1]
        self.brightness = self._brightness(self.images)
        self.mean = self.images.mean(dim=0)
        self.spread = self._contrast(self.images - self.mean).mean().clamp_min(1e-6)
        labels = train.labels.to(device)
        members = [self.images[labels == label] for label in range(train.num_classes)]
        self.class_means = torch.stack([self.mean, *(images.mean(dim=0) for images in members if len(images))])

    def errors(self, logits: Tensor, images: Tensor, temperature: float) -> Tensor:
        """Give the squared error of images (query, feature) to mixtures under logits (query, train), (query,)."""
        return (self._mixed(logits, temperature) - images).square().sum(dim=1)

    @torch.no_grad()
    def explain(self, images: Tensor) -> Explained:
        """Measure how much of images in [-1, 1], (query, channel, height, width), training images account for."""
        size = max(1, MAX_MATRIX // len(self.images))
        return Explained.concatenate([self._explain(part) for part in images.flatten(1).split(size)])

    def _explain(self, images: Tensor) -> Explained:
        images = images.to(self.images)
        squares = torch.cdist(images, self.images, compute_mode="use_mm_for_euclid_dist").square()
        brightness = torch.cdist(self._brightness(images), self.brightness).square()
        logits = -(squares - brightness * images.shape[1] / self.channels) / (2 * self.spread)
        total = torch.minimum(self._contrast(images - self.mean), self._contrast(images))
        total = total.clamp_min(1e-6 * float(self.spread))
        tried = [self._contrast(self._mixed(logits, 0.5**octave) - images) for octave in OCTAVES]
        nearest = logits.argmax(dim=1)
        by_nearest = self._contrast(self.images[nearest] - images)
        by_class = torch.stack([self._contrast(mean - images) for mean in self.class_means]).amin(dim=0)
        best = torch.stack([*tried, by_nearest, by_class]).amin(dim=0)
        share, nearest_share, class_share = ((1 - e / total).clamp(0, 1).cpu() for e in (best, by_nearest, by_class))
        return Explained(
            share=share,
            by_nearest=nearest_share,
            by_class_mean=class_share,
            nearest=nearest.cpu(),
            least=torch.full_like(share, self.limits.least),
            copy=torch.full_like(share, self.limits.copy),
        )

    def _mixed(self, logits: Tensor, temperature: float) -> Tensor:
        """Give the mixtures (query, feature) under logits (query, train)."""
        return (logits / temperature).softmax(dim=1).to(self.images) @ self.images

    def _brightness(self, images: Tensor) -> Tensor:
        """Give the mean of every channel of images (query, feature), (query, channel)."""
        brightness: Tensor = images.unflatten(1, (self.channels, -1)).mean(dim=2)
        return brightness

    def _contrast(self, images: Tensor) -> Tensor:
        """Give the sum of squares of images (query, feature) without their brightness, (query,)."""
        by_channel = images.unflatten(1, (self.channels, -1))
        contrast: Tensor = (by_channel - by_channel.mean(dim=2, keepdim=True)).square().sum(dim=(1, 2))
        return contrast


def support_limits(mixtures: Mixtures, holdout: ImageSet, image_shape: tuple[int, ...], seed: int) -> SupportLimits:
    """Read limits off held-out images, which hardly ever go beyond them, and off noise, which is explained less."""
    random = seeded_generator(seed, Stream.SUPPORT)
    judged = max(FEWEST_JUDGED, min(MOST_JUDGED, MAX_PRODUCTS // mixtures.images.numel()))
    noise = mixtures.explain(torch.rand((judged, *image_shape), generator=random) * 2 - 1).share
    least = float(noise.quantile(1 - TAIL))
    if not len(holdout):
        return SupportLimits(least=least)
    chosen = torch.randperm(len(holdout), generator=random)[:judged]
    known = mixtures.explain(to_unit_range(holdout.images[chosen]))
    return SupportLimits(
        least=max(least, float(known.share.quantile(TAIL))),
        copy=max(LEAST_COPY, float(known.by_nearest.quantile(1 - TAIL))),
    )


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
