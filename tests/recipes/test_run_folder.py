"""A run folder that cannot lie: kills, races, damage, moves and renamings leave the right results, or one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from provgen import build
from provgen.errors import InputError
from provgen.pipeline import ProvenancePipeline
from provgen.run import RunFolder, only_writer, seal
from provgen.settings_file import load_settings
from provgen.tracing import records
from provgen.training.logging import read_metrics

GENERATE = ("--num-images", 3, "--top-k", 3, "--steps", 10)


@pytest.fixture
def run(trained_root, tmp_path):
    """A copy of a trained run."""
    return RunFolder(shutil.copytree(trained_root, tmp_path / "run"))


@pytest.fixture(scope="module")
def analyzed(trained_root, tmp_path_factory, run_recipe):
    """A copy that has generated and was analyzed."""
    root = shutil.copytree(trained_root, tmp_path_factory.mktemp("analyzed") / "run")
    assert run_recipe("generate_and_attribute", "--run", root, *GENERATE, "--closed-form") == 0
    assert run_recipe("analyze", "--run", root) == 0
    return root


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# One generation, one writer.


def crash_outcomes(repository, analyzed, scratch, every, *command):
    """Kill a command at every so many of its file operations; what was left each time."""
    script = str(repository / "tests" / "recipes" / "crash.py")
    call = [sys.executable, script, str(every), str(analyzed), str(scratch / "run"), *map(str, command)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, env=environment, check=True, timeout=3000)
    return json.loads(done.stdout.splitlines()[-1])


COMMANDS = {
    "generate": ("generate", "--run", "RUN", *GENERATE, "--closed-form", "--seed", 50),
    "analyze": ("analyze", "--run", "RUN", "--features", "own"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_kill_at_any_file_operation_leaves_all_old_or_all_new(command, repository, analyzed, tmp_path):
    found = crash_outcomes(repository, analyzed, tmp_path, 4, *COMMANDS[command])
    left = Counter(outcome for groups in found["outcomes"].values() for outcome in groups.values())
    assert left["MIXED"] == 0, found
    assert left["old"] > 0


def test_what_is_being_written_is_left_alone_and_it_is_said_by_whom(run, run_recipe, assert_one_line):
    before = contents(run.pipeline)
    with only_writer(run.root, "provgen train"):
        assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE) == 2
        assert_one_line(f"process {os.getpid()} on ")
        assert run_recipe("train", "--config", run.config) == 2
        assert_one_line("(provgen train) is writing into")
        assert run_recipe("calibrate", "--run", run.root) == 2
    assert contents(run.pipeline) == before
    assert not run.samples.exists()
    assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE) == 0


def test_shards_keep_out_of_each_other_and_a_kill_lets_the_next_one_in(tmp_path, repository):
    hold = (
        "import sys, time; from pathlib import Path; from provgen.run import only_writer\n"
        "with only_writer(Path(sys.argv[1]), 'one', name='-1-of-2'): print('held', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )
    assert child.stdout.readline() == b"held\n"
    with only_writer(tmp_path, "two", name="-2-of-2"):
        pass
    with (
        pytest.raises(InputError, match=rf"process {child.pid} on .*is writing into"),
        only_writer(tmp_path, "one again", name="-1-of-2"),
    ):
        pass
    child.kill()
    child.wait()
    with only_writer(tmp_path, "one again", name="-1-of-2"):
        pass


def test_samples_of_another_generation_are_never_reported(analyzed, tmp_path, run_recipe, assert_one_line):
    root = shutil.copytree(analyzed, tmp_path / "run", symlinks=True)
    folder = RunFolder(root)
    shutil.copytree(folder.traces, tmp_path / "old")
    assert run_recipe("generate_and_attribute", "--run", root, *GENERATE, "--seed", 1000) == 0
    shutil.rmtree(folder.traces)
    shutil.copytree(tmp_path / "old", folder.traces)
    seal(folder.samples)
    assert run_recipe("analyze", "--run", root) == 2
    assert_one_line("another generation")


def test_a_folder_that_is_a_link_is_replaced_and_what_it_points_to_stays(analyzed, tmp_path, run_recipe):
    root = shutil.copytree(analyzed, tmp_path / "run", symlinks=True)
    for name in ("samples", "pipeline", "report"):
        (root / name).rename(tmp_path / name)
        (root / name).symlink_to(tmp_path / name)
    before = contents(tmp_path / "samples")
    assert run_recipe("generate_and_attribute", "--run", root, *GENERATE, "--seed", 9) == 0
    assert run_recipe("analyze", "--run", root) == 0
    assert contents(tmp_path / "samples") == before
    assert {row["seed"] for row in records.read_parts(root / "samples", ["sample"])} == {9, 10, 11}
    assert not (root / "samples").is_symlink()


# No dead ends.


@pytest.mark.parametrize("damage", ["lost", "cut", "moved away", "manifest lost"])
def test_a_lost_pipeline_comes_back_as_it_was(damage, run, run_recipe, capsys):
    before = contents(run.pipeline)
    if damage == "moved away":
        run.pipeline.rename(run.root / ".pipeline.old")
    elif damage == "lost":
        shutil.rmtree(run.pipeline)
    elif damage == "cut":
        part = run.pipeline / "unet" / "diffusion_pytorch_model.safetensors"
        part.write_bytes(part.read_bytes()[:-1])
    else:
        (run.pipeline / "manifest.parquet").unlink()
    capsys.readouterr()
    if damage != "moved away":
        assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE) == 2
        assert f"provgen train --config {run.config}" in capsys.readouterr().err
        assert run_recipe("train", "--config", run.config) == 0
        assert "writing it again from the checkpoint" in capsys.readouterr().out
    assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE) == 0
    assert contents(run.pipeline) == before


# Nothing foreign or damaged passes.


@contextmanager
def changed_json(path):
    content = json.loads(path.read_text())
    yield content
    path.write_text(json.dumps(content))


def foreign_class(pipeline):
    with changed_json(pipeline / "model_index.json") as index:
        index["unet"] = ["diffusers", "AutoencoderKL"]


def foreign_module(pipeline):
    with changed_json(pipeline / "model_index.json") as index:
        index["provenance"] = ["somewhere.else", "ProvenanceNetwork"]


def not_finite(pipeline):
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[..., 0] = torch.nan
    save_file(tensors, path, {"format": "pt"})


def pickled(pipeline):
    path = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def other_kind(pipeline):
    (pipeline / "scheduler" / "scheduler_config.json").write_text('{"beta_schedule": 7}')


@pytest.mark.parametrize("damage", [foreign_class, foreign_module, not_finite, pickled, other_kind])
def test_a_pipeline_that_is_not_ours_is_refused_even_with_right_checksums(damage, run, message_of):
    damage(run.pipeline)
    seal(run.pipeline)
    assert str(run.pipeline) in message_of(ProvenancePipeline.from_pretrained, run.pipeline)


def test_saved_pipelines_hold_no_path_of_this_machine(run, tmp_path):
    pipeline = ProvenancePipeline.from_pretrained(run.pipeline)
    pipeline.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(run.pipeline)
    for path in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in path.read_text()


def test_fewer_steps_than_were_done_change_nothing(run, tiny_overrides, run_recipe, capsys):
    before = contents(run.pipeline)
    assert run_recipe("train", *tiny_overrides, f"output_dir={run.root}", "training.max_steps=2") == 0
    assert "has done 20 steps, more than training.max_steps=2" in capsys.readouterr().out
    assert load_settings(run.config, []).training.max_steps == 20
    assert contents(run.pipeline) == before


def test_without_its_settings_a_run_is_not_resumed_with_others(run, tiny_overrides, run_recipe, assert_one_line):
    run.config.unlink()
    assert run_recipe("train", *tiny_overrides, f"output_dir={run.root}", "training.seed=1") == 2
    assert_one_line("training.seed=0, now training.seed=1")


def test_an_unfinished_run_says_so(run, run_recipe, capsys):
    text = run.config.read_text()
    run.config.write_text(re.sub(r"max_steps: \d+", "max_steps: 4000", text))
    assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE) == 0
    assert "not finished: 20 of 4000 steps are trained" in capsys.readouterr().err


DAMAGES = {
    "removed": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)),
    "eight bytes flipped": lambda path: flip(path, 8),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def flip(path, count):
    content = bytearray(path.read_bytes())
    for place in np.random.default_rng(0).integers(0, max(1, len(content)), count) if content else ():
        content[place] ^= 255
    path.write_bytes(bytes(content))


def outputs_of(root, command, run_recipe, image):
    """Run a command; give its status, and what a user gets of it."""
    folder = RunFolder(root)
    arguments = {
        "train": ("train", "--config", folder.config),
        "generate_and_attribute": ("generate_and_attribute", "--run", root, *GENERATE),
        "attribute": ("attribute", "--run", root, image, "--json"),
        "analyze": ("analyze", "--run", root),
    }[command]
    status = run_recipe(*arguments)
    made = {"train": folder.pipeline, "generate_and_attribute": folder.samples, "analyze": folder.report}.get(command)
    return status, contents(made) if made and made.is_dir() else None


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", ["train", "generate_and_attribute", "attribute", "analyze"])
def test_damage_to_any_file_gives_the_same_result_or_one_line(
    damage, command, analyzed, tmp_path, trained, run_recipe, capfd
):
    image = tmp_path / "image.png"
    Image.fromarray(trained.data.train.images[7, 0].numpy()).save(image)
    root = tmp_path / "run"

    def attempt(name):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(analyzed, root, symlinks=True)
        if name is not None:
            DAMAGES[damage](root / name)
        capfd.readouterr()
        outputs = outputs_of(root, command, run_recipe, image)
        return outputs, capfd.readouterr()

    expected, printed = attempt(None)
    assert expected[0] == 0
    files = (path for path in sorted(analyzed.rglob("*")) if path.is_file() and not path.is_symlink())
    names = [name for name in (path.relative_to(analyzed) for path in files) if "tensorboard" not in name.parts]
    # A third of the files for each kind of damage, all of them together.
    for name in names[list(DAMAGES).index(damage) % 3 :: 3]:
        outputs, said = attempt(name)
        if outputs[0] == 0:
            is_said = "the report lacks some or all" in said.err or "not finished" in said.err
            assert is_said or outputs == expected, f"{name}: exit 0 with another result"
            assert command != "attribute" or said.out == printed.out, name
        else:
            assert outputs[0] == 2, f"{name}: {said.err}"
            last = said.err.strip().splitlines()[-1]
            assert last.startswith("error: "), f"{name}: {said.err}"
            assert "Traceback" not in said.err, name


# Fresh names; images that have moved; runs that have moved.


@pytest.fixture
def pictures(tmp_path, run_recipe, tiny_overrides):
    """A run on a folder of 24 images with credits."""
    folder = tmp_path / "pictures"
    random = np.random.default_rng(0)
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for number in range(12):
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{number:02d}.png")
    credit(folder, "Wrong Name")
    settings = [*tiny_overrides, "data.source=folder", f"data.path={folder}", f"output_dir={tmp_path / 'run'}"]
    settings = [given for given in settings if not given.startswith("data.max_train_images")]
    assert run_recipe("train", *settings, "training.batch_size=8", "data.holdout_fraction=0.25") == 0
    return folder, RunFolder(tmp_path / "run")


def credit(folder, contributor):
    rows = [f"{path.relative_to(folder)},{contributor},CC0" for path in sorted(folder.glob("*/*.png"))]
    (folder / "metadata.csv").write_text("\n".join(["file_name,contributor,license", *rows]))


def sources_of(run, image, run_recipe, capsys, *more):
    capsys.readouterr()
    assert run_recipe("attribute", "--run", run.root, image, "--top-k", 18, "--json", *more) == 0
    said = capsys.readouterr()
    return json.loads(said.out)["images"][0]["sources"], said.err


def test_sources_are_named_as_they_are_called_now(pictures, run_recipe, capsys):
    folder, run = pictures
    before, said = sources_of(run, folder / "a" / "00.png", run_recipe, capsys)
    assert said == ""
    for path in sorted(folder.glob("*/*.png")):
        path.rename(path.with_name(f"new-{path.name}"))
    credit(folder, "Right Name")
    after, said = sources_of(run, folder / "a" / "new-00.png", run_recipe, capsys)
    assert said.strip() == f"24 images have another path, contributor or licence than when {run.root} began"
    for old, new in zip(before, after, strict=True):
        assert (new["contributor"], new["path"]) == ("Right Name", re.sub(r"/", "/new-", old["path"]))
        assert (folder / new["path"]).is_file()
        assert {**old, "path": "", "contributor": ""} == {**new, "path": "", "contributor": ""}


def test_a_broken_file_that_the_run_does_not_use_stops_nothing(pictures, run_recipe, capsys):
    folder, run = pictures
    before, _ = sources_of(run, folder / "a" / "00.png", run_recipe, capsys)
    (folder / "a" / "new.png").write_bytes((folder / "a" / "00.png").read_bytes()[:40])
    assert sources_of(run, folder / "a" / "00.png", run_recipe, capsys)[0] == before


def test_images_that_have_moved_are_found_where_they_are_said_to_be(pictures, run_recipe, capsys, assert_one_line):
    folder, run = pictures
    before, _ = sources_of(run, folder / "a" / "00.png", run_recipe, capsys)
    elsewhere = folder.rename(folder.with_name("elsewhere"))
    assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE) == 2
    assert_one_line("data.path=")
    assert run_recipe("generate_and_attribute", "--run", run.root, *GENERATE, f"data.path={elsewhere}") == 0
    moved = f"data.path={elsewhere}"
    assert sources_of(run, elsewhere / "a" / "00.png", run_recipe, capsys, moved)[0] == before
    assert run_recipe("analyze", "--run", run.root, moved, "training.seed=1") == 2
    assert_one_line("training.seed=1")


def test_a_run_is_resumed_in_its_own_folder_from_wherever_it_is_called(run, tmp_path, run_recipe, monkeypatch, capsys):
    moved = RunFolder(run.root.rename(tmp_path / "moved"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run_recipe("train", "--config", moved.config, "training.max_steps=23") == 0
    assert f"resumed {moved.root} from step 20" in capsys.readouterr().out
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_tilde_is_the_home_folder_everywhere(run, tmp_path, trained, run_recipe, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Image.fromarray(trained.data.train.images[7, 0].numpy()).save(tmp_path / "seven.png")
    assert run_recipe("attribute", "--run", "~/run", "~/seven.png", "--top-k", 2) == 0
    assert "copy" in capsys.readouterr().out
    assert run_recipe("train", "--config", "~/run/config.yaml", "output_dir=~/run", "training.max_steps=21") == 0
    assert not (tmp_path / "~").exists()


def test_a_bad_line_of_the_log_stops_nothing(run, run_recipe):
    lines = run.metrics.read_bytes().split(b"\n")
    run.metrics.write_bytes(b"\n".join([lines[0], b"\xff{", b'{"step": "x"}', b"[1]", *lines[1:]]))
    assert [row["step"] for row in read_metrics(run.metrics)] == [json.loads(line)["step"] for line in lines if line]
    assert run_recipe("train", "--config", run.config, "training.max_steps=21") == 0


# Signals.


@pytest.mark.launch
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_saves_it_and_changes_nothing(number, status, tmp_path, repository, tiny_overrides):
    settings = [*tiny_overrides, "training.max_steps=400", "training.checkpoint_every=400", "training.log_every=1"]
    settings.append("training.evaluate_every=400")
    train = [sys.executable, str(repository / "recipes" / "train.py"), *settings]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    stopped = subprocess.Popen(
        [*train, f"output_dir={tmp_path / 'stopped'}"], stdout=subprocess.PIPE, text=True, env=environment
    )
    log = RunFolder(tmp_path / "stopped").metrics
    while not (log.is_file() and len(log.read_bytes().splitlines()) > 20):
        time.sleep(0.05)
    stopped.send_signal(number)
    said, _ = stopped.communicate(timeout=60)
    assert stopped.returncode == status
    steps = int(re.search(r"stopped after (\d+) of 400 steps", said)[1])
    assert 20 < steps < 400
    assert [path.name for path in log.parent.joinpath("checkpoints").iterdir()] == [f"step-{steps:06d}"]
    for name in ("stopped", "whole"):
        done = subprocess.run(
            [*train, f"output_dir={tmp_path / name}"], capture_output=True, text=True, env=environment, check=True
        )
        assert (f"from step {steps}" in done.stdout) == (name == "stopped")
    one, other = (RunFolder(tmp_path / name) for name in ("stopped", "whole"))
    assert contents(one.pipeline) == contents(other.pipeline)
    last = "step-000400"
    assert contents(one.checkpoints / last) == contents(other.checkpoints / last)
    assert read_metrics(one.metrics) == read_metrics(other.metrics)


def test_the_pipeline_of_a_run_knows_its_weights(run, trained_root):
    one, other = (build.open_trained_run(root, torch.device("cpu")) for root in (run.root, trained_root))
    assert one.weights == other.weights
    (run.pipeline / "sha256.json").unlink()
    assert one.weights == other.weights, "of the files, sealed or not"
    flip(run.pipeline / "unet" / "diffusion_pytorch_model.safetensors", 1)
    assert one.weights != other.weights
