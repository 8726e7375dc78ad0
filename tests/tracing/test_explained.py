"""How much of an image training images explain: copies all, mixtures by mixtures, noise hardly, brightness never."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from provgen.data.images import to_unit_range
from provgen.tracing import attribution
from provgen.tracing.attribution import LEAST_COPY, Explained, Mixtures, Support, SupportLimits, support_limits

CPU = torch.device("cpu")
SHARES = ("share", "by_nearest", "by_class_mean")


@pytest.fixture(scope="module")
def train(random_images):
    return random_images(20, num_classes=3, channels=3)


@pytest.fixture(scope="module")
def mixtures(train):
    return Mixtures(train, CPU, SupportLimits(least=0.2, copy=0.96))


@pytest.fixture(scope="module")
def pixels(train):
    return to_unit_range(train.images)


@pytest.fixture(scope="module")
def smooth(random_images):
    """Make smooth images of 32x32, of three classes with a picture of their own."""

    def make(count, seed):
        noise = torch.randn(count + 3, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        pictures = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(99))
        coarse = noise[:count] + 1.5 * pictures[torch.arange(count) % 3]
        images = F.interpolate(coarse, 32, mode="bilinear", align_corners=False).div(5).clamp(-1, 1)
        pixels = ((images + 1) * 127.5).round().to(torch.uint8)
        return replace(random_images(count, num_classes=3, channels=3, size=32), images=pixels)

    return make


def test_a_copy_is_explained_by_its_original_alone(mixtures, pixels):
    found = mixtures.explain(pixels)
    for name in ("share", "by_nearest"):
        torch.testing.assert_close(getattr(found, name), torch.ones(20))
    assert found.nearest.tolist() == list(range(20))
    assert found.is_copy.all()
    assert {found.support(query) for query in range(20)} == {Support.COPY}


def test_a_copy_with_a_little_noise_is_a_copy_and_with_much_noise_it_is_none(mixtures, pixels):
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0))
    for scale, is_copy in ((0.02, True), (0.3, False)):
        noisy = pixels + scale * noise
        found = mixtures.explain(noisy)
        assert found.nearest.tolist() == list(range(20))
        assert bool(found.is_copy.all()) == bool(found.is_copy.any()) == is_copy
        # The noise is what is not explained of the contrast with the mean image, or with grey.
        left, of_mean, of_grey = (
            some.flatten(2).var(dim=2).sum(dim=1) for some in (scale * noise, noisy - pixels.mean(dim=0), noisy)
        )
        torch.testing.assert_close(found.by_nearest, 1 - left / torch.minimum(of_mean, of_grey), atol=1e-4, rtol=0)


def test_brightness_explains_nothing_and_hides_nothing(mixtures, pixels):
    """A copy in another brightness of every channel is a copy; an even image has no sources, whatever its colour."""
    shift = torch.tensor([0.3, -0.2, 0.5])[:, None, None]
    other = mixtures.explain(pixels + shift)
    torch.testing.assert_close(other.by_nearest, torch.ones(20))
    assert other.nearest.tolist() == list(range(20))
    noise = 2 * torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
    dark, bright = (mixtures.explain(0.5 * noise + by * shift) for by in (-1, 1))
    for name in SHARES:
        torch.testing.assert_close(getattr(dark, name), getattr(bright, name), atol=1e-4, rtol=0)
    even = mixtures.explain(torch.tensor([0.0, 0.5, -1.0])[:, None, None, None].expand(3, 3, 8, 8))
    assert even.share.tolist() == even.by_nearest.tolist() == [0, 0, 0]


def test_an_inverted_image_is_not_explained_by_itself(mixtures, pixels):
    found = mixtures.explain(-pixels)
    assert found.by_nearest.max() < 0.2


def test_a_mixture_of_two_is_explained_by_a_mixture_and_not_by_one(mixtures, pixels):
    """Of independent images a and b, (a + b) / 2 is as far from a as from the mean: one alone explains nothing."""
    found = mixtures.explain((pixels[:10] + pixels[10:]) / 2)
    torch.testing.assert_close(found.share, torch.ones(10), atol=1e-3, rtol=0)
    assert found.by_nearest.max() < 0.3
    assert all(int(nearest) in (row, row + 10) for row, nearest in enumerate(found.nearest))
    assert {found.support(query) for query in range(10)} == {Support.MIXTURE}


def test_the_mean_of_a_class_is_explained_by_its_mean(mixtures, pixels, train):
    means = torch.stack([pixels[train.labels == label].mean(dim=0) for label in range(3)])
    found = mixtures.explain(means)
    torch.testing.assert_close(found.by_class_mean, torch.ones(3))
    torch.testing.assert_close(found.share, torch.ones(3))
    assert found.by_nearest.max() < 0.3
    # Without classes there is the mean of all.
    alone = Mixtures(replace(train, labels=torch.zeros(20).long(), class_names=()), CPU)
    torch.testing.assert_close(alone.explain(pixels.mean(dim=0)[None]).by_class_mean, torch.ones(1))


def test_noise_has_no_sources_and_unseen_images_have_some(smooth):
    known, unseen = smooth(60, seed=0), smooth(250, seed=1)
    mixtures = Mixtures(known, CPU)
    limits = support_limits(mixtures, unseen, (3, 32, 32), seed=0)
    judged = Mixtures(known, CPU, limits)
    noise = judged.explain(2 * torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(5)) - 1)
    assert noise.share.max() < 0.05
    assert {noise.support(query) for query in range(50)} == {Support.NONE}
    others = judged.explain(to_unit_range(smooth(60, seed=2).images))
    assert others.share.min() > 0.2
    assert sum(others.support(query) == Support.MIXTURE for query in range(60)) >= 57
    copied = judged.explain(to_unit_range(known.images))
    assert {copied.support(query) for query in range(60)} == {Support.COPY}


def test_the_best_of_all_mixtures_by_brute_force(mixtures, pixels, train):
    """Pixel by pixel in float64: kernels of falling variance around the image, the nearest, and means of classes."""
    noise = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    images = (0.6 * pixels[:6] + 0.4 * pixels[6:12] + 0.2 * noise).double().numpy()
    rows = pixels.double().numpy()

    def contrast(image):
        return float(sum(((channel - channel.mean()) ** 2).sum() for channel in image))

    mean = rows.mean(axis=0)
    spread = np.mean([contrast(row - mean) for row in rows])
    centres = [mean, *(rows[(train.labels == label).numpy()].mean(axis=0) for label in range(3))]
    expected = {name: [] for name in SHARES}
    for image in images:
        distances = np.array([contrast(image - row) for row in rows])
        total = min(contrast(image - mean), contrast(image))
        tried = []
        for octave in range(16):
            logits = -distances / (2 * spread) * 2**octave
            weights = np.exp(logits - logits.max())
            tried.append(contrast(np.tensordot(weights / weights.sum(), rows, axes=1) - image))
        by_class = min(contrast(centre - image) for centre in centres)
        best = min(*tried, by_class, distances.min())
        for name, error in zip(SHARES, (best, distances.min(), by_class), strict=True):
            expected[name].append(min(1, max(0, 1 - error / total)))
    found = mixtures.explain(torch.from_numpy(images).float())
    for name in SHARES:
        torch.testing.assert_close(
            getattr(found, name), torch.tensor(expected[name], dtype=torch.float32), atol=1e-4, rtol=0
        )
    assert found.share.min() > found.by_nearest.min() + 0.02, "mixtures give more than one image"


def test_two_training_images_by_hand(random_images):
    """All in one direction: training images at -1 and 1, and what is asked about at 0.5, 2 and 0.01."""
    direction = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 2, 2)
    images = ((torch.stack([-direction, direction]) + 1) * 127.5).round().to(torch.uint8)
    pair = replace(random_images(2, num_classes=2, size=2), images=images)
    mixtures = Mixtures(pair, CPU)
    found = mixtures.explain(torch.stack([0.5 * direction, 2 * direction, 0.01 * direction]))
    # The mean is grey, so contrasts are those of the images themselves: 1 - (0.5 / 0.5)^2 and 1 - (1 / 2)^2.
    torch.testing.assert_close(found.by_nearest, torch.tensor([0.0, 0.75, 0.0]), atol=1e-4, rtol=0)
    assert found.nearest[:2].tolist() == [1, 1]
    # A kernel whose variance is the spread of 4 by 2^octave mixes them to tanh(x 2^octave).
    best = [max(1 - ((math.tanh(x * 2**o) - x) / x) ** 2 for o in range(16)) for x in (0.5, 2.0, 0.01)]
    torch.testing.assert_close(found.share, torch.tensor(best), atol=1e-4, rtol=0)


def test_shares_are_between_nothing_and_all_and_the_best_is_the_best(mixtures, pixels):
    noise = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    found = mixtures.explain(torch.cat([pixels + by * noise for by in (0.1, 0.5, 2.0)]))
    for name in SHARES:
        assert ((getattr(found, name) >= 0) & (getattr(found, name) <= 1)).all()
    assert (found.share >= found.by_nearest).all()
    assert (found.share >= found.by_class_mean).all()


def test_neither_the_order_of_training_images_nor_the_batch_changes_anything(mixtures, pixels, train, monkeypatch):
    images = 0.7 * pixels + 0.3 * pixels.roll(1, dims=0)
    whole = mixtures.explain(images)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = Mixtures(train.select(order), CPU, mixtures.limits).explain(images)
    assert torch.equal(order[shuffled.nearest], whole.nearest)
    monkeypatch.setattr(attribution, "MAX_MATRIX", 3 * 20)
    parts = mixtures.explain(images)
    assert torch.equal(parts.nearest, whole.nearest)
    for name in SHARES:
        for other in (shuffled, parts):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), atol=1e-4, rtol=0)


def test_limits_are_read_off_held_out_images_and_noise(mixtures, random_images, smooth):
    known = smooth(60, seed=0)
    unseen = smooth(100, seed=1)
    plain = Mixtures(known, CPU)
    found = support_limits(plain, unseen, (3, 32, 32), seed=0)
    shares = plain.explain(to_unit_range(unseen.images))
    assert found.least == pytest.approx(float(shares.share.quantile(0.01)), abs=1e-4)
    assert found.copy == LEAST_COPY, "no held-out image is as near to one training image"
    # Held-out images some of which are copies raise the limit.
    some = known.select(torch.arange(10))
    mixed = replace(unseen, images=torch.cat([some.images, unseen.images[10:]]))
    assert support_limits(plain, mixed, (3, 32, 32), seed=0).copy == pytest.approx(1, abs=1e-4)
    # Where held-out images are noise, noise is what limits.
    noise = random_images(100, channels=3, seed=5)
    by_noise = support_limits(mixtures, noise, (3, 8, 8), seed=0)
    nothing = support_limits(mixtures, noise.select(torch.arange(0)), (3, 8, 8), seed=0)
    assert by_noise.least == nothing.least > 0
    assert nothing.copy == LEAST_COPY
    random = 2 * torch.rand(2000, 3, 8, 8, generator=torch.Generator().manual_seed(8)) - 1
    beyond = (mixtures.explain(random).share > nothing.least).double().mean()
    assert float(beyond) == pytest.approx(0.01, abs=0.015)


def shares_of(rows):
    """What is explained of images, (query, 3): share, by the nearest, by a class mean."""
    rows = torch.tensor(rows)
    return Explained(
        share=rows[:, 0],
        by_nearest=rows[:, 1],
        by_class_mean=rows[:, 2],
        nearest=torch.arange(len(rows)),
        least=torch.full((len(rows),), 0.25),
        copy=torch.full((len(rows),), 0.95),
    )


def test_support_and_its_description_by_hand():
    found = Explained.concatenate([
        shares_of([[0.99, 0.96, 0.5], [0.99, 0.95, 0.5], [0.9, 0.94, 0.5], [0.25, 0.1, 0.0], [0.24, 0.1, 0.0]]),
        Explained.unknown(1),
    ])  # fmt: skip
    kinds = [Support.COPY, Support.COPY, Support.MIXTURE, Support.MIXTURE, Support.NONE, Support.UNKNOWN]
    assert [found.support(query) for query in range(6)] == kinds
    assert found.is_copy.tolist() == [True, True, False, False, False, False]
    assert [found.describe(query) for query in range(6)] == [
        "a copy: 96% explained by one training image alone",
        "a copy: 95% explained by one training image alone",
        "90% explained by training images",
        "25% explained by training images",
        "no sources: 24% explained by training images",
        "",
    ]
    assert [str(kind) for kind in kinds] == ["copy", "copy", "mixture", "mixture", "no sources", "unknown"]


def test_what_is_not_known_is_no_number():
    found = Explained.unknown(3)
    assert all(getattr(found, name).isnan().all() for name in (*SHARES, "least", "copy"))
    assert found.nearest.tolist() == [-1] * 3
    assert not found.is_copy.any()


def test_joining_keeps_the_order_of_images(mixtures, pixels):
    whole = mixtures.explain(pixels[:9])
    joined = Explained.concatenate([mixtures.explain(part) for part in (pixels[:4], pixels[4:5], pixels[5:9])])
    for field in fields(Explained):
        torch.testing.assert_close(getattr(joined, field.name), getattr(whole, field.name), atol=1e-4, rtol=0)
    assert whole.least.tolist() == pytest.approx([0.2] * 9)
    assert whole.copy.tolist() == pytest.approx([0.96] * 9)
