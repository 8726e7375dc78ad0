"""Fitting the temperatures of posteriors, and the noise levels at which they say something, to a generator.

T(alpha_bar) = argmin E |D(x_t) - sum_i softmax_i(logits / T) x_i|^2 with D the generator's predicted image: how widely
training images must be mixed to give what it draws. No model is trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression, minimize_scalar
from scipy.special import expit, logit
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator
from provgen.generators.closed_form import Posterior, entropy
from provgen.generators.protocol import Generator, Step
from provgen.models.provenance import ProvenanceNetwork
from provgen.models.temperatures import ALL_LEVELS, Temperatures, Tracer
from provgen.tracing.attribution import Mixtures, support_limits

STEPS = 16
"""Noise levels at which temperatures are fitted, the steps of a short sampling run."""

FEWEST_QUERIES, MOST_QUERIES = 12, 48
"""Own samples, and as many held-out images."""

MAX_PRODUCTS = 2**29
"""Numbers of queries times numbers of all training images; with many or large ones there are fewer queries."""

NOISES = 2
"""Parts of the held-out images with a noise of their own each."""

PRIOR = 0.9
"""Effective share of the possible sources from which on a posterior says no more than the prior."""

DECIDED = 0.01
"""Share of the variance of samples that is not yet decided at the clean end of the window."""

NAMED = 1.1
"""Effective number of sources up to which a posterior names one image."""

ASKED_LEVELS = 100
"""Noise levels that are tried to find the informative ones."""

FLAT = 1e-4
"""Change of the unexplained share by doubling or halving T up to which T is not defined."""

SCANNED = (-1, 0, 1, 2, 3, 6, 10)
"""Octaves around the temperature of the level before that are tried first."""

SAME = 1e-6
"""Share of the contrast of predicted images by which two errors may differ by rounding."""

OWN_OCTAVES = tuple(number / 2 for number in range(-4, 33))
"""Logarithms to base 2 of the temperatures that are tried for a sample alone."""

WIDEST = 24.0
"""Largest logarithm of T to base 2, either way."""


@dataclass(frozen=True, kw_only=True)
class _Level:
    """What is fitted at one noise level."""

    alpha_bar: float
    octaves: np.ndarray
    """Logarithm of T to base 2, (tracer, 2), conditional rows first."""
    information: np.ndarray
    """By how much the unexplained share rises when T is doubled and halved, (tracer, 2)."""
    prior_share: float
    """Effective share of the possible sources that the untempered closed form leaves, the median over queries."""
    samples: Tensor
    """Predicted images of own samples, (sample, feature)."""


@torch.no_grad()
def fit_temperatures(
    generator: Generator,
    provenance: ProvenanceNetwork,
    train: ImageSet,
    holdout: ImageSet,
    *,
    closed_form: Posterior,
    seed: int,
) -> Temperatures:
    """Fit temperatures on own samples and noised held-out images, half of them told their class.

    Args:
        generator: The trained generator.
        provenance: Its provenance network.
        train: Its training images.
        holdout: Images it was not trained on; there may be none.
        closed_form: Exact posterior over the training images.
        seed: Seed of the samples and of the noise.
    """
    mixtures = Mixtures(train, generator.network.device)
    limits = support_limits(mixtures, holdout, tuple(train.images.shape[1:]), seed)
    queries = max(FEWEST_QUERIES, min(MOST_QUERIES, MAX_PRODUCTS // train.images.numel()))
    runs = [*_own_samples(generator, train, queries, seed), *_noised(generator, holdout, queries, seed)]
    if not runs:
        untempered: Temperatures = Temperatures(
            null_label=train.num_classes, least_explained=limits.least, copy=limits.copy
        )
        return untempered
    levels: list[_Level] = []
    for steps in zip(*runs, strict=False):
        start = levels[-1].octaves if levels else np.zeros((len(Tracer), 2))
        levels.append(_fit_level(mixtures, closed_form, provenance, steps, start))
    low, high = ALL_LEVELS
    if generator.has_noise_levels:
        asked = _half_told(holdout if len(holdout) else train, queries, seed)
        low, _ = _informative_span(generator, closed_form, *(part.to(mixtures.images.device) for part in asked))
        high = _decision(levels, mixtures.mean)
    if low >= high:
        low, high = ALL_LEVELS
    table: Temperatures = Temperatures(
        num_levels=len(levels),
        null_label=train.num_classes,
        low=low,
        high=high,
        least_explained=limits.least,
        copy=limits.copy,
    )
    table.alpha_bars.copy_(torch.tensor([level.alpha_bar for level in levels]))
    table.log_temperatures.copy_(torch.from_numpy(_rising(levels)) * np.log(2))
    return table


def informative_levels(
    generator: Generator, closed_form: Posterior, images: Tensor, *, null_label: int, count: int
) -> list[float]:
    """Find noise levels at which the untempered closed form says something, evenly spaced in log signal-to-noise.

    They run from where it says no more than the prior to where it names one image.

    Args:
        generator: Its sampler's levels are tried; its network is not asked.
        closed_form: Exact posterior over the training images.
        images: Images in [-1, 1], best held-out ones, (query, channel, height, width).
        null_label: The label that stands for no label.
        count: Levels that are given.
    """
    null = torch.full((len(images),), null_label, device=images.device)
    low, high = _informative_span(generator, closed_form, images, null)
    levels: list[float] = expit(np.linspace(logit(low), logit(high), count)).tolist()
    return levels


@torch.no_grad()
def _informative_span(
    generator: Generator, closed_form: Posterior, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Find from where the untempered closed form says more than the prior to where it names one image.

    The levels that are tried are evenly spaced in log signal-to-noise: those of a sampler may leave much out.
    """
    first, last = torch.logit(generator.alpha_bars(ASKED_LEVELS)[[0, -1]].double()).tolist()
    places = np.linspace(first, last, ASKED_LEVELS)
    noise = generator.draw_noise(seeded_generator(0, Stream.RENOISE)).to(images)
    numbers, shares = [], []
    for level in torch.from_numpy(expit(places)).to(images):
        noisy = level.sqrt() * images + (1 - level).sqrt() * noise
        logits = closed_form.logits(noisy, level.expand(len(images)), labels)
        number = entropy(logits.softmax(dim=1)).exp()
        possible = (logits > torch.finfo(logits.dtype).min).sum(dim=1)
        numbers.append(float(number.median()))
        shares.append(float((number / possible).median()))
    noisiest = float(expit(places[0]))
    low = max(_crossing(places, np.array(shares), PRIOR), noisiest)
    return low, max(_crossing(places, np.array(numbers), NAMED), low)


