"""Ensembles of evidence: the parts of a linear world are found, and what is useless gets nothing."""

import pytest
import torch

from provgen.metrics.datamodeling import datamodeling_scores, predicted_outputs
from provgen.studies.faithfulness.tuning import Ensemble, fit_ensemble, standardised


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def world():
    """Effects of 80 examples on 30 queries that are three parts of `a` and one of `b`; `c` is unrelated."""
    evidence = {"a": rand(30, 80), "b": 5 * rand(30, 80, seed=1) + 3, "c": rand(30, 80, seed=2)}
    effects = 0.75 * standardised(evidence["a"]) + 0.25 * standardised(evidence["b"])
    masks = torch.rand(24, 80, generator=torch.Generator().manual_seed(3)) < 0.5
    return evidence, masks, predicted_outputs(effects, masks), effects


def test_standardised_rows_have_mean_0_and_deviation_1():
    found = standardised(torch.cat([7 * rand(2, 50) - 3, torch.ones(1, 50)]))
    assert found.mean(dim=1).abs().max() < 1e-12
    assert found.std(dim=1, correction=0).tolist() == pytest.approx([1, 1, 0])


def test_the_parts_are_found(world):
    evidence, masks, outputs, _ = world
    weights = fit_ensemble(evidence, masks, outputs).weights
    assert weights["a"] == pytest.approx(0.75, abs=0.02)
    assert weights["b"] == pytest.approx(0.25, abs=0.02)
    assert weights["c"] == pytest.approx(0, abs=0.02)
    assert sum(weights.values()) == pytest.approx(1)


def test_an_ensemble_predicts_better_than_its_parts_on_other_subsets(world):
    evidence, masks, outputs, effects = world
    ensemble = fit_ensemble(evidence, masks, outputs + 3 * rand(30, 24, seed=5))
    fresh = torch.rand(40, 80, generator=torch.Generator().manual_seed(6)) < 0.5
    truth = predicted_outputs(effects, fresh)

    def lds(scores):
        return float(datamodeling_scores(predicted_outputs(scores, fresh), truth).mean())

    assert lds(ensemble(evidence)) > max(lds(scores) for scores in evidence.values()) + 0.01


def test_who_points_the_wrong_way_gets_nothing_and_nobody_is_an_equal_ensemble(world):
    evidence, masks, outputs, _ = world
    turned = {"a": evidence["a"], "minus b": -evidence["b"]}
    assert fit_ensemble(turned, masks, outputs).weights["minus b"] == 0
    assert fit_ensemble({"x": -evidence["a"], "y": -evidence["b"]}, masks, outputs).weights == {
        "x": 0.5,
        "y": 0.5,
    }


def test_twins_share_a_weight_and_scale_does_not_matter(world):
    evidence, masks, outputs, _ = world
    twins = {"a": evidence["a"], "again": 100 * evidence["a"] - 7}
    weights = fit_ensemble(twins, masks, 9 * outputs + 4).weights
    assert weights["a"] == pytest.approx(0.5, abs=1e-6)
    ensemble = Ensemble({"a": 1.0, "missing": 0.0})
    torch.testing.assert_close(ensemble({"a": evidence["a"]}), standardised(evidence["a"]))
