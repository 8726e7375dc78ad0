"""Mixing by hand and against dense matrices, its floor, and the random labels whose expectation it is."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from provgen.generators.closed_form import entropy
from provgen.models.index_heads import ClassIndependentHead
from provgen.training.targets import ClassMixing, NeighborMixing, nearest_neighbors
from provgen.training.trainer import index_loss

LABELS = torch.tensor([0, 0, 0, 1, 2, 2])
"""Three examples of class 0, one of class 1, and two without a class, of which there are two."""
COVERED = torch.tensor([True, False, True, True, True, False])
EVERY = torch.ones(6, dtype=torch.bool)
NEIGHBORS = torch.tensor([[1, 2], [0, 2], [1, 0], [3, 3], [5, 5], [4, 4]])

CASES = [("class", EVERY), ("class", COVERED), ("neighbors", EVERY)]
cases = pytest.mark.parametrize(("kind", "covered"), CASES)
shares = pytest.mark.parametrize("share", [0.0, 0.3, 1.0])


def make_mixing(kind, covered, share):
    if kind == "neighbors":
        return NeighborMixing(NEIGHBORS, share=share)
    return ClassMixing(LABELS, num_classes=2, share=share, covered=covered)


def outcomes_of(kind, covered, example) -> list[int]:
    """What is drawn from, evenly, when the label of `example` is replaced."""
    if kind == "neighbors":
        return NEIGHBORS[example].tolist()
    return [other for other in range(6) if LABELS[other] == LABELS[example] and covered[other]]


def dense(kind, covered):
    matrix = torch.zeros(6, 6, dtype=torch.float64)
    for example in range(6):
        drawn = outcomes_of(kind, covered, example)
        for other in drawn:
            matrix[example, other] += 1 / len(drawn)
    return matrix


@pytest.fixture
def rows(generator):
    return torch.randn(7, 6, generator=generator, dtype=torch.float64).softmax(dim=1)


def test_mixing_two_classes_by_hand():
    probs = torch.tensor([[0.5, 0.1, 0.0, 0.4], [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    mixed = ClassMixing(torch.tensor([0, 0, 0, 1]), num_classes=2, share=0.25)(probs)
    # Three quarters of each, and a quarter of (class mass / class size): 0.6 / 3 = 0.2 and 0.4 / 1.
    expected = [
        [0.375 + 0.05, 0.075 + 0.05, 0.05, 0.3 + 0.1],
        [0, 0, 0, 1],
        [0.75 + 0.25 / 3, 0.25 / 3, 0.25 / 3, 0],
    ]
    torch.testing.assert_close(mixed, torch.tensor(expected, dtype=torch.float64))


def test_mixing_neighbours_by_hand():
    # Example 0 spreads over 1 and 2, example 1 over 2 alone, example 2 over itself and 0.
    mixing = NeighborMixing(torch.tensor([[1, 2], [2, 2], [2, 0]]), share=0.5)
    probs = torch.tensor([[0.8, 0.2, 0.0], [0.0, 0.0, 1.0]])
    expected = torch.tensor([[0.4, 0.1 + 0.2, 0.2 + 0.1], [0.25, 0.0, 0.5 + 0.25]])
    torch.testing.assert_close(mixing(probs), expected)


@cases
@shares
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixing_is_a_product_with_a_row_stochastic_matrix(kind, covered, share, dtype, rows):
    matrix = dense(kind, covered)
    torch.testing.assert_close(matrix.sum(1), torch.ones(6, dtype=torch.float64))
    expected = (1 - share) * rows + share * rows @ matrix
    mixed = make_mixing(kind, covered, share)(rows.to(dtype))
    torch.testing.assert_close(mixed, expected.to(dtype))


@cases
def test_no_mixing_changes_nothing(kind, covered, rows):
    assert torch.equal(make_mixing(kind, covered, 0.0)(rows), rows)


def test_full_mixing_of_an_example_is_uniform_over_its_covered_class():
    mixed = ClassMixing(LABELS, num_classes=2, share=1.0, covered=COVERED)(torch.eye(6, dtype=torch.float64))
    first, unlabelled = [0.5, 0, 0.5, 0, 0, 0], [0, 0, 0, 0, 1, 0]
    expected = [first, first, first, [0, 0, 0, 1, 0, 0], unlabelled, unlabelled]
    assert torch.equal(mixed, torch.tensor(expected, dtype=torch.float64))


def test_a_class_without_covered_examples_keeps_its_sum():
    covered = torch.tensor([True, True, True, True, False, False])
    mixed = ClassMixing(LABELS, num_classes=2, share=0.4, covered=covered)(torch.eye(6))
    torch.testing.assert_close(mixed.sum(1), torch.ones(6))
    assert not mixed[:4, 4:].any()


def test_an_example_mixes_over_many_neighbours_as_the_dense_product_does(generator):
    neighbors = torch.randint(0, 150, (200, 7), generator=generator)  # some examples are nobody's neighbour
    probs = torch.randn(5, 200, generator=generator, dtype=torch.float64).softmax(dim=1)
    matrix = F.one_hot(neighbors, 200).double().mean(dim=1)
    mixing = NeighborMixing(neighbors, share=0.6)
    single = mixing(probs.float())
    torch.testing.assert_close(mixing(probs), 0.4 * probs + 0.6 * probs @ matrix, rtol=1e-13, atol=1e-16)
    torch.testing.assert_close(single, mixing(probs).float())


@cases
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_the_entropy_of_the_mixed_posterior_is_the_least_cross_entropy(kind, covered, share, rows, generator):
    mixing = make_mixing(kind, covered, share)
    posterior = rows * covered / (rows * covered).sum(1, keepdim=True)
    best = mixing(posterior)
    # The lowest finite logits, as a network gives them, stand for the zeros.
    logits = best.log().clamp_min(torch.finfo(torch.float64).min)
    counted = torch.ones(7, dtype=torch.bool)
    floor = float(entropy(best).mean())
    assert float(index_loss(logits, best, counted, 1.0)) == pytest.approx(floor, rel=1e-12)
    for _ in range(20):
        moved = logits + 0.1 * torch.randn(7, 6, generator=generator, dtype=torch.float64)
        assert float(index_loss(moved, best, counted, 1.0)) > floor + 1e-6


def make_network(generator):
    """Make a head whose weights are all random, and the feature maps of two rows."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ClassIndependentHead([(2, 4), (3, 2)], num_examples=6, width=5).double()
        torch.nn.init.normal_(head.embedding.projection.weight)
    feature_maps = [
        torch.randn(2, *shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 4), (3, 2, 2))
    ]
    alpha_bar = torch.tensor([0.1, 0.6], dtype=torch.float64)
    return head, lambda: head(feature_maps, alpha_bar, torch.full((2,), 2), None)


