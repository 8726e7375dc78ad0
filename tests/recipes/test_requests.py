"""Requests and mistakes of a user: each ends with one line, and nothing that was there is lost."""

import json
import shutil
import sys

import pytest
import torch
from PIL import Image

from provgen import build, cli
from provgen.evaluation import late_entropy_limit
from provgen.run import RunFolder
from provgen.tracing.records import read_parts
from provgen.tracing.trace import late_level
from provgen.training.logging import read_metrics


def test_generating_again_with_fewer_images_leaves_none_of_the_old(trained_root, tmp_path, run_recipe):
    root = copy_of(trained_root, tmp_path)
    for count in (3, 2):
        arguments = ("--run", root, "--num-images", count, "--top-k", 2, "--steps", 10)
        assert run_recipe("generate_and_attribute", *arguments) == 0
    run = RunFolder(root)
    assert {path.name for path in run.samples.glob("0*.png")} == {"00000.png", "00001.png"}
    assert len(read_parts(run.traces, ["sample"])) == 4


def copy_of(root, folder):
    return shutil.copytree(root, folder / "run")


MISTAKES = {
    "unknown key": ("train", ["training.max_step=3"], "did you mean training.max_steps?"),
    "bad value": ("train", ["training.max_steps=0"], "training.max_steps must be"),
    "unknown head": ("train", ["provenance.index_head=softmax"], "provenance.index_head must be"),
    "too many feature maps": ("train", ["provenance.shared_stages=9"], "provenance.shared_stages must be"),
    "too small a coverage": ("train", ["provenance.coverage=0.001"], "provenance.coverage"),
    "no file": ("train", ["--config", "absent.yaml"], "absent.yaml"),
    "no run": ("generate_and_attribute", ["--run", "absent"], "absent"),
    "no run to analyze": ("analyze", ["--run", "absent"], "absent"),
    "no run to attribute by": ("attribute", ["--run", "absent", "image.png"], "absent"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_status_two_and_one_line(mistake, run_recipe, assert_one_line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, arguments, expected = MISTAKES[mistake]
    assert run_recipe(name, *arguments) == 2
    assert_one_line(expected)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def test_the_command_line_runs_the_very_same_recipe(monkeypatch, assert_one_line):
    monkeypatch.setattr(sys, "argv", ["provgen", "train", "training.max_step=3"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert_one_line("did you mean training.max_steps?")


@pytest.mark.parametrize("arguments", [("--top-k", 41), ("--class-name", "ten"), ("--steps", 9), ("--top-k", 0)])
def test_impossible_requests_keep_the_samples_there_are(arguments, trained_root, tmp_path, run_recipe, assert_one_line):
    root = copy_of(trained_root, tmp_path)
    (root / "samples").mkdir()
    (root / "samples" / "kept.png").write_bytes(b"old")
    assert run_recipe("generate_and_attribute", "--run", root, "--num-images", 1, *arguments) == 2
    assert_one_line(str(arguments[1]))
    assert (root / "samples" / "kept.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    "change",
    [
        "training.learning_rate=1e-4",
        "training.seed=1",
        "provenance.gradient=stop",
        "generator.size=small",
        "generator.kind=vae",
    ],
)
def test_resuming_with_other_settings_is_refused(change, trained_root, tiny_overrides, run_recipe, assert_one_line):
    before = (trained_root / "config.yaml").read_bytes()
    assert run_recipe("train", *tiny_overrides, f"output_dir={trained_root}", change) == 2
    assert_one_line(change.split("=")[0])
    assert (trained_root / "config.yaml").read_bytes() == before


def test_training_longer_is_allowed_and_goes_on_from_the_last_step(
    trained_root, tmp_path, tiny_overrides, run_recipe, capsys
):
    root = copy_of(trained_root, tmp_path)
    assert run_recipe("train", *tiny_overrides, f"output_dir={root}", "training.max_steps=23") == 0
    assert f"resumed {root} from step 20" in capsys.readouterr().out
    assert {path.name for path in (root / "checkpoints").iterdir()} == {"step-000020", "step-000023"}
    steps = [row["step"] for row in read_metrics(root / "metrics.jsonl") if "denoising_loss" in row]
    assert steps == [5, 10, 15, 20, 23]


def test_a_step_that_gives_no_number_is_reported_and_not_saved(tmp_path, tiny_overrides, run_recipe, assert_one_line):
    root = tmp_path / "run"
    lost = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.max_steps=4")
    assert run_recipe("train", *tiny_overrides, f"output_dir={root}", *lost, "training.log_every=1") == 2
    assert_one_line("training.learning_rate")
    assert not (root / "checkpoints").exists()


def test_samples_surer_than_a_share_of_held_out_images_are_drawn_again(trained_root, tmp_path, run_recipe, capsys):
    """As many as are surer when nothing is drawn again, and they keep their seeds."""
    root = copy_of(trained_root, tmp_path)
    trained = build.open_trained_run(root, torch.device("cpu"))
    arguments = ("--run", root, "--num-images", 10, "--top-k", 2)
    assert run_recipe("generate_and_attribute", *arguments) == 0
    plain = read_parts(RunFolder(root).samples, ["sample"])
    late = late_level(plain[0]["step_alpha_bar"], trained.pipeline.window)
    limit = late_entropy_limit(trained.pipeline, trained.data.holdout, 0.9)
    is_sure = [sample["step_entropy"][late] < limit for sample in plain]
    assert 0 < sum(is_sure) < 10
    capsys.readouterr()
    assert run_recipe("generate_and_attribute", *arguments, "--resample-below", 0.9) == 0
    said = capsys.readouterr().out
    assert f"{sum(is_sure)} of them were resampled" in said
    again = read_parts(RunFolder(root).samples, ["sample"])
    assert [sample["resamplings"] > 0 for sample in again] == is_sure
    counts = [sum(sample["support"] == support for sample in again) for support in ("copy", "no sources")]
    assert f"{counts[0]} of them are copies; {counts[1]} have no sources" in said
    for share in (-0.1, 1.5):
        assert run_recipe("generate_and_attribute", *arguments, "--resample-below", share) == 2


def test_attributing_a_file_says_how_much_of_it_is_explained(trained_root, tmp_path, trained, run_recipe, capsys):
    Image.fromarray(trained.data.train.images[7, 0].numpy()).save(tmp_path / "seven.png")
    assert run_recipe("attribute", "--run", trained_root, tmp_path / "seven.png", "--top-k", 3) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'seven.png'}: a copy: 100% explained by one training image alone" in said
    assert said.index("a copy") < said.index("entropy") < said.index("posterior not shown")


def test_attributing_a_file_prints_its_sources_as_json(trained_root, tmp_path, trained, run_recipe, capsys):
    Image.fromarray(trained.data.train.images[7, 0].numpy()).save(tmp_path / "seven.png")
    arguments = ("--run", trained_root, tmp_path / "seven.png", "--top-k", 3, "--closed-form", "--json")
    assert run_recipe("attribute", *arguments) == 0
    output = json.loads(capsys.readouterr().out)
    sources = output["images"][0]["sources"]
    assert sources[0]["example_index"] == 7
    assert len(sources) == 3
    assert output["method"] == "closed form"
