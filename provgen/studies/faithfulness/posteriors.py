"""Posteriors at many noise levels as one attribution: whole images, patches, or the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import product
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.generators.closed_form import Posterior, impossible
from provgen.models.diffusion import encoder_feature_maps
from provgen.models.provenance import ProvenanceNetwork
from provgen.models.temperatures import Temperatures, Tracer
from provgen.studies.faithfulness.attributor import Along, Cache, Queries
from provgen.tracing.calibrate import AttributionScores, Untuned
from provgen.tracing.trace import NoisyImages, level_spans

MAX_BYTES = 256 * 2**20
"""Bytes of the (query, train, height, width) array that is held at once."""


class PatchPosterior:
    """Mean over all positions of softmax_i(-|x_t patch - sqrt(alpha_bar) x_i patch|^2 / (2 (1 - alpha_bar))).

    A convolutional denoiser sees patches, and blends images that no single posterior holds (Kamb and Ganguli 2024,
    arXiv 2412.20292); NDA (arXiv 2510.14269) scores training images by such weights. Here a patch is compared with the
    patches at its own position.
    """

    def __init__(self, train_images: Tensor, train_labels: Tensor, *, null_label: int, patch_size: int) -> None:
        """Keep images in [-1, 1], floating (train, channel, height, width), with labels, int64 (train,)."""
        assert patch_size <= train_images.shape[-1]
        self.images, self.labels = train_images, train_labels
        self.null_label, self.patch_size = null_label, patch_size

    def __call__(self, noisy: Tensor, timestep: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:  # noqa: ARG002
        """Give log-probabilities (query, train); see `StepPosterior`."""
        ruled_out = impossible(class_labels, self.labels, self.null_label, None)
        size = max(1, MAX_BYTES // self.images.nbytes)
        batches = zip(noisy.split(size), ruled_out.split(size), strict=True)
        return torch.cat([self._log_probs(images.to(self.images), alpha_bar, out) for images, out in batches])

    def _log_probs(self, noisy: Tensor, alpha_bar: Tensor, ruled_out: Tensor) -> Tensor:
        squares = (noisy[:, None] - alpha_bar.sqrt() * self.images).square().sum(dim=2)
        patches = F.avg_pool2d(squares, self.patch_size, stride=1) * self.patch_size**2
        logits = -patches / (2 * (1 - alpha_bar))
        logits = logits.masked_fill(ruled_out[:, :, None, None], torch.finfo(logits.dtype).min)
        # In logarithms: at little noise all positions of most images underflow, and their order would be lost.
        num_positions = logits.shape[2] * logits.shape[3]
        return logits.log_softmax(dim=1).logsumexp(dim=(2, 3)) - math.log(num_positions)


LOWEST, HIGHEST = (0.01, 0.05, 0.2), (0.5, 0.9, 0.99)
"""Ends of the windows of alpha_bar that are tried."""

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)

Averaged = Literal["probabilities", "logarithms"]
AVERAGED: tuple[Averaged, ...] = ("probabilities", "logarithms")


class StepPosterior(Protocol):
    """log p(i | x_t, y) of one noise level, up to a constant of each query."""

    def __call__(self, noisy: Tensor, timestep: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        """Give logits (query, train) for x_t (query, channel, height, width) with labels (query,)."""
        ...


def closed_form_steps(closed_form: Posterior) -> StepPosterior:
    """Take the closed form."""
    return lambda noisy, _, alpha_bar, labels: closed_form.logits(noisy, alpha_bar.expand(len(noisy)), labels)


def network_steps(unet: UNet2DModel, provenance: ProvenanceNetwork) -> StepPosterior:
    """Take the provenance network on the denoiser's feature maps."""

    @torch.no_grad()
    def logits(noisy: Tensor, timestep: Tensor, alpha_bar: Tensor, class_labels: Tensor) -> Tensor:
        noisy, labels = noisy.to(unet.device), class_labels.to(unet.device)
        feature_maps, alpha_bars = encoder_feature_maps(unet, noisy, timestep, labels), alpha_bar.expand(len(noisy))
        index_logits: Tensor = provenance.index_logits(feature_maps, alpha_bars.to(unet.device), labels)
        return index_logits.cpu()

    return logits


@dataclass(frozen=True)
class Average:
    """One way to make one attribution of posteriors at many levels."""

    is_conditional: bool
    """Whether the posteriors know the query's class, so that other classes have nothing."""
    averaged: Averaged
    """What the average is taken of."""
    low: float
    """Lower end of the window of alpha_bar, excluded."""
    high: float
    """Upper end of the window of alpha_bar, excluded."""
    temperature: float
    """Temperature of the posteriors; above 1 they are flatter."""

    def __str__(self) -> str:
        condition = "conditional" if self.is_conditional else "unconditional"
        window = f"{self.low:g} < alpha_bar < {self.high:g}"
        return f"{condition}, {self.averaged}, {window}, temperature {self.temperature:g}"

    def inside(self, alpha_bar: Tensor) -> Tensor:
        """Say which levels (step,) are in the window, bool (step,)."""
        return (self.low < alpha_bar) & (alpha_bar < self.high)

    def steps_from(self, other: Average) -> int:
        """Count the steps on the grid of what is tried."""
        axes = ((False, True), AVERAGED, LOWEST, HIGHEST, TEMPERATURES)
        places = zip(axes, astuple(self), astuple(other), strict=True)
        return sum(abs(axis.index(value) - axis.index(default)) for axis, value, default in places)

    def __call__(self, log_probs: Tensor, alpha_bar: Tensor) -> Tensor:
        """Average log-posteriors (step, query, train) at levels (step,): (query, train), each query's sum is 1."""
        chosen = log_probs[self.inside(alpha_bar)] / self.temperature
        if self.averaged == "probabilities":
            return chosen.softmax(dim=2).mean(dim=0)
        return chosen.mean(dim=0).softmax(dim=1)


