"""Batches as a function of (seed, step): resuming needs no state, and every process sees the same global batch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.data.random import Stream, seeded_generator


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One optimiser step's examples, or one process's share of them."""

    indices: Tensor
    """Example index, int64 (batch,)."""
    clean_images: Tensor
    """Pixels in [-1, 1], (batch, channel, height, width)."""
    noise: Tensor
    """Standard normal, (batch, ...) in the shape of what the generator adds it to."""
    timesteps: Tensor
    """Noise level of each row, int64 (batch,)."""
    labels: Tensor
    """Labels the generator is given, int64 (batch,): the class, or the null label where it was dropped."""
    clean_labels: Tensor
    """The class before dropout, int64 (batch,)."""

    def share(self, process: int, num_processes: int) -> Batch:
        """Keep the rows of one process; all shares have the same size."""
        size = len(self.indices) // num_processes
        return self.select(torch.arange(process * size, (process + 1) * size))

    def select(self, selected: Tensor) -> Batch:
        """Keep the rows `selected`, int64 (selected,)."""
        return Batch(**{name: value[selected] for name, value in vars(self).items()})

    def to(self, device: torch.device) -> Batch:
        """Move every tensor to `device`."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def fixed_batches(
    images: ImageSet, indices: Tensor, timesteps: list[int], *, noise_shape: tuple[int, ...], seed: int
) -> list[Batch]:
    """Make one batch per timestep: the images `indices`, int64 (batch,), with one noise, (batch, *noise_shape)."""
    generator = seeded_generator(seed, Stream.FIXED_BATCH)
    noise = randn_tensor((len(indices), *noise_shape), generator=generator, dtype=torch.get_default_dtype())
    labels = images.labels[indices]
    return [
        Batch(
            indices=indices,
            clean_images=to_unit_range(images.images[indices]),
            noise=noise,
            timesteps=torch.full((len(indices),), timestep),
            labels=labels,
            clean_labels=labels,
        )
        for timestep in timesteps
    ]


@dataclass
class BatchStream:
    """The endless sequence of global batches; each pass over the data is a fresh permutation, a batch may span two.

    All randomness is drawn on the CPU, so the same batch comes out on every device.
    """

    train: ImageSet
    _: KW_ONLY
    batch_size: int
    """Images of all processes together."""
    num_train_timesteps: int
    label_dropout: float
    """Probability of the null label."""
    seed: int
    noise_shape: tuple[int, ...] | None = None
    """Shape of one row of noise; None for that of an image."""
    _permutation: tuple[int, Tensor] | None = field(default=None, init=False)

    def batch(self, step: int) -> Batch:
        """Draw the global batch of the 0-based `step`."""
        indices = self.indices(step)
        clean_images = to_unit_range(self.train.images[indices])
        generator = seeded_generator(self.seed, Stream.BATCH, step)
        shape = (len(indices), *(self.noise_shape or clean_images.shape[1:]))
        noise = randn_tensor(shape, generator=generator, dtype=clean_images.dtype)
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
        start, stop, size = step * self.batch_size, (step + 1) * self.batch_size, len(self.train)
        passes = range(start // size, (stop - 1) // size + 1)
        return torch.cat([self._pass(n)[max(0, start - n * size) : stop - n * size] for n in passes])

    def _pass(self, number: int) -> Tensor:
        if self._permutation is None or self._permutation[0] != number:
            generator = seeded_generator(self.seed, Stream.PERMUTATION, number)
            self._permutation = (number, torch.randperm(len(self.train), generator=generator))
        return self._permutation[1]
