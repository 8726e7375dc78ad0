"""Does a generator copy? Nearest training images, the distance ratio, the share that is memorized.

The ratio is a similarity: it says how near an image lies to the training set, not why. On independent images
that are locally uniform in d dimensions it falls below r with probability r^d, which is nil for images but
11 % at r = 1/3 in two dimensions: always print the same share for held-out images beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from provgen.analysis.neighbors import nearest
from provgen.analysis.statistics import Estimate, proportion
from provgen.errors import InputError


def distance_ratio(queries: Tensor, train: Tensor, *, chunk_size: int = 1024) -> Tensor:
    """Divide each query's distance to its nearest training image by that to the second nearest.

    Exact duplicates in the training set count once; otherwise a copy of an image that is there twice would
    have two equal distances and pass for new.

    Args:
        queries: (query, feature), such as flattened pixels.
        train: (train, feature), on the same device.
        chunk_size: Rows of either in memory as float64 at a time.

    Returns:
        float64 (query,) in [0, 1]; 0 is an exact copy.

    Raises:
        InputError: `train` has fewer than two distinct rows.
    """
    distinct = train.unique(dim=0)
    if len(distinct) < 2:
        raise InputError(f"the distance ratio needs 2 distinct training images, got {len(distinct)}")
    distances = nearest(queries, distinct, 2, chunk_size=chunk_size).distances
    # Yoon et al. 2023 (SPIGM workshop at ICML), used by Gu et al. 2023, arXiv 2310.02664.
    return distances[:, 0] / distances[:, 1]


def share_memorized(ratios: Tensor, threshold: float = 1 / 3) -> Estimate:
    """Give the share of `ratios` (query,) strictly below `threshold`: the 1/3 rule of Yoon et al. 2023.

    Raises:
        InputError: `ratios` is empty.
    """
    return proportion(int((ratios < threshold).sum()), len(ratios))


def calibrated_distance(queries: Tensor, train: Tensor, *, count: int = 50, chunk_size: int = 1024) -> Tensor:
    """Divide each query's distance to its nearest training image by half of the mean to its `count` nearest.

    Carlini et al. 2023 (arXiv 2301.13188): 0 is a copy, 2 is equally far from all of them. There is no threshold that
    holds everywhere: take a quantile of held-out images.

    Args:
        queries: (query, feature).
        train: (train, feature), on the same device; duplicates count as often as they are there.
        count: Neighbours; all there are, if fewer.
        chunk_size: As in `distance_ratio`.

    Returns:
        float64 (query,) in [0, 2].
    """
    distances = nearest(queries, train, min(count, len(train)), chunk_size=chunk_size).distances
    mean = distances.mean(dim=1)
    return torch.where(mean > 0, 2 * distances[:, 0] / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0)
