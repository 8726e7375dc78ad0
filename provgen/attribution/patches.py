"""Which training image every patch of a noisy image comes from: the posterior of the closed form, patch by patch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.attribution.posterior import impossible

MAX_BYTES = 256 * 2**20
"""Of the (query, train, height, width) array that is held at once."""


class PatchPosterior:
    """The mean over all places of softmax_i(-|x_t patch - sqrt(a) x_i patch|^2 / (2 (1 - a))).

    A convolutional denoiser sees patches, and blends images that no single posterior holds (Kamb and Ganguli 2024,
    arXiv 2412.20292); NDA (arXiv 2510.14269) scores training images by such weights. Here a patch is compared with the
    patches at its own place.
    """

    def __init__(
        self, train_images: Tensor, train_labels: Tensor, *, null_label: int, patch_size: int
    ) -> None:
        """Keep the training set.

        Args:
            train_images: Floating (train, channel, height, width), in [-1, 1].
            train_labels: int64 (train,).
            null_label: The label that stands for no label.
            patch_size: Height and width of a patch, at most that of an image.
        """
        assert patch_size <= train_images.shape[-1]
        self.images = train_images
        self.labels = train_labels
        self.null_label = null_label
        self.patch_size = patch_size

    def __call__(self, noisy: Tensor, timestep: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002
        """Give log-probabilities (query, train); see `StepPosterior`."""
        ruled_out = impossible(class_labels, self.labels, self.null_label, None)
        size = max(1, MAX_BYTES // self.images.nbytes)
        batches = zip(noisy.split(size), ruled_out.split(size), strict=True)
        return torch.cat([self._log_probs(images.to(self.images), signal, out) for images, out in batches])

    def _log_probs(self, noisy: Tensor, signal: Tensor, ruled_out: Tensor) -> Tensor:
        squares = (noisy[:, None] - signal.sqrt() * self.images).square().sum(dim=2)
        patches = F.avg_pool2d(squares, self.patch_size, stride=1) * self.patch_size**2
        logits = -patches / (2 * (1 - signal))
        logits = logits.masked_fill(ruled_out[:, :, None, None], torch.finfo(logits.dtype).min)
        # In logarithms: at little noise all places of most images underflow, and their order would be lost.
        places = logits.shape[2] * logits.shape[3]
        return logits.log_softmax(dim=1).logsumexp(dim=(2, 3)) - math.log(places)
