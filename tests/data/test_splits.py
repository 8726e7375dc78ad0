import pytest
import torch

from provgen.data.splits import stratified_split, stratified_subset, subset_masks


def labels_of(*sizes: int) -> torch.Tensor:
    """Give class c sizes[c] examples, in mixed order."""
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(sizes)])
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(9))]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_split_is_a_partition_with_the_rounded_share_of_each_class(fraction):
    sizes = (50, 7, 1, 23)
    labels = labels_of(*sizes)
    train, holdout = stratified_split(labels, fraction, seed=3)
    assert torch.cat([train, holdout]).sort().values.tolist() == list(range(81))
    assert train.tolist() == sorted(train.tolist())
    assert holdout.tolist() == sorted(holdout.tolist())
    expected = [min(round(fraction * size), size - 1) for size in sizes]
    assert labels[holdout].bincount(minlength=4).tolist() == expected


def test_a_class_of_one_is_kept_for_training():
    train, holdout = stratified_split(torch.tensor([0, 1, 2]), 0.9, seed=0)
    assert train.tolist() == [0, 1, 2]
    assert holdout.dtype == torch.int64
    assert holdout.tolist() == []


def test_seed_decides_the_split_and_the_subset():
    labels = labels_of(40, 40)
    for choose in (
        lambda seed: stratified_split(labels, 0.5, seed)[0],
        lambda seed: stratified_subset(labels, 30, seed),
    ):
        assert torch.equal(choose(1), choose(1))
        assert not torch.equal(choose(1), choose(2))


def test_global_random_state_is_neither_read_nor_moved():
    labels = labels_of(30, 30)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = stratified_split(labels, 0.3, 5)[1], stratified_subset(labels, 20, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    second = stratified_split(labels, 0.3, 5)[1], stratified_subset(labels, 20, 5)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_every_example_is_held_out_about_equally_often():
    labels = labels_of(10, 10)
    counts = torch.zeros(20)
    for seed in range(400):
        counts[stratified_split(labels, 0.5, seed)[1]] += 1
    assert (counts / 400 - 0.5).abs().max() < 0.125  # five standard deviations


@pytest.mark.parametrize("count", [0, 1, 2, 17, 80, 81, 500])
def test_subset_has_exactly_the_count_in_proportion(count):
    sizes = torch.tensor([50, 7, 1, 23])
    labels = labels_of(*sizes.tolist())
    subset = stratified_subset(labels, count, seed=2)
    assert len(set(subset.tolist())) == len(subset) == min(count, 81)
    assert subset.tolist() == sorted(subset.tolist())
    shares = min(count, 81) * sizes / 81
    assert (labels[subset].bincount(minlength=4) - shares).abs().max() < 1


def test_largest_remainders_by_hand():
    # Quotas of 10 in 21: 10/21 * (9, 7, 5) = 4.29, 3.33, 2.38: the one left over goes to the third class.
    assert labels_of(9, 7, 5)[stratified_subset(labels_of(9, 7, 5), 10, 0)].bincount().tolist() == [4, 3, 3]


def test_unlabelled_sets_can_be_split():
    train, holdout = stratified_split(torch.zeros(10, dtype=torch.int64), 0.2, 0)
    assert (len(train), len(holdout)) == (8, 2)
    assert stratified_subset(torch.zeros(0, dtype=torch.int64), 5, 0).tolist() == []


def test_subsets_have_their_share_of_every_class_and_differ():
    labels = labels_of(40, 20, 10)
    masks = subset_masks(labels, num_subsets=30, fraction=0.5, seed=1)
    assert masks.shape == (30, 70)
    for label, size in enumerate((40, 20, 10)):
        assert (masks[:, labels == label].sum(dim=1) == size // 2).all()
    assert len(masks.unique(dim=0)) == 30
    # Independent halves: two of them share a quarter of the examples.
    shared = (masks.double() @ masks.double().T)[~torch.eye(30, dtype=torch.bool)].mean() / 70
    assert float(shared) == pytest.approx(0.25, abs=0.01)


def test_the_first_subsets_do_not_depend_on_how_many_there_are():
    labels = labels_of(9, 8)
    many = subset_masks(labels, num_subsets=40, fraction=0.5, seed=2)
    assert torch.equal(many[:5], subset_masks(labels, num_subsets=5, fraction=0.5, seed=2))
    assert not torch.equal(many[:5], subset_masks(labels, num_subsets=5, fraction=0.5, seed=3))
