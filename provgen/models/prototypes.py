"""Logits of the closed form's shape, with learned points in place of the training images."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLEAR_CALL = 40.0
"""Nats between an example and its nearest neighbour at which the learned cap of the inverse temperature starts:
beyond it a sharper posterior says nothing more, and the cleanest images would dominate the loss."""
NEIGHBOR_SAMPLE = 2000
"""Training examples among which the typical nearest-neighbour distance is measured."""


class Prototypes(nn.Module):
    """A learned point and a learned bias for each of `count` outcomes.

    The Bayes posterior of the forward process has logits sqrt(a)/(1-a) (<x_t, x_i> - sqrt(a) |x_i|^2 / 2)
    (`generators/closed_form.py`), from any origin. These have the same form with an embedding of x_t in place of
    it, a point in place of x_i and a bias in place of |x_i|^2 / 2. The inverse temperature is known from the
    noise level, up to a learned cap.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(count, width) / math.sqrt(width))
        self.bias = nn.Parameter(torch.zeros(count))
        self.log_cap = nn.Parameter(torch.tensor(math.log(CLEAR_CALL)))

    def forward(self, embedding: Tensor, alpha_bar: Tensor, members: Tensor | None = None) -> Tensor:
        """Give logits (batch, outcome) of the outcomes `members`, int64 (outcome,), or of all.

        `embedding` is (batch, width). `alpha_bar` in (0, 1], (batch,), is at least float32: a softmax over thousands of
        outcomes needs the digits, even of half-precision weights.
        """
        points: Tensor = self.points if members is None else self.points.index_select(0, members)
        bias: Tensor = self.bias if members is None else self.bias.index_select(0, members)
        return sharpen(F.linear(embedding, points).to(alpha_bar.dtype), bias, alpha_bar, self.log_cap)

    @torch.no_grad()
    def start(self, points: Tensor, log_cap: Tensor) -> None:
        """Start at points (outcome, width), with the closed form's biases."""
        self.points.copy_(points)
        self.bias.copy_(points.square().sum(1) / 2)
        self.log_cap.copy_(log_cap)


def sharpen(similarity: Tensor, bias: Tensor, alpha_bar: Tensor, log_cap: Tensor) -> Tensor:
    """Give the closed form's logits T (similarity - sqrt(a) bias), (batch, outcome).

    T is the forward process's inverse temperature sqrt(a)/(1-a), softly capped; at a = 1 it is the cap itself.
    """
    root, cap = alpha_bar.sqrt(), log_cap.exp()
    inverse_temperature = root * cap / (root + (1 - alpha_bar) * cap)
    return inverse_temperature[:, None] * (similarity - root[:, None] * bias)


def principal_coordinates(images: Tensor, width: int) -> Tensor:
    """Give principal coordinates of images (train, channel, height, width), float64 (train, width) on the CPU.

    Columns beyond the rank of the images are zero.
    """
    if torch.equal(images[1:], images[:-1]):  # scikit-learn divides by their variance, or takes rounding errors for it
        return torch.zeros(len(images), width, dtype=torch.float64)
    from sklearn.decomposition import PCA  # here: loading a pipeline does without

    pixels = images.flatten(1).double().cpu().numpy()
    kept = min(width, *pixels.shape)
    coordinates = torch.from_numpy(PCA(kept, random_state=0).fit_transform(pixels))
    return F.pad(coordinates, (0, width - kept))


def starting_log_cap(coordinates: Tensor) -> Tensor:
    """Give the logarithm of the cap at which typical nearest neighbours of (train, width) are CLEAR_CALL apart."""
    sample = coordinates[:: -(-len(coordinates) // NEIGHBOR_SAMPLE)]
    nearest = torch.cdist(sample, sample).fill_diagonal_(math.inf).min(dim=1).values
    # Exact duplicates must not make the cap infinite.
    distance = nearest.square().median().clamp_min(1e-6 * sample.square().sum(1).mean())
    if distance == 0:  # the images are all the same, and any cap will do
        return torch.tensor(math.log(CLEAR_CALL))
    return (2 * CLEAR_CALL / distance).log()
