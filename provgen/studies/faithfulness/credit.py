"""Leave-one-out variance of a Gaussian process as an attribution method, and a calibrated pipeline's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import to_unit_range
from provgen.models.credit import CreditHead
from provgen.models.diffusion import num_last_layer
from provgen.studies.faithfulness.attributor import AttributionScores, Cache, Queries
from provgen.studies.faithfulness.posteriors import Along
from provgen.tracing.diffusion_tracer import DiffusionTracer
from provgen.tracing.gaussian_process import MAX_LANDMARKS, PIXELS, FittedKernel, Grid, Kernel, Parts, Process

Coordinates = Callable[[Queries | ImageSet], Tensor]
"""Where images lie, floating (image, feature); the same space for training images and queries."""

Progress = Callable[[Iterable[Process]], Iterable[Process]]
"""Shows how far along it is."""


def no_progress(processes: Iterable[Process]) -> Iterable[Process]:
    """Show nothing."""
    return processes


class VarianceCredit:
    """How much less would be known of the query without example i.

    A network does the worse on an image, the less its training set says of it: the loss follows the variance of a
    Gaussian process at the query, which every example that is left out enlarges. Examples that stand for one another
    share the credit, and the sign of an influence does not matter, only its square.
    """

    def __init__(self, coordinates: Coordinates, parts: Parts | None = None, grid: Grid = PIXELS) -> None:
        """Take where images lie, what that is made of (None for one part of places), and the processes to try."""
        self.coordinates = coordinates
        self.parts = parts
        self.processes, self.grid = grid.processes, grid

    def fit(self, train: ImageSet) -> None:
        """Keep where the training images lie."""
        self.points = self.coordinates(train).double().cpu()
        self.labels, self.null_label = train.labels, train.num_classes
        self.fitted: dict[Kernel, FittedKernel] = {}

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:
        """Leave every example out under every process, or under the `only` one."""
        return self.attribute_all({"": queries}, only)[""]

    def attribute_all(
        self,
        queries: Mapping[str, Queries],
        only: str | None = None,
        *,
        progress_bar: Progress = no_progress,
    ) -> dict[str, AttributionScores]:
        """Attribute several kinds of queries, each process fitted once for all of them."""
        steps = {
            process: far
            for process, far in zip(self.processes, self.grid.steps, strict=True)
            if only in (None, process.name)
        }
        places = {kind: self.coordinates(some).double().cpu() for kind, some in queries.items()}
        values: dict[str, list[Tensor]] = {kind: [] for kind in queries}
        for process in progress_bar(steps):
            fitted = self._fitted(process.kernel)
            for kind, some in queries.items():
                values[kind].append(fitted.credit(places[kind], some.class_labels, process.ridge).float())
        names, far = tuple(process.name for process in steps), tuple(steps.values())
        return {
            kind: AttributionScores(values=torch.stack(some), settings=names, distance_to_default=far)
            for kind, some in values.items()
        }

    def credit_head(self, process: Process) -> CreditHead:
        """Give the head that a pipeline keeps."""
        return self._fitted(process.kernel).credit_head(process.ridge)

    def _fitted(self, kernel: Kernel) -> FittedKernel:
        """Fit a kernel; only the last one stays in memory."""
        if kernel not in self.fitted:
            fitted = FittedKernel(self.points, self.labels, kernel, null_label=self.null_label, parts=self.parts)
            self.fitted = {kernel: fitted}
        return self.fitted[kernel]

    def kept(self) -> Cache:
        """Landmarks and read-out, in four bytes a number."""
        landmarks = min(MAX_LANDMARKS, len(self.points))
        return Cache(num_bytes=4 * landmarks * (self.points.shape[1] + len(self.points)))


class CalibratedTrace:
    """The weights of a calibrated pipeline; its one setting is what calibration chose."""

    def __init__(self, credit: CreditHead, coordinates: Coordinates) -> None:
        self.credit = credit
        self.coordinates = coordinates

    def fit(self, train: ImageSet) -> None:
        """Nothing is left to do."""

    def attribute(self, queries: Queries, only: str | None = None) -> AttributionScores:  # noqa: ARG002 - there is one
        """Ask the credit head."""
        points = self.coordinates(queries).to(self.credit.dtype)
        shares = self.credit(points, queries.class_labels.to(points.device)).cpu()
        return AttributionScores(values=shares[None], settings=(self.credit.setting,), distance_to_default=(0,))

    def kept(self) -> Cache:
        """The credit head."""
        return Cache(num_bytes=sum(buffer.nbytes for buffer in self.credit.buffers()))


def pixel_coordinates(images: Queries | ImageSet) -> Tensor:
    """Take pixels in [-1, 1], (image, feature)."""
    found = images.images if isinstance(images, Queries) else to_unit_range(images.images)
    return found.flatten(1)


NETWORK_BATCH = 256
"""Training images noised at a time."""


class NetworkCoordinates:
    """What the provenance network sees of images at clear levels, their pixels, and gradients of the last layer."""

    def __init__(self, tracer: DiffusionTracer, *, along: Along, num_inference_steps: int, level_power: float) -> None:
        """Take a tracer that finds coordinates; images without a trajectory are noised to the sampler's levels."""
        self.tracer = tracer
        self.along = along
        self.num_inference_steps = num_inference_steps
        self.level_power = level_power

    @property
    def parts(self) -> Parts:
        """Features of the embedding, of the pixels, and of gradients where the tracer finds them."""
        unet, provenance = self.tracer.unet, self.tracer.provenance
        assert provenance is not None
        places = provenance.config.width, unet.config.in_channels * unet.config.sample_size**2
        return Parts(places, num_last_layer(unet) if self.tracer.finds_gradients else 0)

    @torch.no_grad()
    def __call__(self, images: Queries | ImageSet) -> Tensor:
        """Give coordinates, (image, feature)."""
        device = self.tracer.unet.device
        if isinstance(images, Queries):
            is_along = self.along == "trajectory" and images.trajectory is not None
            noisy = images.trajectory if is_along and images.trajectory is not None else images.noisy
            return self.tracer.coordinates(noisy, images.class_labels.to(device), self.level_power)
        batches = zip(images.images.split(NETWORK_BATCH), images.labels.split(NETWORK_BATCH), strict=True)
        found = []
        for pixels, labels in batches:
            clean = to_unit_range(pixels).to(device)
            noisy = self.tracer.noised(clean, num_inference_steps=self.num_inference_steps, seed=0)
            found.append(self.tracer.coordinates(noisy, labels.to(device), self.level_power))
        return torch.cat(found)
