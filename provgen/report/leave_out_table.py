"""The table of leave-out models: how far samples moved, and how much harder they are to denoise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from provgen.analysis.leave_out import distance_moved, paired_effect
from provgen.analysis.statistics import Estimate
from provgen.leave_out_files import NOTHING, LeftOut, Outcome
from provgen.run_folder import atomic_path

MOVED = "distance from what the same seed makes with all images, Euclidean, pixels in [-1, 1]"
LOSS = "denoising loss on the sample above that with all images, x 1000"
OF_CLASS = "share of the sample's class that was left out"


def leave_out_effects(
    outcomes: Mapping[LeftOut, Outcome],
    methods: Sequence[str],
    *,
    train_labels: Tensor,
    query_labels: Tensor,
) -> dict[str, dict[str, Tensor]]:
    """Collect effects (seed, query) by title and method, of the queries that have every seed of every method.

    Args:
        outcomes: Of one share, and those with nothing left out.
        methods: Those that are compared.
        train_labels: int64 (train,).
        query_labels: int64 (query,), of all samples.
    """
    share = max(model.share for model in outcomes)
    seeds = sorted({model.seed for model in outcomes})
    queries = [
        query
        for query in sorted({model.query for model in outcomes})
        if all(
            LeftOut(seed=seed, share=of, query=query, method=method) in outcomes
            for of, method in [(0.0, NOTHING), *((share, method) for method in methods)]
            for seed in seeds
        )
    ]
    effects: dict[str, dict[str, Tensor]] = {MOVED: {}, LOSS: {}, OF_CLASS: {}}
    for method in methods if queries else []:
        models = [
            [LeftOut(seed=seed, share=share, query=query, method=method) for query in queries]
            for seed in seeds
        ]
        pairs = [
            [(outcomes[m], outcomes[replace(m, share=0.0, method=NOTHING)]) for m in row] for row in models
        ]
        effects[MOVED][method] = torch.stack([
            distance_moved(torch.stack([b.image for _, b in row]), torch.stack([a.image for a, _ in row]))
            for row in pairs
        ])  # fmt: skip
        effects[LOSS][method] = torch.tensor([[1e3 * (a.loss - b.loss) for a, b in row] for row in pairs])
        effects[OF_CLASS][method] = torch.tensor([
            [_share_of_class(outcomes[m].left_out, train_labels, query_labels[m.query]) for m in row]
            for row in models
        ])  # fmt: skip
    return effects if queries else {}


def _share_of_class(left_out: Tensor, train_labels: Tensor, label: Tensor) -> float:
    of_class = train_labels == label
    return float(of_class[left_out].sum() / of_class.sum().clamp_min(1))


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


def effect_rows(share: float, effects: Mapping[str, Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Give a flat row for each title and method of what leaving out a share of the images did."""
    return [
        {"share": share, "effect": title, "method": method, **asdict(paired_effect(by_method, method, None))}
        for title, by_method in effects.items()
        for method in by_method
    ]


def write_effects(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the rows of all shares."""
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"schema_version": "1"})
    with atomic_path(path) as partial:
        pq.write_table(table, partial)


def read_moved(path: Path) -> dict[str, dict[str, Estimate]]:
    """Read how far samples moved, by what was left out, then by method; nothing where there is no such file."""
    moved: dict[str, dict[str, Estimate]] = {}
    for row in pq.read_table(path).to_pylist() if path.is_file() else []:
        if row["effect"] == MOVED:
            by_method = moved.setdefault(f"moved without {row['share']:.0%}", {})
            by_method[row["method"]] = Estimate(row["value"], row["low"], row["high"], row["n"])
    return moved
