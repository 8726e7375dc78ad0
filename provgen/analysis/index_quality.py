"""How well the provenance network predicts the index, beside the best anything could do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.analysis.statistics import Estimate, mean_estimate
from provgen.attribution.network import NetworkPosterior
from provgen.attribution.posterior import ClosedFormPosterior
from provgen.attribution.trajectory import WINDOW
from provgen.training.batches import seeded_generator
from provgen.training.targets import mix_classes

LEVELS = (0.02, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
"""Signal levels a_t that are looked at; the nearest timestep of the schedule is taken."""


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
    kl_gap: Estimate
    """`cross_entropy` minus its ceiling: mean KL divergence from closed form to network, nats."""
    top1: Estimate
    top1_ceiling: float
    top5: Estimate
    top5_ceiling: float
    query_gaps: Tensor
    """KL divergence of every query, nats, (query,)."""

    def as_row(self) -> dict[str, Any]:
        """Give the metrics as a flat JSON-able dict; estimates become NAME, NAME_low and NAME_high."""
        row: dict[str, Any] = {"n": len(self.query_gaps)}
        for name, value in vars(self).items():
            if isinstance(value, Estimate):
                row |= {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
            elif not isinstance(value, Tensor):
                row[name] = value
        return row


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
        has_label = (self.labels != null).nonzero().flatten()
        kinds = {"null": (torch.arange(len(null)), null)}
        if len(has_label):
            kinds = {"labelled": (has_label, self.labels[has_label]), **kinds}
        return [
            self._level(network, timestep, name, queries, labels)
            for timestep in self.timesteps
            for name, (queries, labels) in kinds.items()
        ]

    def _level(
        self, network: NetworkPosterior, timestep: int, rows: str, queries: Tensor, labels: Tensor
    ) -> IndexQuality:
        level = self.alphas_cumprod[timestep]
        noisy = level.sqrt() * self.clean_images[queries] + (1 - level).sqrt() * self.noise[queries]
        log_probs = self._log_probs(network, noisy, timestep, labels)
        start, measured = 0, []
        for posterior in self.closed_form.chunks(noisy, level.expand(len(noisy)), labels):
            stop = start + len(posterior)
            measured.append(self._compare(log_probs[start:stop], posterior))
            start = stop
        cross_entropy, floor, top1, top1_ceiling, top5, top5_ceiling = torch.cat(measured).T
        return IndexQuality(
            signal=float(level),
            rows=rows,
            cross_entropy=float(cross_entropy.mean()),
            cross_entropy_ceiling=float(floor.mean()),
            kl_gap=mean_estimate(cross_entropy - floor, seed=0),
            top1=mean_estimate(top1, seed=0),
            top1_ceiling=float(top1_ceiling.mean()),
            top5=mean_estimate(top5, seed=0),
            top5_ceiling=float(top5_ceiling.mean()),
            query_gaps=cross_entropy - floor,
        )

    def _log_probs(self, network: NetworkPosterior, noisy: Tensor, timestep: int, labels: Tensor) -> Tensor:
        """Ask the network, in float64 on the CPU: (query, train)."""
        device = network.denoiser.device
        logits = network.index_logits(
            noisy.to(device, network.denoiser.dtype),
            torch.full((len(noisy),), timestep, device=device),
            self.alphas_cumprod[timestep].to(device).expand(len(noisy)),
            labels.to(device),
        )
        return logits.cpu().double().log_softmax(dim=1)

    def _compare(self, log_probs: Tensor, posterior: Tensor) -> Tensor:
        """Measure each query: six columns in the order that `_level` unpacks; both arguments (query, train)."""
        target = mix_classes(
            posterior,
            self.closed_form.labels,
            num_classes=self.closed_form.null_label,
            mixing=self.label_mixing,
        )
        five = min(5, posterior.shape[1])
        chosen = posterior.gather(1, log_probs.topk(five, dim=1).indices)
        best = posterior.topk(five, dim=1).values
        return torch.stack(
            [
                -(target * log_probs).sum(dim=1),
                torch.special.entr(target).sum(dim=1),
                chosen[:, 0],
                best[:, 0],
                chosen.sum(dim=1),
                best.sum(dim=1),
            ],
            dim=1,
        )


def mean_kl_gap(qualities: list[IndexQuality], rows: str) -> Estimate:
    """Mean KL gap in nats over the levels inside the trace window, bootstrapped over queries."""
    gaps = [q.query_gaps for q in qualities if q.rows == rows and WINDOW[0] < q.signal < WINDOW[1]]
    return mean_estimate(torch.stack(gaps).mean(dim=0), seed=0)
