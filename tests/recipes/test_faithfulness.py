"""The table of methods: everything in it can be recomputed from the files, and the second call costs less."""

import shutil

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from provgen import build
from provgen.metrics.datamodeling import datamodeling_scores, noise_ceiling
from provgen.models.credit import GaussianProcess, Kernel
from provgen.run import seal
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.baselines import PixelCosine
from provgen.studies.faithfulness.credit import traced_images
from provgen.studies.faithfulness.leave_out import NOTHING, LeaveOutFolder, LeftOut
from provgen.studies.faithfulness.methods import make_methods, trace_queries
from provgen.studies.faithfulness.retraining import RetrainedFolder
from provgen.studies.faithfulness.tuning import Split, Tuned
from provgen.tracing.calibrate import fit_credit_head

pytestmark = pytest.mark.slow

CALL = ("--calibration-subsets", 2, "--timesteps", 2, "--resamples", 20)


@pytest.fixture(scope="module")
def root(root_of, run_recipe, tmp_path_factory):
    root = shutil.copytree(root_of("diffusion"), tmp_path_factory.mktemp("faithful") / "run")
    retrain = ("--num-subsets", 6, "--seeds", 2, "--num-queries", 4)
    assert run_recipe("retrain", "--run", root, *retrain) == 0
    assert run_recipe("faithfulness", "--run", root, *CALL) == 0
    return root


def table_of(root) -> list[dict]:
    return pq.read_table(root / "faithfulness" / "retrained.parquet").to_pylist()


def drop_second_seed(retrained, subsets):
    """Keep the models of these subsets with the first seed alone."""
    (path,) = (retrained / "losses").iterdir()
    table = pq.read_table(path)
    is_dropped = pc.and_(pc.equal(table["seed"], 1), pc.is_in(table["subset"], value_set=pa.array(subsets)))
    pq.write_table(table.filter(pc.invert(is_dropped)), path)


def test_every_method_meets_both_kinds_of_queries(root):
    rows = table_of(root)
    assert {row["queries"] for row in rows} == {"generated", "holdout"}
    by_kind = {
        kind: {row["method"]: row for row in rows if row["queries"] == kind} for kind in ("generated", "holdout")
    }
    assert set(by_kind["generated"]) > {"random", "pixel kernel", "TRAK squared, 2 timesteps", "ensemble"}
    without = set(by_kind["generated"]) - set(by_kind["holdout"])
    assert {by_kind["generated"][name]["along"] for name in without} == {"trajectory"}, "held-out images have none"
    assert len(rows) == len(by_kind["generated"]) + len(by_kind["holdout"])
    for row in rows:
        assert -1 - 1e-9 <= row["lds low"] <= row["lds high"] <= 1 + 1e-9
        assert -1 <= row["lds"] <= 1
    users = [row["method"] for row in rows if row["uses_provenance"] and row["role"] != "ensemble"]
    for row in (row for row in rows if row["role"] == "ensemble"):
        assert row["uses_provenance"] or not any(name in row["setting"] for name in users)
        assert row["stored_bytes"] is None
        assert sum(float(part.split()[0]) for part in row["setting"].split("; ")) > 0.9
    assert all(row["over random"] == 0 for row in rows if row["method"] == "random")
    same = [row for row in rows if row["method"] == "same class"]
    assert [row["lds"] for row in same] == [0, 0], "halves have the same share of every class"


def test_a_row_is_recomputed_from_the_files(root):
    trained = build.open_trained_run(root, torch.device("cpu"))
    retrained = RetrainedFolder(root / "retrained").load()
    method = PixelCosine()
    method.fit(trained.data.train)
    queries = trace_queries(trained, retrained.queries)
    split = Split.first(torch.arange(6), 4, calibration=2)
    scores = method.attribute(queries["holdout"]).values[0][~split.queries]
    predicted = scores @ retrained.masks[~split.subsets].double().T
    losses = retrained.losses["holdout"][:, ~split.queries][:, :, ~split.subsets]
    expected = datamodeling_scores(predicted, -losses.mean(dim=0)).mean()
    (row,) = [r for r in table_of(root) if r["method"] == "pixel cosine" and r["queries"] == "holdout"]
    assert row["lds"] == pytest.approx(float(expected))
    several = -retrained.losses["holdout"][:, ~split.queries]
    ceiling = noise_ceiling(several, num_seeds=2, seed=0, resamples=10).estimate
    assert row["noise_ceiling"] == pytest.approx(ceiling.value)


