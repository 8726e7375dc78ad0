"""Does a generator copy? Nearest training images, the distance ratio, the share that is memorized.

The ratio is a similarity: it says how near an image lies to the training set, not why. On independent images
that are locally uniform in d dimensions it falls below r with probability r^d, which is nil for images but
11 % at r = 1/3 in two dimensions: always print the same share for held-out images beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from provgen.analysis.neighbors import Neighbors
from provgen.analysis.statistics import Estimate, proportion

MEMORIZED = 1 / 3
"""Distance ratio below which an image is a copy (Yoon et al. 2023)."""


def distance_ratio(found: Neighbors) -> Tensor:
    """Divide each query's distance to its nearest training image by that to the second nearest.

    Args:
        found: At least two neighbours of each query among distinct training images (`distinct_rows`).

    Returns:
        float64 (query,) in [0, 1]; 0 is an exact copy.
    """
    # Yoon et al. 2023 (SPIGM workshop at ICML), used by Gu et al. 2023, arXiv 2310.02664.
    return found.distances[:, 0] / found.distances[:, 1]


def share_memorized(ratios: Tensor, threshold: float = MEMORIZED) -> Estimate:
    """Give the share of `ratios` (query,) strictly below `threshold`: the 1/3 rule of Yoon et al. 2023.

    Raises:
        InputError: `ratios` is empty.
    """
    return proportion(int((ratios < threshold).sum()), len(ratios))


def calibrated_distance(found: Neighbors) -> Tensor:
    """Divide each query's distance to its nearest training image by half of its mean distance to all `found` ones.

    Carlini et al. 2023 (arXiv 2301.13188), with the 50 nearest: 0 is a copy, 2 is equally far from all. There is
    no threshold that holds everywhere: take a quantile of held-out images.

    Returns:
        float64 (query,) in [0, 2].
    """
    mean = found.distances.mean(dim=1)
    return torch.where(mean > 0, 2 * found.distances[:, 0] / mean.clamp_min(torch.finfo(mean.dtype).tiny), 0)
