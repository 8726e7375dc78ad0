"""What every tracer offers: images with their traces, and traces of images from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from provgen.generators.closed_form import Posterior
from provgen.models.provenance import ProvenanceNetwork
from provgen.tracing.trace import TrajectoryTrace

ALL_LEVELS = (0.0, 1.0)
"""Trace window of a generator without noise levels."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be generated, and how."""

    class_labels: Tensor
    """int64 (query,)."""
    null_label: int
    """The class label that stands for no class."""
    generator: torch.Generator | list[torch.Generator] | None
    """One per image, one for all, or torch's own."""
    num_inference_steps: int
    """Sampling steps, where sampling has steps."""
    guidance_scale: float
    """Classifier-free guidance, where there is such a thing; 1 is none."""
    is_traced: bool
    """Whether sources are wanted."""
    trace_every: int
    """Sampling steps from one that is traced to the next, where sampling has steps."""
    closed_form: Posterior | None
    """Traces by the exact posterior as well."""
    progress_bar: Callable[[Iterable[Any]], Iterable[Any]]
    """Wraps the sampling steps."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Images and their traces."""

    images: Tensor
    """In [-1, 1] up to rounding, (query, channel, height, width)."""
    trace: TrajectoryTrace
    """By the provenance network; empty if it was not asked for."""
    closed_trace: TrajectoryTrace
    """By the closed form; empty if none was given."""
    is_trajectory: bool
    """Whether the levels of the traces are steps of a sampling run."""


class Tracer(Protocol):
    """Generates and traces with one kind of generator."""

    def generate(self, request: Request) -> Generated:
        """Generate images, and trace each from what the generator computed.

        Raises:
            InputError: This kind of generator cannot do what was asked for.
        """
        ...

    def trace(
        self,
        clean_images: Tensor,
        class_labels: Tensor,
        *,
        closed_form: Posterior | None,
        num_inference_steps: int,
        trace_every: int,
        seed: int,
    ) -> TrajectoryTrace:
        """Trace images from outside, in [-1, 1], (query, channel, height, width).

        Args:
            clean_images: On the network's device.
            class_labels: int64 (query,).
            closed_form: Trace by it instead of by the network.
            num_inference_steps: Sampling steps whose noise levels are used, where there are any.
            trace_every: Of how many of these one is used.
            seed: Of the noise, which is the same for every image.
        """
        ...

    def encode(self, clean_images: Tensor) -> Tensor:
        """Give the generator's own features of images in [-1, 1], its last encoder stage: (query, feature)."""
        ...


def network_probs(
    provenance: ProvenanceNetwork | None,
    feature_maps: list[Tensor],
    alpha_bar: Tensor,
    class_labels: Tensor,
    class_logits: Tensor | None = None,
) -> Tensor:
    """Ask the provenance network as traces do, with the beam it was saved with: (query, train).

    What the cells outside the beam hold is left out of rows without a class label, which then sum to less than 1. Rows
    with a label are normalised over what was found, as the share of their class in other cells is not known.
    """
    assert provenance is not None, "nothing is traced without a provenance network"
    logits = provenance.index_logits(feature_maps, alpha_bar, class_labels, class_logits, provenance.config.beam)
    probs = logits.softmax(dim=1)
    if provenance.config.beam is None:
        return probs
    found = logits.exp().sum(dim=1).clamp_max(1)
    is_null = class_labels == provenance.config.num_classes
    return probs * torch.where(is_null, found, 1)[:, None]
