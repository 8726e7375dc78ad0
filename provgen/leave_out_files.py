"""The folder of leave-out models: what became of a sample when the sources that a method names were left out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from provgen.run_folder import atomic_path

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
