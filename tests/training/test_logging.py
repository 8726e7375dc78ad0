"""`metrics.jsonl` across kills: torn lines and lines of steps that are done again. The table of index metrics."""

import json
from io import StringIO

import pytest
from rich.console import Console

from provgen.training.logging import JsonLinesTracker, quality_table, read_metrics

ROWS = [{"step": step, "loss": step / 10} for step in (5, 10, 15, 20)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def resume(accelerator, path):
    """Start a tracker of a run that goes on from a step."""

    def call(step):
        tracker = JsonLinesTracker(path, start_step=step)
        tracker.start()
        return tracker

    return call


@pytest.mark.parametrize(("step", "kept"), [(0, 0), (4, 0), (5, 1), (10, 2), (19, 3), (20, 4), (99, 4)])
def test_lines_of_later_steps_are_dropped_on_resuming(step, kept, resume, path):
    resume(step)
    assert read_metrics(path) == ROWS[:kept]


def test_lines_are_appended_after_those_that_were_kept(resume, path):
    tracker = resume(10)
    tracker.log({"loss": 7.0}, step=12)
    tracker.log({"index_quality": [{"alpha_bar": 0.5}]}, step=15)
    assert read_metrics(path) == [
        *ROWS[:2],
        {"step": 12, "loss": 7.0},
        {"step": 15, "index_quality": [{"alpha_bar": 0.5}]},
    ]


@pytest.mark.parametrize("torn", ['{"step": 25, "lo', "{", '{"step": 25, "loss": 1.0}'])
def test_a_last_line_without_its_end_is_ignored_and_gone_after_resuming(torn, resume, path):
    with path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert read_metrics(path) == ROWS
    resume(99).log({"loss": 0.0}, step=30)
    assert read_metrics(path) == [*ROWS, {"step": 30, "loss": 0.0}]


def test_a_new_run_starts_an_empty_file(accelerator, tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    assert read_metrics(path) == []
    JsonLinesTracker(path, start_step=0).start()
    assert path.read_text(encoding="utf-8") == ""
    assert read_metrics(path) == []


def test_the_tracker_works_through_the_accelerator(accelerator, resume, path):
    tracker = resume(20)
    accelerator.log_with = [tracker]
    accelerator.init_trackers("provgen")
    accelerator.log({"loss": 1.5}, step=25)
    assert read_metrics(path)[-1] == {"step": 25, "loss": 1.5}
    assert len(read_metrics(path)) == 5


def test_the_table_of_index_metrics_is_whole_on_a_narrow_terminal():
    measured = {"cross_entropy": 4.9, "cross_entropy_ceiling": 4.8, "kl_gap": 0.1, "top1": 0.5, "top1_ceiling": 0.6,
                "top5": 0.7, "top5_ceiling": 0.8}  # fmt: skip
    rows = [
        {"rows": kind, "alpha_bar": level, **measured}
        for level in (0.9, 0.25)
        for kind in ("unconditional", "conditional")
    ]
    console = Console(width=80, record=True, quiet=False, file=StringIO())
    console.print(quality_table(rows, 7))
    printed = console.export_text()
    assert "…" not in printed
    cells = ["4.90/4.80", "0.100", "0.50/0.60", "0.70/0.80"]
    expected = [[kind, level, *cells] for kind in ("conditional", "unconditional") for level in ("0.25", "0.9")]
    assert [line.split() for line in printed.splitlines() if "/0.60" in line] == expected
