"""Kept predictions say of every subset what the scores say, to the last tie."""

import pytest
import torch

from provgen.metrics.datamodeling import datamodeling_scores, predicted_outputs
from provgen.studies.faithfulness.attributor import Cost, MethodLabel, Role
from provgen.studies.faithfulness.comparison import Predictions, predict, trace_of, with_added


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def kept(tmp_path):
    masks = torch.rand(9, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    masks[4] = masks[3]  # a tie
    scores = rand(5, 30)
    cost = Cost(fit_seconds=1.5, seconds_per_query=0.25, stored_bytes=7)
    label = MethodLabel(name="a", along="noised", uses_provenance=True, is_reference=True, role=Role.TRACE)
    rows = [
        predict(scores, masks, label=label, queries="holdout", setting="s", cost=cost, hindsight=0.625),
        predict(-scores, masks, label=MethodLabel(name="b"), queries="generated", setting="", cost=None),
    ]
    before = Predictions(rows=rows, calibration_subsets=4)
    before.save(tmp_path / "predictions.parquet")
    return scores, masks, before, Predictions.load(tmp_path / "predictions.parquet")


def test_what_is_kept_is_what_was_said(kept):
    _, _, before, after = kept
    assert after.calibration_subsets == 4
    assert [row.hindsight for row in after.rows] == [0.625, None]
    assert [row.hindsight for row in after.without_hindsight().rows] == [None, None]
    for old, new in zip(before.rows, after.rows, strict=True):
        assert torch.equal(old.ranks, new.ranks)
        assert (old.label, old.queries, old.setting, old.cost) == (
            new.label,
            new.queries,
            new.setting,
            new.cost,
        )
    assert torch.equal(after.rows[0].ranks[:, 3], after.rows[0].ranks[:, 4])


def test_ranks_give_the_correlation_of_the_scores_on_any_of_the_subsets(kept):
    scores, masks, _, after = kept
    some, outputs = torch.tensor([0, 3, 4, 6, 8]), rand(5, 5, seed=2)
    expected = datamodeling_scores(predicted_outputs(scores, masks[some]), outputs)
    found = datamodeling_scores(after.rows[0].ranks[:, some], outputs)
    torch.testing.assert_close(found, expected)


def test_methods_are_added_in_the_place_of_the_same_methods_of_the_same_queries(kept):
    scores, masks, before, _ = kept

    def made(name, kind, sign=1):
        return predict(sign * scores, masks, label=MethodLabel(name=name), queries=kind, setting="new", cost=None)

    again, other, new = made("a", "holdout", -1), made("a", "generated"), made("c", "holdout")
    joined = with_added(before.rows, [again, other, new])
    assert joined == [before.rows[1], again, other, new]
    assert with_added([], [again, new]) == [again, new]
    assert with_added(before.rows, []) == list(before.rows)


def test_the_trace_is_the_best_there_is():
    """Names do not matter: calibrated comes before not, and a trajectory before noise."""
    other = MethodLabel(name="calibrated trace, trajectory", along="trajectory", uses_provenance=True)
    noised, along, calibrated = (
        MethodLabel(name="x", along="noised", role=Role.TRACE),
        MethodLabel(name="y", along="trajectory", role=Role.TRACE),
        MethodLabel(name="z", along="noised", role=Role.CALIBRATED_TRACE),
    )
    assert trace_of([other, noised]) == noised
    assert trace_of([other, noised, along]) == along
    assert trace_of([other, noised, along, calibrated]) == calibrated
