"""The closed-form posterior over training examples: the oracle of every index metric."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MAX_CHUNK_BYTES = 256 * 2**20
"""Largest (query, train) matrix that is held at once by the chunked methods."""


class ClosedFormPosterior:
    """p(i | x_t, y) of the forward process, exactly.

    With x_t = sqrt(a) x_i + sqrt(1-a) noise and every example equally likely before,
    p(i | x_t) = softmax_i( -|x_t - sqrt(a) x_i|^2 / (2 (1-a)) )   (e.g. Gu et al. 2023, arXiv 2310.02664),
    over the examples of class y when a label is given and over all examples for the null label.
    """

    def __init__(self, train_images: Tensor, train_labels: Tensor, *, null_label: int) -> None:
        """Keep the training set in the dtype that the posterior shall be computed in.

        Args:
            train_images: Floating (train, channel, height, width), in [-1, 1].
            train_labels: int64 (train,).
            null_label: The label that stands for no label.
        """
        self.rows = train_images.flatten(1)
        self.half_norms = self.rows.square().sum(1) / 2
        self.labels = train_labels
        self.null_label = null_label

    def probs(self, noisy_images: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | x_t, y).

        Args:
            noisy_images: x_t, (query, channel, height, width), any floating dtype.
            signal: a_t of each row, (query,), below 1.
            class_labels: int64 (query,).

        Returns:
            (query, train) in the dtype of the training images; rows sum to 1, ruled-out examples get 0.
        """
        queries = noisy_images.flatten(1).to(self.rows)
        a = signal.to(self.rows)[:, None]
        # |x_t|^2 is the same for every example and drops out of the softmax.
        logits = (a.sqrt() * (queries @ self.rows.T) - a * self.half_norms) / (1 - a)
        is_given = class_labels != self.null_label
        ruled_out = is_given[:, None] & (class_labels[:, None] != self.labels[None, :])
        # Never exp(log_softmax): exp is ten times slower than softmax where nearly everything underflows.
        return logits.masked_fill(ruled_out, torch.finfo(logits.dtype).min).softmax(dim=1)

    def chunks(self, noisy_images: Tensor, signal: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that stay under MAX_CHUNK_BYTES each."""
        size = max(1, MAX_CHUNK_BYTES // (len(self.rows) * self.rows.element_size()))
        parts = zip(noisy_images.split(size), signal.split(size), class_labels.split(size), strict=True)
        for images, levels, labels in parts:
            yield self.probs(images, levels, labels)
