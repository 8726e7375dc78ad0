"""Verdicts counted, drawn and written."""

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from provgen.metrics.verdicts import KINDS, Evidence, Limits, Verdict
from provgen.report.sections.verdicts import (
    PANELS,
    gallery_rows,
    plot_evidence,
    plot_verdicts,
    verdict_section,
    write_verdicts,
)

NAMES = (
    "ratio",
    "calibrated",
    "distance",
    "patches",
    "sources",
    "late_entropy",
    "of_class",
    "top",
    "agreement",
)
LIMITS = Limits(calibrated=0.8, distance=0.6, sources=50.0, of_class=0.2, n=100)


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


def evidence_of(count):
    """Make evidence whose every kind counts up, each from its own place on."""
    return Evidence(**{name: torch.arange(float(count)) + place for place, name in enumerate(NAMES)})


@pytest.fixture
def evidence(judged):
    return {name: evidence_of(len(verdicts)) for name, verdicts in judged.items()}


def test_shares_stand_beside_those_of_held_out_images_and_copies(judged, evidence):
    gallery = Image.new("RGB", (30, 20))
    section, metrics = verdict_section(judged, evidence, LIMITS, gallery)
    assert [picture.width for picture in section.figures][1] == 30
    assert section.table.header == ["verdict", "generated", "held-out", "copies", "rule"]
    assert [row[0] for row in section.table.rows] == list(KINDS)
    assert [cell.split()[0] for cell in section.table.rows[0][1:4]] == ["0.250", "0.000", "1.000"]
    by_name = {metric.name: metric for metric in metrics}
    novel = by_name["share_novel"]
    assert (novel.value, novel.baseline, novel.ceiling, novel.n) == (0.5, 1, 0, 4)
    assert by_name["share_near_copy"].value == 0.25
    assert sum(metric.value for metric in metrics) == 1


def test_bars_are_as_long_as_shares(judged):
    (axes,) = plot_verdicts(judged).axes
    widths = [bars[0].get_width() for bars in axes.containers]
    assert widths == [0.25, 0.25, 0, 0, 0.5, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0]


def test_every_sample_is_written_with_its_reason(judged, tmp_path):
    write_verdicts(tmp_path / "verdicts.parquet", evidence_of(4), judged["generated"], [30, None, 40, None])
    rows = pq.read_table(tmp_path / "verdicts.parquet").to_pylist()
    assert [row["reason"] for row in rows] == ["a", "b", "c", "d"]
    assert rows[2] == {
        "sample": 2, "verdict": "novel", "reason": "c", "ratio": 2, "calibrated": 3, "distance": 4, "patches": 5,
        "sources": 6, "late_entropy": 7, "of_class": 8, "top": 9, "agreement": 10, "commitment_step": 40,
    }  # fmt: skip
    assert rows[1]["commitment_step"] is None


def test_the_gallery_has_the_first_of_each_verdict():
    kinds = ["novel", "copy", "novel", "copy", "near copy", "novel", "novel"]
    assert gallery_rows([Verdict(kind, "") for kind in kinds]) == [1, 3, 4, 0, 2, 5]


def test_evidence_is_drawn_with_its_limits(evidence):
    evidence["held-out"].patches[:] = torch.nan
    figure = plot_evidence(evidence, LIMITS)
    titles = {axes.get_title(): axes for axes in figure.axes}
    assert list(titles) == list(PANELS.values())
    *curves, bound = titles["calibrated distance"].lines
    assert [len(curve.get_xdata()) - 1 for curve in curves] == [4, 3, 2], "generated, held-out, copies"
    assert bound.get_xdata() == [0.8, 0.8]
    assert len(titles["parts from one image"].lines) == 2, "without the set that has none"
