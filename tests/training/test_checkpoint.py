"""Interrupted training ends bit-identical to uninterrupted training; a bad disk costs no older checkpoint."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from provgen import build
from provgen.run import RunFolder, seal
from provgen.training.checkpoint import KEPT, list_checkpoints, resume_latest, save_checkpoint

MADE_BY = {"training.seed": 0, "data fingerprint": "f" * 64}


@pytest.fixture
def start(accelerator, tiny_settings, tiny_data, tmp_path):
    """Make a fresh trainer and its batches."""

    def call(*overrides):
        settings = tiny_settings(*overrides)
        data = tiny_data
        if settings.provenance.coverage < 1:
            data = build.open_data(settings, RunFolder(tmp_path / "none"))
        trainer = build.make_trainer(settings, data, accelerator)
        return trainer, build.make_batches(settings, data.train, accelerator)

    return call


def train(trainer, batches, first, last):
    for step in range(first, last):
        trainer.step(batches.batch(step), step)


def state_of(trainer) -> dict[str, torch.Tensor]:
    """Everything that the next step depends on, by name."""
    state = {}
    for name, network in trainer.networks.items():
        state |= {f"{name}.{key}": value for key, value in network.state_dict().items()}
        state |= {f"{name}_ema.{key}": value for key, value in trainer.averaged(name).items()}
        state[f"{name}_ema.step"] = torch.tensor(trainer.averages[name].optimization_step)
        for key, parameter in network.named_parameters():
            moments = trainer.optimizer.state[parameter]
            state |= {f"optimizer.{name}.{key}.{kind}": value for kind, value in moments.items()}
    return state


def assert_same(first, second):
    first, second = state_of(first), state_of(second)
    assert first.keys() == second.keys()
    assert [key for key, value in first.items() if not torch.equal(value, second[key])] == []
    assert any(".exp_avg_sq" in key for key in first)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("provenance.index_head=none",),
        ("provenance.gradient=stop",),
        ("provenance.index_head=class_conditional", "provenance.shared_stages=0"),
        ("provenance.index_head=two_stage", "provenance.label_mixing=0.3", "provenance.mixing=neighbors"),
        ("generator.kind=none",),
        ("generator.kind=none", "provenance.class_loss_weight=0", "provenance.gradient=stop"),
    ],
)
def test_resuming_is_bit_identical_to_never_stopping(overrides, start, tmp_path):
    whole, batches = start(*overrides)
    train(whole, batches, 0, 6)

    stopped, batches = start(*overrides)
    train(stopped, batches, 0, 3)
    save_checkpoint(stopped, tmp_path, 3, MADE_BY)
    resumed, batches = start("training.seed=9", *overrides)
    assert resume_latest(resumed, tmp_path, MADE_BY) == 3
    assert_same(resumed, stopped)

    _, batches = start(*overrides)
    train(resumed, batches, 3, 6)
    assert_same(resumed, whole)


def test_an_autoencoder_resumes_exactly_at_its_checkpoints(start, tmp_path):
    every = 7
    chosen = ("generator.kind=vae", f"training.checkpoint_every={every}")
    whole, batches = start(*chosen)
    train(whole, batches, 0, every)
    save_checkpoint(whole, tmp_path, every, MADE_BY)
    train(whole, batches, every, every + 3)

    resumed, batches = start("training.seed=9", *chosen)
    assert resume_latest(resumed, tmp_path, MADE_BY) == every
    _, batches = start(*chosen)
    train(resumed, batches, every, every + 3)
    assert_same(resumed, whole)


def test_a_checkpoint_holds_which_examples_are_covered(start, tmp_path):
    chosen = ("provenance.coverage=0.5", "provenance.index_head=two_stage")
    saved, batches = start(*chosen)
    train(saved, batches, 0, 1)
    save_checkpoint(saved, tmp_path, 1, MADE_BY)
    resumed, _ = start(*chosen)
    network = resumed.networks["provenance"]
    network.covered.zero_()
    resume_latest(resumed, tmp_path, MADE_BY)
    assert torch.equal(network.covered, saved.networks["provenance"].covered)
    assert len(network.covered) == 20
    assert_same(resumed, saved)


def test_without_a_checkpoint_training_starts_at_zero(start, tmp_path):
    trainer, _ = start()
    before = state_of(trainer)
    assert resume_latest(trainer, tmp_path / "none", MADE_BY) == 0
    assert all(torch.equal(value, before[key]) for key, value in state_of(trainer).items())


@pytest.fixture
def saved(start, tmp_path):
    """A trainer with a checkpoint at step 2."""
    trainer, batches = start()
    train(trainer, batches, 0, 2)
    save_checkpoint(trainer, tmp_path, 2, MADE_BY)
    return trainer


def test_parts_have_names_and_no_pickle_is_written(saved, tmp_path):
    folder = tmp_path / "step-000002"
    names = {"denoiser", "denoiser_ema", "provenance", "provenance_ema", "optimizer"}
    assert {path.name for path in folder.iterdir()} == {f"{name}.safetensors" for name in names} | {
        "state.json",
        "sha256.json",
    }
    assert json.loads((folder / "state.json").read_text())["step"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


def test_a_checkpoint_of_another_training_set_is_refused(saved, tmp_path, message_of):
    message = message_of(resume_latest, saved, tmp_path, {**MADE_BY, "data fingerprint": "0" * 64})
    assert str(tmp_path / "step-000002") in message
    assert "data fingerprint" in message


def test_a_checkpoint_of_other_settings_is_refused_and_new_settings_do_not_matter(saved, tmp_path, message_of):
    assert "training.seed=0, now training.seed=1" in message_of(
        resume_latest, saved, tmp_path, {**MADE_BY, "training.seed": 1}
    )
    assert resume_latest(saved, tmp_path, {**MADE_BY, "data.invented_later": 3}) == 2


@pytest.mark.parametrize("part", ["denoiser", "denoiser_ema", "provenance_ema", "optimizer"])
def test_a_byte_that_was_flipped_is_seen(part, saved, tmp_path, message_of):
    path = tmp_path / "step-000002" / f"{part}.safetensors"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    assert f"{part}.safetensors is not what was saved" in message_of(resume_latest, saved, tmp_path, MADE_BY)


@pytest.mark.parametrize("step", ["40", 4.0, True, 10**9, -1, None])
def test_a_state_with_another_step_is_refused(step, saved, tmp_path, message_of):
    folder = tmp_path / "step-000002"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "step": step}))
    seal(folder)
    assert "state.json" in message_of(resume_latest, saved, tmp_path, MADE_BY)


def test_copies_that_someone_made_are_no_checkpoints(saved, tmp_path):
    for name in ("step-backup", "step-000002-copy", "step-2"):
        shutil.copytree(tmp_path / "step-000002", tmp_path / name)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002"]


@pytest.mark.parametrize(
    ("part", "keep"),
    [
        ("denoiser", -1),
        ("denoiser_ema", 200),
        ("provenance", 5),
        ("provenance_ema", -1),
        ("optimizer", 0),
        ("optimizer", -1),
    ],
)
def test_a_damaged_part_is_refused_in_one_line(part, keep, saved, tmp_path, message_of):
    path = tmp_path / "step-000002" / f"{part}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = message_of(resume_latest, saved, tmp_path, MADE_BY)
    assert str(tmp_path / "step-000002") in message
    assert "delete that folder" in message


def test_a_missing_part_is_refused_in_one_line(saved, tmp_path, message_of):
    (tmp_path / "step-000002" / "denoiser_ema.safetensors").unlink()
    assert "step-000002" in message_of(resume_latest, saved, tmp_path, MADE_BY)


@pytest.mark.parametrize(
    "override",
    [
        "generator.size=small",
        "provenance.width=8",
        "provenance.shared_stages=2",
        "provenance.index_head=two_stage",
    ],
)
def test_a_checkpoint_of_other_networks_is_refused_in_one_line(override, saved, start, tmp_path, message_of):
    other, _ = start(override)
    assert "step-000002" in message_of(resume_latest, other, tmp_path, MADE_BY)


def test_what_a_kill_left_half_written_is_ignored(saved, start, tmp_path):
    leftover = tmp_path / ".step-000009.1-0a1b2c3d.partial"
    for path in (leftover, tmp_path / "step-000008"):
        shutil.copytree(tmp_path / "step-000002", path)
    os.utime(leftover, (0, 0))
    (tmp_path / "step-000008" / "state.json").unlink()
    resumed, _ = start()
    assert resume_latest(resumed, tmp_path, MADE_BY) == 2
    assert_same(resumed, saved)
    save_checkpoint(resumed, tmp_path, 9, MADE_BY)
    assert not leftover.exists()


def test_only_the_newest_checkpoints_are_kept(saved, tmp_path):
    for step in (4, 6, 100, 1000):
        save_checkpoint(saved, tmp_path, step, MADE_BY)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000100", "step-001000"]
    assert len(list(tmp_path.iterdir())) == KEPT


def test_saving_a_step_again_replaces_it(saved, start, tmp_path):
    other, batches = start("training.seed=3")
    train(other, batches, 0, 2)
    save_checkpoint(other, tmp_path, 2, MADE_BY)
    resumed, _ = start()
    resume_latest(resumed, tmp_path, MADE_BY)
    assert_same(resumed, other)


@pytest.mark.parametrize(
    ("name", "number"),
    [("write_bytes", errno.ENOSPC), ("write_text", errno.ENOSPC), ("mkdir", errno.EACCES)],
)
def test_a_write_that_fails_leaves_the_older_checkpoint_intact(
    name, number, saved, start, tmp_path, monkeypatch, message_of
):
    original = getattr(Path, name)

    def fail(path, *arguments, **keywords):
        if ".step-000004." in str(path):
            raise OSError(number, "it is full")
        return original(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Path, name, fail)
        message = message_of(save_checkpoint, saved, tmp_path, 4, MADE_BY)
    assert str(tmp_path / "step-000004") in message
    assert "it is full" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]
    resumed, _ = start()
    assert resume_latest(resumed, tmp_path, MADE_BY) == 2
    assert_same(resumed, saved)


def test_the_newest_checkpoint_wins(saved, start, tmp_path):
    later, batches = start()
    train(later, batches, 0, 5)
    save_checkpoint(later, tmp_path, 5, MADE_BY)
    resumed, _ = start()
    assert resume_latest(resumed, tmp_path, MADE_BY) == 5
    assert_same(resumed, later)
