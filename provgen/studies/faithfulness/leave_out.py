"""What becomes of a sample when the sources that a method names are left out: models, effects, table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from provgen.metrics.statistics import Estimate, mean_estimate
from provgen.run import atomic_path


def strongest_first(scores: Tensor, distances: Tensor) -> Tensor:
    """Order the examples of every query by scores (query, train), the largest first: int64 (query, train).

    Many methods have nothing to say of most examples: where scores are equal, the smallest of `distances`
    (query, train) goes first.
    """
    near = distances.argsort(dim=1, stable=True)
    return near.gather(1, scores.gather(1, near).argsort(dim=1, descending=True, stable=True))


def paired_effect(effects: Mapping[str, Tensor], method: str, other: str | None, *, seed: int = 0) -> Estimate:
    """Give the mean effect of a method over queries, or by how much it exceeds that of another.

    Args:
        effects: By method, (seed, query): the distance a sample moved, or the change of its loss.
        method: Whose sources were left out.
        other: What to compare with, query by query; None for the effect itself.
        seed: Of the bootstrap over queries, each with the mean of its training seeds.
    """
    per_query = effects[method].double().mean(dim=0)
    if other is not None:
        per_query = per_query - effects[other].double().mean(dim=0)
    return mean_estimate(per_query, seed=seed)


def distance_moved(before: Tensor, after: Tensor) -> Tensor:
    """Give the Euclidean distance of pixels in [-1, 1], (query,), of images uint8 (query, channel, height, width)."""
    distance: Tensor = (before.double() - after.double()).flatten(1).norm(dim=1) * (2 / 255)
    return torch.as_tensor(distance)


NOTHING = "nothing"
"""Left out by the models that others are compared with: one for each training seed."""


@dataclass(frozen=True, order=True)
class LeftOut:
    """One model: whose sources are left out, how many, for which sample, with which training seed."""

    seed: int
    share: float
    """Of the training images."""
    query: int
    """Number of the sample."""
    method: str

    def __str__(self) -> str:
        return f"{self.method}, {self.share:.0%}, sample {self.query}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What such a model makes of the sample."""

    left_out: Tensor
    """Examples it was trained without, int64 (left_out,)."""
    image: Tensor
    """From the same noise, uint8 (channel, height, width)."""
    loss: float
    """The denoising loss on the sample itself."""


def plan(methods: list[str], shares: list[float], queries: list[int], seeds: int) -> list[LeftOut]:
    """List all models, those with the first seed first."""
    return [
        LeftOut(seed=seed, share=share, query=query, method=method)
        for seed, share, query, method in product(range(seeds), shares, queries, methods)
    ]


class LeaveOutFolder:
    """A small file for every model, and for the ranking that a method is left out by, whole or not there.

    Rankings are kept, as another machine rounds otherwise and would swap examples of nearly equal scores.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, model: LeftOut, left_out: Tensor) -> bool:
        """Whether a model has been measured without these very examples."""
        return self._path(model).is_file() and torch.equal(self.load(model).left_out, left_out)

    def save(self, model: LeftOut, outcome: Outcome) -> None:
        """Write what became of the sample."""
        with atomic_path(self._path(model)) as partial, partial.open("wb") as file:
            np.savez(file, left_out=outcome.left_out.numpy(), image=outcome.image.numpy(), loss=outcome.loss)

    def load(self, model: LeftOut) -> Outcome:
        """Read what became of the sample."""
        with np.load(self._path(model)) as file:
            left_out, image = torch.from_numpy(file["left_out"]), torch.from_numpy(file["image"])
            return Outcome(left_out=left_out, image=image, loss=float(file["loss"]))

    def save_ranking(self, method: str, setting: str, ranking: Tensor) -> None:
        """Write the training examples of every sample, strongest first, int64 (query, train), of a tuned method."""
        with atomic_path(self._ranking_path(method)) as partial, partial.open("wb") as file:
            np.savez_compressed(file, setting=setting, ranking=ranking.numpy().astype(np.uint32))

    def load_ranking(self, method: str, setting: str) -> Tensor | None:
        """Read it; None where there is none of this setting."""
        path = self._ranking_path(method)
        if not path.is_file():
            return None
        with np.load(path) as file:
            is_same = str(file["setting"]) == setting
            return torch.from_numpy(file["ranking"].astype(np.int64)) if is_same else None

    def _ranking_path(self, method: str) -> Path:
        return self.root / "rankings" / f"{_file_name(method)}.npz"

    def _path(self, model: LeftOut) -> Path:
        folder = f"{_file_name(model.method)}-{model.share:g}"
        return self.root / folder / f"query-{model.query:04d}-seed-{model.seed}.npz"


def _file_name(method: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in method)


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
        models = [[LeftOut(seed=seed, share=share, query=query, method=method) for query in queries] for seed in seeds]
        pairs = [[(outcomes[m], outcomes[replace(m, share=0.0, method=NOTHING)]) for m in row] for row in models]
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
        differences = ["-" if method == name else _text(paired_effect(effects, method, name)) for name in references]
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
