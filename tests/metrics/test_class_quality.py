"""Hand-worked queries, brute force over every way to break ties, planted truth, and what must not matter."""

from itertools import combinations
from math import comb

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import hypergeom

from provgen.errors import InputError
from provgen.metrics.class_quality import class_quality
from provgen.metrics.statistics import proportion

METRICS = ("consistency_top1", "consistency_top5", "share_top5", "knn_accuracy")


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def drawn(random):
    """50 queries over 30 examples of three classes; some of both (label 3) have none."""
    log_probs = (2 * torch.randn(50, 30, generator=random)).double().log_softmax(dim=1)
    closed_form = (2 * torch.randn(50, 30, generator=random)).double().softmax(dim=1)
    return {
        "log_probs": log_probs,
        "closed_form": closed_form,
        "train_labels": torch.randint(4, (30,), generator=random),
        "query_labels": torch.randint(4, (50,), generator=random),
        "class_logits": torch.randn(50, 3, generator=random),
        "num_classes": 3,
    }


def test_two_queries_worked_by_hand():
    # Classes of the examples: 0 0 1 1 1 none none; both queries are of class 0.
    first = torch.tensor([0.30, 0.05, 0.20, 0.19, 0.06, 0.11, 0.09])
    second = torch.tensor([0.04, 0.03, 0.05, 0.01, 0.02, 0.45, 0.40])
    quality = class_quality(
        torch.stack([first, second]).log(),
        torch.stack([second, second]),
        train_labels=torch.tensor([0, 0, 1, 1, 1, 2, 2]),
        query_labels=torch.tensor([0, 0]),
        class_logits=torch.tensor([[0.0, 2.0], [3.0, 2.0]]),
        num_classes=2,
    )
    # The first query retrieves classes 0 1 1 none none, the second none none 1 0 0.
    assert quality.consistency_top1 == proportion(1, 2)
    assert quality.consistency_top5 == proportion(2, 2)
    assert quality.share_top5.value == pytest.approx((1 / 5 + 2 / 5) / 2, abs=1e-12)
    # Masses of the classes: .35 and .45, then .07 and .08.
    assert quality.knn_accuracy == proportion(0, 2)
    assert quality.class_accuracy == proportion(1, 2)
    assert quality.consistency_top1_closed_form == 0
    assert quality.consistency_top5_closed_form == 1
    assert quality.share_top5_closed_form == pytest.approx(2 / 5, abs=1e-12)
    assert quality.knn_accuracy_closed_form == quality.class_accuracy_closed_form == 0
    assert quality.consistency_top1_baseline == pytest.approx(2 / 7, abs=1e-12)
    assert quality.consistency_top5_baseline == pytest.approx(1 - comb(5, 5) / comb(7, 5), abs=1e-12)
    assert quality.share_top5_baseline == pytest.approx(2 / 7, abs=1e-12)
    assert quality.knn_accuracy_baseline == quality.class_accuracy_baseline == 1


def test_a_loop_over_queries_finds_the_same(drawn):
    quality = class_quality(**drawn)
    labels, train_labels = drawn["query_labels"].tolist(), drawn["train_labels"].tolist()
    for suffix, scores in (
        ("", drawn["log_probs"].exp()),
        ("_closed_form", drawn["closed_form"].softmax(dim=1)),
    ):
        found: dict[str, list[float]] = {name: [] for name in METRICS}
        for row, label in zip(scores.tolist(), labels, strict=True):
            if label == 3:
                continue
            order = sorted(range(30), key=row.__getitem__, reverse=True)
            same = [train_labels[i] == label for i in order[:5]]
            mass = [sum(p for p, c in zip(row, train_labels, strict=True) if c == y) for y in range(3)]
            found["consistency_top1"].append(same[0])
            found["consistency_top5"].append(any(same))
            found["share_top5"].append(sum(same) / 5)
            found["knn_accuracy"].append(mass[label] == max(mass))
        for name, values in found.items():
            value = getattr(quality, name + suffix)
            mean = sum(values) / len(values)
            assert (value if suffix else value.value) == pytest.approx(mean, abs=1e-12), name + suffix
    counted = [(row, y) for row, y in zip(drawn["class_logits"].tolist(), labels, strict=True) if y < 3]
    right = sum(row.index(max(row)) == y for row, y in counted)
    assert quality.class_accuracy == proportion(right, len(counted))


def test_guessing_retrieves_by_the_hypergeometric_distribution(drawn):
    quality = class_quality(**drawn)
    labels = [label for label in drawn["query_labels"].tolist() if label < 3]
    sizes = [int((drawn["train_labels"] == label).sum()) for label in labels]
    none_of_five = [hypergeom(30, size, 5).pmf(0) for size in sizes]
    assert quality.consistency_top1_baseline == pytest.approx(sum(sizes) / 30 / len(sizes), abs=1e-12)
    assert quality.share_top5_baseline == pytest.approx(sum(sizes) / 30 / len(sizes), abs=1e-12)
    assert quality.consistency_top5_baseline == pytest.approx(1 - sum(none_of_five) / len(sizes), abs=1e-12)
    most = max(labels.count(label) for label in range(3))
    assert quality.knn_accuracy_baseline == quality.class_accuracy_baseline == most / len(labels)


