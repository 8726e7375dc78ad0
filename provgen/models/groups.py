"""Groups of training examples: cells, the anchors that stand for them, and slots that classes share."""

from __future__ import annotations

import math
import warnings

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from provgen.models.prototypes import Prototypes

LOG_NOBODY = -20.0
"""Log weight that an anchor without examples starts with; finite, so that it can be learned."""


def log_softmax_within(logits: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Normalise logits (batch, train) over each group of examples apart; `groups` is int64 (train,)."""
    index = groups.expand(len(logits), -1)
    lowest = torch.finfo(logits.dtype).min
    # The largest of the group, not of the row: far groups would underflow.
    largest = logits.new_full((len(logits), num_groups), lowest).scatter_reduce(1, index, logits.detach(), "amax")
    shifted = logits - largest.index_select(1, groups)
    totals = logits.new_zeros(len(logits), num_groups).scatter_add(1, index, shifted.exp())
    # An empty group has no example that would read its total.
    return shifted - totals.clamp_min(torch.finfo(logits.dtype).tiny).log().index_select(1, groups)


def kmeans_cells(coordinates: Tensor, num_cells: int) -> Tensor:
    """Cluster coordinates (train, width) into at most `num_cells` cells; int64 (train,)."""
    return _kmeans(coordinates, num_cells)[0]


def class_cells(labels: Tensor) -> Tensor:
    """Number the classes that are present, 0 upwards; int64 (train,)."""
    number: Tensor = labels.unique(return_inverse=True)[1]
    return number


def place_anchors(coordinates: Tensor, cells: Tensor, num_cells: int, per_cell: int) -> tuple[Tensor, Tensor]:
    """Sum every cell up by points (cell x per_cell, width), and the logarithm of the number of examples near each.

    The examples have `coordinates` (train, width) and lie in `cells`, int64 (train,); some cells may be empty.
    """
    points = coordinates.new_zeros(num_cells, per_cell, coordinates.shape[1])
    weights = coordinates.new_full((num_cells, per_cell), LOG_NOBODY)
    for cell in cells.unique().tolist():
        members = coordinates[cells == cell]
        clusters, centers = _kmeans(members, min(per_cell, len(members)))
        points[cell, : len(centers)] = centers
        counts = clusters.bincount(minlength=len(centers)).double()
        weights[cell, : len(centers)] = counts.clamp_min(math.exp(LOG_NOBODY)).log()
    return points.flatten(0, 1), weights.flatten()


def log_class_shares(cells: Tensor, labels: Tensor, num_cells: int, num_classes: int) -> Tensor:
    """Give the log share of every class among the examples of every cell, float32 (class + 1, cell), -inf for none.

    The row of the null label, `num_classes`, is 0 where there are examples: it rules out none of them.
    """
    counts = torch.zeros(num_classes + 1, num_cells)
    counts.index_put_((labels, cells), torch.ones(len(labels)), accumulate=True)
    counts[num_classes] = sizes = counts.sum(0)
    return (counts / sizes.clamp_min(1)).log()


def _kmeans(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster points (train, width): cluster of each, int64 (train,), and centres (count, width)."""
    from sklearn.cluster import KMeans  # here: loading a pipeline does without
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct images than clusters: some stay empty, which is what they should do.
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = KMeans(count, n_init=1, max_iter=50, random_state=0).fit(points.numpy())
    return torch.from_numpy(fitted.labels_).long(), torch.from_numpy(fitted.cluster_centers_)


class AnchorMixture(nn.Module):
    """Log probabilities of groups of examples.

    That of a group is the sum of the closed form over its members. Here the sum runs over a few anchors with weights: a
    linear layer on the embedding cannot say it, and all examples would cost what the groups are to save.
    """

    def __init__(self, num_groups: int, *, num_examples: int, width: int, share: float) -> None:
        """Build about `share` x sqrt(`num_examples`) anchors, the same number for every group."""
        super().__init__()
        self.num_groups = num_groups
        self.per_group = math.ceil(share * math.sqrt(num_examples) / num_groups)
        self.anchors = Prototypes(num_groups * self.per_group, width)
        self.weights = nn.Parameter(torch.zeros(num_groups * self.per_group))

    def forward(self, embedding: Tensor, alpha_bar: Tensor) -> Tensor:
        """Give log probabilities (batch, group) from an embedding (batch, width) and alpha_bar (batch,)."""
        logits: Tensor = self.anchors(embedding, alpha_bar) + self.weights
        groups: Tensor = logits.unflatten(1, (self.num_groups, -1)).logsumexp(dim=2)
        return groups.log_softmax(dim=1)

    @torch.no_grad()
    def start(self, coordinates: Tensor, groups: Tensor, log_cap: Tensor) -> None:
        """Start at k-means centres of each group of coordinates (train, width); `groups` is int64 (train,)."""
        anchors, weights = place_anchors(coordinates, groups, self.num_groups, self.per_group)
        # An anchor stands for examples around it, which is noise on top of the noise.
        self.anchors.start(anchors, log_cap - 1)
        self.weights.copy_(weights)


MATCH_AT_ONCE = 512
"""Slots matched exactly; more are first split along principal coordinates, as the exact match is cubic in them."""


def group_means(points: Tensor, groups: Tensor, count: int) -> Tensor:
    """Average points (train, width) over each of `count` groups; zeros for an empty one."""
    sums = points.new_zeros(count, points.shape[1]).index_add(0, groups, points)
    return sums / groups.bincount(minlength=count).clamp_min(1)[:, None]


def assign_slots(points: Tensor, groups: Tensor, num_slots: int) -> Tensor:
    """Give every example a slot of its own in its group, int64 (train,), alike ones of different groups the same one.

    Groups are matched one by one, largest first, to the running means of the slots, which are at least as many as the
    examples of the largest group. `points` are measured from the mean of their group, (train, width).
    """
    slots = torch.zeros_like(groups)
    means = points.new_zeros(num_slots, points.shape[1])
    filled = points.new_zeros(num_slots, 1)
    for group in groups.bincount().argsort(descending=True, stable=True):
        members = (groups == group).nonzero().flatten()
        taken = match(points[members], means) if filled.any() else torch.arange(len(members))
        slots[members] = taken
        filled[taken] += 1
        means[taken] += (points[members] - means[taken]) / filled[taken]
    return slots


def match(points: Tensor, slots: Tensor, axis: int = 0) -> Tensor:
    """Give each of points (point, width) one of at least as many slots (slot, width), int64 (point,), a near one.

    The sum of squared distances is the least; too many for an exact match are first split along the column `axis`.
    """
    if len(slots) <= MATCH_AT_ONCE:
        return torch.from_numpy(linear_sum_assignment(torch.cdist(points, slots).square().numpy())[1])
    half = len(slots) // 2
    part = len(points) * half // len(slots)  # leaves room on either side
    column = axis % points.shape[1]
    point_order, slot_order = points[:, column].argsort(), slots[:, column].argsort()
    matched = torch.empty(len(points), dtype=torch.int64)
    halves = zip(point_order.tensor_split([part]), slot_order.tensor_split([half]), strict=True)
    for half_points, half_slots in halves:
        matched[half_points] = half_slots[match(points[half_points], slots[half_slots], axis + 1)]
    return matched


def factorise(points: Tensor, cells: Tensor, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Write points (train, width) as products of shared slots (slot, rank) and maps (group, rank, width).

    `slots @ maps[group]` is as near to the points of the group as `rank` allows (truncated SVD). `cells` are
    group x slots + slot of each example, int64 (train,), `shape` the numbers of groups and slots.
    """
    (groups, num_slots), width = shape, points.shape[1]
    table = points.new_zeros(groups * num_slots, width)
    table[cells] = points
    beside = table.view(groups, num_slots, width).transpose(0, 1).reshape(num_slots, groups * width)
    left, values, right = torch.linalg.svd(beside, full_matrices=False)
    kept = min(rank, len(values))
    # Half of each singular value to either side: the optimiser's steps suit both.
    roots = values[:kept].sqrt()
    slots, maps = points.new_zeros(num_slots, rank), points.new_zeros(rank, groups * width)
    slots[:, :kept] = left[:, :kept] * roots
    maps[:kept] = roots[:, None] * right[:kept]
    return slots, maps.view(rank, groups, width).transpose(0, 1)
