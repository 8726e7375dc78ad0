"""The wiring: launches that cannot work, batches that do not divide, and what a run may change."""

from dataclasses import replace

import pytest
import torch

from provgen import build, runs
from provgen.run_folder import RunFolder
from provgen.settings_file import load_settings


def test_processes_that_do_not_know_of_one_another_are_refused(accelerator, monkeypatch, message_of):
    # The accelerator of this process is alone; now a launcher claims to have started three.
    assert accelerator.num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = message_of(build.make_accelerator)
    assert "started 3 processes, but each runs alone" in message
    assert "--multi_gpu --num_processes 3" in message
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert build.make_accelerator().num_processes == 1


def test_both_networks_depend_on_the_seed_and_on_nothing_global(accelerator, tiny_settings, tiny_data):
    def weights(seed):
        trainer = build.make_trainer(tiny_settings(f"training.seed={seed}"), tiny_data, accelerator)
        return [trainer.networks[name].state_dict() for name in ("denoiser", "provenance")]

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = weights(0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = weights(0), weights(1)
    for network, same, changed in zip(first, again, other, strict=True):
        assert all(torch.equal(value, same[key]) for key, value in network.items())
        assert any(not torch.equal(value, changed[key]) for key, value in network.items())


def test_the_denoiser_starts_the_same_with_and_without_a_provenance_network(
    accelerator, tiny_settings, tiny_data
):
    alone, joint = (
        build.make_trainer(tiny_settings(*overrides), tiny_data, accelerator)
        .networks["denoiser"]
        .state_dict()
        for overrides in (("provenance.index_head=none",), ("provenance.width=7",))
    )
    assert all(torch.equal(value, joint[key]) for key, value in alone.items())


def test_the_provenance_network_knows_its_training_set(accelerator, tiny_settings, tiny_data):
    network = build.make_trainer(tiny_settings(), tiny_data, accelerator).networks["provenance"]
    assert torch.equal(network.example_labels, tiny_data.train.labels)
    assert network.config.fingerprint == tiny_data.manifest.fingerprint
    assert network.config.num_examples == len(tiny_data.train) == 40
    coordinates = network.index_head.prototypes.detach().double()
    pixels = (tiny_data.train.images.double() / 127.5 - 1).flatten(1)
    expected = torch.linalg.svdvals(pixels - pixels.mean(0))[:16]
    torch.testing.assert_close(torch.linalg.svdvals(coordinates), expected, rtol=1e-4, atol=1e-4)


def test_the_split_is_disjoint_and_a_function_of_its_seed(tiny_settings, tmp_path):
    folder = RunFolder(tmp_path / "none")
    first, again, other = (
        runs.open_data(tiny_settings("data.holdout_fraction=0.1", f"data.split_seed={seed}"), folder)
        for seed in (0, 0, 1)
    )
    assert not set(first.train.paths) & set(first.holdout.paths)
    assert first.train.paths == again.train.paths
    assert first.train.paths != other.train.paths
    assert len(first.train) == 40


def test_a_run_keeps_its_manifest_and_its_settings(tiny_settings, tiny_data, tmp_path, message_of):
    settings = replace(tiny_settings(), output_dir=str(tmp_path / "run"))
    folder = runs.start_run(settings, tiny_data, writes=True)
    manifest = folder.manifest.read_bytes()
    assert load_settings(folder.config, []) == settings
    reopened = runs.open_data(settings, folder)
    assert reopened.train.paths == tiny_data.train.paths

    longer = replace(
        settings, training=replace(settings.training, max_steps=99, log_every=1, checkpoint_every=7)
    )
    runs.start_run(longer, tiny_data, writes=True)
    assert load_settings(folder.config, []) == longer
    assert folder.manifest.read_bytes() == manifest

    other = replace(settings, generator=replace(settings.generator, label_dropout=0.7))
    message = message_of(runs.start_run, other, tiny_data, writes=True)
    assert "generator.label_dropout=0.2" in message
    assert "generator.label_dropout=0.7" in message
    assert load_settings(folder.config, []) == longer


def test_a_run_without_a_pipeline_says_how_to_finish_it(tiny_settings, tiny_data, tmp_path, message_of):
    runs.start_run(replace(tiny_settings(), output_dir=str(tmp_path / "run")), tiny_data, writes=True)
    assert "provgen train --config" in message_of(
        runs.open_trained_run, tmp_path / "run", torch.device("cpu")
    )


@pytest.mark.parametrize("name", ["none", "config.yaml"])
def test_what_is_no_run_is_refused(name, tmp_path, message_of):
    assert "provgen train" in message_of(runs.open_trained_run, tmp_path / name, torch.device("cpu"))
