"""Class metrics: whether the sources and the class head know the class of an image when the network is not told it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.errors import InputError
from provgen.metrics.statistics import Estimate, flat_row, mean_estimate, proportion

RETRIEVED = 5
"""Examples that the top-5 metrics look at; all of them in a smaller training set."""


@dataclass(frozen=True, kw_only=True)
class ClassQuality:
    """Class metrics, each beside what the closed form reaches on the same queries and what guessing reaches.

    The closed form is a reference, which a network may exceed. It bounds only the accuracies on noisy training images,
    in expectation, because its class posterior is Bayes' own there. Ties are broken at random: a query whose answer
    depends on them counts with the probability of a hit.

    A query that is itself a training image may retrieve itself, which makes its class certain; the index accuracy
    of arXiv 2510.03361 counts that too. On held-out queries the same numbers say whether sources share meaning.
    """

    consistency_top1: Estimate
    """Share of queries whose first source has their class."""
    consistency_top1_closed_form: float
    consistency_top1_baseline: float
    """The same for one training example drawn at random."""
    consistency_top5: Estimate
    """Share of queries with their class among the first five sources."""
    consistency_top5_closed_form: float
    consistency_top5_baseline: float
    """The same for five distinct training examples drawn at random (hypergeometric)."""
    share_top5: Estimate
    """Mean share of the first five sources that have the query's class."""
    share_top5_closed_form: float
    share_top5_baseline: float
    knn_accuracy: Estimate
    """Share of queries whose class has the largest posterior mass, summed over its examples (learned k-NN)."""
    knn_accuracy_closed_form: float
    knn_accuracy_baseline: float
    """Share of the queries' most frequent class: no constant guess is better."""
    class_accuracy: Estimate | None
    """Share of queries for which the class head is right; None without one."""
    class_accuracy_closed_form: float
    """Accuracy of the closed-form kernel classifier, which is its `knn_accuracy`."""
    class_accuracy_baseline: float

    def as_row(self) -> dict[str, Any]:
        """Give the metrics as a flat JSON-able dict; estimates become NAME, NAME_low and NAME_high."""
        return {"n": self.consistency_top1.n, **flat_row(vars(self))}


def class_quality(
    log_probs: Tensor,
    closed_form: Tensor,
    *,
    train_labels: Tensor,
    query_labels: Tensor,
    class_logits: Tensor | None,
    num_classes: int,
) -> ClassQuality:
    """Measure class metrics on queries that were shown without their class.

    The label `num_classes` stands for no class: such queries are not counted, such examples are of no class.

    Args:
        log_probs: Index log-probabilities of the network, (query, train).
        closed_form: Closed-form logits of the same queries, (query, train); not probabilities, whose order is lost
            where they underflow.
        train_labels: int64 (train,).
        query_labels: int64 (query,).
        class_logits: (query, class); None without a class head.
        num_classes: Number of classes.

    Raises:
        InputError: No query has a class.
    """
    has_class = query_labels < num_classes
    if not has_class.any():
        raise InputError(
            f"none of the {len(query_labels)} query images has a class; measure class metrics on labelled images"
        )
    labels, log_probs, closed_form = query_labels[has_class], log_probs[has_class], closed_form[has_class]
    network = _measure(log_probs, log_probs.exp(), labels, train_labels, num_classes)
    if class_logits is not None:
        network["class_accuracy"], _ = _hits(class_logits[has_class], F.one_hot(labels, num_classes).bool(), 1)
    reference = _measure(closed_form, closed_form.softmax(dim=1), labels, train_labels, num_classes)
    reference["class_accuracy"] = reference["knn_accuracy"]
    guess = _retrieval(torch.zeros_like(log_probs), labels[:, None] == train_labels)
    guess["knn_accuracy"] = guess["class_accuracy"] = (labels == labels.mode().values).double()
    metrics: dict[str, Any] = {"class_accuracy": None}
    metrics |= {name: _estimate(values) for name, values in network.items()}
    metrics |= {f"{name}_closed_form": float(values.mean()) for name, values in reference.items()}
    metrics |= {f"{name}_baseline": float(values.mean()) for name, values in guess.items()}
    return ClassQuality(**metrics)


def _measure(
    scores: Tensor, probs: Tensor, labels: Tensor, train_labels: Tensor, num_classes: int
) -> dict[str, Tensor]:
    """Measure each query by its `scores` and `probs`, both (query, train): metric name to (query,)."""
    # One column more for the examples without a class, which vote for none.
    members = F.one_hot(train_labels, num_classes + 1)[:, :num_classes]
    measured = _retrieval(scores, labels[:, None] == train_labels)
    votes = probs @ members.to(probs.dtype)
    measured["knn_accuracy"], _ = _hits(votes, F.one_hot(labels, num_classes).bool(), 1)
    return measured


def _retrieval(scores: Tensor, is_same: Tensor) -> dict[str, Tensor]:
    """Look at the first sources of each query; `is_same` says which examples have its class, (query, train)."""
    top1, _ = _hits(scores, is_same, 1)
    top5, share = _hits(scores, is_same, min(RETRIEVED, scores.shape[1]))
    return {"consistency_top1": top1, "consistency_top5": top5, "share_top5": share}


def _hits(scores: Tensor, is_hit: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Look for hits among the k best of each row; both arguments (query, candidate).

    Returns:
        Probability of at least one hit and expected share of hits, (query,), with ties broken at random.
    """
    lowest = scores.topk(k, dim=1).values[:, -1:]
    above, tied = scores > lowest, scores == lowest
    open_ranks, sure_hits = k - above.sum(dim=1), (above & is_hit).sum(dim=1)
    num_tied, tied_hits = tied.sum(dim=1).double(), (tied & is_hit).sum(dim=1)
    # Hypergeometric: the tied candidates are drawn into the open ranks one after another.
    miss = (sure_hits == 0).double()
    for drawn in range(k):
        factor = (num_tied - tied_hits - drawn).clamp_min(0) / (num_tied - drawn)
        miss = torch.where(drawn < open_ranks, miss * factor, miss)
    return 1 - miss, (sure_hits + open_ranks * tied_hits / num_tied) / k


def _estimate(values: Tensor) -> Estimate:
    """Give the mean with an exact interval if every value is 0 or 1, bootstrapped otherwise."""
    if ((values == 0) | (values == 1)).all():
        return proportion(int(values.sum()), len(values))
    return mean_estimate(values, seed=0)
