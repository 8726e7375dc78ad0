"""What becomes of a sample when the sources that a method names are left out: models, effects, table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from provgen.metrics.statistics import Estimate, mean_estimate, mean_over_seeds
from provgen.report.format import interval, markdown_table
from provgen.run import atomic_path, read_parquet, write_parquet
from provgen.studies.jobs import ResultStore


def strongest_first(scores: Tensor, distances: Tensor) -> Tensor:
    """Order the examples of every query by scores (query, train), the largest first: int64 (query, train).

    Many methods have nothing to say of most examples: where scores are equal, the smallest of `distances`
    (query, train) goes first.
    """
    near = distances.argsort(dim=1, stable=True)
    return near.gather(1, scores.gather(1, near).argsort(dim=1, descending=True, stable=True))


FEW = 50
"""Queries below which an interval is Student's t."""


def paired_effect(effects: Mapping[str, Tensor], method: str, other: str | None) -> Estimate:
    """Give the mean effect of a method over queries, or by how much it exceeds that of another, with a 95 % interval.

    The percentile bootstrap of few values is too narrow: it lacks both the factor n / (n - 1) of the variance and the
    heavier tails of t (Hesterberg 2015, What Teachers Should Know About the Bootstrap). So the interval of fewer than
    `FEW` queries is Student's t. Effects are (seed, query) by method; differences are taken query by query.
    """
    per_query = effects[method].double().mean(dim=0)
    if other is not None:
        per_query = per_query - effects[other].double().mean(dim=0)
    return mean_over_seeds(per_query.tolist()) if len(per_query) < FEW else mean_estimate(per_query, seed=0)


def distance_moved(before: Tensor, after: Tensor) -> Tensor:
    """Give the Euclidean distance of pixels in [-1, 1], (query,), of images uint8 (query, channel, height, width)."""
    distance: Tensor = (before.double() - after.double()).flatten(1).norm(dim=1) * (2 / 255)
    return distance


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
    share_of_class: float
    """Share of the training images of the sample's class that were left out."""
    image: Tensor
    """The sample made again from its noise, uint8 (channel, height, width)."""
    loss: float
    """The denoising loss on the sample itself."""


def plan(methods: list[str], shares: list[float], queries: list[int], seeds: int) -> list[LeftOut]:
    """List all models, those with the first seed first."""
    return [
        LeftOut(seed=seed, share=share, query=query, method=method)
        for seed, share, query, method in product(range(seeds), shares, queries, methods)
    ]


class LeaveOutFolder:
    """fingerprint.json, outcomes/, and rankings/ that methods are left out by.

    Rankings are kept, as another machine rounds otherwise and would swap examples of nearly equal scores.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._outcomes = ResultStore(root / "outcomes", ("method", "share", "query", "seed"))
        self._rankings = ResultStore(root / "rankings", ("method",))

    def save(self, model: LeftOut, outcome: Outcome) -> None:
        """Write what became of the sample."""
        left_out = outcome.left_out.numpy().astype(np.uint32)
        self._outcomes.save({**asdict(model), **vars(outcome), "left_out": left_out, "image": outcome.image.numpy()})

    def load(self) -> dict[LeftOut, Outcome]:
        """Read what became of all samples."""
        return {
            LeftOut(**{name: row.pop(name) for name in ("method", "share", "query", "seed")}): Outcome(
                left_out=torch.from_numpy(row.pop("left_out").astype(np.int64)),
                image=torch.from_numpy(row.pop("image")),
                **row,
            )
            for row in self._outcomes.rows().values()
        }

    def save_rankings(self, method: str, setting: str, rankings: Mapping[int, Tensor]) -> None:
        """Write the training examples of samples, strongest first, int64 (train,), of a tuned method."""
        ranking = torch.stack(list(rankings.values())).numpy().astype(np.uint32)
        queries = np.array(list(rankings), np.uint32)
        self._rankings.save({"method": method, "setting": setting, "queries": queries, "ranking": ranking})

    def load_rankings(self, method: str, setting: str) -> dict[int, Tensor]:
        """Read them by sample; nothing where there are none of this setting."""
        row = self._rankings.rows().get((method,))
        if row is None or row["setting"] != setting:
            return {}
        ranking = torch.from_numpy(row["ranking"].astype(np.int64))
        return dict(zip(row["queries"].tolist(), ranking, strict=True))

    def compact(self) -> None:
        """Put what is there into few files."""
        self._outcomes.compact()
        self._rankings.compact()


MOVED = "distance from what the same seed makes with all images, Euclidean, pixels in [-1, 1]"
LOSS = "denoising loss on the sample above that with all images, x 1000"
OF_CLASS = "share of the sample's class that was left out"


Effect = Callable[[Sequence[Outcome], Sequence[Outcome]], Tensor]
"""What leaving out does, (query,), from the outcomes of one seed before and after."""


def _moved(before: Sequence[Outcome], after: Sequence[Outcome]) -> Tensor:
    return distance_moved(*(torch.stack([outcome.image for outcome in outcomes]) for outcomes in (before, after)))


def _loss_change(before: Sequence[Outcome], after: Sequence[Outcome]) -> Tensor:
    return torch.tensor([1e3 * (new.loss - old.loss) for old, new in zip(before, after, strict=True)])


def _class_left_out(before: Sequence[Outcome], after: Sequence[Outcome]) -> Tensor:  # noqa: ARG001 - one of EFFECTS
    return torch.tensor([outcome.share_of_class for outcome in after])


EFFECTS: dict[str, Effect] = {MOVED: _moved, LOSS: _loss_change, OF_CLASS: _class_left_out}


def leave_out_effects(outcomes: Mapping[LeftOut, Outcome], methods: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Collect effects (seed, query) by title and method, of the queries that have every seed of every method.

    Outcomes are those of one share, and those with nothing left out.
    """
    share = max(model.share for model in outcomes)
    seeds, queries = (sorted({getattr(model, name) for model in outcomes}) for name in ("seed", "query"))
    models = {
        (method, seed, query): LeftOut(seed, 0.0 if method == NOTHING else share, query, method)
        for method, seed, query in product((NOTHING, *methods), seeds, queries)
    }
    missing = {query for (_, _, query), model in models.items() if model not in outcomes}
    if not set(queries) - missing:
        return {}

    def measured(method: str, seed: int) -> list[Outcome]:
        return [outcomes[models[method, seed, query]] for query in queries if query not in missing]

    return {
        title: {
            method: torch.stack([effect(measured(NOTHING, seed), measured(method, seed)) for seed in seeds])
            for method in methods
        }
        for title, effect in EFFECTS.items()
    }


