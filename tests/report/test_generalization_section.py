"""Losses and divergence in table, metrics and figure."""

import pytest
import torch

from provgen.report.generalization_section import generalization_section, plot_by_level

SEEN = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
UNSEEN = 2 * SEEN
DIVERGENCE = {100: torch.tensor([1.0, 3.0]), 700: torch.tensor([0.0, 0.0])}


def test_losses_and_divergence_are_metrics():
    section, metrics = generalization_section("diffusion", SEEN, UNSEEN, DIVERGENCE)
    by_name = {metric.name: metric.value for metric in metrics}
    assert by_name == {
        "train_denoising_loss": 1.5,
        "holdout_denoising_loss": 3,
        "divergence_from_closed_form_nats": 1,
    }
    assert len(section.figures) == 1
    assert section.table.rows[1][1].startswith("3.000 [")


@pytest.mark.parametrize("kind", ["vae", "none"])
def test_generators_without_noise_levels_have_no_figure(kind):
    section, metrics = generalization_section(kind, SEEN, UNSEEN)
    assert not section.figures
    assert len(metrics) == 2


def test_curves_are_drawn_where_they_were_measured():
    left, right = plot_by_level(SEEN, UNSEEN, DIVERGENCE).axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[1, 2], [2, 4]]
    assert left.lines[0].get_xdata().tolist() == [250, 750]
    assert right.lines[0].get_xdata().tolist() == [100, 700]
    assert right.lines[0].get_ydata().tolist() == [2, 0]
