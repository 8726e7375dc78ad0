"""Batches are a function of (seed, step); passes are permutations; processes share the global batch."""

import pytest
import torch

from provgen.data.batches import BatchStream, fixed_batches
from provgen.data.random import seeded_generator


@pytest.fixture
def make_stream(random_images):
    def make(count=10, **changed):
        defaults = {"batch_size": 4, "num_train_timesteps": 50, "label_dropout": 0.3, "seed": 0}
        return BatchStream(random_images(count), **{**defaults, **changed})

    return make


def assert_equal(first, second):
    assert all(torch.equal(value, getattr(second, name)) for name, value in vars(first).items())


def test_a_batch_depends_on_nothing_that_was_drawn_before(make_stream):
    fresh, used = make_stream(), make_stream()
    torch.manual_seed(1)
    expected = fresh.batch(7)
    torch.manual_seed(2)
    for step in (0, 1, 2, 9, 6):
        used.batch(step)
    assert_equal(used.batch(7), expected)


def test_drawing_leaves_the_global_generator_alone(make_stream):
    before = torch.get_rng_state()
    make_stream().batch(3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["indices", "noise", "timesteps"])
def test_seeds_and_steps_give_different_batches(name, make_stream):
    drawn = [
        getattr(batch, name) for batch in (make_stream().batch(0), make_stream().batch(1), make_stream(seed=1).batch(0))
    ]
    assert not any(torch.equal(drawn[i], drawn[i - 1]) for i in range(3))


@pytest.mark.parametrize("batch_size", [4, 5, 10, 25])
def test_every_example_comes_once_per_pass(batch_size, make_stream):
    stream = make_stream(batch_size=batch_size)
    drawn = torch.cat([stream.batch(step).indices for step in range(50 // batch_size + 1)])[:50]
    passes = drawn.reshape(5, 10)
    assert torch.equal(passes.sort(dim=1).values, torch.arange(10).expand(5, 10))
    assert len({tuple(row.tolist()) for row in passes}) == 5, "every pass has an order of its own"


def test_a_row_holds_its_example(make_stream):
    stream = make_stream(count=30, batch_size=30)
    batch = stream.batch(0)
    pixels = stream.train.images[batch.indices].float()
    torch.testing.assert_close((batch.clean_images + 1) * 127.5, pixels, rtol=0, atol=1e-3)
    assert torch.equal(batch.clean_labels, stream.train.labels[batch.indices])
    is_null = batch.labels == 3
    assert is_null.any()
    assert torch.equal(batch.labels[~is_null], batch.clean_labels[~is_null])


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_the_processes_shares_are_the_global_batch(num_processes, make_stream):
    whole = make_stream(batch_size=8).batch(3)
    # Each process has a stream of its own.
    shares = [make_stream(batch_size=8).batch(3).share(p, num_processes) for p in range(num_processes)]
    assert {len(share.indices) for share in shares} == {8 // num_processes}
    for name, value in vars(whole).items():
        assert torch.equal(torch.cat([getattr(share, name) for share in shares]), value)


@pytest.mark.parametrize("label_dropout", [0.0, 0.2, 1.0])
def test_labels_are_dropped_at_the_rate_asked_for(label_dropout, make_stream):
    stream = make_stream(batch_size=400, label_dropout=label_dropout)
    dropped = torch.cat([stream.batch(step).labels == 3 for step in range(10)]).double()
    error = 4 * (label_dropout * (1 - label_dropout) / len(dropped)) ** 0.5
    assert float(dropped.mean()) == pytest.approx(label_dropout, abs=error + 1e-12)


def test_timesteps_cover_the_schedule_evenly(make_stream):
    stream = make_stream(batch_size=1000)
    steps = torch.cat([stream.batch(step).timesteps for step in range(5)])
    counts = torch.bincount(steps, minlength=50)
    assert len(counts) == 50
    # Chi-squared with 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert float(((counts - 100) ** 2 / 100).sum()) < 49 + 5 * 9.9


def test_noise_is_standard_normal_and_new_for_every_row(make_stream):
    noise = make_stream(batch_size=300).batch(0).noise
    assert float(noise.mean()) == pytest.approx(0, abs=4 / noise.numel() ** 0.5)
    assert float(noise.var()) == pytest.approx(1, abs=4 * (2 / noise.numel()) ** 0.5)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 300


def test_noise_has_the_shape_asked_for_and_changes_nothing_else(make_stream):
    image, latent = make_stream().batch(5), make_stream(noise_shape=(4, 2, 2)).batch(5)
    assert image.noise.shape == (4, 1, 8, 8)
    assert latent.noise.shape == (4, 4, 2, 2)
    assert torch.equal(latent.indices, image.indices)
    assert torch.equal(latent.clean_images, image.clean_images)


def test_rows_are_selected_in_the_order_given(make_stream):
    batch = make_stream(batch_size=8).batch(0)
    rows = torch.tensor([5, 0, 7])
    for name, value in vars(batch.select(rows)).items():
        assert torch.equal(value, torch.stack([getattr(batch, name)[row] for row in (5, 0, 7)]))


@pytest.fixture
def fixed(random_images):
    """Make batches of three images at two timesteps."""

    def make(seed=0, rows=(4, 0, 2)):
        rows = torch.tensor(rows)
        return fixed_batches(random_images(6), rows, [7, 30], noise_shape=(1, 8, 8), seed=seed)

    return make


def test_fixed_batches_show_the_same_images_and_noise_at_every_timestep(fixed, random_images):
    images = random_images(6)
    first, second = fixed()
    assert first.timesteps.tolist() == [7, 7, 7]
    assert second.timesteps.tolist() == [30, 30, 30]
    for name in ("indices", "clean_images", "noise", "labels", "clean_labels"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.indices.tolist() == [4, 0, 2]
    assert torch.equal(first.labels, images.labels[first.indices])
    pixels = images.images[first.indices].float()
    torch.testing.assert_close((first.clean_images + 1) * 127.5, pixels, rtol=0, atol=1e-3)
    assert not torch.equal(first.noise[0], first.noise[1])


def test_fixed_batches_depend_on_their_seed_and_on_nothing_global(fixed):
    torch.manual_seed(0)
    first = fixed()
    torch.manual_seed(1)
    for batch, again in zip(first, fixed(), strict=True):
        assert_equal(batch, again)
    assert not torch.equal(first[0].noise, fixed(seed=1)[0].noise)


def test_seeded_generators_depend_on_all_their_numbers_and_on_the_order():
    numbers = [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0), (0, 0, 2), (5, 6), (6, 5)]
    draws = {float(torch.rand((), generator=seeded_generator(*each))) for each in numbers}
    assert len(draws) == len(numbers)
    again = [torch.rand(3, generator=seeded_generator(5, 6)) for _ in range(2)]
    assert torch.equal(*again)
