"""Effects of leaving out sources: distances by hand, paired differences, queries that are not complete."""

import pytest
import torch

from provgen.analysis.leave_out import distance_moved, paired_effect, strongest
from provgen.leave_out_files import LeaveOutFolder, LeftOut, Outcome, plan
from provgen.report.leave_out_table import LOSS, MOVED, effect_table, leave_out_effects


def test_the_strongest_are_the_largest_and_ties_go_to_the_first():
    assert strongest(torch.tensor([0.1, 0.5, 0.5, 0.9]), 3).tolist() == [3, 1, 2]


def test_a_distance_by_hand():
    before = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    after = before.clone()
    after[1, 0, 0] = torch.tensor([255, 0], dtype=torch.uint8)
    after[1, 0, 1, 1] = 255
    assert distance_moved(before, after).tolist() == pytest.approx([0, 2 * 2**0.5])


def test_paired_effects_by_hand():
    effects = {"a": torch.tensor([[1.0, 3.0, 8.0], [3.0, 5.0, 8.0]]), "b": torch.ones(2, 3)}
    assert paired_effect(effects, "a", None).value == pytest.approx((2 + 4 + 8) / 3)
    difference = paired_effect(effects, "a", "b")
    assert difference.value == pytest.approx((1 + 3 + 7) / 3)
    assert 1 <= difference.low < difference.value < difference.high <= 7
    assert difference.n == 3
    assert paired_effect(effects, "b", "b").high == 0


@pytest.fixture
def outcomes():
    """Two methods, two seeds, three queries; query 4 lacks a model."""
    models = plan(["near", "random"], [0.1], [0, 2, 4], 2)
    made = {}
    for model in models:
        image = torch.full((1, 2, 2), 51 if model.method == "near" else 0, dtype=torch.uint8)
        made[model] = Outcome(image=image, loss=0.002 * (model.seed + 1) if model.method == "near" else 0.001)
    del made[LeftOut(seed=1, share=0.1, query=4, method="random")]
    return made


def test_effects_are_of_queries_that_have_every_model(outcomes):
    samples = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    effects = leave_out_effects(outcomes, samples, ["near", "random"])
    assert effects[MOVED]["near"].shape == (2, 2)  # seed, query
    assert effects[MOVED]["near"].flatten().tolist() == pytest.approx(
        [0.8] * 4
    )  # 2 pixels side: 0.4 x sqrt(4)
    assert effects[MOVED]["random"].max() == 0
    assert effects[LOSS]["near"].flatten().tolist() == pytest.approx([2, 2, 4, 4])
    table = effect_table(effects[MOVED], ["random"])
    assert table.splitlines()[2] == "| near | 2 | 0.80 [0.80, 0.80] | 0.80 [0.80, 0.80] |"
    assert leave_out_effects({}, samples, ["near"]) == {}


def test_files_give_back_what_was_saved(tmp_path, outcomes):
    folder = LeaveOutFolder(tmp_path)
    planned = plan(["near", "random"], [0.1], [0, 2, 4], 2)
    assert [model.seed for model in planned] == [0] * 6 + [1] * 6
    for model, outcome in outcomes.items():
        folder.save(model, torch.tensor([3, 1]), outcome)
    found = dict(folder.measured(planned))
    assert found.keys() == outcomes.keys()
    for model, outcome in found.items():
        assert torch.equal(outcome.image, outcomes[model].image)
        assert outcome.loss == outcomes[model].loss
        assert folder.left_out(model).tolist() == [3, 1]
