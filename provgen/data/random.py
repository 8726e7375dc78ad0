"""Random streams: every draw is a function of a seed, a stream and a position, so that resuming needs no state."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """What is drawn; the number is part of the seed, so numbers are never used again."""

    PERMUTATION = 0
    """Order of the training images in one pass; position: the pass."""
    BATCH = 1
    """Noise, timesteps and dropped labels of one optimiser step; position: the step."""
    FIXED_BATCH = 2
    """Noise of evaluation batches."""
    LOSS = 3
    """Timesteps and noise at which a generator's loss is measured."""
    RENOISE = 4
    """Noise of images from outside; position: the timestep."""
    LATENT = 5
    """Latents of images from outside; position: the draw."""
    PROBE = 6
    """Training images on which index metrics are measured."""
    COVERAGE = 7
    """Noise at which it is measured how hard training images are to tell apart; position: the level."""
    TEMPERATURE = 8
    """Samples and images that temperatures are fitted on; position: the sample."""
    SUPPORT = 10
    """Images that it is read off how much training images explain."""
    GRADIENT = 9
    """Noise at which gradients of single images are taken; position: the timestep."""


def seeded_generator(*entropy: int) -> torch.Generator:
    """Make a CPU generator from a seed, a `Stream` and a position in it; all these numbers count, and their order."""
    # The length first: SeedSequence does not tell (1,) from (1, 0).
    state = int(np.random.SeedSequence((len(entropy), *entropy)).generate_state(1, np.uint64)[0])
    return torch.Generator().manual_seed(state & (2**63 - 1))
