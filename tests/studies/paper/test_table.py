"""Tables of variants against hand-worked ones, and rows through Parquet and back."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from provgen.metrics.statistics import mean_over_seeds
from provgen.run import read_parquet
from provgen.studies.paper.table import (
    METRICS,
    SCHEMA_VERSION,
    bounds_of,
    positions,
    variants_table,
    with_ratios,
    write_rows,
)


def rows_of(variant: str, *seeds: dict) -> list[dict]:
    return [{"variant": variant, "seed": number, **row} for number, row in enumerate(seeds)]


def test_the_interval_over_seeds_is_students():
    found = mean_over_seeds([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653; standard error 1 / sqrt(3).
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - 2.484138, 2 + 2.484138), abs=1e-6)
    values = [0.3, 0.1, 0.4, 0.15, 0.9]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = mean_over_seeds(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_single_seed_has_no_interval():
    found = mean_over_seeds([2.0])
    assert (found.value, found.n) == (2.0, 1)
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_the_table_sets_every_metric_beside_its_bounds():
    rows = rows_of(
        "small",
        {
            "index_top1": 0.5,
            "index_top1_ceiling": 0.9,
            "index_head_parameters": 12345,
            "steps_to_gap_half": 100,
        },
        {
            "index_top1": 0.6,
            "index_top1_ceiling": 0.9,
            "index_head_parameters": 12345,
            "steps_to_gap_half": None,
        },
    ) + rows_of("none", {"index_top1": None, "index_head_parameters": 0})
    metrics = ["index_top1", "index_head_parameters", "steps_to_gap_half", "kl_gap"]
    # 0.6 and 0.5: standard error 0.05, t(0.975, 1) = 12.7062. No row has kl_gap: no column.
    assert variants_table(rows, metrics).splitlines()[:4] == [
        "| variant | seeds | index top-1 | best possible | index head | steps to a gap of 0.5 nats |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| small | 2 | 0.550 ± 0.635 | 0.900 | 12,345 | 100 (1 of 2) |",
        "| none | 1 | - | - | 0 | - |",
    ]


def test_what_stands_beside_a_metric_is_named_for_it():
    rows = rows_of("a", {"share_memorized": 0.25, "share_memorized_baseline": 0.125})
    assert variants_table(rows, ["share_memorized"]).splitlines()[0] == (
        "| variant | seeds | share memorized | held-out images |"
    )
    assert "held-out" not in variants_table([rows[0] | {"share_memorized": None}], ["share_memorized"])
    assert bounds_of("linear_probe_own_accuracy")["linear_probe_baseline"] == "guessing"
    assert bounds_of("step_ms")["step_ms_alone"] == "generator alone"


def test_variants_keep_their_order_whatever_order_their_seeds_come_in():
    rows = rows_of("b", {"kl_gap": 1.0}) + rows_of("a", {"kl_gap": 2.0}) + rows_of("b", {"kl_gap": 3.0})
    lines = variants_table(rows, ["kl_gap"]).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:4]] == [["| b", "2"], ["| a", "1"]]


def test_every_metric_can_be_written():
    rows = rows_of("a", dict.fromkeys(METRICS, 0.5))
    lines = variants_table(rows, list(METRICS)).splitlines()
    assert lines[0].count("|") == len(METRICS) + 3
    assert " - " not in lines[2]


def test_step_times_make_a_ratio_where_both_are_there():
    assert with_ratios({"step_ms": 3.0, "step_ms_alone": 2.0})["step_ratio"] == 1.5
    assert with_ratios({"step_ms": 3.0, "step_ms_alone": None})["step_ratio"] is None
    assert with_ratios({"a": 1}) == {"a": 1, "step_ratio": None}


def test_rows_come_back_from_parquet(tmp_path):
    rows = [
        {
            "experiment": "e",
            "variant": "a",
            "seed": 0,
            "generator.size": "tiny",
            "shared": 1,
            "kl_gap": 0.5,
            "x": 1,
        },
        {
            "experiment": "e",
            "variant": "b",
            "seed": 1,
            "generator.size": "tiny",
            "shared": None,
            "late": 2,
            "x": 0.5,
        },
    ]
    write_rows(tmp_path / "table.parquet", rows)
    table = pq.read_table(tmp_path / "table.parquet")
    assert read_parquet(tmp_path / "table.parquet", version=SCHEMA_VERSION) == table
    names = ["experiment", "variant", "seed", "generator.size", "shared", "kl_gap", "x", "late"]
    assert table.column_names == names
    assert table.to_pylist() == [{name: row.get(name) for name in names} for row in rows]
    types = [str(table.schema.field(name).type) for name in ("seed", "shared", "kl_gap", "x", "late")]
    assert types == ["int64", "int64", "double", "double", "int64"]
    assert table.schema.metadata[b"schema_version"] == b"1"


def test_what_is_no_table_of_runs_is_refused(tmp_path, message_of):
    path = tmp_path / "table.parquet"
    path.write_text("no table", encoding="utf-8")
    assert str(path) in message_of(read_parquet, path, version=SCHEMA_VERSION)
    pq.write_table(pa.table({"seed": [0]}), path)
    assert "version none" in message_of(read_parquet, path, version=SCHEMA_VERSION)


def test_a_column_without_numbers_is_still_one_of_numbers(tmp_path):
    write_rows(tmp_path / "table.parquet", [{"seed": 0, "kl_gap": None}])
    assert str(pq.read_schema(tmp_path / "table.parquet").field("kl_gap").type) == "double"


def test_numbers_lie_where_they_are_and_anything_else_in_the_order_given():
    assert positions([1, 0.25, 0, 1]) == {0: 0.0, 0.25: 0.25, 1: 1.0}
    assert list(positions([1, 0.25, 0])) == [0, 0.25, 1]
    assert positions([0, 1, None]) == {0: 0.0, 1: 1.0, None: 2.0}
    assert positions(["posterior", "one_hot", "posterior"]) == {"posterior": 0.0, "one_hot": 1.0}
