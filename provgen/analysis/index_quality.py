"""How well the provenance network predicts the index, beside the best anything could do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.attribution.network import NetworkPosterior
from provgen.attribution.posterior import ClosedFormPosterior
from provgen.training.batches import seeded_generator
from provgen.training.targets import mix_classes

LEVELS = (0.02, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Signal levels a_t that are looked at; the nearest timestep of the schedule is taken."""

WINDOW = (0.05, 0.9)
"""Levels between these make the mean KL gap."""


@dataclass(frozen=True, kw_only=True)
class IndexQuality:
    """Index metrics at one noise level, each beside its closed-form ceiling.

    The parent of x_t is not drawn but averaged over the closed-form posterior: `top1` is the probability that
    the network's first choice is the parent. That has the expectation of the plain hit rate, less variance, and
    never exceeds its ceiling by chance.
    """

    signal: float
    """a_t."""
    rows: str
    """`labelled` or `null`: whether the class label was given, to the network and to the ceiling alike."""
    cross_entropy: float
    """Nats."""
    cross_entropy_ceiling: float
    """Least cross-entropy: the conditional entropy H(i | x_t), nats."""
    kl_gap: float
    """`cross_entropy` minus its ceiling: mean KL divergence from closed form to network, nats."""
    top1: float
    top1_ceiling: float
    top5: float
    top5_ceiling: float
    n: int
    """Queries."""

    def as_row(self) -> dict[str, Any]:
        """Give the fields as a JSON-able dict."""
        return asdict(self)


class IndexProbe:
    """Fixed noisy training images on which index metrics are measured again and again."""

    def __init__(
        self,
        closed_form: ClosedFormPosterior,
        train_images: Tensor,
        train_labels: Tensor,
        alphas_cumprod: Tensor,
        *,
        num_queries: int,
        label_mixing: float,
        seed: int,
    ) -> None:
        """Choose queries and their noise.

        Args:
            closed_form: In float64: the ceilings come from it.
            train_images: In [-1, 1], (train, channel, height, width).
            train_labels: int64 (train,).
            alphas_cumprod: a_t of every timestep, (num_train_timesteps,).
            num_queries: Training images looked at per level.
            label_mixing: alpha of the targets the network was trained towards.
            seed: Of the choice and the noise.
        """
        generator = seeded_generator(seed, 2)
        queries = torch.randperm(len(train_images), generator=generator)[:num_queries]
        self.closed_form = closed_form
        self.clean_images = train_images[queries]
        self.labels = train_labels[queries]
        self.noise = randn_tensor(self.clean_images.shape, generator=generator, dtype=train_images.dtype)
        self.alphas_cumprod = alphas_cumprod
        self.timesteps = [int((alphas_cumprod - level).abs().argmin()) for level in LEVELS]
        self.label_mixing = label_mixing

    def measure(self, network: NetworkPosterior) -> list[IndexQuality]:
        """Measure every level, labelled rows (where there are labels) and null rows apart."""
        null = torch.full_like(self.labels, self.closed_form.null_label)
        kinds = (
            {"labelled": self.labels, "null": null} if bool((self.labels != null).any()) else {"null": null}
        )
        return [
            self._level(network, timestep, name, labels)
            for timestep in self.timesteps
            for name, labels in kinds.items()
        ]

    def _level(self, network: NetworkPosterior, timestep: int, rows: str, labels: Tensor) -> IndexQuality:
        device = network.denoiser.device
        level = self.alphas_cumprod[timestep]
        noisy = level.sqrt() * self.clean_images + (1 - level).sqrt() * self.noise
        signal = level.expand(len(noisy))
        steps = torch.full((len(noisy),), timestep)
        logits = network.index_logits(
            noisy.to(device, network.denoiser.dtype), steps.to(device), signal.to(device), labels.to(device)
        )
        log_probs = logits.double().log_softmax(dim=1).cpu()
        start, totals = 0, torch.zeros(6, dtype=torch.float64)
        for posterior in self.closed_form.chunks(noisy, signal, labels):
            stop = start + len(posterior)
            totals += self._compare(log_probs[start:stop], posterior)
            start = stop
        values = (totals / start).tolist()
        names = ("cross_entropy", "cross_entropy_ceiling", "top1", "top1_ceiling", "top5", "top5_ceiling")
        measured = dict(zip(names, values, strict=True))
        return IndexQuality(signal=float(level), rows=rows, kl_gap=values[0] - values[1], n=start, **measured)

    def _compare(self, log_probs: Tensor, posterior: Tensor) -> Tensor:
        """Sum the six measures over queries; both arguments (query, train)."""
        target = mix_classes(
            posterior,
            self.closed_form.labels,
            num_classes=self.closed_form.null_label,
            mixing=self.label_mixing,
        )
        five = min(5, posterior.shape[1])
        chosen = log_probs.topk(five, dim=1).indices
        best = target.topk(five, dim=1).indices
        return torch.stack(
            [
                -(target * log_probs).sum(),
                torch.special.entr(target).sum(),
                posterior.gather(1, chosen[:, :1]).sum(),
                posterior.gather(1, best[:, :1]).sum(),
                posterior.gather(1, chosen).sum(),
                posterior.gather(1, best).sum(),
            ]
        )


def mean_kl_gap(qualities: list[IndexQuality], rows: str) -> float:
    """Mean KL gap over the levels inside `WINDOW`, in nats."""
    gaps = [q.kl_gap for q in qualities if q.rows == rows and WINDOW[0] < q.signal < WINDOW[1]]
    return sum(gaps) / len(gaps)
