"""The table of leave-out models: how far samples moved, and how much harder they are to denoise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from provgen.analysis.leave_out import distance_moved, paired_effect
from provgen.analysis.statistics import Estimate
from provgen.leave_out_files import LeftOut, Outcome

MOVED = "distance from the sample of the run, Euclidean, pixels in [-1, 1]"
LOSS = "denoising loss on the sample, x 1000"


def leave_out_effects(
    outcomes: Mapping[LeftOut, Outcome], samples: Tensor, methods: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """Collect effects (seed, query) by title and method, of the queries that have every seed of every method.

    Args:
        outcomes: Of one share.
        samples: Of the run, uint8 (query, channel, height, width).
        methods: Those that are compared.
    """
    by_place = {(model.method, model.seed, model.query): outcome for model, outcome in outcomes.items()}
    seeds = sorted({model.seed for model in outcomes})
    queries = [
        query
        for query in sorted({model.query for model in outcomes})
        if all((method, seed, query) in by_place for method in methods for seed in seeds)
    ]
    if not queries:
        return {}
    moved, losses = {}, {}
    before = samples[queries]
    for method in methods:
        chosen = [[by_place[method, seed, query] for query in queries] for seed in seeds]
        moved[method] = torch.stack(
            [distance_moved(before, torch.stack([o.image for o in row])) for row in chosen]
        )
        losses[method] = torch.tensor([[1e3 * outcome.loss for outcome in row] for row in chosen])
    return {MOVED: moved, LOSS: losses}


def effect_table(effects: Mapping[str, Tensor], references: Sequence[str]) -> str:
    """Lay out a line for each method, the largest effect first, with paired differences and 95 % intervals."""
    lines = [["method", "queries", "mean", *(f"over {name}" for name in references)]]
    lines.append(["---", *["---:"] * (len(references) + 2)])
    means = {method: paired_effect(effects, method, None) for method in effects}
    for method in sorted(means, key=lambda name: -means[name].value):
        differences = [
            "-" if method == name else _text(paired_effect(effects, method, name)) for name in references
        ]
        lines.append([method, str(means[method].n), _text(means[method]), *differences])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _text(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
