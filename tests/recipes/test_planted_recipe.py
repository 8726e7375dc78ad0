"""Planted sources: the folder has what it says, and the report's ceilings are reached where they can be."""

import shutil

import pytest
import torch

from provgen import build
from provgen.data.folder import load_image_folder
from provgen.metrics.statistics import proportion
from provgen.studies.faithfulness.planted import precision_table, reliability_table


@pytest.mark.slow
def test_copies_and_marks_are_in_the_folder_and_in_the_report(tmp_path, run_recipe, capsys, tiny_overrides):
    folder, root = tmp_path / "digits", tmp_path / "run"
    assert run_recipe("data/planted_digits", folder) == 0
    assert "20 are there 10 times" in capsys.readouterr().out
    images = load_image_folder(folder, 8)
    assert len(images) == 1797 + 20 * 9
    _, counts = images.images.flatten(1).unique(dim=0, return_counts=True)
    assert counts.sort(descending=True).values[:21].tolist() == [10] * 20 + [1]
    marked = torch.tensor(["-marked" in path for path in images.paths])
    corner = images.images[:, 0, -2:, :2].flatten(1)
    assert torch.equal((corner == 255).all(dim=1), marked)
    assert {images.class_names[label] for label in images.labels[marked].tolist()} == {"7"}
    assert run_recipe("data/planted_digits", folder) == 2
    assert "exists" in capsys.readouterr().err

    asked = (*tiny_overrides, "data.source=folder", f"data.path={folder}", "data.max_train_images=600")
    assert run_recipe("train", *asked, f"output_dir={root}") == 0
    assert run_recipe("planted", "--run", root, "--num-queries", 12) == 0
    report = (root / "planted.md").read_text(encoding="utf-8")
    assert report in capsys.readouterr().out
    assert "A marked cluster" in report
    untold, is_conditional = report.split("## Samples of the closed-form denoiser, along their trajectories, ")[1:]
    assert untold.startswith("unconditional")
    assert is_conditional.startswith("asked for classes in turn")
    for part in (untold, is_conditional):
        ideal = part.splitlines()
        assert any(line.startswith("| pixel distance | 100.0") for line in ideal)
        assert any(line.startswith("| closed form, cleanest level | 100.0") for line in ideal)
        assert any(line.startswith("| best possible | 100.0") for line in ideal)
    (shuffled,) = [line for line in report.splitlines() if line.startswith("| pixels shuffled")]
    assert float(shuffled.split("|")[2].split()[0]) > 0.9, "by their distance"
    (is_conditional,) = [line for line in report.splitlines() if line.startswith("| told another class")]
    assert is_conditional.split("|")[2].split()[0] == "0.500", "the images are the same"


def test_a_run_without_marks_has_no_part_on_them(trained_root, tmp_path, run_recipe, capsys):
    root = shutil.copytree(trained_root, tmp_path / "run")
    assert run_recipe("planted", "--run", root, "--num-queries", 10) == 0
    assert "marked" not in capsys.readouterr().out
    assert build.require_run(root)


def test_the_tables_by_hand():
    scores = torch.tensor([[0.7, 0.2, 0.1], [0.95, 0.05, 0.0]])
    parents, groups = torch.tensor([0, 1]), torch.arange(3)
    lines = precision_table({"a": scores}, parents, groups, [proportion(2, 2)] * 2).splitlines()
    assert lines[2].startswith("| a | 50.0 [1.3, 98.7] | 100.0 [")
    assert lines[3].count("100.0 [") == 2
    lines = reliability_table({"a": scores}, parents, groups).splitlines()
    assert lines[2].startswith("| a | 1 | 70.0 | 100.0")
    assert lines[3].startswith("| a | 1 | 95.0 | 0.0")
