"""Losses of provenance networks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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
