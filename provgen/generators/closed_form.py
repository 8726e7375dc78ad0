"""Closed-form posteriors over training examples: the oracles of every index metric."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.models.vae import ImageVae

MAX_CHUNK_BYTES = 256 * 2**20
"""Largest (query, train) matrix that is held at once by the chunked methods."""


class Posterior(Protocol):
    """The exact posterior of one kind of generator: the ceiling of every index metric."""

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | query, y), (query, train), for queries at noise levels alpha_bar (query,)."""
        ...

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query, (query, train); it ranks where probabilities underflow."""
        ...

    def chunks(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that bound memory."""
        ...


class ExactPosterior:
    """What closed forms share: probabilities from logits, and slices that bound memory."""

    rows: Tensor
    """The training set, (train, feature)."""
    labels: Tensor
    """int64 (train,)."""
    null_label: int
    covered: Tensor | None

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query; ruled-out examples get the lowest finite value."""
        raise NotImplementedError

    def probs(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Compute p(i | query, y).

        Args:
            queries: Noisy images or latents, (query, ...), any floating dtype.
            alpha_bar: Cumulative alpha of each query, (query,), below 1; a latent has none and ignores it.
            class_labels: int64 (query,).

        Returns:
            (query, train) in the dtype of the training set; rows sum to 1, ruled-out examples get 0. A row for which
            every example is ruled out is 0.
        """
        # Never exp(log_softmax): exp is ten times slower than softmax where nearly everything underflows.
        probs = self.logits(queries, alpha_bar, class_labels).softmax(dim=1)
        if not len(self._empty_classes):
            return probs
        return probs.masked_fill(torch.isin(class_labels, self._empty_classes)[:, None], 0)

    def chunks(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Iterator[Tensor]:
        """Yield `probs` in slices of queries that stay under MAX_CHUNK_BYTES each."""
        size = max(1, MAX_CHUNK_BYTES // (len(self.rows) * self.rows.element_size()))
        slices = zip(queries.split(size), alpha_bar.split(size), class_labels.split(size), strict=True)
        for chunk in slices:
            yield self.probs(*chunk)

    @cached_property
    def _empty_classes(self) -> Tensor:
        """Labels without any example that may be the parent, int64 (label,)."""
        labels = self.labels if self.covered is None else self.labels[self.covered]
        every = torch.arange(self.null_label, device=labels.device)
        return every[~torch.isin(every, labels)]

    def _ruled_out(self, logits: Tensor, class_labels: Tensor) -> Tensor:
        ruled_out = impossible(class_labels, self.labels, self.null_label, self.covered)
        return logits.masked_fill(ruled_out, torch.finfo(logits.dtype).min)


class ClosedFormPosterior(ExactPosterior):
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

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give log p up to a constant of each query; ruled-out examples get the lowest finite value."""
        a = alpha_bar.to(self.rows)[:, None]
        # |x_t|^2 is the same for every example and drops out of the softmax.
        products = queries.flatten(1).to(self.rows) @ self.rows.T
        logits = (a.sqrt() * products - a * self.half_norms) / (1 - a)
        return self._ruled_out(logits, class_labels)


def impossible(class_labels: Tensor, example_labels: Tensor, null_label: int, covered: Tensor | None) -> Tensor:
    """Say which examples cannot be the parent: those of another class, or not covered; bool (query, train)."""
    is_given = class_labels != null_label
    ruled_out = is_given[:, None] & (class_labels[:, None] != example_labels[None, :])
    return ruled_out if covered is None else ruled_out | ~covered


def image_posterior(
    train: ImageSet, *, dtype: torch.dtype, device: torch.device, covered: Tensor | None = None
) -> ClosedFormPosterior:
    """Make the closed form over training images, or over those that are `covered`, bool (train,)."""
    return ClosedFormPosterior(
        to_unit_range(train.images, dtype).to(device),
        train.labels.to(device),
        null_label=train.num_classes,
        covered=None if covered is None else covered.to(device),
    )


ENCODED_AT_ONCE = 500
"""Images."""


class LatentPosterior(ExactPosterior):
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
        self.pulls = self.rows = rows * self.precisions
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
            dtype: Type the posterior is computed in.
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

    def logits(self, queries: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002 - Posterior
        """Give log p up to a constant of all examples; ruled-out examples get the lowest finite value."""
        rows = queries.flatten(1).to(self.pulls)
        logits = rows @ self.pulls.T - (rows.square() @ self.precisions.T + self.offsets) / 2
        return self._ruled_out(logits, class_labels)


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of each row of probabilities (query, train), among the examples that were looked at.

    Rows that a beam has not looked at the whole of sum to s < 1; theirs is H / s + log s.
    """
    # A row without any possible example is 0, and has no entropy.
    total = probs.sum(dim=1).clamp_min(torch.finfo(probs.dtype).tiny)
    entropies: Tensor = torch.special.entr(probs).sum(dim=1) / total + total.log()
    return entropies.clamp_min(0)


ODDS = (0.1, 0.16, 0.36, 0.96)
"""Mean log odds, in nats, of a noised image against its nearest neighbour at the levels where it is asked for its
parent: at cleaner ones only copies have an entropy above 0."""

NEIGHBORS_OF = 1000
"""Training images whose nearest neighbours are looked up."""


def undecided_levels(posterior: ClosedFormPosterior) -> tuple[float, ...]:
    """Find noise levels alpha_bar at which neighbours are hard to tell apart, whatever the size of the images.

    Neighbours are those of the quarter of the images that have the nearest ones. The log odds of two images at a
    distance d have the mean alpha_bar d^2 / (2 (1 - alpha_bar)).
    """
    rows = posterior.rows[:: max(1, len(posterior.rows) // NEIGHBORS_OF)]
    distances = torch.cdist(rows, rows).fill_diagonal_(torch.inf).amin(dim=1)
    distances = distances[distances > 0]
    squared = float(distances.quantile(0.25)) ** 2 if len(distances) else 1.0
    return tuple(2 * odds / (2 * odds + squared) for odds in ODDS)


def posterior_entropies(
    posterior: ClosedFormPosterior, *, seed: int, alpha_bars: tuple[float, ...] | None = None
) -> Tensor:
    """Noise every training image and measure how undecided the closed form is about its parent.

    Args:
        posterior: Over the training images, all of them covered; no class is given.
        seed: Seed of the noise.
        alpha_bars: Levels alpha_bar over which entropies are averaged; None for `undecided_levels`.

    Returns:
        Entropies in nats, (train,), from 0 to log train, in the dtype and on the device of the posterior.
    """
    levels = undecided_levels(posterior) if alpha_bars is None else alpha_bars
    entropies = [_entropies_at(posterior, alpha_bar, seed, number) for number, alpha_bar in enumerate(levels)]
    return torch.stack(entropies).mean(dim=0)


def _entropies_at(posterior: ClosedFormPosterior, alpha_bar: float, seed: int, number: int) -> Tensor:
    clean = posterior.rows
    noise = randn_tensor(
        clean.shape,
        generator=seeded_generator(seed, Stream.COVERAGE, number),
        device=clean.device,
        dtype=clean.dtype,
    )
    noisy = alpha_bar**0.5 * clean + (1 - alpha_bar) ** 0.5 * noise
    levels = torch.full((len(clean),), alpha_bar, dtype=clean.dtype, device=clean.device)
    no_class = torch.full_like(posterior.labels, posterior.null_label)
    return torch.cat([entropy(probs) for probs in posterior.chunks(noisy, levels, no_class)])
