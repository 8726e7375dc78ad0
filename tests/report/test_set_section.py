"""Every measure has its three columns in table, figure and metrics."""

import pytest

from provgen.metrics.set_measures import SetMeasure
from provgen.metrics.statistics import Estimate
from provgen.report.sections.sets import READ, plot_set_measures, set_section


def around(value):
    return Estimate(value, value - 0.5, value + 1, 30)


@pytest.fixture
def measures():
    columns = [[around(number + place) for place in (0, 0.25, 0.5)] for number in range(len(READ))]
    return {name: SetMeasure(*three) for name, three in zip(READ, columns, strict=True)}


def test_table_and_metrics_hold_all_columns(measures):
    section, metrics = set_section(measures, "pixels")
    assert section.table.header == ["measure", "generated", "held-out", "copies", "what it counts"]
    assert section.table.rows[1][:4] == [
        "C_T in deviations",
        "1 [0.5, 2]",
        "1.25 [0.75, 2.25]",
        "1.5 [1, 2.5]",
    ]
    assert [metric.name for metric in metrics] == [name for name in READ if name != "share_memorized"]
    assert (metrics[0].value, metrics[0].low, metrics[0].high) == (1, 0.5, 2)
    assert (metrics[0].baseline, metrics[0].ceiling, metrics[0].n) == (1.25, 1.5, 30)


def test_the_figure_has_a_panel_for_every_measure(measures):
    drawn = [axes for axes in plot_set_measures(measures).axes if axes.axison]
    assert [axes.get_title() for axes in drawn] == [title for title, _ in READ.values()]
    heights = [container.lines[0].get_ydata()[0] for container in drawn[3].containers]
    assert heights == [3, 3.25, 3.5]
