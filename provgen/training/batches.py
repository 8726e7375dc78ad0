"""Batches as a function of (seed, step): resuming needs no state, and every process sees the same global batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One optimiser step's examples, or one process's share of them."""

    indices: Tensor
    """Example index, int64 (batch,)."""
    clean_images: Tensor
    """In [-1, 1], (batch, channel, height, width)."""
    noise: Tensor
    """Standard normal, same shape."""
    timesteps: Tensor
    """int64 (batch,)."""
    labels: Tensor
    """What the denoiser is told, int64 (batch,): the class, or the null label where it was dropped."""
    clean_labels: Tensor
    """The class before dropout, int64 (batch,)."""

    def share(self, process: int, num_processes: int) -> Batch:
        """Keep the rows of one process; all shares have the same size."""
        size = len(self.indices) // num_processes
        rows = slice(process * size, (process + 1) * size)
        return Batch(**{name: value[rows] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> Batch:
        """Move every tensor to `device`."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


class BatchStream:
    """The endless sequence of global batches.

    Each pass over the data is a fresh permutation; a batch may span two passes. All randomness is drawn on
    the CPU, so the same batch comes out on every device.
    """

    def __init__(
        self,
        train: ImageSet,
        *,
        batch_size: int,
        num_train_timesteps: int,
        label_dropout: float,
        seed: int,
    ) -> None:
        """Keep what a batch is drawn from; `batch_size` counts the images of all processes together."""
        self.train = train
        self.batch_size = batch_size
        self.num_train_timesteps = num_train_timesteps
        self.label_dropout = label_dropout
        self.seed = seed
        self._permutation: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Batch:
        """Draw the global batch of the 0-based `step`."""
        indices = self.indices(step)
        clean_images = to_unit_range(self.train.images[indices])
        generator = seeded_generator(self.seed, 1, step)
        noise = randn_tensor(clean_images.shape, generator=generator, dtype=clean_images.dtype)
        timesteps = torch.randint(self.num_train_timesteps, (len(indices),), generator=generator)
        is_dropped = torch.rand(len(indices), generator=generator) < self.label_dropout
        labels = self.train.labels[indices]
        return Batch(
            indices=indices,
            clean_images=clean_images,
            noise=noise,
            timesteps=timesteps,
            labels=labels.masked_fill(is_dropped, self.train.num_classes),
            clean_labels=labels,
        )

    def indices(self, step: int) -> Tensor:
        """Example indices of the global batch of `step`, int64 (batch,)."""
        start, stop = step * self.batch_size, (step + 1) * self.batch_size
        size = len(self.train)
        passes = range(start // size, (stop - 1) // size + 1)
        return torch.cat([self._pass(n)[max(0, start - n * size) : stop - n * size] for n in passes])

    def _pass(self, number: int) -> Tensor:
        if self._permutation is None or self._permutation[0] != number:
            generator = seeded_generator(self.seed, 0, number)
            self._permutation = (number, torch.randperm(len(self.train), generator=generator))
        return self._permutation[1]


def seeded_generator(*entropy: int) -> torch.Generator:
    """Make a CPU generator whose stream depends on all the numbers given, and on their order."""
    # The length first: SeedSequence does not tell (1,) from (1, 0).
    state = int(np.random.SeedSequence((len(entropy), *entropy)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))
