"""A trace is a fold: looks accumulate what they need of every step, from noise to image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from provgen.errors import InputError
from provgen.generators.closed_form import Posterior, entropy
from provgen.generators.protocol import Generator, Step
from provgen.models.diffusion import last_layer_gradients
from provgen.models.provenance import ProvenanceNetwork
from provgen.tracing.attribution import Attribution

WINDOW = (0.05, 0.9)
"""Noise levels alpha_bar whose posteriors are averaged. Noisier ones say little about any example; at cleaner ones
the posterior is a nearest-neighbour look-up of the finished image."""

ALL_LEVELS = (0.0, 1.0)
"""The window of a generator without noise levels."""

LEAST_ALPHA_BAR = 0.01
"""Sampling steps noisier than this are not traced: the posterior is still near the prior, and they are a third of
the steps."""

CLEAR_ALPHA_BAR = 0.9
"""Levels from which on an image's own features are read off; before, its trajectory is elsewhere. The last level
of a sampling run counts in any case."""

INVERSE_VARIANCE = 1.0
"""Power of alpha_bar / (1 - alpha_bar) by which clear levels are weighed, unless calibration finds a better one."""

Ask = Callable[[Step], Tensor]
"""Gives p(i | step), (query, train)."""


class Look(Protocol):
    """What accumulates something over steps."""

    def __call__(self, step: Step) -> None:
        """Look at the next step."""
        ...

    def put(self, rows: Tensor, other: Self) -> None:
        """Put what was accumulated of other queries in the place of some `rows`, int64 (other,)."""
        ...


def trace(steps: Iterable[Step], *looks: Callable[[Step], None]) -> Step:
    """Show every step to every look; give the last step, which has the images."""
    last: Step | None = None
    for step in steps:
        for look in looks:
            look(step)
        last = step
    assert last is not None, "every generator has a step"
    return last


def ask_network(provenance: ProvenanceNetwork) -> Ask:
    """Ask the provenance network as traces do, with the beam it was saved with.

    What the cells outside the beam hold is left out of unconditional rows, which then sum to less than 1. Conditional
    rows are normalised over what was found, as the share of their class in other cells is not known.
    """
    beam = provenance.config.beam

    def ask(step: Step) -> Tensor:
        labels = step.class_labels
        logits = provenance.index_logits(step.feature_maps, step.alpha_bars, labels, step.class_logits, beam)
        probs = logits.softmax(dim=1)
        if beam is None:
            return probs
        found = logits.exp().sum(dim=1).clamp_max(1)
        return probs * torch.where(labels == provenance.config.num_classes, found, 1)[:, None]

    return ask


def ask_closed_form(posterior: Posterior) -> Ask:
    """Ask the exact posterior."""
    return lambda step: posterior.probs(step.query, step.alpha_bars, step.class_labels)


@dataclass(frozen=True)
class Levels:
    """Steps of a generator that are traced, and those whose posteriors are averaged."""

    numbers: range | None
    """Numbers of the traced steps; None for all."""
    window: tuple[float, float]
    """Noise levels whose posteriors are averaged, ends excluded."""

    @classmethod
    def of(cls, generator: Generator, num_inference_steps: int, every: int) -> Levels:
        """Choose every so many steps, back from the last, that are not too noisy.

        Raises:
            InputError: None of them is in the window.
        """
        if not generator.has_noise_levels:
            return cls(None, ALL_LEVELS)
        alpha_bars = generator.alpha_bars(num_inference_steps)
        first, count = int((alpha_bars < LEAST_ALPHA_BAR).sum()), len(alpha_bars)
        numbers = range(first + (count - 1 - first) % every, count, every)
        chosen = alpha_bars[list(numbers)]
        if not ((chosen > WINDOW[0]) & (chosen < WINDOW[1])).any():
            raise InputError(
                f"trace_every={every} passes over all of {num_inference_steps} steps whose posteriors are averaged; "
                "give a smaller one"
            )
        return cls(numbers, WINDOW)

    def has(self, step: Step) -> bool:
        """Whether a step is traced."""
        return self.numbers is None or step.number in self.numbers

    def averages(self, alpha_bar: float) -> bool:
        """Whether the posterior at a level is averaged."""
        return self.window[0] < alpha_bar < self.window[1]


class MeanPosterior:
    """The mean over the window of p(i | x_t, y), with its entropy and its largest entry at every traced step."""

    def __init__(self, ask: Ask, levels: Levels, *, only_window: bool = False) -> None:
        """Start empty.

        Args:
            ask: Gives the posterior of a step.
            levels: Steps that are looked at.
            only_window: Whether to pass over steps outside the window, which have nothing to say of an image that was
                not sampled.
        """
        self.ask, self.levels, self.only_window = ask, levels, only_window
        self._sum: Tensor | None = None
        self._in_window = 0
        self._alpha_bars: list[float] = []
        self._entropy: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._first: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        """Add the posterior of a step, if it is traced."""
        alpha_bar = float(step.alpha_bar)
        averages = self.levels.averages(alpha_bar)
        if not self.levels.has(step) or (self.only_window and not averages):
            return
        probs = self.ask(step)
        self._alpha_bars.append(alpha_bar)
        self._entropy.append(entropy(probs))
        largest, index = probs.max(dim=1)
        self._largest.append(largest)
        self._first.append(index)
        if averages:
            self._in_window += 1
            self._sum = probs if self._sum is None else self._sum + probs

    def put(self, rows: Tensor, other: MeanPosterior) -> None:
        """Put the posteriors of other queries over the same steps in the place of some rows."""
        if self._sum is not None and other._sum is not None:
            self._sum = self._sum.index_copy(0, rows, other._sum)
        for old, new in (
            (self._entropy, other._entropy),
            (self._largest, other._largest),
            (self._first, other._first),
        ):
            old[:] = [kept.index_copy(0, rows, again) for kept, again in zip(old, new, strict=True)]

    def posterior(self) -> Tensor:
        """Mean posterior over the window, (query, train)."""
        assert self._sum is not None, "no noise level lies in the window"
        return self._sum / self._in_window

    def late_entropy(self) -> Tensor:
        """Give the entropy at the cleanest level of the window in nats, (query,): next to nothing for most copies."""
        return self._entropy[late_level(self._alpha_bars, self.levels.window)]

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
            alpha_bar=torch.tensor(self._alpha_bars),
        )

    def commitment_step(self) -> Tensor:
        """First step from which the final top source keeps more than half of the posterior; -1 if never.

        Steps between those that were added count as the next of these.
        """
        largest, first = torch.stack(self._largest), torch.stack(self._first)
        # More than half of the posterior can only belong to the largest entry.
        holds = (first == first[-1]) & (largest > 0.5)
        held_to_the_end = holds.flip(0).cumprod(dim=0).sum(dim=0)
        numbers = self.levels.numbers or range(len(largest))
        step = numbers.start + numbers.step * (len(largest) - held_to_the_end)
        return torch.where(held_to_the_end > 0, step, -1)


class CreditFeatures:
    """What a credit head compares images by: means over clear levels of the embedding and the pixels, and gradients."""

    def __init__(self, provenance: ProvenanceNetwork, alpha_bars: Tensor, *, denoiser: Any = None) -> None:
        """Start empty.

        Args:
            provenance: Network whose embedding is read.
            alpha_bars: Noise levels of the steps that will be shown, (step,).
            denoiser: UNet2DModel whose last layer's normalised gradients are features too; None for none.
        """
        self.provenance, self.denoiser = provenance, denoiser
        self.clear_from = alpha_bars.max().clamp_max(CLEAR_ALPHA_BAR)
        self._seen: list[Tensor] = []
        self._clearness: list[float] = []
        self._gradients: Tensor | None = None

    def __call__(self, step: Step) -> None:
        """Add a step, if it is clear; gradients are those of the first such step."""
        if step.alpha_bar < self.clear_from:
            return
        if self.denoiser is not None and self._gradients is None:
            # In unit length: those of samples are longer than those of training images, and would count for everything.
            gradients = last_layer_gradients(self.denoiser, *step.last_layer)
            self._gradients = F.normalize(gradients.float(), dim=1)
        embedding = self.provenance.embed(step.feature_maps, step.alpha_bars)
        pixels = step.feature_maps[0].flatten(1).to(embedding.dtype)
        alpha_bar = float(step.alpha_bar)
        # Noising makes an image smaller by sqrt(alpha_bar), and what is seen of it.
        self._seen.append(torch.cat([embedding, pixels], dim=1) / math.sqrt(alpha_bar))
        self._clearness.append(alpha_bar / (1 - alpha_bar))

    def put(self, rows: Tensor, other: CreditFeatures) -> None:
        """Put the features of other queries over the same steps in the place of some rows."""
        self._seen = [old.index_copy(0, rows, new) for old, new in zip(self._seen, other._seen, strict=True)]
        if self._gradients is not None and other._gradients is not None:
            self._gradients = self._gradients.index_copy(0, rows, other._gradients)

    def mean(self, level_power: float) -> Tensor:
        """Give the features, (query, feature): embedding, pixels, then gradients where there are any.

        Args:
            level_power: Power of alpha_bar / (1 - alpha_bar) in the weights of levels; 0 weighs all alike.
        """
        seen = torch.stack(self._seen)
        # In double: powers of the clearness are too large for half precision.
        weights = torch.tensor(self._clearness, dtype=torch.float64) ** level_power
        mean: Tensor = torch.tensordot((weights / weights.sum()).to(seen), seen, dims=1)
        gradients = self._gradients
        return mean if gradients is None else torch.cat([mean, gradients.to(mean.dtype)], dim=1)


@dataclass(frozen=True, kw_only=True)
class NoisyImages:
    """Noisy images of every query at several steps, from noise to image."""

    images: Tensor
    """(step, query, channel, height, width)."""
    timesteps: Tensor
    """int64 (step,)."""
    alpha_bars: Tensor
    """Noise levels of the steps, (step,)."""

    def first(self, count: int) -> NoisyImages:
        """Keep the first `count` queries."""
        return NoisyImages(images=self.images[:, :count], timesteps=self.timesteps, alpha_bars=self.alpha_bars)


class Recorder:
    """Keeps the noisy images of the steps that are not too noisy to be traced, on the CPU."""

    def __init__(self) -> None:
        self._steps: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, step: Step) -> None:
        """Keep a step."""
        if step.alpha_bar >= LEAST_ALPHA_BAR:
            self._steps.append((step.query.cpu(), step.timestep, step.alpha_bar.cpu()))

    def noisy_images(self) -> NoisyImages:
        """Give what was kept."""
        images, timesteps, alpha_bars = zip(*self._steps, strict=True)
        return NoisyImages(
            images=torch.stack(images), timesteps=torch.tensor(timesteps), alpha_bars=torch.stack(alpha_bars)
        )


@dataclass
class Draw:
    """Samples and what was looked at on the way to them."""

    images: Tensor
    """In [-1, 1], (query, channel, height, width)."""
    posterior: MeanPosterior
    """Trace by the provenance network."""
    closed_form: MeanPosterior | None
    """Trace by the closed form; None where none was given."""
    features: CreditFeatures | None
    """Features of the samples for a credit head; None without one."""

    def put(self, rows: Tensor, again: Draw) -> None:
        """Put other samples in the place of some rows."""
        self.images = self.images.index_copy(0, rows, again.images)
        self.posterior.put(rows, again.posterior)
        if self.closed_form is not None and again.closed_form is not None:
            self.closed_form.put(rows, again.closed_form)
        if self.features is not None and again.features is not None:
            self.features.put(rows, again.features)


def resample(draw: Callable[[Tensor], Draw], count: int, *, below: float, most: int) -> tuple[Draw, Tensor]:
    """Sample, and sample again what comes from one training image too surely.

    A sample with a random generator of its own is drawn again from the noise that this one gives next, so that it
    does not depend on its batch.

    Args:
        draw: Samples the queries of some rows, int64 (row,).
        count: Queries.
        below: Entropy in nats, at the cleanest level of the trace window, below which a sample is drawn again.
        most: Times a sample may be drawn again; the last draw is kept, whatever it is.

    Returns:
        The samples, and how often each was drawn again, int64 (query,).
    """
    drawn, times = draw(torch.arange(count)), torch.zeros(count, dtype=torch.int64)
    for _ in range(most):
        rows = (drawn.posterior.late_entropy() < below).nonzero().flatten()
        if not len(rows):
            break
        drawn.put(rows, draw(rows.cpu()))
        times[rows.cpu()] += 1
    return drawn, times


def late_level(alpha_bars: Sequence[float], window: tuple[float, float] = WINDOW) -> int:
    """Give the place of the cleanest of some levels, rising, that is in a window; the last where none is."""
    inside = [place for place, level in enumerate(alpha_bars) if window[0] < level < window[1]]
    return inside[-1] if inside else len(alpha_bars) - 1
