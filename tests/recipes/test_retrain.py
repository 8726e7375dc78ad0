"""Subset models: trained on their images alone, resumed one by one, refused where they are of something else."""

import os
import shutil
import subprocess
import sys

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from provgen import build, evaluation
from provgen.data.splits import subset_masks
from provgen.run import RunFolder
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.retraining import RetrainedFolder, _rectangle
from provgen.studies.jobs import Shard

ASKED = ("--num-subsets", 3, "--seeds", 2, "--num-queries", 3)


@pytest.fixture(scope="module")
def root(root_of, tmp_path_factory):
    """A tiny run with held-out images enough."""
    return shutil.copytree(root_of("diffusion"), tmp_path_factory.mktemp("retrain") / "run")


@pytest.fixture(scope="module")
def retrained(root, run_recipe):
    assert run_recipe("retrain", "--run", root, *ASKED) == 0
    return RetrainedFolder(root / "retrained")


@pytest.mark.slow
def test_every_model_is_there_with_a_loss_for_every_query(retrained, root):
    found = retrained.load()
    data = build.open_data(build.load_settings(root / "config.yaml", []), RunFolder(root))
    expected = subset_masks(data.train.labels, num_subsets=3, fraction=0.5, seed=0)
    assert torch.equal(found.masks, expected)
    for kind in ("generated", "holdout"):
        losses = found.losses[kind]
        assert losses.shape == (2, 3, 3)  # seed, query, subset
        assert losses.isfinite().all()
        assert losses.dtype == torch.float64
        assert (losses > 0).all()
        assert len(losses.flatten().unique()) == 18


@pytest.mark.slow
def test_a_loss_is_that_of_a_model_trained_by_hand(retrained, root, trained_of, accelerator):
    trained = trained_of("diffusion")
    subset, seed = 2, 1
    settings = retraining.subset_settings(trained.settings, seed=1000 + seed)
    data = retraining.subset_data(trained.data, retrained.load().masks[subset])
    trainer = build.make_trainer(settings, data, accelerator)
    stream = build.make_batches(settings, data.train, accelerator)
    for step in range(settings.training.max_steps):
        trainer.step(stream.batch(step), step)
    network = evaluation.averaged_networks(trainer)["denoiser"]
    losses = retraining.query_losses(network, settings, trained.data.train, retraining.make_queries(trained, 3))
    for kind, expected in losses.items():
        torch.testing.assert_close(retrained.load().losses[kind][seed, :, subset], expected)


@pytest.mark.slow
def test_the_same_command_trains_nothing_twice(retrained, root, run_recipe, capsys):
    before, (compact,) = retrained.load(), (root / "retrained" / "losses").iterdir()
    table = pq.read_table(compact)
    pq.write_table(table.filter(pc.or_(pc.not_equal(table["subset"], 1), pc.not_equal(table["seed"], 0))), compact)
    stamp = compact.stat().st_mtime_ns
    assert (1, 0) not in retrained.measured()
    assert run_recipe("retrain", "--run", root, *ASKED) == 0
    assert "6 models into" in (said := capsys.readouterr().out)
    assert "1 of this shard are missing" in said
    after = retrained.load()
    assert all(torch.equal(after.losses[kind], losses) for kind, losses in before.losses.items())
    assert compact.stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_two_shards_at_once_measure_what_one_call_does(retrained, root, repository, tmp_path):
    copy = shutil.copytree(root, tmp_path / "run")
    shutil.rmtree(copy / "retrained")
    command = [sys.executable, repository / "recipes" / "retrain.py", "--run", copy, *map(str, ASKED)]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    calls = [subprocess.Popen([*command, "--shard", shard], env=environment) for shard in ("1/2", "2/2")]
    assert [call.wait() for call in calls] == [0, 0]
    found, expected = RetrainedFolder(copy / "retrained").load(), retrained.load()
    assert torch.equal(found.masks, expected.masks)
    assert all(torch.equal(found.losses[kind], losses) for kind, losses in expected.losses.items())
    assert torch.equal(found.queries["generated"].images, expected.queries["generated"].images)
    assert not list(copy.rglob("*.partial"))


