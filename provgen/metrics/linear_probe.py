"""The linear probe: how well a linear classifier reads the class off features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate, proportion, to_numpy

MAX_DIMENSIONS = 256
"""Wider features are projected onto this many principal components."""

INVERSE_REGULARISATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Candidates for C, the inverse strength of the L2 penalty."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Accuracy of a linear probe on images it was not fitted on."""

    accuracy: Estimate
    """Share of the test images whose class is predicted."""
    baseline: float
    """Share of the test images' most frequent class: no constant guess is better."""
    inverse_regularisation: float
    """The C that was chosen."""


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, *, seed: int
) -> ProbeResult:
    """Fit a multinomial logistic regression on features of one set and test it on another.

    Features are standardised and, if wider than MAX_DIMENSIONS, projected onto their first principal components;
    both are fitted on the training part. C is the best on a fifth of each training class that is held out for the
    choice (the smallest of equals); then all of the training part is fitted. The test part decides nothing. Features
    are floating, (train, feature) and (query, feature); every image has a class. The seed draws the held-out fifth.

    Raises:
        InputError: There are not two classes of two training images each, or no test images.
    """
    labels, answers = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    if (np.unique(labels, return_counts=True)[1] > 1).sum() < 2:
        raise InputError(
            f"{len(labels)} training images are too few for a linear probe; it needs two classes with two images each"
        )
    if not len(answers):
        raise InputError("a linear probe has 0 test images; hold out at least 1 image with a class")
    train, test = _projected(to_numpy(train_features), to_numpy(test_features), seed)
    chosen = _choose(train, labels, seed)
    right = _fit(train, labels, chosen).predict(test) == answers
    _, counts = np.unique(answers, return_counts=True)
    return ProbeResult(
        accuracy=proportion(int(right.sum()), len(right)),
        baseline=float(counts.max() / len(answers)),
        inverse_regularisation=chosen,
    )


def _projected(
    train: NDArray[np.float64], test: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Standardise (train, feature) and (query, feature), and project what is wide."""
    transform = make_pipeline(StandardScaler())
    if train.shape[1] > MAX_DIMENSIONS:
        dimensions = min(MAX_DIMENSIONS, len(train))
        transform = make_pipeline(StandardScaler(), PCA(dimensions, svd_solver="randomized", random_state=seed))
    return transform.fit_transform(train), transform.transform(test)


def _choose(train: NDArray[np.float64], labels: NDArray[np.int64], seed: int) -> float:
    """Choose C by the accuracy on the held-out fifth."""
    held_out = _every_fifth(labels, seed)
    scores = [
        _fit(train[~held_out], labels[~held_out], c).score(train[held_out], labels[held_out])
        for c in INVERSE_REGULARISATIONS
    ]
    return INVERSE_REGULARISATIONS[int(np.argmax(scores))]


def _every_fifth(labels: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Mark a random fifth of each class, to within one image; never both of a class of two."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    marked = np.zeros(len(labels), dtype=bool)
    # Never empty: the fourth of the fewest images that are allowed is marked.
    marked[by_class[3::5]] = True
    return marked


def _fit(train: NDArray[np.float64], labels: NDArray[np.int64], c: float) -> LogisticRegression:
    return LogisticRegression(C=c, max_iter=1000, tol=1e-3).fit(train, labels)
