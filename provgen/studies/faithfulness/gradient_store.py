"""Gradient features of a training set on disk: written batch by batch, and gone on with after a kill."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from provgen.run import atomic_path


class GradientStore:
    """float32 rows of features, of which the first `done` are there.

    A folder with `features.npy` and `state.json`; the state also says what the features are of, so that a store of
    another network or of other settings is started again and never mixed with this one.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, int], fingerprint: Mapping[str, str | int]) -> None:
        """Open the store, or start a new one.

        Args:
            folder: Made if it is not there.
            shape: (train, feature).
            fingerprint: Everything that the features depend on, such as a digest of the weights.
        """
        self.folder = folder
        self.shape = shape
        self.fingerprint = {"schema_version": 1, "shape": list(shape), **fingerprint}
        self.done, self.seconds_before = self._read_state()
        folder.mkdir(parents=True, exist_ok=True)
        mode = "r+" if self.done else "w+"
        if not self.done:
            # First, or a kill before the first batch would leave the state of other features beside empty rows.
            self._write_state(0, 0.0)
        self._rows: NDArray[np.float32] = np.lib.format.open_memmap(
            folder / "features.npy", mode=mode, dtype=np.float32, shape=shape
        )

    def fill(self, make_rows: Callable[[int, int], Tensor], *, batch_size: int) -> None:
        """Make what is missing: `make_rows(start, stop)` gives the features (stop - start, feature)."""
        begun = time.perf_counter()
        for start in range(self.done, self.shape[0], batch_size):
            stop = min(start + batch_size, self.shape[0])
            self._rows[start:stop] = make_rows(start, stop).cpu().numpy()
            self._rows.flush()  # type: ignore[attr-defined]  # a memory map
            self._write_state(stop, self.seconds_before + time.perf_counter() - begun)

    def rows(self, start: int, stop: int) -> Tensor:
        """Read features (stop - start, feature) into memory."""
        return torch.from_numpy(np.array(self._rows[start:stop]))

    def products(self, features: Tensor, *, rows_at_once: int = 256) -> Tensor:
        """Give inner products in float64 of features (query, feature) with all rows: (query, train)."""
        left = features.double()
        parts = [
            left @ self.rows(start, min(start + rows_at_once, self.shape[0])).double().T
            for start in range(0, self.shape[0], rows_at_once)
        ]
        return torch.cat(parts, dim=1)

    def gram(self, *, rows_at_once: int = 256) -> Tensor:
        """Give the inner products of all rows with one another, float64 (train, train)."""
        starts = range(0, self.shape[0], rows_at_once)
        return torch.cat([self.products(self.rows(s, min(s + rows_at_once, self.shape[0]))) for s in starts])

    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def _read_state(self) -> tuple[int, float]:
        """Read how many rows are there, and the seconds that were spent on them."""
        try:
            state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return 0, 0.0
        is_ours = state.get("fingerprint") == self.fingerprint and (self.folder / "features.npy").is_file()
        return (int(state["done"]), float(state["seconds"])) if is_ours else (0, 0.0)

    def _write_state(self, done: int, seconds: float) -> None:
        with atomic_path(self.folder / "state.json") as partial:
            state = {"fingerprint": self.fingerprint, "done": done, "seconds": seconds}
            partial.write_text(json.dumps(state) + "\n", encoding="utf-8")
        self.done = done
