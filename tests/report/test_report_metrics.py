"""`report.json` as other programs read it."""

import json
import math

from provgen.metrics.statistics import Estimate
from provgen.report.metrics import Metric, write_report_json


def test_report_json_has_the_documented_layout(tmp_path):
    metric = Metric.from_estimate(
        "share_memorized", Estimate(0.25, 0.1, 0.4, 40), "similarity", baseline=0.0, ceiling=1.0
    )
    write_report_json(tmp_path / "report.json", "digits \N{SNOWMAN}", [metric])
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {
        "schema_version": 2,
        "run": "digits \N{SNOWMAN}",
        "metrics": [
            {
                "name": "share_memorized",
                "value": 0.25,
                "low": 0.1,
                "high": 0.4,
                "baseline": 0.0,
                "ceiling": 1.0,
                "n": 40,
                "kind": "similarity",
            }
        ],
    }


def test_numbers_that_are_not_finite_become_null(tmp_path):
    metric = Metric("top1", math.nan, -math.inf, math.inf, None, math.nan, 0, "learned provenance")
    write_report_json(tmp_path / "report.json", "digits", [metric])
    (row,) = json.loads((tmp_path / "report.json").read_text())["metrics"]
    assert [row[key] for key in ("value", "low", "high", "baseline", "ceiling")] == [None] * 5
    assert row["n"] == 0