AVERAGES = tuple(
    Average(is_conditional, averaged, low, high, temperature)
    for is_conditional, low, high, temperature, averaged in product(
        (True, False), LOWEST, HIGHEST, TEMPERATURES, AVERAGED
    )
)

DEFAULT = Average(is_conditional=True, averaged="probabilities", low=0.05, high=0.9, temperature=1.0)
"""What methods that are tuned start from."""


class TemperedPosterior:
    """What the pipeline calls the posterior: the mean over its window under its temperatures, conditional.

    Nothing is tuned on subset models.
    """

    settings = (Untuned(),)

    def __init__(
        self,
        make_posterior: Callable[[ImageSet], StepPosterior],
        tracer: Tracer,
        temperatures: Temperatures,
        *,
        along: Along,
        num_bytes: int,
    ) -> None:
        """Take what gives the posterior over a training set, its temperatures, and the bytes that it needs."""
        self.make_posterior, self.tracer, self.temperatures = make_posterior, tracer, temperatures
        self.along, self.num_bytes = along, num_bytes

    def fit(self, train: ImageSet) -> None:
        """Make the posterior."""
        self.posterior = self.make_posterior(train)

    def attribute(self, queries: Queries, only: Untuned | None = None) -> AttributionScores[Untuned]:  # noqa: ARG002 - there is one
        """Ask at every level of the window."""
        noisy, (low, high) = queries.along(self.along), self.temperatures.window
        inside = ((noisy.alpha_bars > low) & (noisy.alpha_bars < high)).nonzero().flatten()
        probs = torch.stack([self._probs(noisy, level, queries.class_labels) for level in inside.tolist()])
        spans = level_spans(noisy.alpha_bars[inside]).to(probs)
        return AttributionScores.in_a_row([torch.einsum("s,sqt->qt", spans / spans.sum(), probs)], self.settings)

    def _probs(self, noisy: NoisyImages, level: int, labels: Tensor) -> Tensor:
        """Ask at one level, (query, train)."""
        alpha_bar = noisy.alpha_bars[level]
        logits = self.posterior(noisy.images[level], noisy.timesteps[level], alpha_bar, labels).float()
        temperature = self.temperatures.temperature(self.tracer, alpha_bar.expand(len(labels)), labels)
        return (logits / temperature[:, None].to(logits)).softmax(dim=1)

    def kept(self) -> Cache:
        """Pixels, or the provenance network."""
        return Cache(num_bytes=self.num_bytes)


class PosteriorAttributor:
    """Averages the posteriors of a query over a window of noise levels.

    Tuned are the window, whether the posteriors know the query's class, whether probabilities or their logarithms are
    averaged, and a temperature.
    """

    settings = AVERAGES

    def __init__(self, make_posterior: Callable[[ImageSet], StepPosterior], *, along: Along, num_bytes: int) -> None:
        """Take what gives the posterior over a training set, and the bytes that it needs beside the generator."""
        self.make_posterior, self.along, self.num_bytes = make_posterior, along, num_bytes

    def fit(self, train: ImageSet) -> None:
        """Make the posterior."""
        self.posterior = self.make_posterior(train)
        self.null_label = train.num_classes

    def attribute(self, queries: Queries, only: Average | None = None) -> AttributionScores[Average]:
        """Ask at every level once, and average in every way, or in the `only` one."""
        noisy = queries.along(self.along)
        wanted = [a for a in AVERAGES if only in (None, a) and a.inside(noisy.alpha_bars).any()]
        levels = torch.stack([average.inside(noisy.alpha_bars) for average in wanted]).any(dim=0).nonzero().flatten()
        null = torch.full_like(queries.class_labels, self.null_label)
        values: dict[Average, Tensor] = {}
        for is_conditional, labels in ((True, queries.class_labels), (False, null)):
            if averages := [average for average in wanted if average.is_conditional == is_conditional]:
                log_probs = self._log_probs(noisy, levels, labels)
                values |= {average: average(log_probs, noisy.alpha_bars[levels]) for average in averages}
        return AttributionScores(
            values=torch.stack([*values.values()]),
            settings=tuple(values),
            distance_to_default=tuple(average.steps_from(DEFAULT) for average in values),
        )

    def _log_probs(self, noisy: NoisyImages, levels: Tensor, labels: Tensor) -> Tensor:
        """Ask at some levels, (level, query, train)."""
        logits = [self.posterior(noisy.images[n], noisy.timesteps[n], noisy.alpha_bars[n], labels) for n in levels]
        return torch.stack([of_level.float().log_softmax(dim=1) for of_level in logits])

    def kept(self) -> Cache:
        """Pixels, or the provenance network."""
        return Cache(num_bytes=self.num_bytes)
