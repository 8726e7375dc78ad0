"""The folder of leave-out models: what became of a sample when the sources that a method names were left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from provgen.run_folder import atomic_path


@dataclass(frozen=True, order=True)
class LeftOut:
    """One model: whose sources are left out, how many, for which sample, with which training seed."""

    seed: int
    share: float
    """Of the training images."""
    query: int
    """Number of the sample."""
    method: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What such a model makes of the sample."""

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
    """A small file for every model, whole or not there."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def has(self, model: LeftOut) -> bool:
        """Whether a model has been measured."""
        return self._path(model).is_file()

    def save(self, model: LeftOut, left_out: Tensor, outcome: Outcome) -> None:
        """Write what became of the sample without the examples `left_out`, int64 (left_out,)."""
        with atomic_path(self._path(model)) as partial, partial.open("wb") as file:
            np.savez(file, left_out=left_out.numpy(), image=outcome.image.numpy(), loss=outcome.loss)

    def left_out(self, model: LeftOut) -> Tensor:
        """Read which examples a model was trained without."""
        with np.load(self._path(model)) as file:
            return torch.from_numpy(file["left_out"])

    def load(self, model: LeftOut) -> Outcome:
        """Read what became of the sample."""
        with np.load(self._path(model)) as file:
            return Outcome(image=torch.from_numpy(file["image"]), loss=float(file["loss"]))

    def measured(self, planned: list[LeftOut]) -> Iterator[tuple[LeftOut, Outcome]]:
        """Read the models that are there."""
        for model in planned:
            if self.has(model):
                yield model, self.load(model)

    def _path(self, model: LeftOut) -> Path:
        seed, share, query, method = astuple(model)
        name = "".join(letter if letter.isalnum() else "_" for letter in method)
        return self.root / f"{name}-{share:g}" / f"query-{query:04d}-seed-{seed}.npz"
