"""Twelve images and random batches of them, for generators of every kind."""

import pytest
import torch

from provgen.data.batches import BatchStream

NULL = 3


@pytest.fixture
def images(random_images):
    """Twelve images of three classes; the last two have none."""
    images = random_images(12, num_classes=NULL)
    images.labels[-2:] = NULL
    return images


@pytest.fixture
def pixels(images):
    return images.images.float() / 127.5 - 1


@pytest.fixture
def make(generator_of, images):
    """Make a generator of a kind, with random weights that do not train."""
    return lambda kind, *overrides: generator_of(kind, images, *overrides)


@pytest.fixture
def make_batch(images):
    """Make a training batch of every image; one that can be given labels loses half of them."""

    def call(generator):
        stream = BatchStream(
            images,
            batch_size=12,
            num_train_timesteps=1000,
            label_dropout=0.5 if generator.is_class_conditional else 1.0,
            seed=0,
            noise_shape=generator.noise_shape,
        )
        return stream.batch(0)

    return call


@pytest.fixture
def seeds():
    return lambda *numbers: [torch.Generator().manual_seed(number) for number in numbers]
