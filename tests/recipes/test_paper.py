"""The driver of experiments on tiny real runs: tables of what is there, and nothing trained twice."""

import json
import shutil

import pyarrow.parquet as pq
import pytest
from PIL import Image

from provgen.run import RunFolder
from provgen.settings_file import load_settings
from provgen.studies.paper.table import write_rows

SMALL = """
title: Small
question: Does anything change?
config: digits
settings: {generator.kind: none, provenance.targets: one_hot}
vary: {provenance.label_mixing: [0, 1]}
seeds: 1
x: provenance.label_mixing
figure: [index_top1]
table: [index_top1, class_accuracy]
claims:
  - {text: It falls., source: ours, metric: index_top1, along: provenance.label_mixing, expected: falls, tolerance: 0}
"""

NAMES = ["label_mixing=0-seed0", "label_mixing=1-seed0"]


def copy_of(folder, output):
    """Copy the experiment into another output folder, times included."""
    return shutil.copytree(folder, output / "small")


TABLES = {"table.parquet", "table.md", "figure.png", "findings.md"}


@pytest.fixture(scope="module")
def small(tmp_path_factory, tiny_overrides):
    """Arguments of an experiment of two runs that take a second each."""
    path = tmp_path_factory.mktemp("experiments") / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return [*tiny_overrides, "training.max_steps=2", "data.holdout_fraction=0.05", "--experiment", path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_recipe, small):
    """Folder of the experiment after both shards, run one after the other, and what each left behind."""
    output, found = tmp_path_factory.mktemp("paper"), []
    for shard in ("1/2", "2/2"):
        assert run_recipe("paper", *small, "--output", output, "--shard", shard) == 0
        found.append(sorted(path.parent.name for path in output.glob("small/*/measured.json")))
    return output / "small", found


def test_shards_share_the_runs_and_the_last_writes_tables_of_all(finished):
    folder, found = finished
    assert found == [NAMES[:1], NAMES]
    assert {path.name for path in folder.iterdir()} == {*NAMES, *TABLES}
    rows = pq.read_table(folder / "table.parquet").to_pylist()
    assert [row["variant"] for row in rows] == ["label_mixing=0", "label_mixing=1"]
    assert [row["provenance.label_mixing"] for row in rows] == [0.0, 1.0]
    for row, name in zip(rows, NAMES, strict=True):
        measured = json.loads((folder / name / "measured.json").read_text(encoding="utf-8"))["metrics"]
        assert row["index_top1"] == measured["index_top1"]
        assert row["seconds"] > 0


def test_every_run_is_an_ordinary_run_with_the_settings_of_its_variant(finished):
    for name, mixing in zip(NAMES, (0.0, 1.0), strict=True):
        run = RunFolder(finished[0] / name)
        settings = load_settings(run.config, [])
        assert settings.provenance.label_mixing == mixing
        assert (settings.generator.kind, settings.generator.size) == ("none", "tiny")
        assert settings.output_dir == str(run.root)
        assert (run.checkpoints / "step-000002").is_dir()


def test_figure_findings_and_overview_are_readable(finished):
    folder = finished[0]
    with Image.open(folder / "figure.png") as figure:
        assert figure.width > 300
    findings = (folder / "findings.md").read_text(encoding="utf-8")
    assert "2 of 2 runs measured" in findings
    assert "**one seed**: as label mixing goes from 0 to 1, index top-1 goes from" in findings
    overview = (folder.parent / "README.md").read_text(encoding="utf-8")
    assert "## Small" in overview
    assert "| label_mixing=1 | 1 |" in overview


