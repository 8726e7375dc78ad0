"""What is drawn equals what was given: read back from the artists of each figure."""

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from provgen.errors import InputError
from provgen.report.figures import (
    BLUE,
    VERMILION,
    plot_entropy,
    plot_index_quality,
    plot_ratio_histogram,
    plot_training,
)


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def rendered(figure):
    assert isinstance(figure, Figure)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.fixture
def metrics():
    noise = np.random.default_rng(0).normal(size=(60, 3)) * 0.05
    return [
        {"step": 10 * i, "denoising_loss": 0.2 + a, "index_loss": 3 + b, "class_loss": 1 + c}
        for i, (a, b, c) in enumerate(noise, start=1)
    ]


@pytest.fixture
def quality_rows():
    return [
        {
            "alpha_bar": alpha_bar,
            "rows": kind,
            "cross_entropy": 5 - 4 * alpha_bar + gap,
            "cross_entropy_ceiling": 5 - 4 * alpha_bar,
            "kl_gap": gap,
            "top1": alpha_bar - gap,
            "top1_ceiling": alpha_bar,
            "top5": alpha_bar - gap / 2,
            "top5_ceiling": alpha_bar,
            "n": 100,
        }
        for kind, gap in (("unconditional", 0.1), ("conditional", 0.05))
        for alpha_bar in (0.9, 0.1, 0.5)
    ]


def test_training_curves_hold_every_logged_value(metrics):
    figure = plot_training(metrics)
    for axes, key in zip(figure.axes, ("denoising_loss", "index_loss", "class_loss"), strict=True):
        raw = lines(axes)["logged"]
        np.testing.assert_array_equal(raw.get_xdata(), [row["step"] for row in metrics])
        np.testing.assert_array_equal(raw.get_ydata(), [row[key] for row in metrics])
    assert rendered(figure).std() > 0


def test_moving_average_is_less_noisy_keeps_a_line_and_starts_where_the_curve_does(metrics):
    smooth = lines(plot_training(metrics).axes[0])["moving average"].get_ydata()
    raw = [row["denoising_loss"] for row in metrics]
    assert np.std(smooth) < 0.7 * np.std(raw)
    straight = [{"step": i, "index_loss": 100.0 - i} for i in range(50)]
    smooth = lines(plot_training(straight).axes[0])["moving average"].get_ydata()
    np.testing.assert_allclose(smooth[:48], [100.0 - i for i in range(48)])


def test_short_curves_are_not_smoothed_and_unknown_losses_get_no_panel():
    figure = plot_training([{"step": 20, "denoising_loss": 0.5}, {"step": 10, "denoising_loss": None}])
    (axes,) = figure.axes
    drawn = lines(axes)
    assert "moving average" not in drawn
    np.testing.assert_array_equal(drawn["logged"].get_xdata(), [10, 20])
    np.testing.assert_array_equal(drawn["logged"].get_ydata(), [np.nan, 0.5])


def test_metrics_without_losses_are_refused():
    with pytest.raises(InputError, match="no losses"):
        plot_training([{"step": 1}])


def curves(axes, color):
    """Network (solid) and closed form (dashed) that are drawn in one colour."""
    drawn = {line.get_linestyle(): line for line in axes.get_lines() if line.get_color() == color}
    return drawn["-"], drawn["--"]


def test_index_quality_draws_network_solid_and_closed_form_dashed_in_one_color(quality_rows):
    figure = plot_index_quality(quality_rows)
    for kind, color in (("conditional", BLUE), ("unconditional", VERMILION)):
        rows = sorted((row for row in quality_rows if row["rows"] == kind), key=lambda row: row["alpha_bar"])
        for axes, key in zip(figure.axes, ("cross_entropy", "top1", "top5"), strict=True):
            network, ceiling = curves(axes, color)
            np.testing.assert_array_equal(network.get_xdata(), [0.1, 0.5, 0.9])
            np.testing.assert_array_equal(network.get_ydata(), [row[key] for row in rows])
            np.testing.assert_array_equal(ceiling.get_ydata(), [row[f"{key}_ceiling"] for row in rows])
    assert rendered(figure).std() > 0


def test_index_quality_without_classes_has_unconditional_rows_only(quality_rows):
    figure = plot_index_quality([row for row in quality_rows if row["rows"] == "unconditional"])
    assert {line.get_color() for axes in figure.axes for line in axes.get_lines()} == {VERMILION}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels
    assert all("unconditional" in label for label in labels)


def test_entropy_shows_median_and_band_from_noise_to_image():
    entropies = torch.arange(11.0)[:, None] * torch.tensor([0.1, 0.5, 1.0])
    figure = plot_entropy(torch.tensor([0.9, 0.5, 0.1]), entropies, 2 * entropies)
    (axes,) = figure.axes
    network, closed_form = lines(axes)["network"], lines(axes)["closed form"]
    np.testing.assert_allclose(network.get_xdata(), [0.1, 0.5, 0.9], rtol=1e-6)
    np.testing.assert_allclose(network.get_ydata(), [5.0, 2.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(closed_form.get_ydata(), [10.0, 5.0, 1.0], rtol=1e-6)
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.1, 9.0))
    assert "nats" in axes.get_ylabel()


def test_entropy_without_closed_form_has_one_line():
    (axes,) = plot_entropy(torch.tensor([0.1, 0.9]), torch.ones(3, 2)).axes
    assert "closed form" not in lines(axes)


def test_ratio_histogram_gives_the_share_of_each_set_per_bin():
    sets = {"generated": torch.tensor([0.0, 0.51, 0.52, 0.99]), "held-out": torch.tensor([0.72, 1.0])}
    (axes,) = plot_ratio_histogram(sets).axes
    shares = {patch.get_label(): patch.get_data().values for patch in axes.patches}
    generated, holdout = shares["generated (n = 4)"], shares["held-out (n = 2)"]
    assert generated.sum() == pytest.approx(1)
    assert (generated[0], generated[15], generated[29]) == (0.25, 0.5, 0.25)
    assert (holdout[21], holdout[29]) == (0.5, 0.5)
    assert 1 / 3 in [line.get_xdata()[0] for line in axes.get_lines()], "the threshold"


def test_a_bar_of_copies_is_cut_and_its_height_written():
    spread = torch.linspace(0.4, 1, 200)
    figure = plot_ratio_histogram({"generated": spread, "copied": torch.zeros(50)})
    (axes,) = figure.axes
    assert axes.get_ylim()[1] < 1
    assert any("copied: 100%" in text.get_text() for text in axes.texts)
    assert rendered(figure).std() > 0


def test_figures_leave_the_global_style_alone(metrics):
    before = dict(mpl.rcParams)
    rendered(plot_training(metrics))
    assert dict(mpl.rcParams) == before