@pytest.mark.slow
def test_more_subsets_leave_the_first_as_they_are_and_shards_share_the_rest(retrained, root, run_recipe, capsys):
    more = ("--num-subsets", 4, "--seeds", 2, "--num-queries", 3)
    copy = shutil.copytree(root, root.parent / "more")
    assert run_recipe("retrain", "--run", copy, *more, "--shard", "1/2") == 0
    folder = RetrainedFolder(copy / "retrained")
    assert len(folder.load().masks) == 3, "a subset without all of its seeds is left out"
    assert run_recipe("retrain", "--run", copy, *more, "--shard", "2/2") == 0
    assert "8 of 8 models" in capsys.readouterr().out
    assert torch.equal(folder.load().masks[:3], retrained.load().masks)
    assert torch.equal(folder.load().losses["holdout"][:, :, :3], retrained.load().losses["holdout"])


@pytest.mark.slow
@pytest.mark.parametrize("changed", [("--fraction", 0.4), ("--num-queries", 2)])
def test_other_options_are_refused_and_nothing_is_lost(retrained, root, run_recipe, capsys, changed):
    before = retrained.load()
    assert run_recipe("retrain", "--run", root, *ASKED, *changed) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "remove the folder" in error
    assert torch.equal(retrained.load().losses["generated"], before.losses["generated"])


def test_too_many_queries_are_refused(root_of, run_recipe, capsys):
    assert run_recipe("retrain", "--run", root_of("diffusion"), "--num-queries", 500) == 2
    assert "--num-queries" in capsys.readouterr().err


def test_what_is_logged_may_change_what_is_trained_may_not(tiny_settings):
    made = retraining.fingerprint(tiny_settings())
    assert retraining.fingerprint(tiny_settings("training.log_every=7", "output_dir=elsewhere")) == made
    assert retraining.fingerprint(tiny_settings("data.max_bytes=65536")) == made
    assert retraining.fingerprint(tiny_settings("training.max_steps=21")) != made
    assert retraining.fingerprint(tiny_settings(), fraction=0.5) != made


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([(n, 0) for n in range(5)] + [(0, 1)], ([0, 1, 2, 3, 4], [0])),
        ([(n, 0) for n in range(5)] + [(n, 1) for n in range(4)], ([0, 1, 2, 3], [0, 1])),
        ([], ([], [])),
    ],
)
def test_as_many_models_as_possible_are_used(there, expected):
    assert _rectangle(set(there)) == expected


def test_an_empty_folder_says_what_to_do(tmp_path, message_of):
    assert "provgen retrain" in message_of(RetrainedFolder(tmp_path).load)


def test_a_generator_without_its_gradient_is_trained_alone(tiny_settings):
    joint = retraining.subset_settings(tiny_settings(), seed=5)
    assert joint.provenance == tiny_settings().provenance
    assert joint.training.seed == 5
    stopped = retraining.subset_settings(tiny_settings("provenance.gradient=stop"), seed=5)
    assert stopped.provenance.index_head == "none"
    fewer = retraining.subset_settings(tiny_settings(), seed=5, share_of_steps=0.5)
    assert fewer.training.max_steps == tiny_settings().training.max_steps // 2


@pytest.mark.slow
def test_a_stopped_run_is_its_generator_alone(tiny_settings, tiny_data, accelerator):
    """What `subset_settings` relies on, at the level of a whole training."""
    settings = tiny_settings("provenance.gradient=stop")
    alone = retraining.train_generator(
        retraining.subset_settings(settings, seed=0), tiny_data, accelerator
    ).state_dict()
    beside = retraining.train_generator(settings, tiny_data, accelerator).state_dict()
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_shards_cover_everything_once():
    shares = [Shard(number, 3).share(list(range(10))) for number in (1, 2, 3)]
    assert sorted(number for share in shares for number in share) == list(range(10))