def test_tables_are_made_again_from_what_is_kept(run_recipe, tmp_path):
    folder = tmp_path / "kept" / "alpha"
    folder.mkdir(parents=True)
    rows = [
        {
            "variant": f"mixing={mixing},label_mixing={mix}",
            "seed": seed,
            "provenance.label_mixing": mix,
            "provenance.mixing": mixing,
            "index_top1": 1 - mix + 0.001 * seed,
        }
        for mixing in ("class", "neighbors")
        for mix in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
        for seed in range(3)
    ]
    write_rows(folder / "table.parquet", rows)
    before = (folder / "table.parquet").read_bytes()
    assert run_recipe("paper", "--tables", tmp_path / "kept") == 0
    assert {path.name for path in folder.iterdir()} == TABLES
    assert (folder / "table.parquet").read_bytes() == before
    findings = (folder / "findings.md").read_text(encoding="utf-8")
    assert "36 of 60 runs measured" in findings
    assert "**reproduced** (mixing class): as label mixing goes from 0 to 1, index top-1 goes from 1.001" in findings


def test_a_kept_table_of_another_experiment_is_refused(run_recipe, capsys, tmp_path):
    (tmp_path / "vae").mkdir()
    write_rows(tmp_path / "vae" / "table.parquet", [{"variant": "a", "seed": 0}])
    assert run_recipe("paper", "--tables", tmp_path) == 2
    assert "have no column generator.kl_weight" in capsys.readouterr().err
    (tmp_path / "vae").rename(tmp_path / "beta")
    assert run_recipe("paper", "--tables", tmp_path) == 2
    assert "there are alpha, " in capsys.readouterr().err


def test_what_is_measured_is_neither_trained_nor_measured_again(finished, small, run_recipe, capsys, tmp_path):
    folder = copy_of(finished[0], tmp_path)
    planted = json.loads((folder / NAMES[0] / "measured.json").read_text(encoding="utf-8"))
    planted["metrics"]["index_top1"] = 0.125
    (folder / NAMES[0] / "measured.json").write_text(json.dumps(planted), encoding="utf-8")
    before = times_of(folder)
    assert run_recipe("paper", *small, "--output", folder.parent) == 0
    assert "2 of them measured before" in capsys.readouterr().out
    assert times_of(folder) == before
    assert pq.read_table(folder / "table.parquet")["index_top1"][0].as_py() == 0.125


def test_a_run_that_was_trained_but_not_measured_is_only_measured(finished, small, run_recipe, tmp_path):
    folder = copy_of(finished[0], tmp_path)
    expected = json.loads((folder / NAMES[1] / "measured.json").read_text(encoding="utf-8"))["metrics"]
    (folder / NAMES[1] / "measured.json").unlink()
    before = times_of(folder)
    assert run_recipe("paper", *small, "--output", folder.parent) == 0
    assert {name: time for name, time in times_of(folder).items() if name in before} == before
    again = json.loads((folder / NAMES[1] / "measured.json").read_text(encoding="utf-8"))["metrics"]
    assert again["index_top1"] == expected["index_top1"]
    assert again["class_accuracy"] == expected["class_accuracy"]


def times_of(folder) -> dict:
    """When each checkpoint and measurement was written."""
    found = [*folder.rglob("*.safetensors"), *folder.rglob("measured.json")]
    assert len(found) >= 4
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in found}


def test_a_run_of_other_settings_in_the_way_is_refused(finished, small, run_recipe, capsys):
    before = times_of(finished[0])
    output = finished[0].parent
    assert run_recipe("paper", *small, "--output", output, "provenance.width=8") == 2
    assert "was started with provenance.width=16, now provenance.width=8" in capsys.readouterr().err
    assert run_recipe("paper", *small, "--output", output, "training.max_steps=1") == 2
    assert "was trained for 2 steps, not 1" in capsys.readouterr().err
    assert times_of(finished[0]) == before


MISTAKES = {
    "no tables": (["--tables", "."], "no table.parquet"),
    "no such experiment": (["--experiment", "beta"], "there are alpha, "),
    "no such shard": (["--shard", "3/2"], "--shard must be"),
    "a key that varies": (["--experiment", "alpha", "provenance.label_mixing=1"], "provenance.label_mixing"),
    "an unknown key": (["--experiment", "alpha", "provenance.label_mix=1"], "did you mean"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(mistake, run_recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected = MISTAKES[mistake]
    assert run_recipe("paper", *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert expected in error
    assert list(tmp_path.iterdir()) == []