def random_labels(kind, covered, share, examples):
    """List (label of each row, probability) of everything that can be drawn; each row draws for itself."""
    draws = []
    for example in examples:
        others = outcomes_of(kind, covered, example)
        draws.append([(example, 1 - share), *((other, share / len(others)) for other in others)])
    for drawn in product(*draws):
        labels, probabilities = zip(*drawn, strict=True)
        yield torch.tensor(labels), float(torch.tensor(probabilities, dtype=torch.float64).prod())


@cases
@shares
@pytest.mark.parametrize("examples", [(0, 4), (2, 3)])
def test_gradients_are_what_random_labels_give_on_average(kind, covered, share, examples, generator):
    head, call = make_network(generator)
    parameters = [p for name, p in head.named_parameters()]

    def gradients(loss_of) -> list:
        logits = call()
        return list(torch.autograd.grad(loss_of(logits), [logits, *parameters]))

    expected = None
    for labels, probability in random_labels(kind, covered, share, examples):
        scaled = [probability * g for g in gradients(lambda logits, y=labels: F.cross_entropy(logits, y))]
        expected = scaled if expected is None else [a + b for a, b in zip(expected, scaled, strict=True)]
    one_hot = F.one_hot(torch.tensor(examples), 6).double()
    targets = make_mixing(kind, covered, share)(one_hot)
    found = gradients(lambda logits: index_loss(logits, targets, torch.tensor([True, True]), 1.0))
    assert len(found) == 6
    for one, other in zip(found, expected, strict=True):
        assert one.abs().max() > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12 * float(one.abs().max()))


