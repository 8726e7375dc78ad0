"""Posteriors at many noise levels as one attribution: which levels, what is averaged, and how sharply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Literal, Protocol

import torch
from diffusers import UNet2DModel
from torch import Tensor

from provgen.attribution.attributor import AttributionScores, Kept, Queries
from provgen.attribution.noisy_queries import NoisyQueries
from provgen.attribution.posterior import Oracle
from provgen.data.dataset import ImageSet
from provgen.models.diffusion import record_stages
from provgen.models.provenance import ProvenanceNetwork

LOWEST, HIGHEST = (0.01, 0.05, 0.2), (0.5, 0.9, 0.99)
"""Ends of the windows of signal levels that are tried."""

TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0)


Along = Literal["trajectory", "noised"]


class StepPosterior(Protocol):
    """log p(i | x_t, y) of one noise level, up to a constant of each query."""

    def __call__(self, noisy: Tensor, timestep: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        """Give logits (query, train) for x_t (query, channel, height, width) with labels (query,)."""
        ...


def closed_form_steps(oracle: Oracle) -> StepPosterior:
    """Take the closed form."""
    return lambda noisy, _, signal, labels: oracle.logits(noisy, signal.expand(len(noisy)), labels)


def network_steps(unet: UNet2DModel, provenance: ProvenanceNetwork) -> StepPosterior:
    """Take the provenance network on the denoiser's stages."""

    @torch.no_grad()
    def logits(noisy: Tensor, timestep: Tensor, signal: Tensor, class_labels: Tensor) -> Tensor:
        noisy, labels = noisy.to(unet.device), class_labels.to(unet.device)
        with record_stages(unet) as stages:
            unet(noisy, timestep, class_labels=labels)
        found: Tensor = provenance.index_logits(stages, signal.to(unet.device).expand(len(noisy)), labels)
        return found.cpu()

    return logits


class PosteriorAttributor:
    """Averages the posteriors of a query over a window of noise levels.

    Tuned are the window, whether the query's class is told (then other classes have nothing), whether
    probabilities or their logarithms are averaged, and a temperature.
    """

    def __init__(
        self,
        make_posterior: Callable[[ImageSet], StepPosterior],
        *,
        along: Along,
        num_bytes: int,
    ) -> None:
        """Keep what to ask.

        Args:
            make_posterior: Gives the posterior over a training set.
            along: Ask at the steps that the sampler passed through, or of the image noised again. An image that
                was not generated has no trajectory and is always noised.
            num_bytes: What the posterior needs beside the generator.
        """
        self.make_posterior = make_posterior
        self.along = along
        self.num_bytes = num_bytes

    def fit(self, train: ImageSet) -> None:
        """Make the posterior."""
        self.posterior = self.make_posterior(train)
        self.null_label = train.num_classes

    def attribute(self, queries: Queries) -> AttributionScores:
        """Ask at every level once, and average in every way."""
        is_along = self.along == "trajectory" and queries.trajectory is not None
        noisy = queries.trajectory if is_along and queries.trajectory is not None else queries.noisy
        null = torch.full_like(queries.class_labels, self.null_label)
        named: dict[str, Tensor] = {}
        for told, labels in (("class told", queries.class_labels), ("no class told", null)):
            log_probs = self._log_probs(noisy, labels)
            named |= {f"{told}, {name}": scores for name, scores in averages(log_probs, noisy.signal)}
        return AttributionScores(values=torch.stack(list(named.values())), settings=tuple(named))

    def kept(self) -> Kept:
        """Pixels, or the provenance network."""
        return Kept(num_bytes=self.num_bytes)

    def _log_probs(self, noisy: NoisyQueries, labels: Tensor) -> Tensor:
        steps = zip(noisy.images, noisy.timesteps, noisy.signal, strict=True)
        logits = [self.posterior(images, timestep, signal, labels) for images, timestep, signal in steps]
        return torch.stack([some.float().log_softmax(dim=1) for some in logits])


def averages(log_probs: Tensor, signal: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Average log-posteriors (step, query, train) at levels (step,) over every window, in every way.

    Yields:
        A name, and scores (query, train) that sum to 1 for each query.
    """
    windows = [
        (low, high) for low, high in product(LOWEST, HIGHEST) if ((low < signal) & (signal < high)).any()
    ]
    for (low, high), temperature in product(windows, TEMPERATURES):
        chosen = log_probs[(low < signal) & (signal < high)] / temperature
        window = f"{low:g} < a_t < {high:g}, temperature {temperature:g}"
        yield f"probabilities, {window}", chosen.softmax(dim=2).mean(dim=0)
        yield f"logarithms, {window}", chosen.mean(dim=0).softmax(dim=1)
