"""Closed-form posteriors over training examples: the oracles of every index metric."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from provgen.models.vae import ImageVae

MAX_CHUNK_BYTES = 256 * 2**20
"""Largest (query, train) matrix that is held at once by the chunked methods."""


class Posterior(Protocol):
    """The exact posterior of one kind of generator: the ceiling of every index metric."""

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | query, y), (query, train), for what the generator produced at values of alpha_bar (query,)."""
        ...

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query, (query, train); it ranks where probabilities underflow."""
        ...

    def chunks(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
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

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | x_t, y).

        Args:
            queries: x_t, (query, channel, height, width), any floating dtype.
            alpha_bar: alpha_bar of each row, (query,), below 1.
            class_labels: int64 (query,).

        Returns:
            (query, train) in the dtype of the training images; rows sum to 1, ruled-out examples get 0.
        """
        # Never exp(log_softmax): exp is ten times slower than softmax where nearly everything underflows.
        return self.logits(queries, alpha_bar, class_labels).softmax(dim=1)

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query; ruled-out examples get the lowest finite value."""
        a = alpha_bar.to(self.rows)[:, None]
        # |x_t|^2 is the same for every example and drops out of the softmax.
        products = queries.flatten(1).to(self.rows) @ self.rows.T
        logits = (a.sqrt() * products - a * self.half_norms) / (1 - a)
        ruled_out = impossible(class_labels, self.labels, self.null_label, self.covered)
        return logits.masked_fill(ruled_out, torch.finfo(logits.dtype).min)

    def chunks(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that stay under MAX_CHUNK_BYTES each."""
        size = max(1, MAX_CHUNK_BYTES // (len(self.rows) * self.rows.element_size()))
        parts = zip(queries.split(size), alpha_bar.split(size), class_labels.split(size), strict=True)
        for some, levels, labels in parts:
            yield self.probs(some, levels, labels)


def impossible(class_labels: Tensor, example_labels: Tensor, null_label: int, covered: Tensor | None) -> Tensor:
    """Say which examples cannot be the parent: those of another class, or not covered; bool (query, train)."""
    is_given = class_labels != null_label
    ruled_out = is_given[:, None] & (class_labels[:, None] != example_labels[None, :])
    return ruled_out if covered is None else ruled_out | ~covered


ENCODED_AT_ONCE = 500
"""Images."""


class LatentPosterior:
    """p(i | z, y) of an autoencoder's encoder, exactly.

    With z drawn from q(z | x_i) = N(mean_i, variance_i), diagonal, and every example equally likely before,
    p(i | z) = q(z | x_i) / sum_j q(z | x_j), over the examples of class y when a label is given and over all
    examples for the null label. The mean of these over the examples is the aggregate posterior (Tomczak and
    Welling 2018, arXiv 1705.07120, eq. 5).
    """

    def __init__(
        self,
        means: Tensor,
        log_variances: Tensor,
        labels: Tensor,
        *,
        null_label: int,
        covered: Tensor | None = None,
    ) -> None:
        """Keep the encoded training set in the dtype that the posterior shall be computed in.

        Args:
            means: Floating (train, feature...), in units of the prior's standard deviation.
            log_variances: Same shape, in nats.
            labels: int64 (train,).
            null_label: The label that stands for no label.
            covered: bool (train,), examples that may be the parent; None for all.
        """
        rows, log_variances = means.flatten(1), log_variances.flatten(1)
        # -2 log q(z | x_i) = z^2 . precision_i - 2 z . pull_i + offset_i + constant: two matrix products.
        self.precisions = (-log_variances).exp()
        self.pulls = rows * self.precisions
        self.offsets = (rows * self.pulls + log_variances).sum(1)
        self.labels = labels
        self.null_label = null_label
        self.covered = covered

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        vae: ImageVae,
        images: Tensor,
        labels: Tensor,
        *,
        null_label: int,
        dtype: torch.dtype,
        device: torch.device,
        covered: Tensor | None = None,
    ) -> LatentPosterior:
        """Encode the training set with the encoder as it stands.

        Args:
            vae: On any device; the images are moved to it in batches.
            images: In [-1, 1], (train, channel, height, width).
            labels: int64 (train,).
            null_label: The label that stands for no label.
            dtype: That the posterior shall be computed in.
            device: Where it shall be computed.
            covered: bool (train,), examples that may be the parent; None for all.
        """
        parts = [vae.encode(some.to(vae.device, vae.dtype)).latent_dist for some in images.split(ENCODED_AT_ONCE)]
        return cls(
            torch.cat([part.mean for part in parts]).to(device, dtype),
            torch.cat([part.logvar for part in parts]).to(device, dtype),
            labels.to(device),
            null_label=null_label,
            covered=None if covered is None else covered.to(device),
        )

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | z, y).

        Args:
            queries: Latents z, (query, feature...), any floating dtype.
            alpha_bar: Ignored: a latent has one level of noise, its variance.
            class_labels: int64 (query,).

        Returns:
            (query, train) in the dtype of the means; rows sum to 1, ruled-out examples get 0.
        """
        return self.logits(queries, alpha_bar, class_labels).softmax(dim=1)

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002 - Posterior
        """Give log p up to a constant of all examples; ruled-out examples get the lowest finite value."""
        rows = queries.flatten(1).to(self.pulls)
        logits = rows @ self.pulls.T - (rows.square() @ self.precisions.T + self.offsets) / 2
        ruled_out = impossible(class_labels, self.labels, self.null_label, self.covered)
        return logits.masked_fill(ruled_out, torch.finfo(logits.dtype).min)

    def chunks(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that stay under MAX_CHUNK_BYTES each."""
        size = max(1, MAX_CHUNK_BYTES // (len(self.pulls) * self.pulls.element_size()))
        parts = zip(queries.split(size), alpha_bar.split(size), class_labels.split(size), strict=True)
        for some, levels, labels in parts:
            yield self.probs(some, levels, labels)
