"""Drawing samples again whose provenance collapses onto one training image before they are finished."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from provgen.tracing.tracer import Generated, Request, Tracer


def generate_resampling(tracer: Tracer, request: Request, *, below: float, most: int) -> tuple[Generated, Tensor]:
    """Generate, and draw again what comes from one training image too surely.

    A sample with a generator of its own is resampled from the noise that this one gives next, so that it does not
    depend on its batch.

    Args:
        tracer: Of the generator.
        request: With traces.
        below: Entropy in nats, at the cleanest level of the trace window, below which a sample is resampled.
        most: Times a sample may be resampled; the last draw is kept, whatever it is.

    Returns:
        What was generated, and how often every sample was resampled, int64 (query,).
    """
    made = tracer.generate(request)
    resamplings = torch.zeros(len(request.class_labels), dtype=torch.int64)
    for _ in range(most):
        rows = (made.trace.late_entropy() < below).nonzero().flatten()
        if not len(rows):
            break
        made = _put(made, rows, tracer.generate(_of_rows(request, rows)))
        resamplings[rows.cpu()] += 1
    return made, resamplings


def _of_rows(request: Request, rows: Tensor) -> Request:
    generator = request.generator
    if isinstance(generator, list):
        generator = [generator[row] for row in rows.tolist()]
    return replace(request, class_labels=request.class_labels[rows], generator=generator)


def _put(made: Generated, rows: Tensor, again: Generated) -> Generated:
    made.trace.put(rows, again.trace)
    made.closed_trace.put(rows, again.closed_trace)
    return replace(made, images=made.images.index_copy(0, rows, again.images))
