"""Do all parts of an image come from one training image, or from several?"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 4
"""An image is cut into GRID x GRID parts, or a few more where its size is no multiple."""

SAME = 0.1
"""Root mean squared difference, on a range of 2, by which a part may be farther than the nearest one and still be
explained as well."""

COMMON = 0.05
"""Share of the training images (but at least two) that may explain a part; one that more explain, such as an empty
corner, says nothing."""

MAX_BYTES = 256 * 2**20
"""Of the (query, train, part) array that is held at once."""


def patch_share(images: Tensor, train: Tensor) -> Tensor:
    """Give the largest share of an image's telling parts that one training image explains.

    A training image explains a part if the same part of no other is nearer by more than `SAME`. Copies have 1, also
    where some parts are changed but little else is near; an image put together from several has less. An image without
    any telling part has NaN.

    Args:
        images: In [-1, 1], (query, channel, height, width).
        train: Without exact duplicates, (train, channel, height, width).

    Returns:
        float64 (query,) in (0, 1], or NaN.
    """
    theirs = _parts(train)
    size = max(1, MAX_BYTES // (4 * len(train) * theirs.shape[1]))
    return torch.cat([_share(_parts(some), theirs) for some in images.split(size)])


def _share(mine: Tensor, theirs: Tensor) -> Tensor:
    """Do it for parts (query, part, feature) and (train, part, feature)."""
    distances = torch.stack(
        [torch.cdist(mine[:, p], theirs[:, p]) / mine.shape[2] ** 0.5 for p in range(mine.shape[1])], dim=2
    )
    explains = distances <= distances.amin(dim=1, keepdim=True) + SAME
    tells = explains.sum(dim=1) <= max(2, COMMON * explains.shape[1])
    explained = (explains & tells[:, None]).sum(dim=2).amax(dim=1)
    count = tells.sum(dim=1)
    return torch.where(count > 0, explained / count.clamp_min(1), torch.nan).double()


def _parts(images: Tensor) -> Tensor:
    """Cut images into parts, (image, part, feature); what is left over at the border belongs to no part."""
    size = max(1, images.shape[-1] // GRID)
    return F.unfold(images.float(), size, stride=size).transpose(1, 2)
