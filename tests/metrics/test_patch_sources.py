"""Parts of one image, of several, and parts that say nothing."""

import pytest
import torch

from provgen.metrics.verdicts import patch_share


@pytest.fixture
def train(generator):
    return 2 * torch.rand(60, 1, 8, 8, generator=generator) - 1


def test_copies_are_of_one_image(train):
    assert torch.equal(patch_share(train[:9], train), torch.ones(9, dtype=torch.float64))
    assert torch.equal(patch_share(train[:9] + 0.02, train), torch.ones(9, dtype=torch.float64))


@pytest.mark.parametrize("columns", [2, 4, 6])
def test_an_image_of_two_halves_has_the_larger_share(train, columns):
    image = train[:1].clone()
    image[..., columns:] = train[1:2, :, :, columns:]
    assert patch_share(image, train).tolist() == [max(columns, 8 - columns) / 8]


def test_parts_that_all_images_share_do_not_count(train):
    train = train.clone()
    train[..., :4, :] = -1
    image = train[:1].clone()
    image[..., :4] = train[1:2, :, :, :4]
    assert patch_share(image, train).tolist() == [0.5], "of the lower half"
    assert patch_share(-torch.ones(1, 1, 8, 8), -torch.ones(50, 1, 8, 8)).isnan().all(), "no part tells"


@pytest.mark.parametrize("count", [2, 16, 20])
def test_noise_is_of_no_single_image_of_a_small_set(train, count, generator):
    images = 2 * torch.rand(30, 1, 8, 8, generator=generator) - 1
    assert patch_share(train[:2], train[:count]).tolist() == [1, 1]
    if count > 2:
        assert patch_share(images, train[:count]).nanmean() < 0.5


def test_chunks_and_order_change_nothing(train, generator, monkeypatch):
    images = train[:20] / 2 + train[20:40] / 2
    whole = patch_share(images, train)
    assert 0 < whole.min() < whole.max() <= 1
    assert torch.equal(patch_share(images, train[torch.randperm(60, generator=generator)]), whole)
    monkeypatch.setattr("provgen.metrics.verdicts.MAX_BYTES", 60 * 16 * 4 * 3)
    assert torch.equal(patch_share(images, train), whole)
