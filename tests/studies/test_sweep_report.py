"""Table, onsets and figures of a made-up sweep."""

import pyarrow.parquet as pq
import pytest

from provgen.metrics.statistics import Estimate
from provgen.studies.memorization.curves import SweepCurves
from provgen.studies.memorization.report import (
    onset,
    plot_prediction,
    plot_resampling,
    plot_sweep,
    plot_time,
    tables_in_words,
    write_sweep_report,
)


def around(value):
    return Estimate(value, value - 0.05, value + 0.05, 40)


@pytest.fixture
def curves():
    shares = {(16, 10): 0.5, (16, 20): 1.0, (64, 10): 0.0, (64, 20): 0.25}
    points = {
        place: {"share_memorized": around(share), "loss_ratio": around(2 - share), "entropy": around(1.0)}
        for place, share in shares.items()
    }
    points[16, 20]["halves_agreement"] = around(0.1)
    return SweepCurves(
        points=points,
        predictions={64: {"entropy": around(0.9)}},
        within={64: {"entropy": around(0.7)}},
        overall={"entropy": around(0.8)},
        early={64: [(0.2, around(0.6)), (0.8, around(0.9))]},
        resampling={64: {"50%": (around(0.125), around(1.5))}},
    )


def test_the_last_step_is_in_the_table(curves):
    lines = tables_in_words(curves).splitlines()
    assert lines[4].startswith("| 16 | 1 [0.95, 1.05] | - | 0.1 [0.05, 0.15] | 1 [")
    assert lines[5].startswith("| 64 | 0.25 [0.2, 0.3] | - | - | 1.75 [")
    assert "memorization ends (half) at 40 images" in lines
    assert "generalization begins: not within these sizes" in lines
    assert "| entropy | 0.9 [0.85, 0.95] | 0.8 [0.75, 0.85] |" in lines, "of a size, and of all"
    assert "| entropy | 0.7 [0.65, 0.75] |" in lines, "within generator and class"
    assert not any(line.startswith("| late entropy") for line in lines), "measured of no size"
    assert "| 64 | 0.25 [0.2, 0.3] | 0.125 [0.075, 0.175], 1.5 [1.45, 1.55] draws |" in lines


def test_onsets_are_interpolated(curves):
    assert onset(curves, "share_memorized") == pytest.approx(16 * 4 ** (2 / 3))
    assert onset(curves, "halves_agreement") is None


def test_figures_show_what_was_measured(curves):
    figure = plot_sweep(curves)
    assert [axes.get_title(loc="left") for axes in figure.axes][:2] == [
        "Copies",
        "Same noise, no image in common",
    ]
    assert figure.axes[0].containers[0].lines[0].get_ydata().tolist() == [1, 0.25]
    over_time = plot_time(curves)
    assert over_time.axes[1].lines[1].get_xdata().tolist() == [10 / 64, 20 / 64]
    assert plot_prediction(curves).axes[0].lines[0].get_ydata().tolist() == [0.6, 0.9]
    (drawn,) = plot_resampling(curves).axes[0].containers
    assert drawn.lines[0].get_xydata().tolist() == [[1, 0.25], [1.5, 0.125]]


@pytest.mark.slow
def test_everything_is_written(curves, tmp_path):
    assert "report.html in" in write_sweep_report(tmp_path, curves)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 4
    assert page.count("<table") == 4
    assert "16 to 64" in page
    rows = pq.read_table(tmp_path / "sweep.parquet").to_pylist()
    assert {k: rows[7][k] for k in ("size", "step", "name")} == {
        "size": 64,
        "step": 10,
        "name": "share_memorized",
    }
    for name in ("sweep.md", "sweep.png", "time.png", "prediction.png", "resampling.png"):
        assert (tmp_path / name).stat().st_size > 0
