"""Index metrics of posteriors worked out by hand, and the mean gap over noise levels."""

import math

import pytest
import torch

from provgen.metrics.index_quality import IndexQuality, index_hits, index_quality, mean_kl_gap
from provgen.metrics.statistics import Estimate

POSTERIOR = torch.tensor([[0.5, 0.25, 0.25, 0.0, 0.0, 0.0], [0.0, 0.1, 0.2, 0.3, 0.25, 0.15]], dtype=torch.float64)
NETWORK = torch.tensor([[0.25, 0.5, 0.05, 0.1, 0.06, 0.04], [0.5, 0.1, 0.2, 0.1, 0.05, 0.05]], dtype=torch.float64)


def cross_entropy(target, probs):
    return -sum(t * math.log(p) for t, p in zip(target, probs, strict=True) if t > 0)


def test_hits_of_each_query_by_hand():
    hits = index_hits(NETWORK.log(), POSTERIOR, None)
    rows = list(zip(POSTERIOR.tolist(), NETWORK.tolist(), strict=True))
    assert hits[:, 0].tolist() == pytest.approx([cross_entropy(*row) for row in rows])
    assert hits[:, 1].tolist() == pytest.approx([cross_entropy(target, target) for target, _ in rows])
    # The network names example 1, then example 0; the best are examples 0 and 3.
    assert hits[:, 2].tolist() == [0.25, 0.0]
    assert hits[:, 3].tolist() == [0.5, 0.3]
    # Of six, the network leaves out one: the last of the first row, and one of the last two of the second.
    assert hits[0, 4].item() == pytest.approx(1.0)
    assert hits[1, 4].item() in (pytest.approx(0.75), pytest.approx(0.85))
    assert hits[:, 5].tolist() == pytest.approx([1.0, 1.0])


def test_hits_of_mixed_targets_move_the_entropies_and_nothing_else():
    plain = index_hits(NETWORK.log(), POSTERIOR, None)
    mixed = index_hits(NETWORK.log(), POSTERIOR, lambda probs: 0.5 * probs + 0.5 / 6)
    targets = (0.5 * POSTERIOR + 0.5 / 6).tolist()
    expected = [cross_entropy(target, probs) for target, probs in zip(targets, NETWORK.tolist(), strict=True)]
    assert mixed[:, 0].tolist() == pytest.approx(expected)
    assert mixed[:, 1].tolist() == pytest.approx([cross_entropy(target, target) for target in targets])
    assert torch.equal(mixed[:, 2:], plain[:, 2:])


def test_fewer_than_five_examples_are_all_named():
    posterior = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    hits = index_hits(posterior.flip(1).log(), posterior, None)
    assert hits[0, 2:].tolist() == pytest.approx([0.1, 0.7, 1.0, 1.0])


def test_a_quality_is_the_mean_over_queries():
    hits = index_hits(NETWORK.log(), POSTERIOR, None)
    quality = index_quality(0.3, "conditional", hits)
    assert (quality.alpha_bar, quality.rows) == (0.3, "conditional")
    means = hits.mean(dim=0).tolist()
    found = [
        quality.cross_entropy, quality.cross_entropy_ceiling, quality.top1.value, quality.top1_ceiling,
        quality.top5.value, quality.top5_ceiling,
    ]  # fmt: skip
    assert found == pytest.approx(means)
    gaps = hits[:, 0] - hits[:, 1]
    assert torch.equal(quality.query_gaps, gaps)
    assert quality.kl_gap.value == pytest.approx(float(gaps.mean()))
    row = quality.as_row()
    assert row["n"] == 2
    assert row["kl_gap_low"] <= row["kl_gap"] <= row["kl_gap_high"]
    assert all(isinstance(value, (int, float, str)) for value in row.values())


def quality_of(alpha_bar, rows, *gaps) -> IndexQuality:
    """A quality of which the gaps alone count."""
    numbers = ("cross_entropy", "cross_entropy_ceiling", "top1_ceiling", "top5_ceiling")
    zero = dict.fromkeys(numbers, 0.0) | dict.fromkeys(("kl_gap", "top1", "top5"), Estimate(0.0, 0.0, 0.0, 2))
    return IndexQuality(alpha_bar=alpha_bar, rows=rows, query_gaps=torch.tensor(gaps), **zero)


def test_the_mean_gap_is_over_all_levels_and_one_kind_of_rows():
    qualities = [
        quality_of(0.001, "unconditional", 1.0, 2.0),
        quality_of(0.5, "conditional", 9.0, 10.0),
        quality_of(0.8, "unconditional", 2.0, 3.0),
        quality_of(0.999, "unconditional", 6.0, 7.0),
    ]
    found = mean_kl_gap(qualities, "unconditional")
    assert found.value == 3.5
    assert (found.low, found.high) == (3, 4)
    assert mean_kl_gap(qualities, "conditional").value == 9.5


@pytest.mark.parametrize("rows", ["unconditional", "conditional"])
def test_a_generator_without_noise_levels_has_the_gap_of_its_one_level(rows):
    assert mean_kl_gap([quality_of(0.9999, rows, 1.0, 4.0)], rows).value == 2.5
