"""A trace is a fold: looks accumulate what they need of every step, from noise to image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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
from provgen.models.temperatures import ALL_LEVELS, Temperatures, Tracer
from provgen.tracing.attribution import Attribution, Explained

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


def ask_network(provenance: ProvenanceNetwork, temperatures: Temperatures | None = None) -> Ask:
    """Ask the provenance network as traces do, under its temperatures (None for 1) and with the beam it was saved with.

    What the cells outside the beam hold is left out of unconditional rows, which then sum to less than 1. Conditional
    rows are normalised over what was found, as the share of their class in other cells is not known.
    """
    beam = provenance.config.beam

    def ask(step: Step) -> Tensor:
        labels = step.class_labels
        logits = provenance.index_logits(step.feature_maps, step.alpha_bars, labels, step.class_logits, beam)
        probs = _tempered(logits, Tracer.NETWORK, temperatures, step)
        if beam is None:
            return probs
        found = logits.exp().sum(dim=1).clamp_max(1)
        return probs * torch.where(labels == provenance.config.num_classes, found, 1)[:, None]

    return ask


def ask_closed_form(posterior: Posterior, temperatures: Temperatures | None = None) -> Ask:
    """Ask the exact posterior under its temperatures (None for 1)."""

    def ask(step: Step) -> Tensor:
        logits = posterior.logits(step.query, step.alpha_bars, step.class_labels)
        probs = _tempered(logits, Tracer.CLOSED_FORM, temperatures, step)
        # A query whose class has no example has no sources, and not all of them alike.
        return probs.masked_fill((logits == torch.finfo(logits.dtype).min).all(dim=1, keepdim=True), 0)

    return ask


def _tempered(logits: Tensor, tracer: Tracer, temperatures: Temperatures | None, step: Step) -> Tensor:
    """Give the probabilities (query, train) of logits under the temperatures of a step."""
    if temperatures is None:
        return logits.softmax(dim=1)
    temperature = temperatures.temperature(tracer, step.alpha_bars, step.class_labels).to(logits)
    # Finite: a row of which everything is ruled out would be NaN.
    return (logits / temperature[:, None]).clamp_min(torch.finfo(logits.dtype).min).softmax(dim=1)


@dataclass(frozen=True)
class Levels:
    """Steps of a generator that are traced, and those whose posteriors are averaged."""

    numbers: range | None
    """Numbers of the traced steps; None for all."""
    window: tuple[float, float]
    """Noise levels whose posteriors are averaged, ends excluded."""
    spans: Mapping[int, float] | None = None
    """What each of these steps counts for by its number; None for all alike."""

    @classmethod
    def of(cls, generator: Generator, num_inference_steps: int, every: int, window: tuple[float, float]) -> Levels:
        """Choose every so many steps, back from the last, from where posteriors say more than the prior.

        Args:
            generator: The generator, with or without noise levels.
            num_inference_steps: Steps of its sampler.
            every: Steps from one that is traced to the next.
            window: Noise levels whose posteriors are averaged, ends excluded.

        Raises:
            InputError: None of them is in the window.
        """
        if not generator.has_noise_levels:
            return cls(None, ALL_LEVELS)
        alpha_bars = generator.alpha_bars(num_inference_steps)
        first, count = int((alpha_bars <= window[0]).sum()), len(alpha_bars)
        numbers = range(first + (count - 1 - first) % every, count, every)
        inside = [number for number in numbers if alpha_bars[number] < window[1]]
        if not inside:
            raise InputError(
                f"trace_every={every} passes over all of {num_inference_steps} steps whose posteriors are averaged; "
                "give a smaller one"
            )
        return cls(numbers, window, dict(zip(inside, level_spans(alpha_bars[inside]).tolist(), strict=True)))

    def has(self, step: Step) -> bool:
        """Whether a step is traced."""
        return self.numbers is None or step.number in self.numbers

    def span(self, step: Step) -> float:
        """What a step counts for in the average; 0 outside the window."""
        if not self.window[0] < step.alpha_bar < self.window[1]:
            return 0.0
        return 1.0 if self.spans is None else self.spans[step.number]


class MeanPosterior:
    """The mean of p(i | x_t, y) over the log signal-to-noise ratios of the window.

    Its entropy and its largest entry are kept at every traced step.
    """

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
        self._span = 0.0
        self._alpha_bars: list[float] = []
        self._entropy: list[Tensor] = []
        self._largest: list[Tensor] = []
        self._first: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        """Add the posterior of a step, if it is traced."""
        if not self.levels.has(step):
            return
        span = self.levels.span(step)
        if self.only_window and not span:
            return
        probs = self.ask(step)
        self._alpha_bars.append(float(step.alpha_bar))
        self._entropy.append(entropy(probs))
        largest, index = probs.max(dim=1)
        self._largest.append(largest)
        self._first.append(index)
        if span:
            self._span += span
            self._sum = probs * span if self._sum is None else self._sum + probs * span

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
        return self._sum / self._span

    def late_entropy(self) -> Tensor:
        """Give the entropy at the cleanest level of the window in nats, (query,): next to nothing for most copies."""
        return self._entropy[late_level(self._alpha_bars, self.levels.window)]

    def attribution(
        self,
        top_k: int,
        *,
        is_trajectory: bool,
        reachable: Tensor,
        credit: Tensor | None = None,
        explained: Explained | None = None,
    ) -> Attribution:
        """Summarise what was added.

        Args:
            top_k: Sources per query.
            is_trajectory: Whether the levels are steps of one sampling run.
            reachable: bool (train,), examples that the provenance network can name.
            credit: Shares of credit (query, train); without them the posterior is the credit.
            explained: How much of the images training images explain; None where these are not at hand.
        """
        posterior = self.posterior()
        explained = Explained.unknown(len(posterior)) if explained is None else explained
        credit = posterior if credit is None else credit
        index = _copies_first(credit, explained).topk(top_k, dim=1).indices
        weight, top = credit.gather(1, index), posterior.gather(1, index)
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
            explained=explained,
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


def _copies_first(credit: Tensor, explained: Explained) -> Tensor:
    """Give what sources are ordered by, (query, train): credit, but the original of a copy before all else."""
    order, copies = credit.clone(), explained.is_copy.to(credit.device)
    order[copies, explained.nearest.to(credit.device)[copies]] = torch.inf
    return order


class CreditFeatures:
    """What a credit head compares finished images by: the embedding and the pixels of the last step, and gradients."""

    def __init__(self, provenance: ProvenanceNetwork, *, denoiser: Any = None, clear_from: float = 1.0) -> None:
        """Start empty.

        Args:
            provenance: Network whose embedding is read.
            denoiser: UNet2DModel whose last layer's normalised gradients are features too; None for none.
            clear_from: Noise level from which on little noise is left: gradients are those of the first such step, or
                of the last step. At cleaner ones the denoiser has nothing left to do.
        """
        self.provenance, self.denoiser, self.clear_from = provenance, denoiser, clear_from
        self._step: Step | None = None
        self._clear: Step | None = None
        self._features: Tensor | None = None

    def __call__(self, step: Step) -> None:
        """Keep a step; what it costs to look at is spent on the last one alone."""
        self._step = step
        if self.denoiser is not None and self._clear is None and step.alpha_bar >= self.clear_from:
            self._clear = step

    def put(self, rows: Tensor, other: CreditFeatures) -> None:
        """Put the features of other queries in the place of some rows."""
        self._features = self.features().index_copy(0, rows, other.features())

    @torch.no_grad()
    def features(self) -> Tensor:
        """Give the features, (query, feature): embedding, pixels, then gradients where there are any."""
        if self._features is None:
            assert self._step is not None, "every generator has a step"
            self._features = self._of(self._step)
        return self._features

    def _of(self, step: Step) -> Tensor:
        # Gradients first: where they need a whole pass, it gives the feature maps as well.
        asked = [] if self.denoiser is None else [(self._clear or step).last_layer]
        gradients = [last_layer_gradients(self.denoiser, *last_layer) for last_layer in asked]
        embedding = self.provenance.embed(step.feature_maps, step.alpha_bars)
        pixels = step.feature_maps[0].flatten(1).to(embedding.dtype)
        # Noising makes an image smaller by sqrt(alpha_bar), and what is seen of it.
        seen = torch.cat([embedding, pixels], dim=1) / step.alpha_bar.to(embedding).sqrt()
        # In unit length: those of samples are longer than those of training images, and would count for everything.
        unit = [F.normalize(gradient.float(), dim=1).to(embedding.dtype) for gradient in gradients]
        return torch.cat([seen, *unit], dim=1)


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
    """Keeps the noisy images of the steps from a noise level on, on the CPU."""

    def __init__(self, *, least_alpha_bar: float) -> None:
        self.least_alpha_bar = least_alpha_bar
        self._steps: list[tuple[Tensor, int, Tensor]] = []

    def __call__(self, step: Step) -> None:
        """Keep a step."""
        if step.alpha_bar >= self.least_alpha_bar:
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


def level_spans(alpha_bars: Tensor) -> Tensor:
    """Give the span of log signal-to-noise ratios that each of some rising levels (step,) stands for, (step,).

    Half of the way to each neighbour, by the trapezoidal rule, so that an average says the same at every schedule and
    number of steps. A level alone stands for 1.
    """
    if len(alpha_bars) == 1:
        return torch.ones(1)
    half = torch.logit(alpha_bars.double()).diff() / 2
    return (F.pad(half, (1, 0)) + F.pad(half, (0, 1))).to(torch.float32)


def late_level(alpha_bars: Sequence[float], window: tuple[float, float]) -> int:
    """Give the place of the cleanest of some levels, rising, that is in a window; the last where none is."""
    inside = [place for place, level in enumerate(alpha_bars) if window[0] < level < window[1]]
    return inside[-1] if inside else len(alpha_bars) - 1
