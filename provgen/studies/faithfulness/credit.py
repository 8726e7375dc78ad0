"""Leave-one-out variance of a Gaussian process as an attribution method, and a calibrated pipeline's weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.models.credit import CreditHead, GaussianProcess
from provgen.models.diffusion import num_last_layer
from provgen.pipeline import ProvenancePipeline
from provgen.studies.faithfulness.attributor import LEAST_ALPHA_BAR, Along, Cache, Queries
from provgen.tracing.calibrate import (
    NUM_INFERENCE_STEPS,
    AttributionScores,
    LabelledFeatures,
    LeaveOneOutVariance,
    TracedImages,
)
from provgen.tracing.gaussian_process import MAX_LANDMARKS, PIXELS, FeatureParts, Grid
from provgen.tracing.trace import CreditFeatures, NoisyImages, Recorder, trace

NETWORK_BATCH = 256
"""Training images noised at a time."""

Features = Callable[[Queries | ImageSet], Tensor]
"""Gives features of images, floating (image, feature); the same space for training images and queries."""


class VarianceAttributor:
    """The leave-one-out variance of a Gaussian process; the process is tuned."""

    def __init__(self, features: Features, parts: FeatureParts | None = None, grid: Grid = PIXELS) -> None:
        """Take features, what they are made of (None for one part of distances), and the processes to try."""
        self.features, self.parts, self.distances = features, parts, grid.settings
        self.settings = tuple(self.distances)

    def fit(self, train: ImageSet) -> None:
        """Keep the features of the training images."""
        labelled = LabelledFeatures(features=self.features(train), labels=train.labels)
        self.variance = LeaveOneOutVariance(labelled, null_label=train.num_classes, parts=self.parts)

    def attribute(self, queries: Queries, only: GaussianProcess | None = None) -> AttributionScores[GaussianProcess]:
        """Leave every example out under every process, or under the `only` one."""
        settings = self.distances if only is None else {only: self.distances[only]}
        labelled = LabelledFeatures(features=self.features(queries), labels=queries.class_labels)
        return self.variance.scores({"": labelled}, settings)[""]

    def kept(self) -> Cache:
        """Landmarks and read-out, in four bytes a number."""
        num_train, width = self.variance.features.shape
        return Cache(num_bytes=4 * min(MAX_LANDMARKS, num_train) * (width + num_train))


class CalibratedTrace:
    """The weights of a calibrated pipeline; its one setting is what calibration chose."""

    def __init__(self, credit: CreditHead, features: Features) -> None:
        self.credit, self.features = credit, features
        self.settings = (credit.process,)

    def fit(self, train: ImageSet) -> None:
        """Nothing is left to do."""

    def attribute(self, queries: Queries, only: GaussianProcess | None = None) -> AttributionScores[GaussianProcess]:  # noqa: ARG002 - there is one
        """Ask the credit head."""
        features = self.features(queries).to(self.credit.dtype)
        shares = self.credit(features, queries.class_labels.to(features.device)).cpu()
        return AttributionScores.in_a_row([shares], self.settings)

    def kept(self) -> Cache:
        """The credit head, and the seconds of the calibration."""
        num_bytes = sum(buffer.nbytes for buffer in self.credit.buffers())
        return Cache(num_bytes=num_bytes, seconds=self.credit.config.calibration_seconds)


def pixel_features(images: Queries | ImageSet) -> Tensor:
    """Take pixels in [-1, 1], (image, feature)."""
    pixels = images.images if isinstance(images, Queries) else to_unit_range(images.images)
    return pixels.flatten(1)


@dataclass(frozen=True, kw_only=True)
class TraceFeatures:
    """What the provenance network sees of images at the last step, their pixels, and gradients of the last layer."""

    pipeline: ProvenancePipeline
    """Pipeline of a denoiser with a provenance network."""
    along: Along
    """Where images are looked at; training images are noised."""
    has_gradients: bool = True
    """Whether normalised gradients come last."""

    @property
    def parts(self) -> FeatureParts:
        """Widths of the embedding, of the pixels, and of gradients where there are any."""
        unet = self.pipeline.unet
        distances = self.pipeline.provenance.config.width, unet.config.in_channels * unet.config.sample_size**2
        return FeatureParts(distances, num_last_layer(unet) if self.has_gradients else 0)

    @torch.no_grad()
    def __call__(self, images: Queries | ImageSet) -> Tensor:
        """Give features, (image, feature)."""
        if isinstance(images, Queries):
            return self._features(images.along(self.along), images.class_labels)
        batches = zip(images.images.split(NETWORK_BATCH), images.labels.split(NETWORK_BATCH), strict=True)
        noised = ((noised_steps(self.pipeline, to_unit_range(pixels)), labels) for pixels, labels in batches)
        return torch.cat([self._features(noisy, labels) for noisy, labels in noised])

    def _features(self, noisy: NoisyImages, class_labels: Tensor) -> Tensor:
        """Give the features of images at some steps."""
        pipeline, device = self.pipeline, self.pipeline.device
        unet = pipeline.unet if self.has_gradients else None
        look = CreditFeatures(pipeline.provenance, denoiser=unet, clear_from=pipeline.clear_from)
        steps = (
            pipeline.denoiser.step_at(images.to(device), timestep, class_labels.to(device), number=number)
            for number, (images, timestep) in enumerate(zip(noisy.images, noisy.timesteps, strict=True))
        )
        trace(steps, look)
        return look.features()


def traced_images(pipeline: ProvenancePipeline, train: ImageSet, queries: Mapping[str, Queries]) -> TracedImages:
    """Give what traces see of training images, and of queries by kind."""
    features = TraceFeatures(pipeline=pipeline, along="trajectory")
    asked = {kind: LabelledFeatures(features=features(q), labels=q.class_labels) for kind, q in queries.items()}
    labelled = LabelledFeatures(features=features(train), labels=train.labels)
    return TracedImages(train=labelled, queries=asked, parts=features.parts, null_label=train.num_classes)


def least_alpha_bar(pipeline: ProvenancePipeline) -> float:
    """Give the noise level from which on images are recorded: the window of a trace is always within."""
    low = pipeline.window[0]
    return min(LEAST_ALPHA_BAR, low) if low > 0 else LEAST_ALPHA_BAR


def noised_steps(pipeline: ProvenancePipeline, images: Tensor) -> NoisyImages:
    """Noise images in [-1, 1], (query, channel, height, width), to the levels of the sampler."""
    recorder, images = Recorder(least_alpha_bar=least_alpha_bar(pipeline)), images.to(pipeline.device)
    null = torch.full((len(images),), pipeline.null_label, device=images.device)
    steps = pipeline.denoiser.renoise(images, null, num_inference_steps=NUM_INFERENCE_STEPS, seed=0)
    trace(steps, recorder)
    return recorder.noisy_images()
