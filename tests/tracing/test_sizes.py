"""From 8 to 64 pixels, grey and coloured, untrained and barely trained: traces are neither sure nor empty."""

import pytest
import torch
import torch.nn.functional as F

from provgen import build, evaluation
from provgen.build import RunData
from provgen.data.dataset import ImageSet
from provgen.data.manifest import Manifest
from provgen.settings import DataSettings, GeneratorSettings, ProvenanceSettings, Settings, TrainingSettings
from provgen.tracing.attribution import Support

TRAIN, HOLDOUT = 60, 40

SLOW = pytest.mark.slow


def blurred_images(count: int, size: int, channels: int, seed: int) -> torch.Tensor:
    """Make smooth random images, uint8 (image, channel, size, size): a few coarse blobs each, whatever the size."""
    coarse = torch.rand((count, channels, 4, 4), generator=torch.Generator().manual_seed(seed))
    return (255 * F.interpolate(coarse, size=size, mode="bilinear").clamp(0, 1)).round().to(torch.uint8)


def images_of(count: int, size: int, channels: int, seed: int) -> ImageSet:
    """Blurred images of two classes."""
    return ImageSet(
        images=blurred_images(count, size, channels, seed),
        labels=torch.arange(count) % 2,
        class_names=("one", "two"),
        paths=tuple(f"{seed}/{number}.png" for number in range(count)),
        sha256=tuple(f"{seed}-{number}" for number in range(count)),
        contributors=(None,) * count,
        licenses=(None,) * count,
    )


VELOCITY = {"prediction": "v_prediction", "beta_schedule": "squaredcos_cap_v2"}
"""As in the recipes for larger images."""


def pipeline_of(size: int, channels: int, steps: int, **chosen: str):
    """Train a tiny denoiser for some steps, and make its pipeline."""
    train, holdout = images_of(TRAIN, size, channels, 1), images_of(HOLDOUT, size, channels, 2)
    data = RunData(train=train, holdout=holdout, manifest=Manifest.of(train, holdout))
    settings = Settings(
        data=DataSettings(image_size=size),
        generator=GeneratorSettings(size="tiny", **chosen),
        provenance=ProvenanceSettings(width=16),
        training=TrainingSettings(batch_size=16, warmup_steps=1),
    )
    accelerator = build.make_accelerator(settings)
    trainer = build.make_trainer(settings, data, accelerator)
    batches = build.make_batches(settings, train, accelerator)
    for step in range(steps):
        trainer.step(batches.batch(step), step)
    pipeline = evaluation.make_pipeline(trainer, data, has_credit=True).with_training_images(train)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, data, trainer.generator


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize(
    ("size", "channels"), [(8, 1), (14, 3), *(pytest.param(*case, marks=SLOW) for case in ((28, 1), (32, 3), (64, 3)))]
)
@pytest.mark.parametrize("chosen", [{}, VELOCITY], ids=["noise", "velocity"])
def test_traces_are_neither_sure_nor_empty_at_any_size(size, channels, steps, chosen):
    pipeline, data, generator = pipeline_of(size, channels, steps, **chosen)
    low, high = pipeline.window
    assert 0 <= low < high <= 1
    levels = evaluation.probe_levels(generator, data)
    assert levels == sorted(levels)
    assert levels[0] < levels[-1]

    known = pipeline.attribute(data.holdout.images, top_k=TRAIN)
    # A posterior that names one image has an entropy of 0, the prior one of log 60 = 4.1.
    assert known.posterior[:, 0].mean() < 0.5
    assert known.weight[:, 0].mean() < 0.3
    assert known.entropy.exp().median() > 4
    supports = [known.explained.support(query) for query in range(HOLDOUT)]
    assert supports.count(Support.MIXTURE) >= 0.9 * HOLDOUT

    copies = pipeline.attribute(data.train.images, top_k=2)
    assert copies.example_index[:, 0].tolist() == list(range(TRAIN))
    assert {copies.explained.support(query) for query in range(TRAIN)} == {Support.COPY}

    random = torch.Generator().manual_seed(3)
    noise = torch.randint(256, data.holdout.images.shape, dtype=torch.uint8, generator=random)
    noisy = pipeline.attribute(noise, top_k=2).explained
    assert sum(noisy.support(query) is Support.NONE for query in range(HOLDOUT)) >= 0.95 * HOLDOUT


@SLOW
def test_informative_levels_move_towards_noise_as_images_grow():
    ends = []
    for size in (8, 16, 32):
        _, data, generator = pipeline_of(size, 1, 0)
        ends.append(evaluation.probe_levels(generator, data)[-1])
    assert ends == sorted(ends, reverse=True)
    # The same pictures with 16 times the pixels are as hard to tell apart at a 16th of the signal-to-noise ratio.
    first, last = (end / (1 - end) for end in (ends[0], ends[-1]))
    assert first / last == pytest.approx(16, rel=0.3)
