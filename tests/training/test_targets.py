"""Target rows worked by hand, and the floors that they imply."""

import pytest
import torch

from provgen.attribution.scores import entropy
from provgen.data.images import to_unit_range
from provgen.training.batches import BatchStream
from provgen.training.losses import index_loss
from provgen.training.targets import ClassMixedTargets, OneHotTargets, PosteriorTargets, mix_classes

LABELS = torch.tensor([0, 0, 0, 1])
"""Three examples of class 0, one of class 1."""


@pytest.fixture
def rows(generator):
    return torch.rand(6, 4, generator=generator, dtype=torch.float64).softmax(dim=1)


def test_mixing_two_classes_by_hand():
    probs = torch.tensor(
        [[0.5, 0.1, 0.0, 0.4], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64
    )
    mixed = mix_classes(probs, LABELS, num_classes=2, mixing=0.25)
    # Three quarters of each, and a quarter of (class mass / class size): 0.6 / 3 = 0.2 and 0.4 / 1.
    expected = [
        [0.375 + 0.05, 0.075 + 0.05, 0.05, 0.3 + 0.1],
        [0, 0, 0, 1],
        [0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3, 0],
    ]
    torch.testing.assert_close(mixed, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_mixed_rows_and_their_classes_keep_their_sums(mixing, rows):
    mixed = mix_classes(rows, LABELS, num_classes=2, mixing=mixing)
    torch.testing.assert_close(mixed.sum(1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(mixed[:, :3].sum(1), rows[:, :3].sum(1))


def test_no_mixing_changes_nothing_and_full_mixing_is_uniform_in_each_class(rows):
    assert torch.equal(mix_classes(rows, LABELS, num_classes=2, mixing=0), rows)
    mixed = mix_classes(rows, LABELS, num_classes=2, mixing=1)
    expected = rows[:, :3].mean(dim=1, keepdim=True).expand(-1, 3)
    torch.testing.assert_close(mixed[:, :3], expected)
    torch.testing.assert_close(mixed[:, 3], rows[:, 3])


def test_examples_without_a_label_and_empty_classes_mix_among_themselves():
    labels = torch.tensor([0, 2, 2, 0])
    probs = torch.tensor([[0.6, 0.4, 0.0, 0.0]], dtype=torch.float64)
    mixed = mix_classes(probs, labels, num_classes=2, mixing=1)
    torch.testing.assert_close(mixed, torch.tensor([[0.3, 0.2, 0.2, 0.3]], dtype=torch.float64))


def noised(stream, signal, step=0):
    batch = stream.batch(step)
    a = torch.full((len(batch.indices),), signal)
    scaled = a[:, None, None, None]
    return batch, scaled.sqrt() * batch.clean_images + (1 - scaled).sqrt() * batch.noise, a


@pytest.fixture
def images(random_images):
    return random_images(12)


@pytest.fixture
def stream(images):
    return BatchStream(images, batch_size=64, num_train_timesteps=50, label_dropout=0.5, seed=0)


def test_one_hot_targets_name_the_example_itself(stream):
    batch, noisy, signal = noised(stream, 0.1)
    targets = OneHotTargets(12)(batch, noisy, signal)
    assert targets.shape == (64, 12)
    assert targets.dtype == noisy.dtype
    assert torch.equal(targets.argmax(1), batch.indices)
    assert torch.equal(targets.sum(1), torch.ones(64))
    assert torch.equal(targets.amax(1), torch.ones(64))


def test_posterior_targets_name_the_parent_at_high_signal(stream, closed_form_of, images):
    batch, noisy, signal = noised(stream, 0.99)
    targets = PosteriorTargets(closed_form_of(images))(batch, noisy, signal)
    expected = OneHotTargets(12)(batch, noisy, signal).double()
    torch.testing.assert_close(targets, expected, rtol=0, atol=1e-9)


def test_posterior_targets_are_restricted_where_the_label_is_kept_and_only_there(
    stream, closed_form_of, images
):
    batch, noisy, signal = noised(stream, 0.001)
    targets = PosteriorTargets(closed_form_of(images))(batch, noisy, signal)
    is_null = batch.labels == 3
    other_class = batch.clean_labels[:, None] != images.labels[None, :]
    assert not targets[~is_null][other_class[~is_null]].any()
    assert (targets[is_null] > 0).all()
    assert 0 < is_null.sum() < 64


def test_one_hot_targets_are_posterior_targets_on_average(random_images, closed_form_of):
    images = random_images(3, num_classes=1)
    stream = BatchStream(images, batch_size=9000, num_train_timesteps=50, label_dropout=1, seed=0)
    batch, noisy, signal = noised(stream, 0.02)
    one_hot = OneHotTargets(3)(batch, noisy, signal)
    posterior = PosteriorTargets(closed_form_of(images))(batch, noisy, signal)
    # Of the rows with about the same posterior of example 0, that share comes from it (calibration).
    for rows in posterior[:, 0].argsort().chunk(5):
        stated, hit = posterior[rows, 0], one_hot[rows, 0]
        error = 4 * float((stated * (1 - stated)).sum()) ** 0.5 / len(rows)
        assert float(hit.double().mean()) == pytest.approx(float(stated.mean()), abs=error)
    assert posterior[:, 0].std() > 0.1, "the groups differ"


@pytest.mark.parametrize("mixing", [0.2, 0.9])
def test_the_floor_of_mixed_targets_is_the_entropy_of_the_mixed_posterior(
    mixing, stream, closed_form_of, images
):
    batch, noisy, signal = noised(stream, 0.05)
    posterior = PosteriorTargets(closed_form_of(images))
    mixed = ClassMixedTargets(posterior, images.labels, num_classes=3, mixing=mixing)
    targets = mixed(batch, noisy, signal)
    rows = posterior(batch, noisy, signal)
    best = mix_classes(rows, images.labels, num_classes=3, mixing=mixing)
    floor = float(entropy(best).mean())
    assert float(index_loss(best.clamp_min(1e-300).log(), targets)) == pytest.approx(floor, abs=1e-9)
    assert floor > float(entropy(rows).mean())
    worse = best.lerp(torch.full_like(best, 1 / 12), 0.01)
    assert float(index_loss(worse.log(), targets)) > floor + 1e-6


def test_mixed_one_hot_targets_have_the_share_alpha_in_the_class(stream, images):
    batch, noisy, signal = noised(stream, 0.5)
    mixed = ClassMixedTargets(OneHotTargets(12), images.labels, num_classes=3, mixing=0.4)
    expected = torch.zeros(64, 12)
    for row, index in enumerate(batch.indices.tolist()):
        expected[row, images.labels == images.labels[index]] = 0.4 / 4
        expected[row, index] += 0.6
    torch.testing.assert_close(mixed(batch, noisy, signal), expected)


def test_targets_are_computed_on_the_given_batch_alone(stream, closed_form_of, images):
    batch, noisy, signal = noised(stream, 0.1)
    whole = PosteriorTargets(closed_form_of(images))(batch, noisy, signal)
    half = PosteriorTargets(closed_form_of(images))(batch.share(1, 2), noisy[32:], signal[32:])
    torch.testing.assert_close(half, whole[32:], rtol=1e-9, atol=1e-14)


def test_pixels_of_targets_and_batches_are_scaled_alike(stream, images):
    batch = stream.batch(0)
    assert torch.equal(to_unit_range(images.images)[batch.indices], batch.clean_images)
