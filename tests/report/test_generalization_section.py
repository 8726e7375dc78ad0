"""Losses and divergence in table, metrics and figure."""

import pytest
import torch

from provgen.report.sections.generalization import generalization_section, loss_ratios, plot_by_level

SEEN = torch.tensor([[1.0, 1.5, 2.0]] * 3)
UNSEEN = 2 * SEEN
DIVERGENCE = {100: torch.tensor([1.0, 3.0]), 700: torch.tensor([0.0, 0.0])}


def test_losses_and_divergence_are_metrics():
    section, metrics = generalization_section("diffusion", SEEN, UNSEEN, DIVERGENCE)
    by_name = {metric.name: metric.value for metric in metrics}
    assert by_name == {
        "train_denoising_loss": 1.5,
        "holdout_denoising_loss": 3,
        "denoising_loss_ratio": 2,
        "denoising_loss_ratio_little_noise": 2,
        "denoising_loss_ratio_some_noise": 2,
        "denoising_loss_ratio_much_noise": 2,
        "divergence_from_closed_form_nats": 1,
    }
    assert len(section.figures) == 1
    assert section.table.rows[1][1].startswith("3.000 [")


@pytest.mark.parametrize("kind", ["vae", "none"])
def test_generators_without_noise_levels_have_no_figure(kind):
    section, metrics = generalization_section(kind, SEEN, UNSEEN)
    assert not section.figures
    assert [metric.name for metric in metrics][2].endswith("_ratio")
    assert len(metrics) == 3


def test_curves_are_drawn_where_they_were_measured():
    left, right = plot_by_level(SEEN, UNSEEN, DIVERGENCE).axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[1, 1.5, 2], [2, 3, 4]]
    assert left.lines[0].get_xdata().tolist() == pytest.approx([500 / 3, 500, 2500 / 3])
    assert right.lines[0].get_xdata().tolist() == [100, 700]
    assert right.lines[0].get_ydata().tolist() == [2, 0]


def test_ratios_of_thirds_by_hand():
    unseen = SEEN * torch.tensor([3.0, 2.0, 1.0])
    found = loss_ratios(SEEN, unseen)
    assert {name: ratio.value for name, ratio in found.items()} == pytest.approx(
        {"all": 8 / 4.5, "little_noise": 3, "some_noise": 2, "much_noise": 1}
    )
    assert list(loss_ratios(SEEN[:, :1], unseen[:, :1])) == ["all"]
