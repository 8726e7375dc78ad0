"""What is drawn equals what was given: read back from the artists."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from provgen.studies.paper.figure import plot_variants


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


def heights(line):
    return np.asarray(line.get_ydata(), dtype=float)


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.fixture
def sweep():
    """Three seeds of x in 0, 0.5, 1 and two sizes."""
    return [
        {
            "variant": f"x={x},size={size}",
            "seed": seed,
            "p.x": x,
            "p.size": size,
            "index_top1": 0.9 - 0.5 * x + 0.01 * seed - 0.1 * (size == "tiny"),
            "index_top1_ceiling": 0.95 - 0.4 * x,
            "consistency_top1": 0.8 + 0.05 * x + 0.01 * seed,
            "consistency_top1_baseline": 0.1,
        }
        for x in (0.0, 0.5, 1.0)
        for size in ("tiny", "small")
        for seed in range(3)
    ]


def test_lines_hold_the_means_over_seeds_and_their_intervals(sweep):
    figure = plot_variants(sweep, ["index_top1"], x="p.x", lines=["p.size"])
    (axes,) = figure.axes
    tiny, small = (container.lines for container in axes.containers)
    np.testing.assert_allclose(heights(tiny[0]), [0.81, 0.56, 0.31])
    np.testing.assert_allclose(heights(small[0]), [0.91, 0.66, 0.41])
    np.testing.assert_allclose(np.asarray(tiny[0].get_xdata(), dtype=float), [0, 0.5, 1], atol=0.02)
    # Seeds 0.01 apart: standard error 0.01 / sqrt(3), t(0.975, 2) = 4.302653.
    ends = tiny[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(ends, [0.81 - 0.0248414, 0.81 + 0.0248414], atol=1e-6)
    assert legend_of(figure)[:2] == ["size tiny", "size small"]
    assert rendered(figure).std() > 0


def test_lines_are_moved_apart_but_less_than_values_are(sweep):
    (axes,) = plot_variants(sweep, ["index_top1"], x="p.x", lines=["p.size"]).axes
    tiny, small = (container.lines[0].get_xdata() for container in axes.containers)
    assert 0 < np.abs(np.subtract(tiny, small)).max() < 0.05


def test_a_bound_that_all_lines_share_is_drawn_once_and_dashed(sweep):
    (axes,) = plot_variants(sweep, ["index_top1"], x="p.x", lines=["p.size"]).axes
    (bound,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    np.testing.assert_allclose(bound.get_ydata(), [0.95, 0.75, 0.55])


def test_bounds_that_differ_have_the_colours_of_their_lines(sweep):
    rows = [row | {"index_top1_ceiling": 0.9 + 0.05 * (row["p.size"] == "small")} for row in sweep]
    (axes,) = plot_variants(rows, ["index_top1"], x="p.x", lines=["p.size"]).axes
    dashed = [line.get_color() for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert dashed == [container.lines[0].get_color() for container in axes.containers]


def test_a_bound_far_off_is_written_and_does_not_flatten_the_lines(sweep):
    figure = plot_variants(sweep, ["consistency_top1"], x="p.x", lines=["p.size"])
    (axes,) = figure.axes
    assert "guessing 0.100" in axes.get_ylabel()
    assert "guessing" not in legend_of(figure)
    assert axes.get_ylim()[0] > 0.7


def test_values_that_are_no_numbers_are_named_at_their_places(sweep):
    rows = [row | {"p.x": {0.0: 1, 0.5: 2, 1.0: None}[row["p.x"]]} for row in sweep]
    (axes,) = plot_variants(rows, ["index_top1"], x="p.x", lines=["p.size"]).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "all"]
    assert axes.get_xscale() == "linear"


@pytest.mark.parametrize(
    ("values", "scale"),
    [((0.01, 0.03, 0.1), "log"), ((0.1, 0.5, 0.9), "linear"), ((0.0, 0.1, 1.0), "linear")],
)
def test_the_axis_is_logarithmic_where_that_spaces_the_values_evenly(values, scale, sweep):
    rows = [row | {"p.x": dict(zip((0.0, 0.5, 1.0), values, strict=True))[row["p.x"]]} for row in sweep]
    figure = plot_variants(rows, ["index_top1"], x="p.x", lines=["p.size"])
    assert figure.axes[0].get_xscale() == scale
    assert rendered(figure).std() > 0


def test_without_x_every_variant_has_a_row_in_every_panel(sweep):
    rows = [row for row in sweep if row["p.x"] != 0.5]
    figure = plot_variants(rows, ["index_top1", "consistency_top1"], x=None, lines=[])
    first, second = figure.axes
    names = list(dict.fromkeys(row["variant"] for row in rows))
    assert [tick.get_text() for tick in first.get_yticklabels()] == names
    assert {tick.get_text() for tick in second.get_yticklabels()} == {""}
    means = [container.lines[0].get_xdata()[0] for container in first.containers]
    np.testing.assert_allclose(means, [0.81, 0.91, 0.31, 0.41])
    bottom, top = first.get_ylim()
    assert bottom > top, "the first variant is on top"
    assert "best possible" in legend_of(figure)
    assert rendered(figure).std() > 0


def test_a_metric_that_no_run_has_gets_no_panel_and_one_seed_no_interval(sweep):
    rows = [row for row in sweep if row["seed"] == 0]
    figure = plot_variants(rows, ["kl_gap", "index_top1"], x="p.x", lines=["p.size"])
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "index top-1"
    segments = axes.containers[0].lines[2][0].get_segments()
    assert all(np.ptp(segment[:, 1]) == 0 for segment in segments)
    assert rendered(figure).std() > 0


def test_runs_without_any_of_the_metrics_still_make_a_figure():
    rows = [{"variant": "a", "seed": 0, "p.x": 1}, {"variant": "b", "seed": 0, "p.x": 2}]
    for x in ("p.x", None):
        assert rendered(plot_variants(rows, ["kl_gap"], x=x, lines=[])).std() > 0
