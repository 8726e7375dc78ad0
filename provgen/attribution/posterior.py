"""The closed-form posterior over training examples: the oracle of every index metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

MAX_CHUNK_BYTES = 256 * 2**20
"""Largest (query, train) matrix that is held at once by the chunked methods."""


class Oracle(Protocol):
    """The exact posterior of one kind of generator: the ceiling of every index metric."""

    def probs(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | query, y), (query, train), for what the generator produced at signal levels (query,)."""
        ...

    def logits(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query, (query, train); it ranks where probabilities underflow."""
        ...

    def chunks(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that bound memory."""
        ...


class ClosedFormPosterior:
    """p(i | x_t, y) of the forward process, exactly.

    With x_t = sqrt(a) x_i + sqrt(1-a) noise and every example equally likely before,
    p(i | x_t) = softmax_i( -|x_t - sqrt(a) x_i|^2 / (2 (1-a)) )   (e.g. Gu et al. 2023, arXiv 2310.02664),
    over the examples of class y when a label is given and over all examples for the null label.
    """

    def __init__(
        self, train_images: Tensor, train_labels: Tensor, *, null_label: int, covered: Tensor | None = None
    ) -> None:
        """Keep the training set in the dtype that the posterior shall be computed in.

        Args:
            train_images: Floating (train, channel, height, width), in [-1, 1].
            train_labels: int64 (train,).
            null_label: The label that stands for no label.
            covered: bool (train,), examples that may be the parent; None for all.
        """
        self.rows = train_images.flatten(1)
        self.half_norms = self.rows.square().sum(1) / 2
        self.labels = train_labels
        self.null_label = null_label
        self.covered = covered

    def probs(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | x_t, y).

        Args:
            queries: x_t, (query, channel, height, width), any floating dtype.
            signal: a_t of each row, (query,), below 1.
            class_labels: int64 (query,).

        Returns:
            (query, train) in the dtype of the training images; rows sum to 1, ruled-out examples get 0.
        """
        # Never exp(log_softmax): exp is ten times slower than softmax where nearly everything underflows.
        return self.logits(queries, signal, class_labels).softmax(dim=1)

    def logits(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query; ruled-out examples get the lowest finite value."""
        a = signal.to(self.rows)[:, None]
        # |x_t|^2 is the same for every example and drops out of the softmax.
        products = queries.flatten(1).to(self.rows) @ self.rows.T
        logits = (a.sqrt() * products - a * self.half_norms) / (1 - a)
        ruled_out = impossible(class_labels, self.labels, self.null_label, self.covered)
        return logits.masked_fill(ruled_out, torch.finfo(logits.dtype).min)

    def chunks(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that stay under MAX_CHUNK_BYTES each."""
        size = max(1, MAX_CHUNK_BYTES // (len(self.rows) * self.rows.element_size()))
        parts = zip(queries.split(size), signal.split(size), class_labels.split(size), strict=True)
        for some, levels, labels in parts:
            yield self.probs(some, levels, labels)


def impossible(
    class_labels: Tensor, example_labels: Tensor, null_label: int, covered: Tensor | None
) -> Tensor:
    """Say which examples cannot be the parent: those of another class, or not covered; bool (query, train)."""
    is_given = class_labels != null_label
    ruled_out = is_given[:, None] & (class_labels[:, None] != example_labels[None, :])
    return ruled_out if covered is None else ruled_out | ~covered
