"""Planted sources, whose truth is known: how often tracers name them, and how sure they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from provgen.generators.closed_form import ClosedFormPosterior
from provgen.metrics.statistics import Estimate, mean_estimate, proportion
from provgen.tracing.noisy_queries import NoisyQueries
from provgen.tracing.trace import LEAST_ALPHA_BAR


@dataclass(frozen=True, kw_only=True)
class PlantedQueries:
    """x_parent + s * noise."""

    images: Tensor
    """(query, channel, height, width), in the range of the training images up to the noise."""
    parents: Tensor
    """int64 (query,), rows of the training set."""
    bandwidth: float
    """s, standard deviation of the noise of every pixel."""


def plant(train_images: Tensor, count: int, *, bandwidth: float, seed: int) -> PlantedQueries:
    """Draw from the kernel density estimate with a Gaussian kernel, and keep the parents.

    Args:
        train_images: Floating (train, channel, height, width).
        count: Queries.
        bandwidth: s.
        seed: Of parents and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    parents = torch.randint(len(train_images), (count,), generator=generator)
    noise = torch.randn((count, *train_images.shape[1:]), generator=generator, dtype=train_images.dtype)
    return PlantedQueries(images=train_images[parents] + bandwidth * noise, parents=parents, bandwidth=bandwidth)


def source_groups(train_images: Tensor) -> Tensor:
    """Number the distinct images, int64 (train,): exact copies are one source, as nobody could tell them apart."""
    groups: Tensor = train_images.flatten(1).unique(dim=0, return_inverse=True)[1]
    return groups


def bayes_hits(planted: PlantedQueries, train_images: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Trace as well as can be done: by the exact posterior of the parent's group.

    Returns:
        Whether the parent's group is among the k most probable, bool (query,), and how sure of it the posterior is,
        (query,): both have the mean that no tracer can exceed, and the second varies less.
    """
    squares = torch.cdist(planted.images.flatten(1).double(), train_images.flatten(1).double()).square()
    posterior = (-squares / (2 * planted.bandwidth**2)).softmax(dim=1)
    by_group = torch.zeros(len(posterior), int(groups.max()) + 1, dtype=torch.float64)
    by_group.index_add_(1, groups, posterior)
    best = by_group.topk(min(k, by_group.shape[1]), dim=1)
    is_parent = best.indices == groups[planted.parents][:, None]
    return is_parent.any(dim=1), best.values.sum(dim=1)


def precision_at(scores: Tensor, parents: Tensor, groups: Tensor, k: int) -> Estimate:
    """Give the share of queries whose parent, or a copy of it, is among the first k sources.

    Args:
        scores: (query, train).
        parents: int64 (query,).
        groups: int64 (train,), of `source_groups`; every group counts as one of the k, with its best example.
        k: Sources looked at.
    """
    best = torch.full((len(scores), int(groups.max()) + 1), -torch.inf, dtype=scores.dtype)
    best.scatter_reduce_(1, groups.expand(len(scores), -1), scores, reduce="amax")
    first = best.topk(min(k, best.shape[1]), dim=1).indices
    hits = (first == groups[parents][:, None]).any(dim=1)
    return proportion(int(hits.sum()), len(hits))


def reliability(posterior: Tensor, parents: Tensor, groups: Tensor, edges: Tensor) -> list[tuple[Estimate, Estimate]]:
    """Compare what a tracer believes of its first source with how often that is the parent.

    Args:
        posterior: (query, train), beliefs that sum to 1 at most.
        parents: int64 (query,).
        groups: int64 (train,), of `source_groups`.
        edges: Ascending (bin + 1,) over [0, 1]; a belief on an edge falls into the bin above.

    Returns:
        For every bin that has queries: mean belief, and share that is right.
    """
    by_group = torch.zeros(len(posterior), int(groups.max()) + 1, dtype=torch.float64)
    by_group.index_add_(1, groups, posterior.double())
    belief, first = by_group.max(dim=1)
    is_right = first == groups[parents]
    places = torch.bucketize(belief, edges[1:-1].double(), right=True)
    return [
        (mean_estimate(belief[places == place], seed=0), proportion(int(is_right[places == place].sum()), n))
        for place in range(len(edges) - 1)
        if (n := int((places == place).sum()))
    ]


def ideal_samples(
    closed_form: ClosedFormPosterior,
    scheduler: DDIMScheduler,
    noise: Tensor,
    class_labels: Tensor,
    *,
    num_inference_steps: int,
) -> tuple[Tensor, NoisyQueries]:
    """Sample with E[x_0 | x_t] = sum over i of p(i | x_t) x_i, the denoiser of least loss on the training images.

    It ends on training images, or on a mean of several that lie so close together that the last step cannot tell
    them apart (e.g. Gu et al. 2023, arXiv 2310.02664).

    Args:
        closed_form: Posterior over the training images.
        scheduler: Predicts the noise.
        noise: Where sampling starts, (query, channel, height, width).
        class_labels: int64 (query,); the null label allows all training images.
        num_inference_steps: DDIM steps.

    Returns:
        Images in [-1, 1], (query, channel, height, width), and what each was at every step worth tracing.
    """
    scheduler.set_timesteps(num_inference_steps)
    images, traced = noise, []
    for timestep in scheduler.timesteps:
        level = scheduler.alphas_cumprod[timestep].to(noise)
        if level >= LEAST_ALPHA_BAR:
            traced.append(images)
        probs = closed_form.probs(images, level.expand(len(images)), class_labels)
        denoised = (probs @ closed_form.rows).view_as(images)
        predicted_noise = (images - level.sqrt() * denoised) / (1 - level).sqrt()
        images = scheduler.step(predicted_noise, timestep, images).prev_sample
    timesteps = scheduler.timesteps[-len(traced) :]
    return images, NoisyQueries(
        images=torch.stack(traced), timesteps=timesteps, alpha_bar=scheduler.alphas_cumprod[timesteps]
    )


FIRST = 5

EDGES = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1])
"""Bins of belief."""


RANKS = (1, FIRST)
"""Numbers of sources that are looked at."""


def precision_table(scores: Mapping[str, Tensor], parents: Tensor, groups: Tensor, best: Sequence[Estimate]) -> str:
    """Lay out how often the parent is the first source, or one of the first five, for every tracer.

    Args:
        scores: (query, train) by tracer.
        parents: int64 (query,).
        groups: int64 (train,), of `source_groups`.
        best: How often the ideal tracer's first source is the parent, and how often one of its first five.
    """
    lines = [["tracer", "first source, %", f"one of the first {FIRST}, %"]]
    for name, some in scores.items():
        lines.append([name, *(_percent(precision_at(some, parents, groups, k)) for k in RANKS)])
    lines.append(["best possible", *map(_percent, best)])
    return _table(lines)


def reliability_table(beliefs: Mapping[str, Tensor], parents: Tensor, groups: Tensor) -> str:
    """Lay out how often first sources are the parent, by how sure of them a tracer is; arguments as above."""
    lines = [["tracer", "queries", "mean belief, %", "right, %"]]
    for name, some in beliefs.items():
        for belief, right in reliability(some, parents, groups, EDGES):
            lines.append([name, str(right.n), f"{100 * belief.value:.1f}", _percent(right)])
    return _table(lines)


def _percent(estimate: Estimate) -> str:
    value, low, high = (100 * number for number in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _table(lines: Sequence[Sequence[str]]) -> str:
    title, *rows = [f"| {' | '.join(line)} |" for line in lines]
    rule = f"| --- |{' ---: |' * (len(lines[0]) - 1)}"
    return "\n".join([title, rule, *rows]) + "\n"
