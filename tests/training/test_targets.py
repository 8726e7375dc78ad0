"""Target rows against the examples themselves and the closed form."""

import pytest
import torch

from provgen.data.batches import BatchStream
from provgen.data.images import to_unit_range
from provgen.training.targets import ClassMixing, MixedTargets, OneHotTargets, PosteriorTargets


def rows_of(targets, batch, noisy, alpha_bar):
    return targets(batch.indices, noisy, alpha_bar, batch.labels)


def noised(stream, alpha_bar, step=0):
    batch = stream.batch(step)
    a = torch.full((len(batch.indices),), alpha_bar)
    scaled = a[:, None, None, None]
    return batch, scaled.sqrt() * batch.clean_images + (1 - scaled).sqrt() * batch.noise, a


@pytest.fixture
def images(random_images):
    return random_images(12)


@pytest.fixture
def stream(images):
    return BatchStream(images, batch_size=64, num_train_timesteps=50, label_dropout=0.5, seed=0)


def test_one_hot_targets_name_the_example_itself(stream):
    batch, noisy, alpha_bar = noised(stream, 0.1)
    targets = rows_of(OneHotTargets(12), batch, noisy, alpha_bar)
    assert targets.shape == (64, 12)
    assert targets.dtype == alpha_bar.dtype
    assert rows_of(OneHotTargets(12), batch, noisy, alpha_bar.double()).dtype == torch.float64
    assert torch.equal(targets.argmax(1), batch.indices)
    assert torch.equal(targets.sum(1), torch.ones(64))
    assert torch.equal(targets.amax(1), torch.ones(64))


def test_posterior_targets_name_the_parent_at_high_signal(stream, closed_form_of, images):
    batch, noisy, alpha_bar = noised(stream, 0.99)
    targets = rows_of(PosteriorTargets(closed_form_of(images)), batch, noisy, alpha_bar)
    expected = rows_of(OneHotTargets(12), batch, noisy, alpha_bar).double()
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-9)


def test_posterior_targets_are_restricted_where_the_label_is_kept_and_only_there(stream, closed_form_of, images):
    batch, noisy, alpha_bar = noised(stream, 0.001)
    targets = rows_of(PosteriorTargets(closed_form_of(images)), batch, noisy, alpha_bar)
    is_null = batch.labels == 3
    other_class = batch.clean_labels[:, None] != images.labels[None, :]
    assert not targets[~is_null][other_class[~is_null]].any()
    assert (targets[is_null] > 0).all()
    assert 0 < is_null.sum() < 64


def test_one_hot_targets_are_posterior_targets_on_average(random_images, closed_form_of):
    images = random_images(3, num_classes=1)
    stream = BatchStream(images, batch_size=9000, num_train_timesteps=50, label_dropout=1, seed=0)
    batch, noisy, alpha_bar = noised(stream, 0.02)
    one_hot = rows_of(OneHotTargets(3), batch, noisy, alpha_bar)
    posterior = rows_of(PosteriorTargets(closed_form_of(images)), batch, noisy, alpha_bar)
    # Of the rows with about the same posterior of example 0, that share comes from it (calibration).
    for rows in posterior[:, 0].argsort().chunk(5):
        stated, hit = posterior[rows, 0], one_hot[rows, 0]
        error = 4 * float((stated * (1 - stated)).sum()) ** 0.5 / len(rows)
        assert float(hit.double().mean()) == pytest.approx(float(stated.mean()), abs=error)
    assert posterior[:, 0].std() > 0.1, "the groups differ"


def test_mixed_one_hot_targets_have_the_share_alpha_in_the_class(stream, images):
    batch, noisy, alpha_bar = noised(stream, 0.5)
    mixed = MixedTargets(OneHotTargets(12), ClassMixing(images.labels, num_classes=3, share=0.4))
    expected = torch.zeros(64, 12)
    for row, index in enumerate(batch.indices.tolist()):
        expected[row, images.labels == images.labels[index]] = 0.4 / 4
        expected[row, index] += 0.6
    torch.testing.assert_close(rows_of(mixed, batch, noisy, alpha_bar), expected)


def test_targets_are_computed_on_the_given_batch_alone(stream, closed_form_of, images):
    batch, noisy, alpha_bar = noised(stream, 0.1)
    whole = rows_of(PosteriorTargets(closed_form_of(images)), batch, noisy, alpha_bar)
    half = rows_of(PosteriorTargets(closed_form_of(images)), batch.share(1, 2), noisy[32:], alpha_bar[32:])
    torch.testing.assert_close(half, whole[32:], rtol=1e-9, atol=1e-14)


def test_pixels_of_targets_and_batches_are_scaled_alike(stream, images):
    batch = stream.batch(0)
    assert torch.equal(to_unit_range(images.images)[batch.indices], batch.clean_images)
