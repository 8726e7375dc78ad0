"""The row of numbers of a finished run: every promised name, finite, and equal to what is counted by hand."""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch

from provgen import build
from provgen.run import RunFolder
from provgen.studies.paper import measurement
from provgen.studies.paper.measurement import is_trained, measure_run, read_measured, write_measured
from provgen.studies.paper.table import METRICS
from provgen.training.logging import read_metrics

COSTS = {
    "coverage", "generator_parameters", "provenance_parameters", "index_head_parameters", "training_megabytes",
    "step_ms", "step_ms_alone", "train_loss", "holdout_loss",
}  # fmt: skip
INDEX = {
    "index_top1", "index_top1_ceiling", "index_top5", "index_top5_ceiling", "cross_entropy",
    "cross_entropy_ceiling", "kl_gap", "kl_gap_conditional", "steps_to_gap_half", "beam_recall10",
}  # fmt: skip
CLASS = {
    f"{name}{ending}"
    for name in ("consistency_top1", "consistency_top5", "knn_accuracy", "class_accuracy")
    for ending in ("", "_closed_form", "_baseline")
}
SAMPLES = {
    "share_memorized", "share_memorized_baseline", "nearest_distance", "nearest_distance_baseline",
    "confidence_realism", "confidence_realism_closed_form", "confidence_realism_baseline",
}  # fmt: skip
PROBES = {"linear_probe_accuracy", "linear_probe_own_accuracy", "linear_probe_baseline"}

MAY_BE_NONE = {
    "diffusion": {"steps_to_gap_half", "beam_recall10"},
    "vae": {"steps_to_gap_half", "beam_recall10", "kl_gap_conditional"},
    "none": {"steps_to_gap_half", "beam_recall10", "kl_gap_conditional"},
}


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Twelve samples, and two steps timed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "SAMPLES", 12)
        patch.setattr(measurement, "TIMED_STEPS", 2)
        yield


@pytest.fixture(scope="module")
def measured(root_of):
    """Measure a tiny run of a kind once."""
    rows = {}

    def call(kind):
        if kind not in rows:
            rows[kind] = measure_run(RunFolder(root_of(kind)))
        return rows[kind]

    return call


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAY_BE_NONE)
def test_every_promised_number_is_there_and_finite(kind, measured):
    row = measured(kind)
    promised = COSTS | INDEX | CLASS | PROBES | (set() if kind == "none" else SAMPLES)
    assert promised <= set(row)
    assert not (SAMPLES & set(row)) or kind != "none"
    for name, value in row.items():
        if value is None:
            assert name in MAY_BE_NONE[kind], name
        else:
            assert isinstance(value, int | float), name
            assert math.isfinite(value), name
    ceilings = [name for name in row if name.endswith("_ceiling") and name != "cross_entropy_ceiling"]
    assert all(row[name.removesuffix("_ceiling")] <= row[name] + 1e-9 for name in ceilings)
    assert row["cross_entropy"] >= row["cross_entropy_ceiling"] - 1e-9


def test_everything_that_experiments_may_show_is_measured(measured):
    derived = {"step_ratio"}  # of the two step times, when the table is made
    assert set(METRICS) - derived <= set(measured("diffusion"))


@pytest.mark.parametrize("kind", MAY_BE_NONE)
def test_costs_are_those_of_the_networks_that_were_saved(kind, measured, trained_of):
    row, pipe = measured(kind), trained_of(kind).pipeline
    count = [sum(p.numel() for p in net.parameters()) for net in (pipe.network, pipe.provenance)]
    assert [row["generator_parameters"], row["provenance_parameters"]] == count
    head = sum(p.numel() for p in pipe.provenance.index_head.parameters())
    assert row["index_head_parameters"] == head
    assert row["training_megabytes"] > 20 * sum(count) / 1e6
    assert row["coverage"] == 1
    assert row["step_ms"] > 0
    assert row["step_ms_alone"] > 0


@pytest.mark.parametrize("kind", MAY_BE_NONE)
def test_what_a_step_keeps_for_its_backward_pass_grows_linearly_with_the_batch(kind, tiny_settings, tiny_data):
    def kept(size):
        settings = tiny_settings(f"generator.kind={kind}", f"training.batch_size={size}")
        return measurement._activation_bytes(settings, tiny_data)

    four, eight, twelve = kept(4), kept(8), kept(12)
    assert twelve - eight == eight - four > 4 * 4 * 64  # at least the four images themselves


def test_a_layer_keeps_its_input_once():
    """`_kept_for_backward` of x -> relu(linear(x)): the input and the output, neither weight nor copies."""
    layer, x = torch.nn.Linear(3, 5), torch.randn(7, 3)
    kept = measurement._kept_for_backward(lambda: layer(x).relu(), layer.parameters())
    assert kept == 4 * (7 * 3 + 7 * 5)


def test_index_metrics_are_the_mean_over_the_levels_of_the_last_evaluation(measured, root_of):
    row = measured("diffusion")
    last = [line for line in read_metrics(RunFolder(root_of("diffusion")).metrics) if "index_quality" in line][-1]
    levels = [q for q in last["index_quality"] if q["rows"] == "unconditional"]
    assert len(levels) >= 5
    assert row["index_top1"] == pytest.approx(sum(q["top1"] for q in levels) / len(levels))
    assert row["kl_gap"] == pytest.approx(row["cross_entropy"] - row["cross_entropy_ceiling"], abs=1e-6)
    assert row["kl_gap_conditional"] == last["kl_gap_conditional"]