@cases
def test_gradients_are_within_the_standard_error_of_drawn_labels(kind, covered, rows, generator):
    share, example, draws = 0.6, 0, 20_000
    others = torch.tensor(outcomes_of(kind, covered, example))
    replaced = torch.rand(draws, generator=generator) < share
    picked = others[torch.randint(len(others), (draws,), generator=generator)]
    repeated = rows[:1].log().repeat(draws, 1).requires_grad_()
    F.cross_entropy(repeated, torch.where(replaced, picked, example), reduction="sum").backward()
    logits = rows[:1].log().requires_grad_()
    targets = make_mixing(kind, covered, share)(F.one_hot(torch.tensor([example]), 6).double())
    index_loss(logits, targets, torch.tensor([True]), 1.0).backward()
    error = repeated.grad.std(dim=0) / draws**0.5
    assert (error > 1e-4).sum() >= 2, "labels were drawn"
    assert ((repeated.grad.mean(dim=0) - logits.grad[0]).abs() <= 4 * error + 1e-12).all()


def brute_force(rows, labels, k, covered):
    """Sort the others of the same label by distance, and take k of them in turn."""
    found = []
    for example in range(len(rows)):
        others = [
            other
            for other in range(len(rows))
            if other != example and labels[other] == labels[example] and covered[other]
        ]
        others.sort(key=lambda other: float((rows[other] - rows[example]).square().sum()))
        found.append([(others or [example])[place % max(1, min(k, len(others)))] for place in range(k)])
    return torch.tensor(found)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("features", [3, 40])
def test_nearest_neighbors_against_brute_force(k, features, generator):
    rows = torch.randn(90, features, generator=generator)
    labels = torch.randint(0, 4, (90,), generator=generator)
    found = nearest_neighbors(rows, labels, k)
    assert found.dtype == torch.int64
    assert torch.equal(found, brute_force(rows, labels, k, torch.ones(90, dtype=torch.bool)))


@pytest.mark.parametrize("k", [2, 5])
def test_only_covered_examples_are_neighbours(k, generator):
    rows = torch.randn(80, 20, generator=generator)
    labels = torch.randint(0, 3, (80,), generator=generator)
    covered = torch.rand(80, generator=generator) < 0.5
    found = nearest_neighbors(rows, labels, k, covered=covered)
    assert torch.equal(found, brute_force(rows, labels, k, covered))
    probs = covered / covered.sum()
    mixed = NeighborMixing(found, share=0.7)(probs[None])
    assert not mixed[0, ~covered].any()
    assert float(mixed.sum()) == pytest.approx(1, rel=1e-6)


def test_small_classes_repeat_their_examples_and_a_single_one_stands_for_itself():
    rows = torch.tensor([[0.0], [1.0], [3.0], [9.0], [4.0]])
    labels = torch.tensor([0, 0, 0, 1, 2])
    found = nearest_neighbors(rows, labels, 5)
    expected = [[1, 2, 1, 2, 1], [0, 2, 0, 2, 0], [1, 0, 1, 0, 1], [3] * 5, [4] * 5]
    assert torch.equal(found, torch.tensor(expected))


@pytest.mark.parametrize("k", [2, 5])
def test_copies_of_an_image_are_neighbours_and_never_itself(k, generator):
    rows = torch.randn(12, 20, generator=generator)
    rows[:6] = rows[0]
    found = nearest_neighbors(rows, torch.zeros(12, dtype=torch.int64), k)
    assert not (found == torch.arange(12)[:, None]).any()
    assert (found[:6] < 6).all()
    assert all(len(set(row)) == k for row in found.tolist())
