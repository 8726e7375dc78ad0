"""Intervals and tables as they are printed; `report.json` as other programs read it."""

import json
import math

from provgen.metrics.statistics import Estimate
from provgen.report.format import Metric, interval, markdown_table, percent, write_report_json


def test_intervals_are_written_in_the_format_asked_for():
    estimate = Estimate(0.25, 0.1, 1.0, 40)
    assert interval(estimate) == "0.250 [0.100, 1.000]"
    assert interval(estimate, ".3g") == "0.25 [0.1, 1]"
    assert interval(estimate, "+.2f") == "+0.25 [+0.10, +1.00]"
    assert percent(estimate) == "25.0 [10.0, 100.0]"


def test_a_value_without_an_interval_stands_alone():
    assert interval(Estimate(0.25, math.nan, math.nan, 1), ".2f") == "0.25"
    assert percent(Estimate(0.25, math.nan, math.nan, 1)) == "25.0"


def test_a_markdown_table_by_hand():
    header, rows = ["method", "LDS", "setting"], [["a", 1.5, "s"], ["b", None, "t"]]
    assert markdown_table(header, rows, text_columns=(0, 2)) == (
        "| method | LDS | setting |\n| --- | ---: | --- |\n| a | 1.5 | s |\n| b | - | t |\n"
    )
    assert markdown_table(["n"], [], text_columns=()) == "| n |\n| ---: |\n"


def test_report_json_has_the_documented_layout(tmp_path):
    metric = Metric.from_estimate(
        "share_memorized", Estimate(0.25, 0.1, 0.4, 40), "similarity", baseline=0.0, ceiling=1.0
    )
    write_report_json(tmp_path / "report.json", "digits \N{SNOWMAN}", [metric])
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report.items() >= {"schema_version": 2, "run": "digits \N{SNOWMAN}"}.items()
    (row,) = report["metrics"]
    assert (
        row.items()
        >= {
            "name": "share_memorized",
            "value": 0.25,
            "low": 0.1,
            "high": 0.4,
            "baseline": 0.0,
            "ceiling": 1.0,
            "n": 40,
            "kind": "similarity",
        }.items()
    )


def test_numbers_that_are_not_finite_become_null(tmp_path):
    metric = Metric("top1", math.nan, -math.inf, math.inf, None, math.nan, 0, "learned provenance")
    write_report_json(tmp_path / "report.json", "digits", [metric])
    (row,) = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert [row[key] for key in ("value", "low", "high", "baseline", "ceiling")] == [None] * 5
    assert row["n"] == 0
