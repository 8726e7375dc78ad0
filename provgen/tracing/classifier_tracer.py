"""Tracing images through a classifier: the paper's own system, which generates nothing."""

from __future__ import annotations

from torch import Tensor

from provgen.errors import InputError
from provgen.generators.closed_form import Posterior
from provgen.models.classifier import CLEAN_ALPHA_BAR, ImageClassifier
from provgen.models.provenance import ProvenanceNetwork
from provgen.tracing.trace import TrajectoryTrace
from provgen.tracing.tracer import ALL_LEVELS, Generated, Request, network_probs


class ClassifierTracer:
    """Traces read the classifier's feature maps on the clean image."""

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
        closed_form: Posterior | None,
        num_inference_steps: int,  # noqa: ARG002 - Tracer
        trace_every: int,  # noqa: ARG002 - Tracer
        seed: int,  # noqa: ARG002 - Tracer
    ) -> TrajectoryTrace:
        """Trace the images as they are; see `Tracer`."""
        trace = TrajectoryTrace(window=ALL_LEVELS)
        alpha_bar = clean_images.new_full((len(clean_images),), CLEAN_ALPHA_BAR)
        if closed_form is not None:
            trace.add(closed_form.probs(clean_images, alpha_bar, class_labels), CLEAN_ALPHA_BAR)
        else:
            output = self.classifier(clean_images)
            probs = network_probs(self.provenance, output.feature_maps, alpha_bar, class_labels, output.class_logits)
            trace.add(probs, CLEAN_ALPHA_BAR)
        return trace

    def encode(self, clean_images: Tensor) -> Tensor:
        """Give the last stage; see `Tracer`."""
        feature_maps: list[Tensor] = self.classifier(clean_images).feature_maps
        return feature_maps[-1].flatten(1)


def no_generator(count: int) -> InputError:
    """Say why `count` images cannot be generated."""
    return InputError(
        f"cannot generate {count} images: this run has generator.kind=none; "
        "trace images with `provgen attribute`, or train with generator.kind=diffusion"
    )
