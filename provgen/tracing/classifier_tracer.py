"""Tracing images through a classifier: the paper's own system, which generates nothing."""

from __future__ import annotations

from torch import Tensor

from provgen.errors import InputError
from provgen.generators.closed_form import Oracle
from provgen.models.classifier import CLEAN_SIGNAL, ImageClassifier
from provgen.models.provenance import ProvenanceNetwork
from provgen.tracing.trace import TrajectoryTrace
from provgen.tracing.tracer import ALL_LEVELS, Generated, Request, network_probs


class ClassifierTracer:
    """Traces read the classifier's stages on the clean image."""

    def __init__(self, classifier: ImageClassifier, provenance: ProvenanceNetwork | None) -> None:
        self.classifier = classifier
        self.provenance = provenance

    def generate(self, request: Request) -> Generated:
        """Refuse: there is no generator."""
        raise no_generator(len(request.class_labels))

    def trace(
        self,
        clean_images: Tensor,
        class_labels: Tensor,
        *,
        closed_form: Oracle | None,
        num_inference_steps: int,  # noqa: ARG002 - Tracer
        trace_every: int,  # noqa: ARG002 - Tracer
        seed: int,  # noqa: ARG002 - Tracer
    ) -> TrajectoryTrace:
        """Trace the images as they are; see `Tracer`."""
        trace = TrajectoryTrace(window=ALL_LEVELS)
        signal = clean_images.new_full((len(clean_images),), CLEAN_SIGNAL)
        if closed_form is not None:
            trace.add(closed_form.probs(clean_images, signal, class_labels), CLEAN_SIGNAL)
        else:
            output = self.classifier(clean_images)
            probs = network_probs(self.provenance, output.stages, signal, class_labels, output.class_logits)
            trace.add(probs, CLEAN_SIGNAL)
        return trace

    def encode(self, clean_images: Tensor) -> Tensor:
        """Give the last stage; see `Tracer`."""
        stages: list[Tensor] = self.classifier(clean_images).stages
        return stages[-1].flatten(1)


def no_generator(count: int) -> InputError:
    """Say why `count` images cannot be generated."""
    return InputError(
        f"cannot generate {count} images: this run has generator.kind=none; "
        "trace images with `provgen attribute`, or train with generator.kind=diffusion"
    )
