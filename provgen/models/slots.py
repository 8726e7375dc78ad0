"""Slots that all classes share: which example takes which, and what slots and class maps start at."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

MATCH_AT_ONCE = 512
"""Slots matched exactly; more are first split along principal coordinates, as the exact match is cubic in them."""


def group_means(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """Average rows (train, width) over each of `count` groups; zeros for an empty one."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, groups, rows)
    return sums / groups.bincount(minlength=count).clamp_min(1)[:, None]


def assign_slots(points: Tensor, groups: Tensor, num_slots: int) -> Tensor:
    """Give every example a slot of its own within its group, alike examples of different groups the same one.

    Groups are matched one by one, largest first, to the running means of the slots.

    Args:
        points: Examples, each from the mean of its group, (train, width).
        groups: int64 (train,).
        num_slots: At least the size of the largest group.

    Returns:
        int64 (train,).
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
    """Give each of points (point, width) a slot of its own, the sum of squared distances small.

    Args:
        points: At most as many as slots.
        slots: (slot, width).
        axis: Where to split if there are too many for an exact match.

    Returns:
        int64 (point,).
    """
    if len(slots) <= MATCH_AT_ONCE:
        return torch.from_numpy(linear_sum_assignment(torch.cdist(points, slots).square().numpy())[1])
    half = len(slots) // 2
    part = len(points) * half // len(slots)  # leaves room on either side
    column = axis % points.shape[1]
    point_order, slot_order = points[:, column].argsort(), slots[:, column].argsort()
    matched = torch.empty(len(points), dtype=torch.int64)
    for some, among in (
        (point_order[:part], slot_order[:half]),
        (point_order[part:], slot_order[half:]),
    ):
        matched[some] = among[match(points[some], slots[among], axis + 1)]
    return matched


def factorise(points: Tensor, place: Tensor, shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Write points as products of shared slots and group maps, as nearly as `rank` allows (truncated SVD).

    Args:
        points: (train, width).
        place: group x slots + slot of each example, int64 (train,).
        shape: Groups and slots.
        rank: Columns of the slots.

    Returns:
        Slots (slot, rank) and maps (group, rank, width); `slots @ maps[group]` is near the points of the group.
    """
    groups, num_slots = shape
    width = points.shape[1]
    table = points.new_zeros(groups * num_slots, width)
    table[place] = points
    beside = table.view(groups, num_slots, width).transpose(0, 1).reshape(num_slots, groups * width)
    left, values, right = torch.linalg.svd(beside, full_matrices=False)
    kept = min(rank, len(values))
    # Half of each singular value to either side: the optimiser's steps suit both.
    roots = values[:kept].sqrt()
    slots, maps = points.new_zeros(num_slots, rank), points.new_zeros(rank, groups * width)
    slots[:, :kept] = left[:, :kept] * roots
    maps[:kept] = roots[:, None] * right[:kept]
    return slots, maps.view(rank, groups, width).transpose(0, 1)
