"""A posterior that is computed anew every so often, for a generator whose closed form moves while it learns."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from provgen.attribution.posterior import Oracle

REFRESH_EVERY = 20
"""Optimiser steps between two closed forms. A checkpoint at a multiple of it resumes exactly."""


class RefreshedPosterior:
    """Asks the closed form that `make` gave at most REFRESH_EVERY calls ago."""

    def __init__(self, make: Callable[[], Oracle]) -> None:
        self.make = make
        self._calls = 0
        self._latest: Oracle | None = None

    def probs(self, queries: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Compute probabilities (batch, train); one call per optimiser step."""
        if self._latest is None or self._calls % REFRESH_EVERY == 0:
            self._latest = self.make()
        self._calls += 1
        return self._latest.probs(queries, signal, class_labels)
