"""The folder of subset models: which images each was trained on, and its loss on every query."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.errors import InputError
from provgen.run_folder import atomic_path

KINDS = ("generated", "holdout")


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """Everything that is measured of the subset models of a run."""

    masks: Tensor
    """bool (subset, train)."""
    losses: dict[str, Tensor]
    """By kind of query, float64 (seed, query, subset)."""


class RetrainedFolder:
    """masks.npz, made_of.json, and a small file of losses for every model, each whole or not there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def start(self, masks: Tensor, queries: Mapping[str, ImageSet], made_of: Mapping[str, Any]) -> None:
        """Start the folder, or go on with it.

        Args:
            masks: bool (subset, train); a folder may be started again with more subsets.
            queries: By kind.
            made_of: What the models are of: the run's settings.

        Raises:
            InputError: There are models of something else in it.
        """
        content = {"schema_version": 1, **made_of, **{kind: list(queries[kind].sha256) for kind in KINDS}}
        wanted = json.dumps(content, indent=1, sort_keys=True)
        path = self.root / "made_of.json"
        if path.is_file() and path.read_text(encoding="utf-8") != wanted:
            raise InputError(
                f"{self.root} holds models of another run, other options or other queries; remove the folder to "
                "start again"
            )
        if path.is_file() and not _agree(self._masks(), masks):
            raise InputError(f"{self.root} holds models of other subsets; remove the folder to start again")
        if not path.is_file() or len(self._masks()) < len(masks):
            with atomic_path(self.root / "masks.npz") as partial, partial.open("wb") as file:
                np.savez_compressed(file, masks=np.packbits(masks.numpy(), axis=1), train=masks.shape[1])
        with atomic_path(path) as partial:
            partial.write_text(wanted, encoding="utf-8")

    def has(self, subset: int, seed: int) -> bool:
        """Whether a model has been measured."""
        return self._path(subset, seed).is_file()

    def save(self, subset: int, seed: int, losses: Mapping[str, Tensor]) -> None:
        """Write what one model makes of the queries, (query,) by kind."""
        with atomic_path(self._path(subset, seed)) as partial, partial.open("wb") as file:
            np.savez(file, **{kind: losses[kind].float().numpy() for kind in KINDS})  # type: ignore[arg-type]

    def measured(self) -> list[tuple[int, int]]:
        """List the `(subset, seed)` of the models that are there."""
        names = sorted(path.stem.split("-") for path in (self.root / "losses").glob("subset-*-seed-*.npz"))
        return [(int(subset), int(seed)) for _, subset, _, seed in names]

    def load(self) -> Retrained:
        """Read the subsets of which every seed is there.

        Raises:
            InputError: There are fewer than two.
        """
        measured = self.measured()
        seeds = sorted({seed for _, seed in measured})
        whole = [n for n in sorted({n for n, _ in measured}) if all((n, seed) in measured for seed in seeds)]
        if len(whole) < 2:
            raise InputError(
                f"{len(whole)} subset models in {self.root}, at least 2 are needed; run `provgen retrain` first"
            )
        return Retrained(
            masks=self._masks()[torch.tensor(whole)],
            losses={kind: self._losses(kind, seeds, whole) for kind in KINDS},
        )

    def _losses(self, kind: str, seeds: Sequence[int], subsets: Sequence[int]) -> Tensor:
        """Read losses of one kind of query, (seed, query, subset)."""
        rows = []
        for seed in seeds:
            columns = []
            for subset in subsets:
                with np.load(self._path(subset, seed)) as file:
                    columns.append(torch.from_numpy(file[kind]).double())
            rows.append(torch.stack(columns, dim=1))
        return torch.stack(rows)

    def _masks(self) -> Tensor:
        with np.load(self.root / "masks.npz") as file:
            bits = np.unpackbits(file["masks"], axis=1, count=int(file["train"]))
        return torch.from_numpy(bits).bool()

    def _path(self, subset: int, seed: int) -> Path:
        return self.root / "losses" / f"subset-{subset:04d}-seed-{seed}.npz"


def _agree(saved: Tensor, masks: Tensor) -> bool:
    """Whether the shorter list of subsets is the beginning of the longer one."""
    count = min(len(saved), len(masks))
    return saved.shape[1] == masks.shape[1] and torch.equal(saved[:count], masks[:count])
