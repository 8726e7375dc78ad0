"""A posterior that is computed anew every so often, for a generator whose closed form moves while it learns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from provgen.attribution.posterior import Oracle

REFRESH_EVERY = 20
"""Optimiser steps between two closed forms, at most."""


class RefreshedPosterior:
    """Asks the closed form that `make` gave at most REFRESH_EVERY calls ago.

    A resumed run makes it anew, and is the same as one that was never stopped only if that one did so too: so it is
    made at every checkpoint, at equal distances in between.
    """

    def __init__(self, make: Callable[[], Oracle], *, checkpoint_every: int) -> None:
        """Keep how it is made; `checkpoint_every` counts optimiser steps, which are calls."""
        self.make = make
        self.every = max(n for n in range(1, REFRESH_EVERY + 1) if checkpoint_every % n == 0)
        self._calls = 0
        self._latest: Oracle | None = None

    def probs(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Compute probabilities (batch, train); one call per optimiser step."""
        if self._latest is None or self._calls % self.every == 0:
            self._latest = self.make()
        self._calls += 1
        return self._latest.probs(queries, signal, class_labels)
