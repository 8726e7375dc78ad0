"""What a run holds when its recipes have ended: files, traces, images and reports, by kind of generator."""

import json
import re
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from provgen import build
from provgen.data.images import to_unit_range
from provgen.evaluation import temperature_rows
from provgen.models.temperatures import Tracer
from provgen.report.grid import load_pixels
from provgen.run import RunFolder
from provgen.settings_file import load_settings
from provgen.tracing.records import read_parts
from provgen.training.logging import read_metrics

FINISHED_FILES = {
    "config.yaml", "manifest.parquet", "metrics.jsonl", "checkpoints", "pipeline", "tensorboard",
    "samples", "report", "report.html", "report.json", "verdicts.parquet", ".lock", ".writer",
}  # fmt: skip


NUM_IMAGES = 24
"""Enough for sets to be measured."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory, run_recipe, tiny_overrides):
    """A run of three steps that generated and was analyzed."""
    root = tmp_path_factory.mktemp("finished") / "run"
    overrides = [*tiny_overrides, "training.max_steps=3", "data.holdout_fraction=0.05", f"output_dir={root}"]
    assert run_recipe("train", *overrides) == 0
    arguments = ("--run", root, "--num-images", NUM_IMAGES, "--top-k", 4, "--steps", 10, "--batch-size", 5)
    assert run_recipe("generate_and_attribute", *arguments, "--closed-form") == 0
    assert run_recipe("analyze", "--run", root) == 0
    return RunFolder(root)


def test_a_finished_run_holds_the_files_of_the_design(finished):
    assert {path.name for path in finished.root.iterdir()} == FINISHED_FILES
    parts = {"denoiser", "denoiser_ema", "provenance", "provenance_ema", "optimizer"}
    checkpoint = finished.checkpoints / "step-000003"
    assert {path.name for path in checkpoint.iterdir()} == {
        "state.json",
        "sha256.json",
        *[f"{p}.safetensors" for p in parts],
    }
    assert {path.name for path in finished.pipeline.iterdir()} == {
        "model_index.json", "manifest.parquet", "sha256.json", "unet", "provenance", "scheduler", "temperatures",
        "credit",
    }  # fmt: skip
    images = {f"{number:05d}.png" for number in range(NUM_IMAGES)}
    assert {path.name for path in finished.samples.iterdir()} == {
        *images, "grid.png", "part-0.parquet", "generation.json", "sha256.json", "traces", "traces_closed_form"
    }  # fmt: skip
    assert [path.name for path in finished.traces.iterdir()] == ["part-0.parquet"]
    assert not list(finished.root.rglob("*.partial"))


def test_settings_of_a_run_can_be_given_to_config_again(finished, tiny_overrides, run_recipe):
    settings = load_settings(finished.config, [])
    assert settings.training.max_steps == 3
    assert settings.output_dir == str(finished.root)
    comments = finished.config.read_text(encoding="utf-8")
    assert all(f"# {name}: " in comments for name in ("provgen", "torch", "diffusers", "fingerprint"))
    assert run_recipe("train", "--config", finished.config) == 0


def test_traces_name_sources_of_the_samples_class(finished):
    manifest = pq.ParquetFile(finished.manifest).read().to_pylist()
    label_of = {row["example_index"]: row["label"] for row in manifest if row["split"] == "train"}
    samples = read_parts(finished.samples, ["sample"])
    traces = read_parts(finished.traces, ["sample", "rank"])
    assert [sample["class_label"] for sample in samples] == [n % 10 for n in range(NUM_IMAGES)]
    assert [sample["seed"] for sample in samples] == list(range(NUM_IMAGES))
    assert [(row["sample"], row["rank"]) for row in traces] == [(s, r) for s in range(NUM_IMAGES) for r in range(4)]
    # Four training images a class and four sources a sample: all of its class, whose posteriors make one.
    exact = read_parts(finished.closed_form_traces, ["sample", "rank"])
    for row in exact:
        assert label_of[row["example_index"]] == samples[row["sample"]]["class_label"]
    for sample in samples:
        rows = [row for row in exact if row["sample"] == sample["sample"]]
        assert sum(row["posterior"] for row in rows) == pytest.approx(1, abs=1e-5)
    # Credit may be due to images of other classes, but they are not believed to be the parent.
    for row in traces:
        assert row["posterior"] == 0 or label_of[row["example_index"]] == samples[row["sample"]]["class_label"]
    for sample in samples:
        weights = [row["weight"] for row in traces if row["sample"] == sample["sample"]]
        assert weights == sorted(weights, reverse=True)
        assert 0 < sum(weights) < 1


def test_samples_say_how_much_of_them_training_images_explain(finished):
    """In their table, in their files and in the report: as measured on the finished images."""
    trained = build.open_trained_run(finished.root, torch.device("cpu"))
    samples = read_parts(finished.samples, ["sample"])
    pixels = load_pixels(finished, samples, trained.data.manifest)
    found = trained.pipeline.mixtures.explain(to_unit_range(pixels))
    columns = {"explained": found.share, "explained_by_nearest": found.by_nearest}
    columns["explained_by_class_mean"] = found.by_class_mean
    for name, expected in columns.items():
        measured = torch.tensor([sample[name] for sample in samples])
        torch.testing.assert_close(measured, expected, atol=0.02, rtol=0)
    for number, sample in enumerate(samples):
        assert sample["support"] == found.support(number)
        with Image.open(finished.root / sample["path"]) as image:
            said = image.text["provgen:support"]
        assert f"{sample['explained']:.0%} explained" in said or sample["support"] == "copy"
    (metric,) = [metric for metric in metrics_of(finished) if metric["name"] == "explained_share"]
    assert metric["value"] == pytest.approx(float(found.share.mean()))
    assert metric["n"] == NUM_IMAGES
    assert "How much do training images explain?" in finished.report_html.read_text(encoding="utf-8")


def test_images_carry_their_sources(finished):
    traces = read_parts(finished.traces, ["sample", "rank"])
    for number in (0, 11):
        with Image.open(finished.samples / f"{number:05d}.png") as image:
            assert image.size == (8, 8)
            sources = json.loads(image.text["provgen:sources"])
        named = [row["example_index"] for row in traces if row["sample"] == number]
        assert [source["example_index"] for source in sources] == named


def test_metrics_hold_the_losses_and_the_last_index_quality(finished):
    rows = read_metrics(finished.metrics)
    assert {row["step"] for row in rows} == {3}
    losses = [row for row in rows if "denoising_loss" in row]
    assert set(losses[0]) == {
        "step",
        "denoising_loss",
        "index_loss",
        "class_loss",
        "denoiser_gradient_norm",
        "provenance_gradient_norm",
    }
    quality = [row["index_quality"] for row in rows if "index_quality" in row]
    assert {row["rows"] for row in quality[-1]} == {"conditional", "unconditional"}
    for row in quality[-1]:
        assert row["kl_gap"] > -1e-6
        assert row["top1"] <= row["top1_ceiling"] + 1e-9
    # The last temperatures are those that were saved.
    (temperatures,) = [row["temperatures"] for row in rows if "temperatures" in row]
    saved = build.open_trained_run(finished.root, torch.device("cpu")).pipeline.temperatures
    assert temperatures == temperature_rows(saved)
    for name, row in (("conditional", 0), ("unconditional", 1)):
        fitted = [each[f"closed_form_{name}"] for each in temperatures]
        assert fitted == sorted(fitted)
        assert fitted[-1] == pytest.approx(float(saved.log_temperatures[Tracer.CLOSED_FORM, row, -1].exp()))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory, run_recipe, tiny_overrides):
    """A run of an autoencoder of three steps that generated and was analyzed."""
    root = tmp_path_factory.mktemp("decoded") / "run"
    chosen = ("generator.kind=vae", "training.max_steps=3", "data.holdout_fraction=0.05")
    assert run_recipe("train", *tiny_overrides, *chosen, f"output_dir={root}") == 0
    arguments = ("--run", root, "--num-images", 6, "--top-k", 4, "--closed-form")
    assert run_recipe("generate_and_attribute", *arguments) == 0
    assert run_recipe("analyze", "--run", root) == 0
    return RunFolder(root)


def test_a_run_of_an_autoencoder_holds_the_same_files(decoded):
    assert {path.name for path in decoded.root.iterdir()} == FINISHED_FILES
    checkpoint = decoded.checkpoints / "step-000003"
    parts = {"vae", "vae_ema", "provenance", "provenance_ema", "optimizer"}
    assert {path.stem for path in checkpoint.glob("*.safetensors")} == parts
    assert {path.name for path in decoded.pipeline.iterdir()} == {
        "model_index.json", "manifest.parquet", "sha256.json", "vae", "provenance", "temperatures", "credit"
    }  # fmt: skip
    samples = read_parts(decoded.samples, ["sample"])
    assert [sample["class_label"] for sample in samples] == [None] * 6
    assert {sample["commitment_step"] for sample in samples} == {None}
    traces = read_parts(decoded.traces, ["sample", "rank"])
    assert [(row["sample"], row["rank"]) for row in traces] == [(s, r) for s in range(6) for r in range(4)]
    losses = [row for row in read_metrics(decoded.metrics) if "reconstruction_loss" in row]
    assert set(losses[0]) == {
        "step",
        "reconstruction_loss",
        "latent_divergence",
        "index_loss",
        "class_loss",
        "vae_gradient_norm",
        "provenance_gradient_norm",
    }


@pytest.fixture(scope="module")
def classified(root_of, tmp_path_factory, run_recipe):
    """A run of a classifier that was analyzed."""
    root = shutil.copytree(root_of("none"), tmp_path_factory.mktemp("classified") / "run")
    assert run_recipe("analyze", "--run", root) == 0
    return RunFolder(root)


def test_a_classifier_is_analyzed_without_samples(classified):
    names = {metric["name"] for metric in metrics_of(classified)}
    assert {"holdout_class_loss", "train_class_loss"} <= names
    assert any(name.startswith("holdout_consistency_top1") for name in names)
    assert not any("memorized" in name for name in names)
    assert not classified.samples.exists()


def test_a_classifier_generates_nothing_and_says_what_it_can_do(classified, run_recipe, assert_one_line):
    before = {path.name for path in classified.root.iterdir()}
    assert run_recipe("generate_and_attribute", "--run", classified.root, "--num-images", 2) == 2
    assert_one_line("generator.kind=none")
    assert {path.name for path in classified.root.iterdir()} == before, "nothing is left behind"


@pytest.mark.parametrize("kind", ["vae", "none"])
def test_files_are_attributed_by_every_kind(kind, root_of, trained_of, tmp_path, run_recipe, capsys):
    train = trained_of(kind).data.train
    capsys.readouterr()  # of the training
    Image.fromarray(train.images[7, 0].numpy()).save(tmp_path / "seven.png")
    arguments = ("--run", root_of(kind), tmp_path / "seven.png", "--top-k", 3, "--json")
    for more, method in ((), "provenance network"), (("--closed-form",), "closed form"):
        assert run_recipe("attribute", *arguments, *more) == 0
        output = json.loads(capsys.readouterr().out)
        assert output["method"] == method
        assert output["schema_version"] == 2
        copied = output["images"][0]
        assert copied["support"] == "copy"
        assert copied["explained"] == copied["explained_by_nearest"] == pytest.approx(1, abs=1e-4)
        assert 0 <= copied["explained_by_class_mean"] < 0.95
        sources = copied["sources"]
        assert sources[0]["example_index"] == 7
        assert len(sources) == 3


def test_an_autoencoder_is_not_asked_for_a_class(decoded, run_recipe, assert_one_line):
    arguments = ("--run", decoded.root, "--num-images", 2, "--class-name", "3")
    assert run_recipe("generate_and_attribute", *arguments) == 2
    assert_one_line("without class labels")
    assert len(list(decoded.samples.glob("0*.png"))) == 6, "what there was is kept"


def test_sources_that_the_network_cannot_name_are_marked(tmp_path, run_recipe, tiny_overrides, assert_one_line):
    root = tmp_path / "run"
    chosen = ("provenance.coverage=0.3", "training.max_steps=2", f"output_dir={root}")
    assert run_recipe("train", *tiny_overrides, *chosen) == 0
    arguments = ("--run", root, "--num-images", 4, "--top-k", 12, "--steps", 10, "--closed-form")
    assert run_recipe("generate_and_attribute", *arguments) == 0
    run = RunFolder(root)
    rows = pq.ParquetFile(run.manifest).read().to_pylist()
    reachable = {row["example_index"] for row in rows if row["reachable"]}
    assert len(reachable) == 12
    for folder in (run.traces, run.closed_form_traces):
        traces = read_parts(folder, ["sample", "rank"])
        assert all(row["reachable"] == (row["example_index"] in reachable) for row in traces)
        unreachable = sum(row["posterior"] for row in traces if not row["reachable"])
        # The closed form is over all training images, whatever the network can name.
        assert (unreachable > 0) == (folder == run.closed_form_traces)
    assert run_recipe("generate_and_attribute", "--run", root, "--num-images", 1, "--top-k", 13) == 2
    assert_one_line("top_k must be between 1 and 12")


def metrics_of(folder):
    return json.loads(folder.report_json.read_text(encoding="utf-8"))["metrics"]


@pytest.mark.parametrize("name", ["finished", "decoded", "classified"])
def test_a_report_says_how_well_the_generator_and_the_sources_do(name, request):
    finished = request.getfixturevalue(name)
    loss = {"finished": "denoising_loss", "decoded": "autoencoder_loss", "classified": "class_loss"}[name]
    names = {metric["name"] for metric in metrics_of(finished)}
    assert {f"holdout_{loss}", f"train_{loss}"} <= names
    assert any(each.startswith("holdout_knn_accuracy") for each in names)
    assert any(each.startswith("index_") for each in names)
    assert ("share_memorized" in names) == (name != "classified")
    page = finished.report_html.read_text(encoding="utf-8")
    assert "Does it generalize?" in page
    assert "Do sources share the class?" in page


@pytest.mark.slow
def test_sets_and_samples_are_judged(finished, run_recipe, capsys):
    by_name = {metric["name"]: metric for metric in metrics_of(finished)}
    measured = {"data_copying", "authenticity", "precision", "coverage", "frechet_distance", "vendi_score"}
    assert measured <= by_name.keys()
    assert all(by_name[name]["baseline"] is not None for name in measured)
    assert by_name["authenticity"]["ceiling"] == 0, "of copies"
    rows = pq.read_table(finished.root / "verdicts.parquet").to_pylist()
    assert [row["sample"] for row in rows] == list(range(NUM_IMAGES))
    shares = sum(by_name[f"share_{kind}"]["value"] for kind in ("copy", "near_copy", "unsupported", "novel"))
    assert shares + by_name["share_blend_of_few"]["value"] == pytest.approx(1)
    assert run_recipe("analyze", "--run", finished.root, "--features", "own") == 0
    others = {metric["name"]: metric for metric in metrics_of(finished)}
    assert others["frechet_distance"]["value"] != by_name["frechet_distance"]["value"]
    assert "last encoder stage" in finished.report_html.read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_copy_without_checkpoints_and_log_is_analyzed(finished, run_recipe, tmp_path):
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(finished.root, copy.root, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    copy.report_html.unlink()
    assert run_recipe("analyze", "--run", copy.root) == 0
    page = copy.report_html.read_text(encoding="utf-8")
    assert "not kept" in page
    assert "Is it copying?" in page


def test_the_report_is_one_self_contained_page(finished):
    page = finished.report_html.read_text(encoding="utf-8")
    addresses = re.findall(r"""(?:src|href|action|poster|data)\s*=\s*["']?([^"'\s>]+)""", page)
    assert sum(address.startswith("data:image/png;base64,") for address in addresses) >= 4
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"<script|<link|<iframe|@import|url\((?!['\"]?data:)", page)


def test_the_numbers_of_the_report_are_labelled(finished):
    report = json.loads(finished.report_json.read_text(encoding="utf-8"))
    assert report["schema_version"] == 2
    assert report["run"] == "run"
    keys = {"name", "value", "low", "high", "baseline", "ceiling", "n", "kind"}
    assert len(report["metrics"]) >= 4
    for metric in report["metrics"]:
        assert set(metric) == keys
        assert metric["kind"] in {"similarity", "model fit", "learned provenance", "counterfactual"}
    names = [metric["name"] for metric in report["metrics"]]
    assert len(set(names)) == len(names)
