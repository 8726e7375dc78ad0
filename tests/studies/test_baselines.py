"""Baselines that know no generator: hand-worked cases, symmetries, and limits."""

import pytest
import torch

from provgen.data.images import to_unit_range
from provgen.studies.faithfulness.attributor import Queries
from provgen.studies.faithfulness.baselines import (
    BANDWIDTHS,
    Bandwidth,
    ClassPixelKernel,
    Neighbors,
    PixelCosine,
    PixelKernel,
    PixelNeighbors,
    RandomOfClass,
    RandomScores,
    SameClass,
)
from provgen.tracing.trace import NoisyImages

METHODS = {
    "random": lambda: RandomScores(seed=3),
    "random of the class": lambda: RandomOfClass(seed=3),
    "class": SameClass,
    "cosine": PixelCosine,
    "neighbors": PixelNeighbors,
    "kernel": PixelKernel,
    "class kernel": ClassPixelKernel,
}


@pytest.fixture(scope="module")
def train(random_images):
    return random_images(60)


def queries_of(images, labels) -> Queries:
    none = NoisyImages(images=images[None, :0], timesteps=torch.zeros(1, dtype=torch.int64), alpha_bars=torch.zeros(1))
    return Queries(images=images, class_labels=torch.tensor(labels), noisy=none)


@pytest.fixture(scope="module")
def queries(train):
    """Two training images, and one between two others whose class is not known."""
    pixels = to_unit_range(train.images, torch.float64)
    images = torch.stack([pixels[7], pixels[30], 0.6 * pixels[2] + 0.4 * pixels[5]])
    return queries_of(images, [int(train.labels[7]), int(train.labels[30]), 3])


def fitted(name, train):
    method = METHODS[name]()
    method.fit(train)
    return method


@pytest.mark.parametrize("name", METHODS)
def test_shapes_names_and_no_query_depends_on_its_batch(name, train, queries):
    method = fitted(name, train)
    scores = method.attribute(queries)
    assert scores.values.shape == (len(scores.settings), 3, 60)
    assert len(set(scores.settings)) == len(scores.settings)
    assert torch.equal(scores.under(scores.settings[-1]), scores.values[-1])
    first = method.attribute(queries_of(queries.images[:1], queries.class_labels[:1].tolist()))
    torch.testing.assert_close(first.values, scores.values[:, :1])


@pytest.mark.parametrize("name", ["class", "cosine", "neighbors", "kernel", "class kernel"])
def test_the_order_of_training_images_does_not_matter(name, train, queries):
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    moved = fitted(name, train.select(order)).attribute(queries)
    torch.testing.assert_close(moved.values, fitted(name, train).attribute(queries).values[..., order])


@pytest.mark.parametrize("name", ["cosine", "neighbors", "kernel", "class kernel"])
def test_a_training_image_names_itself_and_a_mixture_its_larger_part(name, train, queries):
    for values in fitted(name, train).attribute(queries).values:
        assert values[[0, 1, 2], [7, 30, 2]].tolist() == values.max(dim=1).values.tolist()
        assert name == "neighbors" or [int(row.argmax()) for row in values] == [7, 30, 2]


def test_the_class_and_nothing_but_the_class(train, queries):
    (values,) = fitted("class", train).attribute(queries).values
    assert torch.equal(values[0], (train.labels == train.labels[7]).double())
    assert (values[2] == 1).all()


def test_cosine_by_hand(train):
    images = to_unit_range(train.images[:2], torch.float64)
    scores = fitted("cosine", train).attribute(queries_of(2.5 * images, [0, 0])).values[0]
    product = (images[0] * images[1]).sum() / (images[0].norm() * images[1].norm())
    assert scores[0, 0] == pytest.approx(1)
    assert scores[0, 1] == pytest.approx(float(product))


def test_neighbors_are_the_k_nearest(train, queries):
    scores = fitted("neighbors", train).attribute(queries)
    pixels = to_unit_range(train.images, torch.float64).flatten(1)
    for row, query in enumerate(queries.images.flatten(1)):
        nearest = (pixels - query).norm(dim=1).argsort()[:5]
        assert set(scores.under(Neighbors(5))[row].nonzero().flatten().tolist()) == set(nearest.tolist())
    assert [float(values.sum()) for values in scores.values] == [3 * k for k in (1, 2, 5, 10, 20, 50)]


def test_the_kernel_by_hand_and_in_its_limits(train, queries):
    method = fitted("kernel", train)
    pixels = to_unit_range(train.images, torch.float64).flatten(1)
    gaps = (pixels[:, None] - pixels[None]).square().sum(-1)
    assert method.scale == pytest.approx(float(gaps.mean().sqrt()))
    values = method.attribute(queries).under(Bandwidth(0.3))[2]
    squares = (pixels - queries.images[2].flatten()).square().sum(1)
    assert values.sum() == pytest.approx(1)
    ratio = torch.exp((squares[9] - squares[4]) / (2 * (0.3 * method.scale) ** 2))
    assert values[4] / values[9] == pytest.approx(float(ratio))
    assert BANDWIDTHS[0].share < 0.3 < BANDWIDTHS[-1].share
    assert method.attribute(queries).values[0, 0, 7] == pytest.approx(1)


def test_the_kernel_of_a_class_is_that_of_all_images_restricted_to_the_class(train, queries):
    whole, found = (fitted(name, train).attribute(queries) for name in ("kernel", "class kernel"))
    assert found.settings == whole.settings
    assert found.distance_to_default == whole.distance_to_default
    is_own = (train.labels == queries.class_labels[:, None]) | (queries.class_labels == 3)[:, None]
    inside = whole.values * is_own
    torch.testing.assert_close(found.values, inside / inside.sum(dim=2, keepdim=True))
    torch.testing.assert_close(found.values[:, 2], whole.values[:, 2], msg="the class of the last is not known")
    assert found.values[-1, 0, train.labels != train.labels[7]].max() == 0
    # So far from its class that the kernel of all images is 0 there: nothing is said, and nothing is not a number.
    far = queries_of(queries.images[:1], [(int(train.labels[7]) + 1) % 3])
    assert fitted("class kernel", train).attribute(far).values.isfinite().all()


def test_guessing_within_the_class_takes_the_whole_class_first_and_in_the_order_of_guessing(train, queries):
    values = fitted("random of the class", train).attribute(queries).values[-1]
    guessed = fitted("random", train).attribute(queries).values[-1]
    for query, label in enumerate(queries.class_labels[:2]):
        members = (train.labels == label).nonzero().flatten()
        first = values[query].argsort(descending=True)[: len(members)]
        assert first.tolist() == members[guessed[query, members].argsort(descending=True)].tolist()
    assert values[2].argsort().tolist() == guessed[2].argsort().tolist(), "no class is known"


def test_guessing_is_reproducible_and_depends_on_the_seed(train, queries):
    again, other = RandomScores(seed=3), RandomScores(seed=4)
    again.fit(train)
    other.fit(train)
    first = fitted("random", train).attribute(queries)
    assert torch.equal(again.attribute(queries).values, first.values)
    assert not torch.equal(other.attribute(queries).values, first.values)
