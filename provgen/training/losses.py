"""Losses of generators and of provenance networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def denoising_loss(predicted_noise: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error of the predicted noise of every row, (batch,) (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""
    return (predicted_noise - noise).square().flatten(1).mean(dim=1)


def vae_loss(reconstruction: Tensor, images: Tensor, mean: Tensor, log_variance: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and divergence of an autoencoder (Kingma and Welling 2014, arXiv 1312.6114, appendix B).

    Args:
        reconstruction: (batch, channel, height, width).
        images: Same shape.
        mean: Of the latent's Gaussian, (batch, ...).
        log_variance: Of the same, in nats.

    Returns:
        Mean squared error over pixels, and KL(q(z|x), N(0, 1)) in nats per pixel and channel, each (batch,): their
        ratio does not depend on the resolution.
    """
    errors = (reconstruction - images).square().flatten(1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(dim=1) / 2
    return errors.mean(dim=1), divergence / errors.shape[1]


def index_loss(index_logits: Tensor, targets: Tensor, is_covered: Tensor, coverage: float) -> Tensor:
    """Cross-entropy in nats between target rows and predicted rows, over the rows of covered examples.

    The sum is divided by the expected number of covered rows, never by the actual one: see `class_loss`.

    Args:
        index_logits: (batch, train), finite.
        targets: (batch, train).
        is_covered: bool (batch,), rows whose example the index head can name.
        coverage: Share of examples that it can name.
    """
    rows = targets * is_covered[:, None]
    losses = -(rows * index_logits.log_softmax(dim=1)).sum(dim=1)
    return losses.sum() / (len(losses) * coverage)


def class_loss(class_logits: Tensor, clean_labels: Tensor, is_null: Tensor, label_dropout: float) -> Tensor:
    """Cross-entropy in nats of the true class, on rows whose label the denoiser was not given.

    A row whose label conditions the denoiser would leak it into the features. The sum is divided by the
    expected number of unconditional rows, never by the actual one: a mean over no rows is NaN, and a branch that
    differs between processes deadlocks them.

    Args:
        class_logits: (batch, class).
        clean_labels: int64 (batch,), before dropout; rows without a class carry the null label and do not count.
        is_null: bool (batch,), rows whose label was dropped.
        label_dropout: Probability of `is_null`.
    """
    num_classes = class_logits.shape[1]
    counts = is_null & (clean_labels < num_classes)
    losses = F.cross_entropy(class_logits, clean_labels.clamp_max(num_classes - 1), reduction="none")
    return (losses * counts).sum() / (len(class_logits) * label_dropout)
