"""What does a shared pipeline reveal of its training images?

    python benchmarks/revealed_images.py runs/photos --picture revealed.png

Reads training images back from the numbers of the pipeline folder, and compares them with the images of the run:

- from prototypes, by a ridge regression onto the pixels of some training images that the reader has;
- from prototypes without any training image, by the axes that fit samples which the pipeline itself draws;
- from the credit head, whose landmarks are training images as it compares them with others;
- from the head's read-outs, by a regression on those landmarks, where some training images are no landmarks.

Prints R^2 on training images that were not used for reading: 1 is the image itself, 0 the mean image. The null has the
same numbers dealt to other images: a regression then finds nothing, and the other ways give another image (about -1).
Intervals are 95 % bootstrap intervals over images.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image
from sklearn.linear_model import RidgeCV
from torch import Tensor
from torchvision.utils import make_grid

from provgen import build, cli
from provgen.data.images import to_pil, to_uint8, to_unit_range
from provgen.metrics.statistics import RESAMPLES_OF_MEAN, Estimate, percentile_interval, to_numpy
from provgen.models.index_heads import ClassConditionalHead
from provgen.models.provenance import ProvenanceNetwork
from provgen.pipeline import ProvenancePipeline
from provgen.report.format import interval, markdown_table
from provgen.tracing.calibrate import NUM_INFERENCE_STEPS
from provgen.tracing.gaussian_process import MAX_LANDMARKS
from provgen.tracing.trace import CreditFeatures, trace

FEW = 100
"""Training images that a reader has who has few."""
PENALTIES = np.logspace(-6, 2, 17)
"""Ridge penalties to choose from, in units of the number of images times the mean variance of the numbers."""
SHOWN = 16
"""Images in the picture."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Training images as they were read from a pipeline."""

    source: str
    """What was read."""
    known: str
    """Training images that the reader has."""
    rows: Tensor
    """Training images that were read, int64 (read,)."""
    pixels: Tensor
    """Pixels in [-1, 1], float64 (read, pixel)."""
    null: Tensor
    """The same with the numbers dealt to other images."""


def main(
    run: Annotated[Path, typer.Argument(help="Run folder of a trained generator.")],
    samples: Annotated[int, typer.Option(min=2, help="Images drawn to read without training images.")] = 512,
    picture: Annotated[Path | None, typer.Option(help="PNG of the first images and how they are read.")] = None,
) -> None:
    """Print the table."""
    trained = build.open_trained_run(run, torch.device("cpu"))
    train, pipeline = trained.data.train, trained.pipeline
    pixels = to_unit_range(train.images, torch.float64).flatten(1)
    print(f"{run}: {len(train)} images of {pixels.shape[1]} numbers, prototypes of {pipeline.provenance.config.width}")
    rows, shown = [], [train.images[:SHOWN]]
    for reading in readings(pipeline, pixels, samples):
        estimates = [explained(pixels[reading.rows], read) for read in (reading.pixels, reading.null)]
        exact = (to_uint8(reading.pixels) == to_uint8(pixels[reading.rows])).all(dim=1).double().mean()
        rows.append(
            [reading.source, reading.known, len(reading.rows), *map(interval, estimates), f"{100 * float(exact):.1f} %"]
        )
        if SHOWN <= len(train) == len(reading.rows):
            shown.append(to_uint8(reading.pixels[:SHOWN]).view_as(shown[0]))
    header = ["read from", "training images known", "images read", "R^2", "null", "bit for bit"]
    print(markdown_table(header, rows, text_columns=(0, 1)))
    if picture is not None:
        save_picture(torch.cat(shown), picture)


