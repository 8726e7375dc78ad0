"""Verdicts counted, drawn and written."""

import pyarrow.parquet as pq
import pytest
import torch

from provgen.analysis.verdicts import KINDS, Evidence, Limits, Verdict
from provgen.report.verdict_section import plot_verdicts, verdict_section, write_verdicts

LIMITS = Limits(calibrated=0.8, distance=0.6, of_class=0.2, n=100)


@pytest.fixture
def judged():
    return {
        "generated": [
            Verdict("copy", "a"),
            Verdict("novel", "b"),
            Verdict("novel", "c"),
            Verdict("near copy", "d"),
        ],
        "held-out": [Verdict("novel", "e")] * 3,
        "copies": [Verdict("copy", "f")] * 2,
    }


def test_shares_stand_beside_those_of_held_out_images_and_copies(judged):
    section, metrics = verdict_section(judged, LIMITS)
    assert section.table.header == ["verdict", "generated", "held-out", "copies", "rule"]
    assert [row[0] for row in section.table.rows] == list(KINDS)
    assert [cell.split()[0] for cell in section.table.rows[0][1:4]] == ["0.250", "0.000", "1.000"]
    by_name = {metric.name: metric for metric in metrics}
    novel = by_name["share_novel"]
    assert (novel.value, novel.null, novel.ceiling, novel.n) == (0.5, 1, 0, 4)
    assert by_name["share_near_copy"].value == 0.25
    assert sum(metric.value for metric in metrics) == 1


def test_bars_are_as_long_as_shares(judged):
    (axes,) = plot_verdicts(judged).axes
    widths = [bars[0].get_width() for bars in axes.containers]
    assert widths == [0.25, 0.25, 0, 0, 0.5, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_every_sample_is_written_with_its_reason(judged, tmp_path):
    names = ("ratio", "calibrated", "distance", "patches", "sources", "of_class")
    evidence = Evidence(**{name: torch.arange(4.0) + place for place, name in enumerate(names)})
    write_verdicts(tmp_path / "verdicts.parquet", evidence, judged["generated"])
    rows = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[2] == {
        "sample": 2, "verdict": "novel", "reason": "c", "ratio": 2, "calibrated": 3, "distance": 4, "patches": 5,
        "sources": 6, "of_class": 7,
    }  # fmt: skip
