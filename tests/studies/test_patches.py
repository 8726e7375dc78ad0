"""Patch posteriors: the whole image as one patch is the closed form, a collage is taken apart, loops agree."""

import pytest
import torch

from provgen.data.images import to_unit_range
from provgen.studies.faithfulness import posteriors as patches
from provgen.studies.faithfulness.posteriors import PatchPosterior


@pytest.fixture(scope="module")
def train(random_images):
    return random_images(6, num_classes=2, channels=3)


@pytest.fixture(scope="module")
def pixels(train):
    return to_unit_range(train.images, torch.float64)


def posterior_of(train, pixels, patch_size):
    return PatchPosterior(pixels, train.labels, null_label=2, patch_size=patch_size)


SIGNAL = torch.tensor(0.3, dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(scope="module")
def noisy(pixels):
    noise = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return SIGNAL.sqrt() * pixels[:3] + (1 - SIGNAL).sqrt() * noise


def test_a_patch_as_large_as_the_image_is_the_closed_form(train, pixels, noisy, closed_form_of):
    found = posterior_of(train, pixels, 8)(noisy, torch.tensor(500), SIGNAL, LABELS).exp()
    torch.testing.assert_close(found, closed_form_of(train).probs(noisy, SIGNAL.expand(3), LABELS))


def test_small_patches_by_a_loop(train, pixels, noisy):
    found = posterior_of(train, pixels, 3)(noisy, torch.tensor(500), SIGNAL, torch.full((3,), 2)).exp()
    total = 0
    for y in range(6):
        for x in range(6):
            place = (slice(None), slice(y, y + 3), slice(x, x + 3))
            squares = torch.stack([
                (noisy[1][place] - SIGNAL.sqrt() * image[place]).square().sum() for image in pixels
            ])  # fmt: skip
            total = total + (-squares / (2 * (1 - SIGNAL))).softmax(dim=0) / 36
    torch.testing.assert_close(found[1], total)


def test_a_collage_has_both_sources_where_the_closed_form_has_none(train, pixels):
    """Left half of one image, right half of another, hardly any noise: places touching one half alone say which."""
    collage = torch.cat([pixels[1][:, :, :4], pixels[4][:, :, 4:]], dim=2)[None]
    alpha_bar = torch.tensor(0.99, dtype=torch.float64)
    found = posterior_of(train, pixels, 2)(
        alpha_bar.sqrt() * collage, torch.tensor(1), alpha_bar, torch.tensor([2])
    ).exp()[0]
    assert found[1] >= 3 / 7 - 1e-6
    assert found[4] >= 3 / 7 - 1e-6


def test_slices_and_batches_change_nothing(train, pixels, noisy, monkeypatch):
    whole = posterior_of(train, pixels, 3)(noisy, torch.tensor(500), SIGNAL, LABELS)
    monkeypatch.setattr(patches, "MAX_BYTES", 1)
    torch.testing.assert_close(posterior_of(train, pixels, 3)(noisy, torch.tensor(500), SIGNAL, LABELS), whole)
    assert whole[0, train.labels == 1].exp().max() == 0
    assert whole.exp().sum(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_with_hardly_any_noise_the_order_of_far_images_is_kept(train, pixels):
    alpha_bar = torch.tensor(0.9999, dtype=torch.float32)
    posterior = PatchPosterior(pixels.float(), train.labels, null_label=2, patch_size=3)
    found = posterior(pixels[:1].float(), torch.tensor(0), alpha_bar, torch.tensor([2]))[0]
    assert found.isfinite().all()
    assert len(found.unique()) == 6
    assert int(found.argmax()) == 0