def test_the_table_is_made_again_of_what_was_kept(root, run_recipe, tmp_path, capsys):
    before, kept = table_of(root), tmp_path / "kept"
    shutil.copytree(root / "retrained", kept / "retrained")
    (kept / "faithfulness").mkdir()
    shutil.copy(root / "faithfulness" / "predictions.parquet", kept / "faithfulness")
    assert run_recipe("faithfulness_table", kept, "--resamples", 20) == 0
    assert table_of(kept) == before
    assert "| pixel kernel |" in capsys.readouterr().out
    assert (kept / "faithfulness" / "retrained.png").stat().st_size > 10_000
    # Of later subsets alone, beside the whole table.
    assert run_recipe("faithfulness_table", kept, "--resamples", 20, "--first-subset", 4) == 0
    (row,) = [
        row
        for row in pq.read_table(kept / "faithfulness" / "retrained_from_4.parquet").to_pylist()
        if (row["method"], row["queries"]) == ("pixel cosine", "holdout")
    ]
    assert row["subsets"] == 2
    assert table_of(kept) == before
    # Without the second seed of half of the subsets, the ceiling is still known from the others.
    drop_second_seed(kept / "retrained", (2, 3, 4, 5))
    assert run_recipe("faithfulness_table", kept, "--resamples", 20) == 0
    several = RetrainedFolder(kept / "retrained").load_several_seeds()
    assert several.subsets.tolist() == [0, 1]
    assert {row["subsets"] for row in table_of(kept)} == {4}
    split = Split.first(torch.arange(6), 4, calibration=2)
    outputs = -several.losses["generated"][:, ~split.queries]
    expected = noise_ceiling(outputs, num_seeds=1, seed=0, resamples=10).estimate.value
    assert table_of(kept)[0]["noise_ceiling"] == pytest.approx(expected)
    # And without any: no ceiling, and predictions that are missing are asked for.
    drop_second_seed(kept / "retrained", (0, 1))
    assert run_recipe("faithfulness_table", kept, "--resamples", 20) == 0
    assert table_of(kept)[0]["noise_ceiling"] is None
    assert run_recipe("faithfulness_table", tmp_path) == 2
    assert "provgen faithfulness" in capsys.readouterr().err


def test_the_second_call_finds_its_gradients_and_says_the_same(root, run_recipe, capsys):
    before = {(row["method"], row["queries"]): row["lds"] for row in table_of(root)}
    store = root / "faithfulness" / "d-trak-2" / "features.npy"
    stamp = store.stat().st_mtime_ns
    assert run_recipe("faithfulness", "--run", root, *CALL) == 0
    assert "noise ceiling" in capsys.readouterr().out
    assert store.stat().st_mtime_ns == stamp
    assert {(row["method"], row["queries"]): row["lds"] for row in table_of(root)} == before


def test_methods_that_are_added_alone_take_their_own_place(root, run_recipe, tmp_path):
    """Made again alone, a method says the same; all others, ensembles and tuned settings stay as they were."""
    copy = shutil.copytree(root, tmp_path / "run")
    before = {(row["method"], row["queries"]): row["lds"] for row in table_of(copy)}
    assert all(row["hindsight"] is None or row["hindsight"] >= row["lds"] - 1e-9 for row in table_of(copy))
    tuned = (copy / "faithfulness" / "tuned.json").read_bytes()
    assert run_recipe("faithfulness", "--run", copy, *CALL, "--only", "default trace", "--only", "tempered") == 0
    after = {(row["method"], row["queries"]): row["lds"] for row in table_of(copy)}
    assert after == before
    assert {"default trace, trajectory", "tempered closed form, noised"} < {name for name, _ in after}
    assert (copy / "faithfulness" / "tuned.json").read_bytes() == tuned


@pytest.mark.parametrize("start", ["TARK", "pixel", "random"])
def test_only_methods_that_are_there_and_not_compared_with_are_skipped(root, run_recipe, capsys, start):
    assert run_recipe("faithfulness", "--run", root, *CALL, "--skip", start) == 2
    assert "TRAK, 2 timesteps" in capsys.readouterr().err


def test_skipped_methods_are_not_in_the_table(root, run_recipe, tmp_path):
    copy = shutil.copytree(root, tmp_path / "run")
    skipped = ("--skip", "TRAK", "--skip", "patches")
    assert run_recipe("faithfulness", "--run", copy, *CALL, *skipped) == 0
    names = {row["method"] for row in table_of(copy)}
    assert not any(name.startswith(("TRAK", "patches")) for name in names)
    assert "D-TRAK, 2 timesteps" in names


def test_without_subset_models_it_says_what_to_do(root_of, run_recipe, capsys):
    assert run_recipe("faithfulness", "--run", root_of("diffusion")) == 2
    error = capsys.readouterr().err
    assert "provgen retrain" in error
    assert len(error.splitlines()) == 1


