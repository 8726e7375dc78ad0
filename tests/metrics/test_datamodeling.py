"""The linear datamodeling score: worked cases, scipy, a linear model, and a ceiling that is known."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from provgen.metrics.datamodeling import LdsComparison, datamodeling_scores, noise_ceiling, predicted_outputs


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def half_masks(subsets, train, seed=0):
    order = torch.rand(subsets, train, generator=torch.Generator().manual_seed(seed)).argsort(dim=1)
    return order < train // 2


def test_the_worked_case_of_dattri():
    """The example in dattri's own tests: 1 and sqrt(3)/2, the second with a tie."""
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]], dtype=torch.float64)
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]]).bool()
    outputs = torch.tensor([[0.3, 0.4, 0.5], [0.3, 0.4, 0.3]], dtype=torch.float64)
    found = datamodeling_scores(predicted_outputs(scores, masks), outputs)
    assert found.tolist() == pytest.approx([1.0, 0.8660254038])


def test_equals_scipy_row_by_row():
    predicted, outputs = rand(7, 20).mul(3).round(), rand(7, 20, seed=1)
    expected = [spearmanr(p, o).statistic for p, o in zip(predicted, outputs, strict=True)]
    assert datamodeling_scores(predicted, outputs).tolist() == pytest.approx(expected)


def test_scores_of_a_linear_model_predict_it_perfectly_and_their_negative_the_reverse():
    masks, effects = half_masks(16, 30), rand(5, 30)
    outputs = masks.double() @ effects.T + 4
    found = datamodeling_scores(predicted_outputs(effects, masks), outputs.T)
    assert found.tolist() == pytest.approx([1] * 5)
    assert datamodeling_scores(predicted_outputs(-effects, masks), outputs.T).tolist() == pytest.approx([-1] * 5)


def test_who_predicts_the_same_for_all_subsets_has_nothing():
    assert datamodeling_scores(torch.ones(2, 6), rand(2, 6)).tolist() == [0, 0]


def test_order_of_subsets_and_of_examples_does_not_matter():
    masks, scores, outputs = half_masks(12, 20), rand(4, 20), rand(4, 12, seed=2)
    found = datamodeling_scores(predicted_outputs(scores, masks), outputs)
    subsets, examples = torch.randperm(12), torch.randperm(20)
    moved = predicted_outputs(scores[:, examples], masks[subsets][:, examples])
    torch.testing.assert_close(datamodeling_scores(moved, outputs[:, subsets]), found)


@pytest.fixture(scope="module")
def noisy_linear():
    """A linear world: what each example does to 40 queries, and 48 noisy subset models."""
    masks, effects = half_masks(48, 60), rand(40, 60)
    clean = masks.double() @ effects.T
    outputs = clean.T + 0.5 * clean.std() * rand(40, 48, seed=3)
    scores = {"true": effects, "half": effects + rand(40, 60, seed=4), "random": rand(40, 60, seed=5)}
    predicted = {name: predicted_outputs(some, masks) for name, some in scores.items()}
    return predicted, outputs


def test_intervals_hold_the_value_and_tell_methods_apart(noisy_linear):
    predicted, outputs = noisy_linear
    compared = LdsComparison(predicted, outputs, seed=0, resamples=300)
    for name, some in predicted.items():
        estimate = compared.estimate(name)
        assert estimate.value == pytest.approx(float(datamodeling_scores(some, outputs).mean()))
        assert estimate.low < estimate.value < estimate.high
    assert compared.estimate("random").low < 0 < compared.estimate("random").high
    assert compared.difference("true", "half").low > 0
    assert compared.difference("half", "random").low > 0
    assert compared.difference("true", "true").value == compared.difference("true", "true").high == 0


def test_a_difference_is_better_known_than_from_two_separate_intervals(noisy_linear):
    predicted, outputs = noisy_linear
    near = predicted["true"] + 0.3 * predicted["true"].std() * rand(40, 48, seed=6)
    compared = LdsComparison({"true": predicted["true"], "near": near}, outputs, seed=0, resamples=300)
    paired, *alone = (
        e.high - e.low
        for e in (compared.difference("true", "near"), compared.estimate("true"), compared.estimate("near"))
    )
    assert paired < 0.7 * np.hypot(*alone)


def test_the_same_seed_gives_the_same_interval(noisy_linear):
    predicted, outputs = noisy_linear
    first, second, other = (LdsComparison(predicted, outputs, seed=s, resamples=50) for s in (0, 0, 1))
    assert first.estimate("half") == second.estimate("half") != other.estimate("half")


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_the_ceiling_is_the_score_of_the_truth(seeds, noise):
    """Outputs are truth plus independent noise per seed: the truth itself is as good as the ceiling says."""
    truth = rand(200, 64)
    outputs = truth + noise * rand(seeds, 200, 64, seed=7)
    ceiling = noise_ceiling(outputs, num_seeds=seeds, seed=0, resamples=50)
    reached = float(datamodeling_scores(truth, outputs.mean(dim=0)).mean())
    assert ceiling.estimate.value == pytest.approx(reached, abs=0.03)
    assert ceiling.estimate.low < ceiling.estimate.value < ceiling.estimate.high
    pearson = 1 / (1 + noise**2)
    # Pearson to Spearman of a bivariate normal (Pearson 1907).
    assert ceiling.seed_correlation == pytest.approx(6 / np.pi * np.arcsin(pearson / 2), abs=0.02)


def test_a_few_subsets_with_two_seeds_give_the_ceiling_of_one_seed():
    truth = rand(200, 64)
    outputs = truth + rand(2, 200, 64, seed=7)
    ceiling = noise_ceiling(outputs[:, :, :32], num_seeds=1, seed=0, resamples=10)
    reached = float(datamodeling_scores(truth, outputs[0]).mean())
    assert ceiling.estimate.value == pytest.approx(reached, abs=0.03)


def test_seeds_that_disagree_leave_no_ceiling():
    outputs = torch.stack([rand(3, 9), -rand(3, 9)])
    ceiling = noise_ceiling(outputs, num_seeds=2, seed=0, resamples=20)
    assert ceiling.seed_correlation == pytest.approx(-1)
    assert ceiling.estimate.value == ceiling.estimate.high == 0


def test_where_queries_differ_the_ceiling_is_an_upper_bound():
    """Half of the queries are noise alone: what the truth reaches is below, by Jensen's inequality."""
    truth, noise = rand(200, 64), rand(2, 200, 64, seed=8)
    outputs = truth + noise * torch.cat([torch.full((100, 1), 0.3), torch.full((100, 1), 30.0)])
    reached = float(datamodeling_scores(truth, outputs.mean(dim=0)).mean())
    assert noise_ceiling(outputs, num_seeds=2, seed=0, resamples=10).estimate.value > reached + 0.1
