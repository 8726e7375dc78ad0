"""From posteriors at many noise levels to one attribution."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from provgen.tracing.attribution import Attribution, entropy

WINDOW = (0.05, 0.9)
"""alpha_bars alpha_bar whose posteriors are averaged. Noisier ones say little about any example; at cleaner ones
the posterior is a nearest-neighbour look-up of the finished image."""


LEAST_ALPHA_BAR = 0.01
"""Sampling steps noisier than this are not traced: the posterior is still near the prior, and they are a third of
the steps."""


CLEAR_ALPHA_BAR = 0.9
"""Levels from which on an image's own coordinates are read off; before, its trajectory is elsewhere. The last level
of a sampling run counts in any case."""


INVERSE_VARIANCE = 1.0
"""Power of alpha_bar / (1 - alpha_bar) by which clear levels are weighed, unless calibration finds a better one."""


class TrajectoryTrace:
    """Collects p(i | x_t, y) level by level, from noise to image.

    The posterior of an image is the mean of its posteriors over the levels in the window, its coordinates the mean of
    what the network sees of it at clear levels.
    """

    def __init__(self, first_step: int = 0, window: tuple[float, float] = WINDOW, *, every: int = 1) -> None:
        """Start empty.

        Args:
            first_step: Number of the sampling step of the first level that will be added.
            window: Levels alpha_bar between which posteriors are averaged, ends excluded.
            every: Sampling steps from one level that will be added to the next.
        """
        self.first_step = first_step
        self.every = every
        self.window = window
        self._sum: Tensor | None = None
        self._in_window = 0
        self._alpha_bar: list[float] = []
        self._entropy: list[Tensor] = []
        self._top: list[tuple[Tensor, Tensor]] = []
        self._coordinates: list[Tensor] = []
        self._clearness: list[float] = []
        self._directions: Tensor | None = None

    def add(self, probs: Tensor, alpha_bar: float) -> None:
        """Add one level: probabilities (query, train) and its alpha_bar."""
        self._alpha_bar.append(alpha_bar)
        self._entropy.append(entropy(probs))
        largest, index = probs.max(dim=1)
        self._top.append((largest, index))
        if self.window[0] < alpha_bar < self.window[1]:
            self._in_window += 1
            self._sum = probs if self._sum is None else self._sum + probs

    def place(self, seen: Tensor, alpha_bar: float, directions: Tensor | None = None) -> None:
        """Add one clear level: what is seen at it (query, feature), its alpha_bar, and normalised gradients at one.

        Noising makes an image smaller by sqrt(alpha_bar), and what is seen of it, which is undone.
        """
        self._coordinates.append(seen / math.sqrt(alpha_bar))
        self._clearness.append(alpha_bar / (1 - alpha_bar))
        if directions is not None:
            self._directions = directions

    @property
    def has_place(self) -> bool:
        """Whether a clear level has been added."""
        return bool(self._coordinates)

    def put(self, rows: Tensor, other: TrajectoryTrace) -> None:
        """Put the trace of other queries over the same levels in the place of some `rows`, int64 (other,)."""
        if self._sum is not None and other._sum is not None:
            self._sum = self._sum.index_copy(0, rows, other._sum)
        if self._directions is not None and other._directions is not None:
            self._directions = self._directions.index_copy(0, rows, other._directions)
        for mine, theirs in (
            (self._entropy, other._entropy),
            (self._coordinates, other._coordinates),
        ):
            mine[:] = [old.index_copy(0, rows, new) for old, new in zip(mine, theirs, strict=True)]
        self._top = [
            (value.index_copy(0, rows, new_value), index.index_copy(0, rows, new_index))
            for (value, index), (new_value, new_index) in zip(self._top, other._top, strict=True)
        ]

    def coordinates(self, level_power: float) -> Tensor:
        """Give mean coordinates over the clear levels, (query, feature), directions last where there are any.

        Args:
            level_power: Of alpha_bar / (1 - alpha_bar) in the weights of levels for what is seen; 0 weighs all alike.
        """
        seen = torch.stack(self._coordinates)
        # In double: powers of the clearness are too large for half precision.
        weights = torch.tensor(self._clearness, dtype=torch.float64) ** level_power
        mean: Tensor = torch.tensordot((weights / weights.sum()).to(seen), seen, dims=1)
        return mean if self._directions is None else torch.cat([mean, self._directions.to(mean.dtype)], dim=1)

    def posterior(self) -> Tensor:
        """Mean posterior over the window, (query, train)."""
        assert self._sum is not None, "no noise level lies in the window"
        return self._sum / self._in_window

    def late_entropy(self) -> Tensor:
        """Give the entropy at the cleanest level of the window in nats, (query,): next to nothing for most copies."""
        place = late_level(self._alpha_bar, self.window)
        return self._entropy[place]

    def attribution(
        self, top_k: int, *, is_trajectory: bool, reachable: Tensor, credit: Tensor | None = None
    ) -> Attribution:
        """Summarise what was added.

        Args:
            top_k: Sources per query.
            is_trajectory: Whether the levels are steps of one sampling run.
            reachable: bool (train,), examples that the provenance network can name.
            credit: Calibrated shares (query, train); without them the posterior is the credit.
        """
        posterior = self.posterior()
        weight, index = (posterior if credit is None else credit).topk(top_k, dim=1)
        top = posterior.gather(1, index)
        steps = self.commitment_step() if is_trajectory else torch.full((len(posterior),), -1)
        return Attribution(
            example_index=index.cpu(),
            posterior=top.cpu(),
            weight=weight.cpu(),
            mass_not_shown=(1 - top.sum(dim=1)).clamp_min(0).cpu(),
            mass_unreachable=posterior.masked_fill(reachable.to(posterior.device), 0).sum(dim=1).cpu(),
            entropy=entropy(posterior).cpu(),
            commitment_step=steps.cpu(),
            step_entropy=torch.stack(self._entropy, dim=1).cpu(),
            alpha_bar=torch.tensor(self._alpha_bar),
        )

    def commitment_step(self) -> Tensor:
        """First step from which the final top source keeps more than half of the posterior; -1 if never.

        Steps between those that were added count as the next of these.
        """
        largest = torch.stack([value for value, _ in self._top])
        index = torch.stack([index for _, index in self._top])
        # More than half of the posterior can only belong to the largest entry.
        holds = (index == index[-1]) & (largest > 0.5)
        held_to_the_end = holds.flip(0).cumprod(dim=0).sum(dim=0)
        first = self.first_step + self.every * (len(self._top) - held_to_the_end)
        return torch.where(held_to_the_end > 0, first, -1)


def late_level(alpha_bar: Sequence[float], window: tuple[float, float] = WINDOW) -> int:
    """Give the place of the cleanest of some levels, rising, that is in a window; the last where none is."""
    inside = [place for place, level in enumerate(alpha_bar) if window[0] < level < window[1]]
    return inside[-1] if inside else len(alpha_bar) - 1
