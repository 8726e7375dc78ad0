"""Effects of leaving out sources: distances by hand, paired differences, queries that are not complete."""

import pytest
import torch

from provgen.studies.faithfulness.leave_out import (
    LOSS,
    MOVED,
    NOTHING,
    OF_CLASS,
    LeaveOutFolder,
    LeftOut,
    Outcome,
    distance_moved,
    effect_table,
    leave_out_effects,
    paired_effect,
    plan,
    read_moved,
    share_of_class,
    strongest_first,
    write_table,
)


def test_the_strongest_go_first_and_of_ties_the_nearest():
    scores = torch.tensor([[0.1, 0.0, 0.5, 0.0, 0.9, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]])
    distances = torch.tensor([[9.0, 3, 9, 1, 9, 2], [6.0, 5, 4, 3, 2, 1]])
    assert strongest_first(scores, distances).tolist() == [[4, 2, 0, 3, 5, 1], [1, 5, 4, 3, 2, 0]]


def test_a_ranking_is_kept_for_the_setting_it_was_made_with(tmp_path):
    folder, rankings = LeaveOutFolder(tmp_path), {4: torch.tensor([2, 0, 1]), 7: torch.tensor([0, 1, 2])}
    assert folder.load_rankings("D-TRAK, 10 timesteps", "lambda=0.1") == {}
    folder.save_rankings("D-TRAK, 10 timesteps", "lambda=0.1", rankings)
    kept = folder.load_rankings("D-TRAK, 10 timesteps", "lambda=0.1")
    assert {query: ranking.tolist() for query, ranking in kept.items()} == {4: [2, 0, 1], 7: [0, 1, 2]}
    assert folder.load_rankings("D-TRAK, 10 timesteps", "lambda=1") == {}


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
    # Student's t of 1, 3, 7: standard deviation sqrt(28 / 3), and 4.3027 is the 97.5 % point with 2 degrees of freedom.
    margin = 4.302653 * (28 / 3) ** 0.5 / 3**0.5
    assert (difference.low, difference.high) == (pytest.approx(11 / 3 - margin), pytest.approx(11 / 3 + margin))
    assert difference.n == 3
    assert paired_effect(effects, "b", "b").high == 0


@pytest.fixture
def outcomes():
    """Two methods, two seeds, three queries; query 4 lacks a model. With nothing left out images are at 51."""
    made = {}
    for model in [*plan(["near", "random"], [0.1], [0, 2, 4], 2), *plan([NOTHING], [0.0], [0, 2, 4], 2)]:
        level = {"near": 0, "random": 51, NOTHING: 51}[model.method]
        made[model] = Outcome(
            left_out=torch.tensor([3, 1] if model.method == "near" else [0]),
            share_of_class=(model.query + 1) / 10,
            image=torch.full((1, 2, 2), level, dtype=torch.uint8),
            loss=0.001 + 0.002 * (model.seed + 1) * (model.method == "near"),
        )
    del made[LeftOut(seed=1, share=0.1, query=4, method="random")]
    return made


def test_from_fifty_queries_on_an_interval_is_a_bootstrap():
    values = torch.zeros(1, 50)
    values[0, 0] = 50
    found = paired_effect({"a": values}, "a", None)
    assert (found.value, found.low) == (1, 0), "no mean of resampled values is below 0, as that of Student's t is"
    assert paired_effect({"a": values[:, :49]}, "a", None).low < 0


def test_effects_are_against_the_same_seed_and_of_queries_that_have_every_model(outcomes):
    effects = leave_out_effects(outcomes, ["near", "random"])
    assert effects[MOVED]["near"].shape == (2, 2)  # seed, query
    assert effects[MOVED]["near"].flatten().tolist() == pytest.approx([0.8] * 4)  # 0.4 in each of 4 pixels
    assert effects[MOVED]["random"].max() == 0
    assert effects[LOSS]["near"].flatten().tolist() == pytest.approx([2, 2, 4, 4])
    assert effects[OF_CLASS]["near"][0].tolist() == pytest.approx([0.1, 0.3])
    table = effect_table(effects[MOVED])
    assert table.splitlines()[2] == "| near | 2 | 0.80 [0.80, 0.80] | 0.80 [0.80, 0.80] |"
    some = {model: outcome for model, outcome in outcomes.items() if model.seed == 0}
    assert leave_out_effects(some, ["near", "other"]) == {}


def test_the_share_of_a_class_by_hand():
    labels = torch.tensor([0, 1, 2, 2, 2])
    assert share_of_class(torch.tensor([3, 1]), labels, 2) == pytest.approx(1 / 3)
    assert share_of_class(torch.tensor([3, 1]), labels, 1) == 1
    assert share_of_class(torch.empty(0, dtype=torch.int64), labels, 2) == 0


def test_a_table_is_made_of_what_was_saved_compacted_or_not(tmp_path, outcomes):
    folder = LeaveOutFolder(tmp_path)
    for model, outcome in outcomes.items():
        folder.save(model, outcome)
    before = write_table(tmp_path, folder.load(), ["near", "random"])
    folder.compact()
    kept = folder.load()
    assert write_table(tmp_path, kept, ["near", "random"]) == before
    assert before.startswith("10% of the training images left out: distance")
    assert read_moved(tmp_path / "effects.parquet")["moved without 10%"]["near"].value == pytest.approx(0.8)
    assert kept.keys() == outcomes.keys()
    for model, outcome in outcomes.items():
        assert torch.equal(kept[model].left_out, outcome.left_out)
        assert torch.equal(kept[model].image, outcome.image)
        assert (kept[model].loss, kept[model].share_of_class) == (outcome.loss, outcome.share_of_class)
