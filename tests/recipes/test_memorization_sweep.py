"""The sweep end to end on tiny models: two halves, several steps, resumed where it was stopped."""

import shutil

import pyarrow.parquet as pq
import pytest
import torch

from provgen.studies.memorization.curves import bounds_of
from provgen.studies.memorization.sweep import SweepFolder, SweepModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def swept(tmp_path_factory, run_recipe, tiny_overrides):
    root = tmp_path_factory.mktemp("sweep") / "run"
    arguments = [*tiny_overrides, f"output_dir={root}", "--size", 12, "--size", 18, "--num-images", 24]
    assert run_recipe("memorization_sweep", *arguments) == 0
    return root, arguments


def test_every_size_and_step_is_measured(swept, run_recipe, capsys):
    root, arguments = swept
    rows = pq.read_table(root / "sweep.parquet").to_pylist()
    assert {row["size"] for row in rows} == {12, 18}
    assert {row["name"] for row in rows} >= {
        "share_memorized", "share_memorized_holdout", "halves_agreement", "loss_ratio", "divergence", "entropy",
        "closed_form_entropy",
    }  # fmt: skip
    by_size = {row["size"]: row["n"] for row in rows if row["name"] == "share_memorized"}
    assert by_size == {12: 48, 18: 48}, "samples of both halves"
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)

    assert len(list((root / "measured").iterdir())) == 1, "all models are there, so they are in one file"
    before, (compact,) = SweepFolder(root).load(), (root / "measured").iterdir()
    table = pq.read_table(compact)
    pq.write_table(table.slice(0, len(table) - 1), compact)  # the last step of the last model is gone
    assert run_recipe("memorization_sweep", *arguments) == 0
    assert "1 of this shard are missing" in capsys.readouterr().out
    after = SweepFolder(root).load()
    for model, by_step in before.items():
        for step, arrays in by_step.items():
            assert all(torch.equal(after[model][step][name], values) for name, values in arrays.items())


def test_tables_are_made_again_without_training(swept, run_recipe, capsys, tmp_path):
    root, _ = swept
    shutil.copytree(root / "measured", tmp_path / "measured")
    assert run_recipe("memorization_sweep", "--only-tables", f"output_dir={tmp_path}") == 0
    for name in ("sweep.md", "sweep.parquet"):
        assert (tmp_path / name).read_bytes() == (root / name).read_bytes()
    assert run_recipe("memorization_sweep", "--only-tables", f"output_dir={tmp_path / 'none'}") == 2
    assert "without --only-tables first" in capsys.readouterr().err


def test_samples_of_little_late_entropy_are_drawn_again(swept):
    root, _ = swept
    steps = SweepFolder(root).load()[SweepModel(12, 0, 0)]
    found = steps[max(steps)]
    assert set(steps[min(steps)]) < set(found)
    late = found["late_entropy"]
    (level,) = (found["step_entropy"] == late[:, None]).all(dim=0).nonzero().flatten().tolist()
    assert 0 < level < len(found["alpha_bar"]) - 1, "inside the window of the model, whose end is before the image"
    assert bounds_of(found) == ["1%", "5%", "25%"]
    before = torch.zeros(len(late), dtype=torch.bool)
    for below in bounds_of(found):
        again = found[f"resamplings_below_{below}"] > 0
        assert torch.equal(again, late <= late[again].max() if again.any() else again)
        assert torch.equal(again | before, again), "whatever is resampled below a bound is so below a larger one"
        assert torch.equal(found[f"ratio_below_{below}"][~again], found["ratio"][~again])
        before = again


def test_samples_have_a_temperature_and_an_explained_share(swept):
    root, _ = swept
    for by_step in SweepFolder(root).load().values():
        for found in by_step.values():
            assert found["octaves"].shape == found["explained"].shape == found["ratio"].shape
            assert found["octaves"].isfinite().all()
            assert ((found["explained"] >= 0) & (found["explained"] <= 1)).all()


def test_mistakes_end_in_one_line(swept, run_recipe, capsys):
    _, arguments = swept
    assert run_recipe("memorization_sweep", *arguments, "training.learning_rate=0.5") == 2
    assert "results of another run" in capsys.readouterr().err
    assert run_recipe("memorization_sweep", *arguments, "--size", 100000) == 2
    assert "--size must be 10 to" in capsys.readouterr().err
    assert run_recipe("memorization_sweep", *arguments, "data.holdout_fraction=0") == 2
    assert "raise data.holdout_fraction" in capsys.readouterr().err
    assert run_recipe("memorization_sweep", *arguments, "generator.kind=vae") == 2
    assert "needs generator.kind=diffusion" in capsys.readouterr().err
