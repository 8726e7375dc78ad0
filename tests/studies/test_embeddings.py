"""Cosines of a denoiser's features: by hand, and without a batch that matters."""

import pytest
import torch
import torch.nn.functional as F

from provgen.data.images import to_unit_range
from provgen.data.random import seeded_generator
from provgen.generators.diffusion import DiffusionGenerator
from provgen.models.diffusion import make_sampling_scheduler, make_training_scheduler, record_feature_maps
from provgen.studies.faithfulness.attributor import Queries
from provgen.studies.faithfulness.baselines import EmbeddingCosine
from provgen.tracing.trace import NoisyImages


@pytest.fixture(scope="module")
def train(random_images):
    return random_images(9, num_classes=3)


@pytest.fixture(scope="module")
def denoiser(train, tiny_networks):
    return tiny_networks(train)[0]


def queries_of(images):
    none = NoisyImages(images=images[None], timesteps=torch.zeros(1, dtype=torch.int64), alpha_bars=torch.ones(1))
    return Queries(images=images, class_labels=torch.zeros(len(images), dtype=torch.int64), noisy=none)


@torch.no_grad()
def test_by_hand(train, denoiser):
    scheduler = make_sampling_scheduler(make_training_scheduler("linear"))
    method = EmbeddingCosine(DiffusionGenerator(network=denoiser, scheduler=scheduler).encode, torch.device("cpu"))
    method.fit(train)
    pixels = to_unit_range(train.images)
    found = method.attribute(queries_of(pixels[[4, 1]])).values[0]
    timestep = (scheduler.alphas_cumprod - 0.9).abs().argmin()
    level = scheduler.alphas_cumprod[timestep]
    noise = torch.randn(1, 8, 8, generator=seeded_generator(0, 4, int(timestep)))
    features = []
    for image in pixels:
        noisy = level.sqrt() * image + (1 - level).sqrt() * noise
        with record_feature_maps(denoiser) as feature_maps:
            denoiser(noisy[None], timestep, class_labels=torch.tensor([3]))
        features.append(feature_maps[-1].flatten())
    expected = [[F.cosine_similarity(features[q], f, dim=0) for f in features] for q in (4, 1)]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-4)
    assert found.argmax(dim=1).tolist() == [4, 1]
    assert method.kept().num_bytes == 4 * 9 * len(features[0])