def readings(pipeline: ProvenancePipeline, pixels: Tensor, samples: int) -> Iterator[Reading]:
    """Read training images (train, pixel) in every way."""
    points, covered = prototypes(pipeline.provenance), pipeline.provenance.covered
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    for known in (FEW, len(points) // 2):
        is_known = torch.zeros(len(points), dtype=torch.bool)
        is_known[order[:known]] = True
        yield fitted("prototypes", f"{known} others", points, pixels[covered], is_known, covered)
    yield from_samples(pipeline, points, samples)
    if pipeline.credit is not None and float(pipeline.credit.scale[points.shape[1]]) > 0:
        yield from from_credit(pipeline, points)


def prototypes(provenance: ProvenanceNetwork) -> Tensor:
    """Give the point of every covered training image, float64 (covered, width)."""
    head = provenance.index_head
    if isinstance(head, ClassConditionalHead):
        points = torch.einsum("sr,grw->gsw", head.slots, head.maps)[head.example_groups, head.example_slots]
    else:
        points = head.prototypes.points
    return points.detach().double()


def fitted(source: str, known: str, numbers: Tensor, pixels: Tensor, is_known: Tensor, index: Tensor) -> Reading:
    """Read images from numbers (image, number), by a regression on the pixels (image, pixel) of those that are known.

    `index` are the images' training indices, int64 (image,).
    """
    random = torch.Generator().manual_seed(1)
    reads = []
    for dealt in (numbers, numbers[torch.randperm(len(numbers), generator=random)]):
        reads.append(regress(dealt[is_known], pixels[is_known], dealt[~is_known]))
    return Reading(source=source, known=known, rows=index[~is_known], pixels=reads[0], null=reads[1])


def regress(numbers: Tensor, pixels: Tensor, asked: Tensor) -> Tensor:
    """Fit pixels (image, pixel) by ridge regression on numbers (image, number), and predict those of others."""
    scale = float(numbers.var(dim=0).mean()) * len(numbers)
    regression = RidgeCV(alphas=PENALTIES * scale).fit(to_numpy(numbers), to_numpy(pixels))
    return torch.from_numpy(regression.predict(to_numpy(asked)))


def from_samples(pipeline: ProvenancePipeline, points: Tensor, count: int) -> Reading:
    """Read images from prototypes as the network reads samples, whose pixels everyone can draw.

    Prototypes start at principal coordinates, whose axes are orthonormal: those that fit samples best are taken.
    """
    labels = pipeline.provenance.example_labels
    random = torch.Generator().manual_seed(0)
    drawn = labels[torch.randint(len(labels), (count,), generator=random)]
    pipeline.set_progress_bar_config(disable=True)
    images = to_unit_range(pipeline(drawn, top_k=None, generator=random, output_type="pt").images)
    seen, pixels = features(pipeline, images, drawn)[:, : points.shape[1]], images.flatten(1).double()
    # The network sees clean images sharper than prototypes lie: both get the same spread.
    scaled = (seen - seen.mean(dim=0)) / seen.std(dim=0).clamp_min(1e-12) * points.std(dim=0)
    left, _, right = torch.linalg.svd(scaled.T @ (pixels - pixels.mean(dim=0)), full_matrices=False)
    read = pixels.mean(dim=0) + (points - points.mean(dim=0)) @ left @ right
    dealt = read[torch.randperm(len(read), generator=random)]
    return Reading(
        source="prototypes", known=f"none ({count} samples)", rows=pipeline.provenance.covered, pixels=read, null=dealt
    )


def features(pipeline: ProvenancePipeline, images: Tensor, labels: Tensor) -> Tensor:
    """Give what the credit head sees of images in [-1, 1] (image, channel, height, width): embedding and pixels."""
    look = CreditFeatures(pipeline.provenance)
    trace(pipeline.generator.renoise(images, labels, num_inference_steps=NUM_INFERENCE_STEPS, seed=0), look)
    return look.features().double()


def from_credit(pipeline: ProvenancePipeline, points: Tensor) -> Iterator[Reading]:
    """Read landmarks as they stand in the credit head, and from them the other training images."""
    manifest, head, width = pipeline.manifest, pipeline.credit, points.shape[1]
    shape = (manifest.channels, manifest.image_size, manifest.image_size)
    part = slice(width, width + int(np.prod(shape)))
    # Training images have the same seeded noise on them: what is left of an image that is zero.
    noise = features(pipeline, torch.zeros(1, *shape), torch.tensor([pipeline.null_label]))[:, part]
    pixels = head.landmarks[:, part].double() / head.scale[part].double() - noise
    random, count = torch.Generator().manual_seed(0), head.config.num_examples
    rows = torch.randperm(count, generator=random)[:MAX_LANDMARKS].sort().values
    dealt = pixels[torch.randperm(len(pixels), generator=random)]
    yield Reading(source="credit head, landmarks", known="none", rows=rows, pixels=pixels, null=dealt)
    if len(rows) == count:
        return
    is_known, everything = torch.zeros(count, dtype=torch.bool), torch.zeros(count, pixels.shape[1]).double()
    is_known[rows], everything[rows] = True, pixels
    numbers = head.readout.T.double()
    yield fitted("credit head, read-outs", "none (landmarks)", numbers, everything, is_known, torch.arange(count))


def explained(pixels: Tensor, read: Tensor) -> Estimate:
    """Give the share of the variance of images (image, pixel) that readings explain."""
    errors = to_numpy((pixels - read).square().sum(dim=1))
    spreads = to_numpy((pixels - pixels.mean(dim=0)).square().sum(dim=1))
    random, draws = np.random.default_rng(0), np.empty(RESAMPLES_OF_MEAN)
    for number in range(RESAMPLES_OF_MEAN):
        rows = random.integers(len(errors), size=len(errors))
        draws[number] = 1 - errors[rows].sum() / spreads[rows].sum()
    return Estimate(float(1 - errors.sum() / spreads.sum()), *percentile_interval(draws), len(errors))


def save_picture(images: Tensor, path: Path) -> None:
    """Draw rows of images uint8 (image, channel, height, width), enlarged without smoothing."""
    grid = to_pil(make_grid(images, nrow=SHOWN, padding=1, pad_value=255))
    factor = max(1, 64 // images.shape[-1])
    grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST).save(path, optimize=True)


if __name__ == "__main__":
    cli.run(main)
