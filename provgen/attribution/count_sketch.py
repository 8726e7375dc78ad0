"""A random projection that costs one addition per number."""

from __future__ import annotations

import torch
from torch import Tensor


class CountSketch:
    """Adds every feature, with a random sign, to a random one of fewer columns.

    Inner products are kept in expectation: E<Sa, Sb> = <a, b>, with variance of order |a|^2 |b|^2 / size (Charikar et
    al. 2002; Weinberger et al. 2009, arXiv 0902.2206). A dense Gaussian projection has the same order at a
    cost times the number of columns.
    """

    def __init__(self, num_features: int, size: int, *, seed: int, device: torch.device) -> None:
        """Draw columns and signs for `num_features` numbers; `size` columns come out."""
        generator = torch.Generator().manual_seed(seed)
        self.columns = torch.randint(size, (num_features,), generator=generator).to(device)
        self.signs = (torch.randint(2, (num_features,), generator=generator) * 2 - 1).to(device)
        self.size = size

    def __call__(self, features: Tensor) -> Tensor:
        """Project (query, feature) to (query, size)."""
        sketch = features.new_zeros(len(features), self.size)
        return sketch.index_add_(1, self.columns, features * self.signs)