def test_calibration_sets_weights_and_leaves_posteriors(root, run_recipe, capsys, tmp_path):
    copy = shutil.copytree(root, tmp_path / "run")
    before = build.open_trained_run(root, torch.device("cpu"))
    assert run_recipe("calibrate", "--run", copy, "--calibration-subsets", 2) == 0
    assert "calibrated on 2 subset models: s=" in capsys.readouterr().out
    after = build.open_trained_run(copy, torch.device("cpu"))
    assert after.pipeline.credit.config.calibration_subsets == 2
    # Another choice than calibration's: one that needs everything a trace can see.
    chosen = GaussianProcess(Kernel(1.0, 0.5, (0.5, 0.5), 0.25), 3.0)
    queries = trace_queries(after, RetrainedFolder(copy / "retrained").load().queries)
    images = traced_images(after.pipeline, after.data.train, queries)
    head = fit_credit_head(images, lambda _: chosen, calibration_subsets=2)
    head.save_pretrained(copy / "pipeline" / "credit")
    seal(copy / "pipeline")
    after = build.open_trained_run(copy, torch.device("cpu"))
    labels, count = [0, 1, 2], len(after.data.train)

    def traced(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return pipeline(labels, generator=generators, top_k=count, output_type="pt")

    old, new = traced(before.pipeline), traced(after.pipeline)
    assert torch.equal(old.images, new.images)
    order, other = old.attribution.example_index.argsort(dim=1), new.attribution.example_index.argsort(dim=1)
    assert torch.equal(old.attribution.posterior.gather(1, order), new.attribution.posterior.gather(1, other))
    assert (new.attribution.weight.diff(dim=1) <= 0).all()
    torch.testing.assert_close(new.attribution.weight.sum(dim=1), torch.ones(3))
    assert not torch.allclose(new.attribution.weight, new.attribution.posterior, atol=1e-3)
    weights = [a.weight.gather(1, places) for a, places in ((old.attribution, order), (new.attribution, other))]
    assert not torch.allclose(*weights, atol=1e-3), "no longer the default ones"
    # What is compared with other methods is what the pipeline says, along the trajectory and of images from outside.
    methods = {method.name: method.attributor for method in make_methods(after, tmp_path, num_timesteps=())}
    assert after.pipeline.credit.process == chosen
    along = methods["calibrated trace, trajectory"].attribute(queries["generated"]).under(chosen)[:3]
    weights = torch.zeros(3, count).scatter(1, new.attribution.example_index, new.attribution.weight)
    torch.testing.assert_close(along, weights, atol=1e-5, rtol=1e-3)
    held_out = RetrainedFolder(copy / "retrained").load().queries["holdout"]
    outside = after.pipeline.attribute(held_out.images, class_labels=held_out.labels, top_k=count)
    weights = torch.zeros(4, count).scatter(1, outside.example_index, outside.weight)
    noised = methods["calibrated trace, noised"].attribute(queries["holdout"]).under(chosen)
    torch.testing.assert_close(noised, weights, atol=1e-5, rtol=1e-3)

    assert run_recipe("faithfulness", "--run", copy, *CALL) == 0
    compared = {(row["method"], row["queries"]): row["over the trace"] for row in table_of(copy)}
    assert compared["calibrated trace, trajectory", "generated"] == 0
    assert compared["calibrated trace, noised", "holdout"] == 0
    set_up = {row["method"]: row["fit_seconds"] for row in table_of(copy)}
    assert set_up["calibrated trace, noised"] >= head.config.calibration_seconds > 0
    note = "Training the 2 subset models it is calibrated on comes on top"
    assert note in (copy / "faithfulness" / "retrained.md").read_text(encoding="utf-8")
    assert run_recipe("faithfulness", "--run", copy, "--calibration-subsets", 3, *CALL[2:]) == 2
    assert "give both the same number" in capsys.readouterr().err
    assert run_recipe("generate_and_attribute", "--run", copy, "--num-images", 3) == 0
    assert run_recipe("analyze", "--run", copy) == 0
    page = (copy / "report.html").read_text(encoding="utf-8")
    assert "Are the sources right?" in page
    assert "calibrated trace, trajectory" in page
    assert "calibrated on 2 subset models" in page
    # Sources are left out by what this calibration says, and not by what another one would.
    again = ("leave_out", "--run", copy, *LEAVE_OUT[:-4], "--method", "calibrated trace, trajectory")
    assert run_recipe(*again) == 0
    key = Tuned.load(copy / "faithfulness" / "tuned.json").ranking_key("calibrated trace, trajectory")
    kept = LeaveOutFolder(copy / "leave_out").load_rankings("calibrated trace, trajectory", key)
    first = {query: int(ranking[0]) for query, ranking in kept.items() if query < 3}
    assert first
    assert first == {query: int(new.attribution.example_index[query, 0]) for query in first}
    config = copy / "pipeline" / "credit" / "config.json"
    config.write_text(config.read_text().replace('"ridge": 3.0', '"ridge": 10.0'))
    seal(copy / "pipeline")
    assert run_recipe(*again) == 2
    assert "by another calibration" in capsys.readouterr().err


LEAVE_OUT = (
    "--num-queries", 2, "--share", 0.2, "--seeds", 1, "--method", "random", "--method", "D-TRAK, 2 timesteps",
)  # fmt: skip


def test_sources_are_left_out_and_the_sample_is_made_again(root, run_recipe, capsys, new_accelerator, tmp_path):
    assert run_recipe("leave_out", "--run", root, *LEAVE_OUT) == 0
    said = capsys.readouterr().out
    assert "4 of 4 models measured" in said
    assert "D-TRAK, 2 timesteps | 2 |" in said
    outcomes, trained = LeaveOutFolder(root / "leave_out").load(), build.open_trained_run(root, torch.device("cpu"))
    split = Split.first(torch.arange(6), 4, calibration=2)
    query = (~split.queries).nonzero().flatten()[1].item()
    found = outcomes[LeftOut(seed=0, share=0.2, query=query, method="D-TRAK, 2 timesteps")]
    assert len(found.left_out.unique()) == round(0.2 * len(trained.data.train))
    # By hand: train on the others with the run's own seed, and generate from the noise of the sample.
    mask = torch.ones(len(trained.data.train), dtype=torch.bool)
    mask[found.left_out] = False
    data = retraining.subset_data(trained.data, mask)
    network = retraining.train_generator(trained.settings, data, new_accelerator())
    expected = retraining.regenerate(network, trained, label=query, seed=query)
    assert torch.equal(found.image, expected)
    # With nothing left out the same seed makes the sample itself.
    samples = retraining.make_queries(trained, 4)["generated"].images
    itself = outcomes[LeftOut(seed=0, share=0.0, query=query, method=NOTHING)].image
    assert (itself.int() - samples[query].int()).abs().max() <= 1

    # Nothing is asked a second time: what methods named is kept.
    copy = shutil.copytree(root, tmp_path / "without gradients")
    for gradients in (copy / "faithfulness").glob("*-2"):
        shutil.rmtree(gradients)
    assert run_recipe("leave_out", "--run", copy, *LEAVE_OUT) == 0
    assert "0 of this shard are missing" in capsys.readouterr().out
    table = (copy / "leave_out" / "table.md").read_bytes()
    (copy / "leave_out" / "table.md").unlink()
    assert run_recipe("leave_out", "--run", copy, *LEAVE_OUT, "--only-table") == 0
    assert (copy / "leave_out" / "table.md").read_bytes() == table
    # By default the table is of those methods that have been left out by.
    capsys.readouterr()
    assert run_recipe("leave_out", "--run", copy, "--only-table") == 0
    assert "| random | 2 |" in capsys.readouterr().out
    assert run_recipe("leave_out", "--run", tmp_path / "none", "--only-table") == 2
    assert "without --only-table first" in capsys.readouterr().err
    assert not list((copy / "faithfulness").glob("*-2"))

    copy = shutil.copytree(root, tmp_path / "run")
    assert run_recipe("faithfulness_table", copy, "--resamples", 10) == 0
    moved = {row["method"]: row["moved without 20%"] for row in table_of(copy) if row["queries"] == "generated"}
    images = [
        (outcomes[LeftOut(seed=0, share=0.2, query=n, method="D-TRAK, 2 timesteps")].image,
         outcomes[LeftOut(seed=0, share=0.0, query=n, method=NOTHING)].image)
        for n in (~split.queries).nonzero().flatten()[:2].tolist()
    ]  # fmt: skip
    expected = sum(float((a.double() - b.double()).norm()) * 2 / 255 for a, b in images) / 2
    assert moved["D-TRAK, 2 timesteps"] == pytest.approx(expected)
    assert moved["pixel cosine"] is None


@pytest.mark.parametrize("share", [0, 0.95, 1])
def test_a_share_that_leaves_nothing_is_refused(root, run_recipe, capsys, share):
    assert run_recipe("leave_out", "--run", root, "--share", share) == 2
    assert "--share" in capsys.readouterr().err


def test_a_method_that_was_not_tuned_is_refused(root, run_recipe, capsys):
    assert run_recipe("leave_out", "--run", root, "--method", "tarot") == 2
    assert "unknown method 'tarot'" in capsys.readouterr().err


def test_leaving_out_needs_the_comparison_first(root_of, run_recipe, capsys):
    assert run_recipe("leave_out", "--run", root_of("diffusion")) == 2
    assert "provgen faithfulness" in capsys.readouterr().err