def test_measuring_again_gives_the_same_numbers_but_times_and_changes_nothing(measured, root_of, tmp_path):
    root = shutil.copytree(root_of("none"), tmp_path / "run")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    torch.manual_seed(5)
    again, first = measure_run(RunFolder(root)), measured("none")
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    times = {"step_ms", "step_ms_alone"}
    assert {name: again[name] for name in again if name not in times} == {
        name: first[name] for name in first if name not in times
    }


def test_a_generator_alone_has_no_index_metrics(run_recipe, tiny_overrides, tmp_path):
    root = tmp_path / "alone"
    chosen = ("generator.kind=vae", "provenance.index_head=none", "training.max_steps=2")
    assert run_recipe("train", *tiny_overrides, *chosen, f"output_dir={root}") == 0
    row = measure_run(RunFolder(root))
    assert row["provenance_parameters"] == row["index_head_parameters"] == 0
    assert not (INDEX | {"confidence_realism", "linear_probe_own_accuracy"}) & set(row)
    assert {"holdout_loss", "linear_probe_accuracy", "share_memorized"} <= set(row)
    assert all(math.isfinite(value) for value in row.values() if value is not None)


def test_a_run_without_held_out_images_leaves_out_what_needs_them(run_recipe, tiny_overrides, tmp_path):
    root = tmp_path / "all"
    chosen = ("data.holdout_fraction=0", "generator.kind=vae", "training.max_steps=2", f"output_dir={root}")
    assert run_recipe("train", *tiny_overrides, *chosen) == 0
    row = measure_run(RunFolder(root))
    assert row["share_memorized"] >= 0
    assert not (CLASS | PROBES | {"share_memorized_baseline", "confidence_realism"}) & set(row)
    assert "holdout_loss" not in row or row["holdout_loss"] is None
    assert math.isfinite(row["train_loss"])


def test_coverage_is_the_share_that_is_covered(run_recipe, tiny_overrides, tmp_path):
    root = tmp_path / "some"
    chosen = ("generator.kind=none", "provenance.coverage=0.3", "training.max_steps=2", f"output_dir={root}")
    assert run_recipe("train", *tiny_overrides, *chosen) == 0
    row = measure_run(RunFolder(root))
    assert row["coverage"] == pytest.approx(0.3)
    assert build.open_trained_run(root, torch.device("cpu")).data.covered.sum() == 12
    assert 0 <= row["kl_gap"] < 100, "over what is covered"


def test_a_classifier_alone_is_measured_by_its_class_head(run_recipe, tiny_overrides, tmp_path):
    root = tmp_path / "classifier"
    chosen = ("generator.kind=none", "provenance.index_head=none", "provenance.class_loss_weight=1")
    more = ("data.holdout_fraction=0.3", "training.max_steps=20", f"output_dir={root}")
    assert run_recipe("train", *tiny_overrides, *chosen, *more) == 0
    row = measure_run(RunFolder(root))
    assert 0.3 < row["class_accuracy"] <= 1, "guessing is 0.1"
    assert "index_top1" not in row


def test_measured_numbers_are_read_back_and_infinite_ones_are_null(tmp_path, tiny_settings):
    settings = tiny_settings()
    assert read_measured(tmp_path, settings) is None
    write_measured(tmp_path, settings, {"a": 0.1, "b": None, "c": 3, "d": math.nan, "e": -math.inf})
    assert read_measured(tmp_path, settings) == {"a": 0.1, "b": None, "c": 3, "d": None, "e": None}
    moved = replace(settings, output_dir="elsewhere", data=replace(settings.data, path="elsewhere"))
    assert read_measured(tmp_path, moved) is not None
    images = tiny_settings("data.source=folder", "data.path=elsewhere")
    write_measured(tmp_path / "images", images, {"a": 1})
    assert read_measured(tmp_path / "images", images) == {"a": 1}


def test_what_another_version_or_other_settings_measured_does_not_count(tmp_path, tiny_settings):
    write_measured(tmp_path, tiny_settings(), {"a": 0.1})
    assert read_measured(tmp_path, tiny_settings("training.max_steps=21")) is None
    content = json.loads((tmp_path / "measured.json").read_text())
    (tmp_path / "measured.json").write_text(json.dumps(content | {"schema_version": 0}))
    assert read_measured(tmp_path, tiny_settings()) is None
    (tmp_path / "measured.json").write_text("[1")
    assert read_measured(tmp_path, tiny_settings()) is None


def test_a_run_is_trained_at_its_last_step_with_its_settings(trained_root, tmp_path, tiny_settings):
    root = tmp_path / "run"
    root.mkdir()
    shutil.copy(trained_root / "config.yaml", root)
    assert is_trained(RunFolder(root), tiny_settings(), 20)
    assert not is_trained(RunFolder(root), tiny_settings(), 10)
    assert not is_trained(RunFolder(root), tiny_settings("training.max_steps=30"), 30)
    assert not is_trained(RunFolder(root), tiny_settings("provenance.width=8"), 20)
    assert not is_trained(RunFolder(tmp_path), tiny_settings(), 20)
