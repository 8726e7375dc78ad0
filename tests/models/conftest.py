"""Index heads on the images themselves, so that what they should say is known."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from provgen.generators.closed_form import ClosedFormPosterior
from provgen.models.index_heads import ClassConditionalHead, TwoStageHead
from provgen.models.prototypes import principal_coordinates

LEVELS = torch.tensor([0.01, 0.3, 0.6, 0.95, 0.999], dtype=torch.float64)
CLASSES = 3


@dataclass(frozen=True)
class HeadCase:
    """Training images and noised ones, in float64."""

    train: Tensor
    labels: Tensor
    noisy: Tensor
    alpha_bar: Tensor

    def started(self, kind, **more):
        """A head in float64, started on these images."""
        head = self.fresh(kind, **more)
        head.start(self.train, self.labels)
        return head

    def fresh(self, kind, *, width=64, **more):
        """A head in float64 for these images, not started."""
        arguments = {"num_examples": len(self.train), "width": width, **more}
        if kind is ClassConditionalHead:
            arguments |= {"num_classes": CLASSES, "num_slots": int(self.labels.bincount().max())}
            arguments["has_unlabelled"] = bool((self.labels == CLASSES).any())
        if kind is TwoStageHead:
            arguments = {"num_cells": 3, "num_classes": CLASSES} | arguments
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return kind([tuple(self.train.shape[1:3])], **arguments).double()

    def exact(self, kind, *, width=64, **more):
        """Such a head with the embedding set by hand to the principal coordinates, and caps out of reach."""
        head = self.started(kind, width=width, **more)
        rows = self.train.flatten(1)
        # coordinates = (x_i - mean) P for an isometry P on the span of the images; P from least squares.
        projection = torch.linalg.pinv(rows - rows.mean(0)) @ principal_coordinates(self.train, width)
        with torch.no_grad():
            head.embedding.projection.weight.copy_(projection.T)
            for name, parameter in head.named_parameters():
                if name.endswith("log_cap"):
                    parameter.fill_(math.log(1e15))
        return head

    def random(self, kind, *, seed=0, **more):
        """Such a head with something random added to every weight."""
        head = self.started(kind, **more)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws, dtype=parameter.dtype)
        return head

    def feature_maps(self):
        """What the head reads: noised images from the origin of the coordinates, the faded mean image."""
        return [self.noisy - self.alpha_bar.sqrt()[:, None, None, None] * self.train.mean(0)]

    def logits(self, head, *, class_labels=None, class_logits=None, **more):
        """Index logits (query, train); without class labels the null label."""
        if class_labels is None:
            class_labels = self.null
        with torch.no_grad():
            if class_logits is None:
                class_logits = torch.zeros(len(self.alpha_bar), CLASSES, dtype=self.alpha_bar.dtype)
            return head(self.feature_maps(), self.alpha_bar, class_labels, class_logits, **more)

    @property
    def null(self):
        return torch.full((len(self.noisy),), CLASSES)

    @property
    def closed_form(self):
        """Exact p(i | x_t), (query, train)."""
        posterior = ClosedFormPosterior(self.train, self.labels, null_label=CLASSES)
        return posterior.probs(self.noisy, self.alpha_bar, self.null)

    def class_probs(self, probs):
        """Posterior mass of every class, and of having none last, (query, class + 1)."""
        return torch.stack([probs[:, self.labels == label].sum(1) for label in range(CLASSES + 1)], dim=1)


@pytest.fixture
def head_case(generator):
    """Make a case of training images in [-1, 1] and their labels, with random x_t of random parents."""

    def make(train: Tensor, labels: Tensor, *, queries: int = 20) -> HeadCase:
        parents = torch.randint(len(train), (queries,), generator=generator)
        alpha_bar = LEVELS.repeat(queries // len(LEVELS))
        noise = torch.randn(queries, *train.shape[1:], generator=generator, dtype=torch.float64)
        a = alpha_bar[:, None, None, None]
        return HeadCase(train, labels, a.sqrt() * train[parents] + (1 - a).sqrt() * noise, alpha_bar)

    return make


@pytest.fixture
def random_case(head_case, random_images):
    """Make a case of random images, labels in turn, some of them relabelled."""

    def make(count, *, relabelled=None, queries=20) -> HeadCase:
        images = random_images(count)
        labels = images.labels.clone()
        for before, after in (relabelled or {}).items():
            labels[images.labels == before] = after
        return head_case(images.images.double() / 127.5 - 1, labels, queries=queries)

    return make


@pytest.fixture
def assert_same_posterior():
    def check(logits, expected):
        actual = logits.log_softmax(dim=1)
        torch.testing.assert_close(actual.exp(), expected, rtol=1e-8, atol=1e-12)
        # Log-probabilities too, where the closed form is far from underflow.
        is_plain = expected > 1e-200
        torch.testing.assert_close(actual[is_plain], expected[is_plain].log(), rtol=1e-9, atol=1e-7)
        assert is_plain.sum() > 2 * len(logits), "the examples compete, so that the test can fail"

    return check