def test_ties_are_broken_at_random_not_by_position(drawn):
    """Two sure sources, then seven tied for three places, all zero: every way to fill them counts alike."""
    probs = torch.tensor([[0.6, 0.4, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    train_labels = torch.tensor([1, 1, 1, 1, 1, 0, 1, 0, 1])
    quality = class_quality(
        probs.log(),
        probs,
        train_labels=train_labels,
        query_labels=torch.tensor([0]),
        class_logits=torch.zeros(1, 2),
        num_classes=2,
    )
    ways = [[int(train_labels[i] == 0) for i in some] for some in combinations(range(2, 9), 3)]
    any_hit = sum(any(way) for way in ways) / len(ways)
    share = sum(sum(way) for way in ways) / len(ways) / 5
    assert quality.consistency_top1.value == quality.consistency_top1_closed_form == 0
    assert quality.consistency_top5.value == pytest.approx(any_hit, abs=1e-12)
    assert quality.consistency_top5_closed_form == pytest.approx(any_hit, abs=1e-12)
    assert quality.share_top5.value == pytest.approx(share, abs=1e-12)
    assert quality.class_accuracy.value == 0.5


def test_a_posterior_on_the_right_class_is_always_right():
    train_labels = torch.arange(40) % 4
    query_labels = torch.arange(20) % 4
    probs = F.normalize((query_labels[:, None] == train_labels).double(), p=1, dim=1)
    quality = class_quality(
        probs.log(),
        probs,
        train_labels=train_labels,
        query_labels=query_labels,
        class_logits=F.one_hot(query_labels, 4).float(),
        num_classes=4,
    )
    for name in (*METRICS, "class_accuracy"):
        assert getattr(quality, name).value == getattr(quality, f"{name}_closed_form") == 1
        assert 0 < getattr(quality, f"{name}_baseline") < 1
    assert quality.consistency_top1 == proportion(20, 20)


def test_a_uniform_posterior_is_exactly_guessing():
    uniform = torch.full((12, 16), 1 / 16, dtype=torch.float64)
    quality = class_quality(
        uniform.log(),
        uniform,
        train_labels=torch.arange(16) % 4,
        query_labels=torch.arange(12) % 4,
        class_logits=torch.zeros(12, 4),
        num_classes=4,
    )
    for name in (*METRICS, "class_accuracy"):
        null = getattr(quality, f"{name}_baseline")
        assert getattr(quality, name).value == pytest.approx(null, abs=1e-12), name
        assert getattr(quality, f"{name}_closed_form") == pytest.approx(null, abs=1e-12), name


def test_a_posterior_that_ignores_the_query_has_guessing_inside_its_intervals(random):
    noise = torch.rand(400, 60, generator=random, dtype=torch.float64)
    quality = class_quality(
        noise.log_softmax(dim=1),
        noise.softmax(dim=1),
        train_labels=torch.randint(3, (60,), generator=random),
        query_labels=torch.arange(400) % 3,
        class_logits=torch.randn(400, 3, generator=random),
        num_classes=3,
    )
    for name in ("consistency_top1", "consistency_top5", "share_top5", "class_accuracy"):
        estimate = getattr(quality, name)
        assert estimate.low < getattr(quality, f"{name}_baseline") < estimate.high, name


def test_the_order_of_the_training_examples_does_not_matter(drawn, random):
    order = torch.randperm(30, generator=random)
    moved = {name: drawn[name][:, order] for name in ("log_probs", "closed_form")}
    found = class_quality(**{**drawn, **moved, "train_labels": drawn["train_labels"][order]})
    assert found.as_row() == pytest.approx(class_quality(**drawn).as_row(), abs=1e-12)


def test_queries_without_a_class_are_not_counted(drawn, random):
    extra = {name: torch.randn(9, len(drawn[name][0]), generator=random) for name in ("log_probs", "class_logits")}
    extra["closed_form"] = torch.rand(9, 30, generator=random)
    extra["query_labels"] = torch.full((9,), 3)
    more = {name: torch.cat([drawn[name], values.to(drawn[name])]) for name, values in extra.items()}
    assert class_quality(**{**drawn, **more}) == class_quality(**drawn)
    assert class_quality(**drawn).consistency_top1.n == int((drawn["query_labels"] < 3).sum()) < 50


def test_examples_without_a_class_are_retrieved_but_vote_for_none():
    # The third class is no class: half of the mass, and yet class 0 has the largest of the two.
    probs = torch.tensor([[0.3, 0.2, 0.5], [0.3, 0.2, 0.5]], dtype=torch.float64)
    quality = class_quality(
        probs.log(),
        probs,
        train_labels=torch.tensor([0, 1, 2]),
        query_labels=torch.tensor([0, 2]),
        class_logits=None,
        num_classes=2,
    )
    assert quality.consistency_top1 == proportion(0, 1)
    assert quality.knn_accuracy == proportion(1, 1)


def test_a_set_of_fewer_than_five_examples_has_top_five_of_all(drawn):
    few = {name: drawn[name][:, :3] for name in ("log_probs", "closed_form")}
    quality = class_quality(**{**drawn, **few, "train_labels": torch.tensor([0, 1, 2])})
    assert quality.consistency_top5.value == quality.consistency_top5_baseline == 1
    assert quality.share_top5.value == pytest.approx(1 / 3, abs=1e-12)


def test_the_row_holds_every_number_and_its_interval(drawn):
    quality = class_quality(**drawn)
    row = quality.as_row()
    assert row["n"] == quality.consistency_top1.n
    for name in (*METRICS, "class_accuracy"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
        assert {type(row[f"{name}_baseline"]), type(row[f"{name}_closed_form"])} == {float}
    without = class_quality(**{**drawn, "class_logits": None}).as_row()
    assert without["class_accuracy"] is None
    assert row.items() >= {name: value for name, value in without.items() if name != "class_accuracy"}.items()


def test_queries_that_all_lack_a_class_are_refused(drawn):
    with pytest.raises(InputError, match="none of the 50 query images has a class"):
        class_quality(**{**drawn, "query_labels": torch.full((50,), 3)})