def share_of_class(left_out: Tensor, train_labels: Tensor, label: int) -> float:
    """Give the share of a class that was left out; `left_out` int64 (left_out,), `train_labels` int64 (train,)."""
    of_class = train_labels == label
    return float(of_class[left_out].sum() / of_class.sum().clamp_min(1))


def write_table(root: Path, outcomes: Mapping[LeftOut, Outcome], methods: Sequence[str]) -> str:
    """Write effects.parquet and table.md of the models that are there; give the table of every share and effect."""
    rows, tables = [], []
    for share in sorted({model.share for model in outcomes} - {0.0}):
        compared = {model: outcome for model, outcome in outcomes.items() if model.share in (0, share)}
        for title, by_method in leave_out_effects(compared, methods).items():
            tables.append(f"{share:.0%} of the training images left out: {title}\n\n{effect_table(by_method)}")
            estimates = {method: paired_effect(by_method, method, None) for method in methods}
            rows += [{"share": share, "effect": title, "method": m, **asdict(e)} for m, e in estimates.items()]
    if rows:
        write_parquet(root / "effects.parquet", pa.Table.from_pylist(rows), version=1)
    table = "\n".join(tables)
    with atomic_path(root / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    return table


REFERENCES = ("random", "random of the class", "pixel kernel")
"""Methods that every other is compared with, where they are there."""


def effect_table(effects: Mapping[str, Tensor]) -> str:
    """Lay out a line for each method, the largest effect first, with paired differences and 95 % intervals."""
    references = [name for name in REFERENCES if name in effects]
    means = {method: paired_effect(effects, method, None) for method in effects}
    lines = []
    for method in sorted(means, key=lambda name: -means[name].value):
        others = [None if method == name else paired_effect(effects, method, name) for name in references]
        cells = [estimate and interval(estimate, ".2f") for estimate in (means[method], *others)]
        lines.append([method, means[method].n, *cells])
    return markdown_table(["method", "queries", "mean", *(f"over {name}" for name in references)], lines)


def read_moved(path: Path) -> dict[str, dict[str, Estimate]]:
    """Read how far samples moved, by what was left out, then by method; nothing where there is no such file."""
    moved: dict[str, dict[str, Estimate]] = {}
    for row in read_parquet(path, version=1).to_pylist() if path.is_file() else []:
        if row["effect"] == MOVED:
            by_method = moved.setdefault(f"moved without {row['share']:.0%}", {})
            by_method[row["method"]] = Estimate(row["value"], row["low"], row["high"], row["n"])
    return moved