def _own_samples(generator: Generator, train: ImageSet, count: int, seed: int) -> Iterator[Iterator[Step]]:
    """Sample a batch, half of it told a class where the generator can be told one."""
    if generator.can_sample:
        labels = torch.arange(count) // 2 % max(1, train.num_classes)
        labels[:: 2 if generator.is_class_conditional else 1] = train.num_classes
        seeds = [seeded_generator(seed, Stream.TEMPERATURE, number) for number in range(count)]
        yield generator.sample(
            labels.to(generator.network.device),
            null_label=train.num_classes,
            generator=seeds,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
        )


def _noised(generator: Generator, holdout: ImageSet, count: int, seed: int) -> Iterator[Iterator[Step]]:
    """Noise held-out images to the levels of the sampler, half of them told their class."""
    asked = zip(*(rows.tensor_split(NOISES) for rows in _half_told(holdout, count, seed)), strict=True)
    device = generator.network.device
    for part, (images, labels) in enumerate(asked):
        if len(images):
            yield generator.renoise(images.to(device), labels.to(device), num_inference_steps=STEPS, seed=seed + part)


def _half_told(images: ImageSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose at most `count` images, in [-1, 1], with the labels of every other one and the null label."""
    chosen = torch.randperm(len(images), generator=seeded_generator(seed, Stream.TEMPERATURE))[:count]
    labels = images.labels[chosen].clone()
    labels[::2] = images.num_classes
    return to_unit_range(images.images[chosen]), labels


def _fit_level(
    mixtures: Mixtures,
    closed_form: Posterior,
    provenance: ProvenanceNetwork,
    steps: Sequence[Step],
    start: np.ndarray,
) -> _Level:
    """Fit both tracers at one level, conditional and unconditional rows apart."""
    labels = torch.cat([step.class_labels for step in steps])
    exact = torch.cat([closed_form.logits(s.query, s.alpha_bars, s.class_labels) for s in steps])
    possible = (exact > torch.finfo(exact.dtype).min).sum(dim=1)
    level = _Level(
        alpha_bar=float(steps[0].alpha_bar),
        octaves=start.copy(),
        information=np.zeros_like(start),
        prior_share=float((entropy(exact.softmax(dim=1)).exp() / possible).median()),
        samples=steps[0].predicted_image.flatten(1),
    )
    if level.prior_share > PRIOR:
        return level  # all temperatures give the same mixture
    network = torch.cat([
        provenance.index_logits(s.feature_maps, s.alpha_bars, s.class_labels, s.class_logits) for s in steps
    ])  # fmt: skip
    predicted = torch.cat([step.predicted_image for step in steps]).flatten(1).to(mixtures.images)
    is_told = labels != provenance.config.num_classes
    for tracer, logits in ((Tracer.NETWORK, network), (Tracer.CLOSED_FORM, exact)):
        for row, rows in enumerate((is_told, ~is_told)):
            if rows.any():
                fitted = fit_temperature(mixtures, logits[rows], predicted[rows], start=start[tracer, row])
                level.octaves[tracer, row], level.information[tracer, row] = fitted
    return level


def fit_temperature(
    mixtures: Mixtures, logits: Tensor, predicted: Tensor, *, start: float = 0.0
) -> tuple[float, float]:
    """Find the temperature whose mixtures are nearest to predicted images.

    Octaves around `start` are tried, and then further ones while they are better; the best is refined by Brent's
    bounded search.

    Args:
        mixtures: Mixtures of training images.
        logits: Logits of a posterior, (query, train).
        predicted: Predicted images, (query, feature).
        start: Logarithm of a temperature to base 2.

    Returns:
        The logarithm of the temperature to base 2, and by how much the unexplained share rises when it is doubled and
        halved. Where nothing depends on the temperature it is not defined, and is `start`.
    """
    total = float((predicted - mixtures.mean).square().sum())

    def unexplained(octave: float) -> float:
        return float(mixtures.errors(logits, predicted, 2.0**octave).sum()) / max(total, 1e-12)

    best = _walk(unexplained, start)
    around = unexplained(best - 1) + unexplained(best + 1) - 2 * unexplained(best)
    if around < FLAT:
        # Either nothing depends on T, or the wider the better, as for a network that has not learned anything yet.
        is_better = unexplained(start) - unexplained(best) > FLAT
        return (best, FLAT) if is_better else (start, 0.0)
    found = minimize_scalar(unexplained, bounds=(best - 1, best + 1), method="bounded", options={"xatol": 0.04})
    return float(found.x), around


class OwnTemperature:
    """Fits one temperature of the closed form to every sample alone, on the steps of its trajectory.

    It is 1 for a generator that copies, as the closed form does.
    """

    def __init__(self, mixtures: Mixtures, closed_form: Posterior) -> None:
        """Start with the training images, and their exact posterior."""
        self.mixtures, self.closed_form = mixtures, closed_form
        self._errors: list[Tensor] = []
        self._contrasts: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        """Add the errors of mixtures to the predicted image of a step."""
        logits = self.closed_form.logits(step.query, step.alpha_bars, step.class_labels)
        predicted = step.predicted_image.flatten(1).to(self.mixtures.images)
        errors = [self.mixtures.errors(logits, predicted, 2.0**octave) for octave in OWN_OCTAVES]
        self._errors.append(torch.stack(errors, dim=1))
        self._contrasts.append((predicted - self.mixtures.mean).square().sum(dim=1, keepdim=True))

    def octaves(self) -> Tensor:
        """Give the logarithm of the temperature to base 2, (query,).

        It is 0 where nothing depends on the temperature, as for a class of one image.
        """
        errors, contrast = torch.stack(self._errors).sum(dim=0), torch.stack(self._contrasts).sum(dim=0)
        is_best = errors <= errors.amin(dim=1, keepdim=True) + SAME * contrast
        octaves = torch.tensor(OWN_OCTAVES, device=errors.device)
        from_one = octaves.abs().expand_as(errors).masked_fill(~is_best, torch.inf)
        return octaves[from_one.argmin(dim=1)].cpu()


def _walk(unexplained: Callable[[float], float], start: float) -> float:
    """Give the best of octaves around `start`, and beyond while it gets better."""
    errors = {start + octave: unexplained(start + octave) for octave in SCANNED}
    best = min(errors, key=lambda octave: errors[octave])
    for direction in (-1, 1):
        while abs(best + direction) <= WIDEST:
            error = errors.get(best + direction)
            if error is None:
                error = errors[best + direction] = unexplained(best + direction)
            if error > errors[best] - FLAT / 10:
                break
            best += direction
    return best


def _rising(levels: Sequence[_Level]) -> np.ndarray:
    """Smooth temperatures so that they rise from noise to image, by what is known of each, (tracer, 2, level)."""
    octaves = np.stack([level.octaves for level in levels], axis=-1)
    weights = np.stack([level.information for level in levels], axis=-1)
    for tracer in Tracer:
        for row in range(2):
            # A row that nothing was fitted for, such as that of classes where there are none, is as the other.
            told = row if weights[tracer, row].any() else 1 - row
            weight = weights[tracer, told].clip(FLAT / 100)
            octaves[tracer, row] = isotonic_regression(octaves[tracer, told], weights=weight).x
    return octaves


def _decision(levels: Sequence[_Level], mean: Tensor) -> float:
    """Find the level from which on samples are decided."""
    places = torch.logit(torch.tensor([level.alpha_bar for level in levels], dtype=torch.float64)).numpy()
    last = levels[-1].samples
    variance = float((last - mean).square().sum())
    left = np.array([float((level.samples - last).square().sum()) / max(variance, 1e-12) for level in levels])
    return _crossing(places, left, DECIDED)


def _crossing(places: np.ndarray, falling: np.ndarray, limit: float) -> float:
    """Give the alpha_bar at which values at log signal-to-noise ratios fall below a limit for good; 0 if always."""
    above = (falling > limit).nonzero()[0]
    if not len(above):
        return 0.0
    left, right = above[-1], min(above[-1] + 1, len(falling) - 1)
    share = (falling[left] - limit) / (falling[left] - falling[right]) if left < right else 0.0
    return float(expit(places[left] + share * (places[right] - places[left])))
