"""A point of a curve, and the prediction of copies, on made-up models."""

import pytest
import torch

from provgen.metrics.statistics import mean_over_seeds, proportion
from provgen.studies.memorization.curves import (
    bounds_of,
    copy_prediction,
    curve_point,
    early_prediction,
    resampling_effect,
)


def model(ratios, **more):
    count = len(ratios)
    generator = torch.Generator().manual_seed(count)
    return {
        "ratio": torch.tensor(ratios),
        "holdout_ratio": torch.full((10,), 0.9),
        "images": torch.randint(256, (count, 1, 4, 4), generator=generator),
        "labels": torch.arange(count) % 2,
        "train_loss": torch.full((7,), 0.5),
        "holdout_loss": torch.full((9,), 1.0),
        "divergence": torch.full((7,), 4.0),
        **more,
    }


def traced(ratios, late, **more):
    """Make a model of some entropies at the only level."""
    found = {
        "entropy": torch.tensor(late),
        "late_entropy": torch.tensor(late),
        "top": -torch.tensor(late),
    }
    found["commitment"] = torch.ones(len(late))
    closed = {f"closed_form_{name}": values for name, values in found.items()}
    return model(ratios, **{**found, **closed, **more})


def test_a_point_pools_the_samples_of_all_models():
    first, second = model([0.1, 0.2, 0.9, 0.9]), model([0.1, 0.9, 0.9, 0.9])
    point = curve_point([first, second], [(first, first)])
    assert (point["share_memorized"].value, point["share_memorized"].n) == (3 / 8, 8)
    assert point["share_memorized_holdout"].value == 0
    assert point["halves_agreement"].value == 1
    assert (point["loss_ratio"].value, point["loss_ratio"].low, point["loss_ratio"].high) == (2, 2, 2)
    assert point["divergence"].value == 4
    assert "entropy" not in point, "of a generator without a provenance network"
    assert "halves_agreement" not in curve_point([first], [])


def test_commitment_counts_samples_that_commit():
    point = curve_point([model([0.9] * 4, commitment=torch.tensor([10, -1, 20, -1]))], [])
    assert (point["commitment"].value, point["commitment"].n) == (15, 2)
    assert "commitment" not in curve_point([model([0.9], commitment=torch.tensor([-1]))], [])


def test_copies_are_told_by_small_entropy_large_top_and_early_commitment():
    made = traced(
        [0.1] * 6 + [0.9] * 6,
        [0.1] * 6 + [2.0] * 6,
        top=torch.tensor([0.9] * 6 + [0.3] * 6),
        commitment=torch.tensor([10] * 6 + [20, 30, -1, -1, -1, -1]),
        closed_form_entropy=torch.tensor([1.0] * 12),
        closed_form_late_entropy=torch.tensor([1.0] * 12),
        closed_form_top=torch.tensor([1.0] * 12),
        closed_form_commitment=torch.tensor([1] * 12),
    )
    found = copy_prediction([made])
    for name in ("late_entropy", "entropy", "top", "commitment"):
        assert found[name].value == 1
        assert found[f"closed_form_{name}"].value == 0.5
    assert copy_prediction([model([0.1] * 6 + [0.9] * 6)]) == {}, "without traces"


def test_within_a_class_its_size_does_not_tell():
    # Class 0 has little entropy and copies only, class 1 much and none but for two, which do not stand out.
    made = traced([0.1] * 6 + [0.1, 0.1] + [0.9] * 6, [0.0] * 6 + [2.0] * 8)
    made["labels"] = torch.tensor([0] * 6 + [1] * 8)
    assert copy_prediction([made])["late_entropy"].value > 0.8
    assert copy_prediction([made], within=True)["late_entropy"].value == 0.5


@pytest.mark.parametrize("ratios", [[0.1] * 12, [0.9] * 12, [0.1] * 4 + [0.9] * 8])
def test_too_few_of_either_kind_are_not_told_apart(ratios):
    assert copy_prediction([traced(ratios, [0.5] * 12)]) == {}
    assert early_prediction([model(ratios, step_entropy=torch.rand(12, 2), alpha_bar=torch.tensor([0.1, 0.9]))]) == []


def test_every_sampling_step_tells_what_it_knows():
    known = torch.stack([torch.ones(12), torch.tensor([0.0] * 6 + [1.0] * 6)], dim=1)
    found = early_prediction([model([0.1] * 6 + [0.9] * 6, step_entropy=known, alpha_bar=torch.tensor([0.25, 0.75]))])
    assert [(level, estimate.value) for level, estimate in found] == [(0.25, 0.5), (0.75, 1)]


def test_what_drawing_again_did():
    first = model([0.1] * 4, **{"ratio_below_1%": torch.tensor([0.1, 0.9, 0.9, 0.9])})
    second = model([0.9] * 4, **{"ratio_below_1%": torch.tensor([0.9] * 4)})
    for made, resamplings in ((first, [4, 1, 1, 2]), (second, [0] * 4)):
        made["resamplings_below_1%"] = torch.tensor(resamplings)
    assert bounds_of(first) == ["1%"]
    left, draws = resampling_effect([first, second], "1%")
    assert (left.value, left.n, draws.value) == (1 / 8, 8, 2)


def test_intervals_of_three_trainings_are_over_trainings():
    models = [model([0.1] * copies + [0.9] * (10 - copies)) for copies in (2, 4, 6)]
    point = curve_point(models, [])
    over = mean_over_seeds([0.2, 0.4, 0.6])
    exact = proportion(12, 30)
    found = point["share_memorized"]
    assert (found.value, found.n) == (pytest.approx(0.4), 3)
    assert (found.low, found.high) == (max(0, min(over.low, exact.low)), max(over.high, exact.high))
    assert point["loss_ratio"].value == 2
    assert (point["loss_ratio"].low, point["loss_ratio"].high) == (2, 2)
    none = curve_point([model([0.9] * 10)] * 3, [])["share_memorized"]
    assert (none.value, none.low) == (0, 0)
    assert none.high == proportion(0, 30).high, "not the interval of three equal trainings"


def test_auroc_of_three_trainings_is_the_mean_of_theirs():
    ratios = [0.1] * 6 + [0.9] * 6
    # The first and third tell copies, the second knows nothing; between generators entropies differ.
    late = [[0.1] * 6 + [0.2] * 6, [5.0] * 12, [7.0] * 6 + [8.0] * 6]
    models = [traced(ratios, some, commitment=torch.ones(12)) for some in late]
    for some in models:
        some |= {f"closed_form_{name}": some[name] for name in ("entropy", "late_entropy", "top", "commitment")}
    found = copy_prediction(models)["late_entropy"]
    over = mean_over_seeds([1, 0.5, 1])
    assert (found.value, found.n) == (pytest.approx(5 / 6), 3)
    assert (found.low, found.high) == (pytest.approx(over.low), 1)
    everything = copy_prediction(models, pooled=True)["late_entropy"]
    assert everything.value == pytest.approx((1 + 2 * 1 + 1 * 0.5 + 1 + 1) / 9)
