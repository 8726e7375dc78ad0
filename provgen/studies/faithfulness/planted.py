"""Queries with planted sources, whose truth is known: how often tracers name them, and how sure they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from provgen.generators.closed_form import ClosedFormPosterior
from provgen.metrics.statistics import Estimate, mean_estimate, proportion
from provgen.models.diffusion import denoiser_target
from provgen.report.format import markdown_table, percent
from provgen.studies.faithfulness.attributor import LEAST_ALPHA_BAR
from provgen.tracing.trace import NoisyImages

FIRST = 5
"""Sources that the second column of `precision_table` looks at."""

RANKS = (1, FIRST)
"""Numbers of sources that are looked at."""

EDGES = torch.tensor([0, 0.2, 0.4, 0.6, 0.8, 0.9, 1])
"""Bins of belief of `reliability_table`."""


@dataclass(frozen=True, kw_only=True)
class PlantedQueries:
    """Images that are a training image each, its parent, plus s * noise."""

    images: Tensor
    """(query, channel, height, width), in the range of the training images up to the noise."""
    parents: Tensor
    """int64 (query,), rows of the training set."""
    bandwidth: float
    """Standard deviation s of the noise of every pixel."""


def plant(train_images: Tensor, count: int, *, bandwidth: float, seed: int) -> PlantedQueries:
    """Draw from the kernel density of images, floating (train, channel, height, width), and keep the parents."""
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
    by_group = _group_sums(posterior, groups)
    best = by_group.topk(min(k, by_group.shape[1]), dim=1)
    is_parent = best.indices == groups[planted.parents][:, None]
    return is_parent.any(dim=1), best.values.sum(dim=1)


def precision_at(scores: Tensor, parents: Tensor, groups: Tensor, k: int) -> Estimate:
    """Give the share of queries whose parent (query,), or a copy of it, is among the first k by scores (query, train).

    Every one of the `source_groups`, int64 (train,), counts as one of the k, with its best example.
    """
    best = torch.full((len(scores), int(groups.max()) + 1), -torch.inf, dtype=scores.dtype)
    best.scatter_reduce_(1, groups.expand(len(scores), -1), scores, reduce="amax")
    first = best.topk(min(k, best.shape[1]), dim=1).indices
    hits = (first == groups[parents][:, None]).any(dim=1)
    return proportion(int(hits.sum()), len(hits))


def reliability(posterior: Tensor, parents: Tensor, groups: Tensor, edges: Tensor) -> list[tuple[Estimate, Estimate]]:
    """Compare what a tracer believes of its first source with how often that is the parent.

    Beliefs (query, train) sum to 1 at most. One on an edge, ascending (bin + 1,) over [0, 1], falls into the bin above.

    Returns:
        For every bin that has queries: mean belief, and share that is right.
    """
    belief, first = _group_sums(posterior.double(), groups).max(dim=1)
    is_right = first == groups[parents]
    bins = torch.bucketize(belief, edges[1:-1].double(), right=True)
    return [
        (mean_estimate(belief[bins == number], seed=0), proportion(int(is_right[bins == number].sum()), n))
        for number in range(len(edges) - 1)
        if (n := int((bins == number).sum()))
    ]


def _group_sums(posterior: Tensor, groups: Tensor) -> Tensor:
    """Add up the posterior float64 (query, train) of each group, (query, group)."""
    sums = torch.zeros(len(posterior), int(groups.max()) + 1, dtype=torch.float64)
    return sums.index_add_(1, groups, posterior)


def ideal_samples(
    closed_form: ClosedFormPosterior,
    scheduler: DDIMScheduler,
    noise: Tensor,
    class_labels: Tensor,
    *,
    num_inference_steps: int,
) -> tuple[Tensor, NoisyImages]:
    """Sample with E[x_0 | x_t] = sum over i of p(i | x_t) x_i, the denoiser of least loss on the training images.

    It ends on training images, or on a mean of several that lie so close together that the last step cannot tell
    them apart (e.g. Gu et al. 2023, arXiv 2310.02664).

    Sampling starts from noise (query, channel, height, width) with labels (query,); the null label allows all images.

    Returns:
        Images in [-1, 1], (query, channel, height, width), and what each was at every step worth tracing.
    """
    scheduler.set_timesteps(num_inference_steps)
    images, traced = noise, []
    for timestep in scheduler.timesteps:
        alpha_bar = scheduler.alphas_cumprod[timestep].to(noise)
        if alpha_bar >= LEAST_ALPHA_BAR:
            traced.append(images)
        probs = closed_form.probs(images, alpha_bar.expand(len(images)), class_labels)
        denoised = (probs @ closed_form.rows).view_as(images)
        removed = (images - alpha_bar.sqrt() * denoised) / (1 - alpha_bar).sqrt()
        output = denoiser_target(scheduler, denoised, removed, timestep)
        images = scheduler.step(output, timestep, images).prev_sample
    timesteps = scheduler.timesteps[-len(traced) :]
    alpha_bars = scheduler.alphas_cumprod[timesteps]
    return images, NoisyImages(images=torch.stack(traced), timesteps=timesteps, alpha_bars=alpha_bars)


def precision_table(scores: Mapping[str, Tensor], parents: Tensor, groups: Tensor, best: Sequence[Estimate]) -> str:
    """Lay out how often the parent is the first source, or one of the first five; arguments as of `precision_at`.

    Scores are by tracer; `best` has the two numbers of the ideal one.
    """
    rows = [
        [name, *(percent(precision_at(scores_of_tracer, parents, groups, k)) for k in RANKS)]
        for name, scores_of_tracer in scores.items()
    ]
    header = ["tracer", "first source, %", f"one of the first {FIRST}, %"]
    return markdown_table(header, [*rows, ["best possible", *map(percent, best)]])


def reliability_table(beliefs: Mapping[str, Tensor], parents: Tensor, groups: Tensor) -> str:
    """Lay out how often first sources are the parent, by how sure of them a tracer is."""
    rows = [
        [name, right.n, f"{100 * belief.value:.1f}", percent(right)]
        for name, posterior in beliefs.items()
        for belief, right in reliability(posterior, parents, groups, EDGES)
    ]
    return markdown_table(["tracer", "queries", "mean belief, %", "right, %"], rows)
