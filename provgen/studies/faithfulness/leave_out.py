"""What becomes of a sample when the sources that a method names are left out: models, effects, table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from provgen.metrics.statistics import Estimate, mean_estimate, mean_over_seeds
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
    `FEW` queries is Student's t.

    Args:
        effects: By method, (seed, query): the distance a sample moved, or the change of its loss.
        method: Whose sources were left out.
        other: What to compare with, query by query; None for the effect itself.
    """
    per_query = effects[method].double().mean(dim=0)
    if other is not None:
        per_query = per_query - effects[other].double().mean(dim=0)
    return mean_over_seeds(per_query.tolist()) if len(per_query) < FEW else mean_estimate(per_query, seed=0)


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


def leave_out_effects(outcomes: Mapping[LeftOut, Outcome], methods: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Collect effects (seed, query) by title and method, of the queries that have every seed of every method.

    Args:
        outcomes: Those of one share, and those with nothing left out.
        methods: Those that are compared.
    """
    share = max(model.share for model in outcomes)
    seeds = sorted({model.seed for model in outcomes})

    def models(method: str, query: int) -> list[LeftOut]:
        left_out = 0.0 if method == NOTHING else share
        return [LeftOut(seed=seed, share=left_out, query=query, method=method) for seed in seeds]

    def is_whole(query: int) -> bool:
        return all(model in outcomes for method in (NOTHING, *methods) for model in models(method, query))

    queries = [query for query in sorted({model.query for model in outcomes}) if is_whole(query)]
    if not queries:
        return {}
    by_method = {
        method: [[outcomes[model] for model in models(method, query)] for query in queries]
        for method in (NOTHING, *methods)
    }
    return {
        title: {method: effect(by_method[NOTHING], by_method[method]) for method in methods}
        for title, effect in EFFECTS.items()
    }


Outcomes = Sequence[Sequence[Outcome]]
"""Of one method: a row for each query, with an outcome for each seed."""


def _moved(before: Outcomes, after: Outcomes) -> Tensor:
    images = [torch.stack([torch.stack([o.image for o in row]) for row in rows]) for rows in (before, after)]
    return torch.stack([distance_moved(b, a) for b, a in zip(*(i.unbind(dim=1) for i in images), strict=True)])


def _loss_change(before: Outcomes, after: Outcomes) -> Tensor:
    pairs = [zip(*rows, strict=True) for rows in zip(before, after, strict=True)]
    return torch.tensor([[1e3 * (after_.loss - before_.loss) for before_, after_ in pair] for pair in pairs]).T


def _class_left_out(before: Outcomes, after: Outcomes) -> Tensor:  # noqa: ARG001 - one of EFFECTS
    return torch.tensor([[outcome.share_of_class for outcome in row] for row in after]).T


EFFECTS = {MOVED: _moved, LOSS: _loss_change, OF_CLASS: _class_left_out}
"""What leaving out does, (seed, query) from the outcomes before and after."""


def share_of_class(left_out: Tensor, train_labels: Tensor, label: int) -> float:
    """Give the share of a class that was left out; `left_out` int64 (left_out,), `train_labels` int64 (train,)."""
    of_class = train_labels == label
    return float(of_class[left_out].sum() / of_class.sum().clamp_min(1))


def effects_by_share(
    outcomes: Mapping[LeftOut, Outcome], methods: Sequence[str]
) -> dict[float, dict[str, dict[str, Tensor]]]:
    """Collect effects by share, title and method, over the queries of which every method has every seed."""
    effects = {}
    for share in sorted({model.share for model in outcomes} - {0.0}):
        compared = {model: outcome for model, outcome in outcomes.items() if model.share in (0, share)}
        effects[share] = leave_out_effects(compared, methods)
    return effects


def write_table(root: Path, outcomes: Mapping[LeftOut, Outcome], methods: Sequence[str]) -> str:
    """Write effects.parquet and table.md of the models that are there; give the table."""
    effects = effects_by_share(outcomes, methods)
    rows = [row for share, by_title in effects.items() for row in effect_rows(share, by_title)]
    if rows:
        write_parquet(root / "effects.parquet", pa.Table.from_pylist(rows), version=1)
    table = leave_out_table(effects)
    with atomic_path(root / "table.md") as partial:
        partial.write_text(table, encoding="utf-8")
    return table


def leave_out_table(effects: Mapping[float, Mapping[str, Mapping[str, Tensor]]]) -> str:
    """Lay out a table for every share and effect."""
    return "\n".join(
        f"{share:.0%} of the training images left out: {title}\n\n{effect_table(by_method)}"
        for share, by_title in effects.items()
        for title, by_method in by_title.items()
    )


REFERENCES = ("random", "pixel kernel")
"""Methods that every other is compared with, where they are there."""


def effect_table(effects: Mapping[str, Tensor]) -> str:
    """Lay out a line for each method, the largest effect first, with paired differences and 95 % intervals."""
    references = [name for name in REFERENCES if name in effects]
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


def read_moved(path: Path) -> dict[str, dict[str, Estimate]]:
    """Read how far samples moved, by what was left out, then by method; nothing where there is no such file."""
    moved: dict[str, dict[str, Estimate]] = {}
    for row in read_parquet(path, version=1).to_pylist() if path.is_file() else []:
        if row["effect"] == MOVED:
            by_method = moved.setdefault(f"moved without {row['share']:.0%}", {})
            by_method[row["method"]] = Estimate(row["value"], row["low"], row["high"], row["n"])
    return moved
