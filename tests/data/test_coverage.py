"""Coverage against brute force, a two-fold optimum, and what is asked of every rule."""

from itertools import combinations

import pytest
import torch

from provgen.data.splits import entropy_coverage, k_center_coverage, stratified_coverage, stratified_subset


def labels_of(*sizes: int) -> torch.Tensor:
    """Give class c sizes[c] examples, in mixed order."""
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


def draw(*shape: int, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radius(features, covered) -> float:
    """Largest distance of an example from the nearest covered one."""
    return float((features[:, None] - features[covered]).norm(dim=2).min(dim=1).values.max())


RULES = {
    "stratified": lambda labels, count: stratified_coverage(labels, count, seed=3),
    "k_center": lambda labels, count: k_center_coverage(draw(len(labels), 2), labels, count),
    "entropy": lambda labels, count: entropy_coverage(draw(len(labels)), labels, count),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sizes", [(30,), (1, 1, 1), (20, 1, 8, 1), (3, 40, 2, 2, 2)])
def test_every_rule_gives_the_count_with_one_of_every_class_and_the_same_again(rule, sizes):
    labels = labels_of(*sizes)
    for count in range(len(sizes), len(labels) + 1):
        covered = RULES[rule](labels, count)
        assert covered.dtype == torch.int64
        assert covered.tolist() == sorted(set(covered.tolist()))
        assert len(covered) == count
        assert set(labels[covered].tolist()) == set(range(len(sizes)))
        assert torch.equal(RULES[rule](labels, count), covered)


@pytest.mark.parametrize("rule", RULES)
def test_counts_that_cannot_be_are_refused(rule, message_of):
    labels = labels_of(20, 10, 10)
    message = message_of(RULES[rule], labels, 2)
    assert "got 2" in message
    assert "provenance.coverage" in message
    assert "0.075" in message, "three classes in forty images"
    assert "got 41" in message_of(RULES[rule], labels, 41)


def test_stratified_coverage_is_the_stratified_subset_where_that_has_every_class():
    labels = labels_of(50, 7, 23)
    for count in (20, 40, 79):
        assert torch.equal(stratified_coverage(labels, count, 4), stratified_subset(labels, count, 4))


def test_classes_too_small_for_their_share_get_one_each_and_the_others_the_rest():
    labels = labels_of(60, 20, 1, 1, 1)
    # 8 in 83 is 5.8, 1.9 and three times 0.1: one each for the rare ones leaves 5 for 60 and 20.
    covered = stratified_coverage(labels, 8, seed=0)
    assert labels[covered].bincount().tolist() == [4, 1, 1, 1, 1]
    # Leaving 4 of 8 for classes of 100, 100, 5 shares out as 2, 2, 0, so the third one too gets one.
    labels = labels_of(100, 100, 5, 1, 1, 1, 1)
    assert labels[stratified_coverage(labels, 8, seed=0)].bincount().tolist() == [2, 1, 1, 1, 1, 1, 1]


def test_every_example_is_drawn_about_equally_often_within_its_class():
    labels = labels_of(12, 3)
    drawn = torch.zeros(15)
    for seed in range(400):
        drawn[stratified_coverage(labels, 2, seed)] += 1
    share = torch.tensor([1 / 12, 1 / 3])[labels]
    deviation = (share * (1 - share) / 400).sqrt()
    assert ((drawn / 400 - share).abs() < 5 * deviation).all()


@pytest.mark.parametrize("seed", range(4))
def test_k_center_adds_the_farthest_example_one_at_a_time(seed):
    features, labels = draw(24, 3, seed=seed), labels_of(12, 8, 4)
    starts = set()
    for label in range(3):
        members = (labels == label).nonzero().flatten().tolist()
        mean = sum(features[i] for i in members) / len(members)
        starts.add(min(members, key=lambda i: float((features[i] - mean).norm())))
    covered = set(k_center_coverage(features, labels, 3).tolist())
    assert covered == starts
    for count in range(4, 25):
        gaps = [min(float((row - features[j]).norm()) for j in covered) for row in features]
        covered |= {max(range(24), key=gaps.__getitem__)}
        assert set(k_center_coverage(features, labels, count).tolist()) == covered


@pytest.mark.parametrize("seed", range(4))
def test_k_center_covers_within_twice_the_best_possible_radius(seed):
    features = draw(12, 2, seed=seed)
    best = min(radius(features, list(some)) for some in combinations(range(12), 4))
    covered = k_center_coverage(features, torch.zeros(12, dtype=torch.int64), 4)
    assert best <= radius(features, covered) <= 2 * best


def test_k_center_finds_every_cluster_that_chance_misses():
    # Nine tight clusters, one of them large: chance draws from the large one.
    centers = 10 * draw(9, 5)
    sizes = torch.tensor([200, 5, 5, 5, 5, 5, 5, 5, 5])
    features = (centers + torch.zeros(9, 5)).repeat_interleave(sizes, dim=0) + 0.01 * draw(240, 5, seed=1)
    labels = torch.zeros(240, dtype=torch.int64)
    found = radius(features, k_center_coverage(features, labels, 9))
    by_chance = [radius(features, stratified_coverage(labels, 9, seed)) for seed in range(20)]
    assert found < 0.2
    assert min(by_chance) > 1


def test_k_center_depends_on_distances_alone_and_leaves_copies_to_the_last():
    features, labels = draw(20, 4), labels_of(12, 8)
    turned = features @ torch.linalg.qr(draw(4, 4, seed=5)).Q + 3
    assert torch.equal(k_center_coverage(turned, labels, 9), k_center_coverage(features, labels, 9))
    # float32 and far from the origin, where |x|^2 + |y|^2 - 2 x.y is not 0 for a copy.
    doubled = (features + 1000).float().repeat(2, 1)
    covered = k_center_coverage(doubled, labels.repeat(2), 20)
    assert len(set((covered % 20).tolist())) == 20
    assert len(set(k_center_coverage(doubled, labels.repeat(2), 39).tolist())) == 39


def test_highest_entropy_first_after_the_first_of_every_class_by_hand():
    entropies = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.7])
    labels = torch.tensor([0, 1, 0, 1, 0, 0])
    assert entropy_coverage(entropies, labels, 2).tolist() == [0, 3]
    assert entropy_coverage(entropies, labels, 3).tolist() == [0, 2, 3]
    assert entropy_coverage(entropies, labels, 4).tolist() == [0, 2, 3, 4], "ties go to the lowest index"
    assert entropy_coverage(entropies, labels, 5).tolist() == [0, 2, 3, 4, 5]
