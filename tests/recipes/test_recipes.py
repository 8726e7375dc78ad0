"""The recipes as a user runs them: copied elsewhere, resumed, with mistakes, killed, and on two processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from provgen import cli
from provgen.data.images import read_image
from provgen.run import RunFolder
from provgen.settings_file import load_settings
from provgen.tracing.records import read_parts
from provgen.training.logging import read_metrics

FINISHED_FILES = {
    "config.yaml", "manifest.parquet", "metrics.jsonl", "checkpoints", "pipeline", "tensorboard",
    "samples", "traces", "traces_closed_form", "report.html", "report.json", "verdicts.parquet",
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
        *[f"{p}.safetensors" for p in parts],
    }
    assert {path.name for path in finished.pipeline.iterdir()} == {
        "model_index.json", "manifest.parquet", "unet", "provenance", "scheduler"
    }  # fmt: skip
    images = {f"{number:05d}.png" for number in range(NUM_IMAGES)}
    assert {path.name for path in finished.samples.iterdir()} == {*images, "grid.png", "part-0.parquet"}
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
    for sample in samples:
        rows = [row for row in traces if row["sample"] == sample["sample"]]
        assert {label_of[row["example_index"]] for row in rows} == {sample["class_label"]}
        assert sum(row["posterior"] for row in rows) == pytest.approx(1, abs=1e-5)


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
        "model_index.json", "manifest.parquet", "vae", "provenance"
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


def test_a_classifier_generates_nothing_and_says_what_it_can_do(classified, run_recipe, capsys):
    before = {path.name for path in classified.root.iterdir()}
    assert run_recipe("generate_and_attribute", "--run", classified.root, "--num-images", 2) == 2
    assert_one_line(capsys, "generator.kind=none")
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
        sources = output["images"][0]["sources"]
        # The closed form of a clean image is one copy; others have no posterior, and are no sources.
        assert len(sources) == (1 if (kind, method) == ("none", "closed form") else 3)
    if kind == "none":
        assert output["images"][0]["sources"][0]["example_index"] == 7


def test_an_autoencoder_is_not_asked_for_a_class(decoded, run_recipe, capsys):
    arguments = ("--run", decoded.root, "--num-images", 2, "--class-name", "3")
    assert run_recipe("generate_and_attribute", *arguments) == 2
    assert_one_line(capsys, "without class labels")
    assert len(list(decoded.samples.glob("0*.png"))) == 6, "what there was is kept"


def test_sources_that_the_network_cannot_name_are_marked(tmp_path, run_recipe, tiny_overrides, capsys):
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
    assert_one_line(capsys, "top_k must be between 1 and 12")


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
def test_a_mistake_ends_with_status_two_and_one_line(mistake, run_recipe, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, arguments, expected = MISTAKES[mistake]
    assert run_recipe(name, *arguments) == 2
    assert_one_line(capsys, expected)
    assert list(tmp_path.iterdir()) == [], "nothing was written"


def assert_one_line(capsys, expected):
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert expected in error


def test_the_command_line_runs_the_very_same_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["provgen", "train", "training.max_step=3"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert_one_line(capsys, "did you mean training.max_steps?")


@pytest.mark.parametrize("arguments", [("--top-k", 41), ("--class-name", "ten"), ("--steps", 9), ("--top-k", 0)])
def test_impossible_requests_keep_the_samples_there_are(arguments, trained_root, tmp_path, run_recipe, capsys):
    root = copy_of(trained_root, tmp_path)
    (root / "samples").mkdir()
    (root / "samples" / "kept.png").write_bytes(b"old")
    assert run_recipe("generate_and_attribute", "--run", root, "--num-images", 1, *arguments) == 2
    assert_one_line(capsys, str(arguments[1]))
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
def test_resuming_with_other_settings_is_refused(change, trained_root, tiny_overrides, run_recipe, capsys):
    before = (trained_root / "config.yaml").read_bytes()
    assert run_recipe("train", *tiny_overrides, f"output_dir={trained_root}", change) == 2
    assert_one_line(capsys, change.split("=")[0])
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


def test_a_step_that_gives_no_number_is_reported_and_not_saved(tmp_path, tiny_overrides, run_recipe, capsys):
    root = tmp_path / "run"
    lost = ("training.learning_rate=1e30", "training.warmup_steps=0", "training.max_steps=4")
    assert run_recipe("train", *tiny_overrides, f"output_dir={root}", *lost, "training.log_every=1") == 2
    assert_one_line(capsys, "training.learning_rate")
    assert not (root / "checkpoints").exists()


def test_attributing_a_file_prints_its_sources_as_json(trained_root, tmp_path, trained, run_recipe, capsys):
    Image.fromarray(trained.data.train.images[7, 0].numpy()).save(tmp_path / "seven.png")
    arguments = ("--run", trained_root, tmp_path / "seven.png", "--top-k", 3, "--closed-form", "--json")
    assert run_recipe("attribute", *arguments) == 0
    output = json.loads(capsys.readouterr().out)
    sources = output["images"][0]["sources"]
    assert sources[0]["example_index"] == 7
    assert len(sources) == 3
    assert output["method"] == "closed form"


# From here on processes of their own.


def environment() -> dict[str, str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PROVGEN_", "MASTER_"))
    }
    return {**kept, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def launch(config, *arguments) -> list[str]:
    """Command line of `accelerate launch`, on a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    return [*start, "--main_process_port", str(port), *map(str, arguments)]


def run(command, folder):
    return subprocess.run(
        list(map(str, command)), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )


def assert_same_weights(first, second, *, tolerance):
    paths = sorted(path.relative_to(first) for path in first.rglob("*.safetensors"))
    assert paths == sorted(path.relative_to(second) for path in second.rglob("*.safetensors"))
    assert len(paths) >= 5
    for path in paths:
        tensors, expected = load_file(first / path), load_file(second / path)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=0, atol=tolerance, msg=lambda m, at=(path, name): f"{at}: {m}"
            )


@pytest.mark.launch
@pytest.mark.parametrize("kind", ["diffusion", "vae"])
def test_a_killed_run_ends_like_one_that_was_never_killed(kind, tmp_path, repository, tiny_overrides):
    sizes = ["training.max_steps=80", "training.checkpoint_every=20", f"generator.kind={kind}"]
    command = [sys.executable, repository / "recipes" / "train.py", *tiny_overrides, *sizes]
    whole = run([*command, f"output_dir={tmp_path / 'whole'}"], tmp_path)
    assert whole.returncode == 0, whole.stderr

    killed = tmp_path / "killed"
    again = [*map(str, command), f"output_dir={killed}"]
    process = subprocess.Popen(
        again, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 200
        while not list((killed / "checkpoints").glob("step-*/state.json")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (killed / "checkpoints" / "step-000080").exists(), "killed before the end"

    resumed = run(again, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumed .* from step \d+", resumed.stdout)
    final = [root / "checkpoints" / "step-000080" for root in (tmp_path / "whole", killed)]
    assert_same_weights(*final, tolerance=0)
    assert_same_weights(
        tmp_path / "whole" / "checkpoints" / "step-000060",
        killed / "checkpoints" / "step-000060",
        tolerance=0,
    )
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


@pytest.mark.launch
@pytest.mark.parametrize(
    ("network", "chosen"),
    [
        ("denoiser", ()),
        (
            "denoiser",
            ("provenance.shared_stages=2", "provenance.index_head=two_stage", "provenance.coverage=0.5"),
        ),
        ("vae", ("generator.kind=vae",)),
        ("classifier", ("generator.kind=none", "provenance.index_head=class_conditional")),
        ("classifier", ("generator.kind=none", "provenance.gradient=stop")),
        (
            "classifier",
            ("generator.kind=none", "provenance.class_loss_weight=0", "provenance.shared_stages=2"),
        ),
    ],
)
def test_two_processes_train_the_weights_of_one(network, chosen, tmp_path, repository, tiny_overrides):
    driver = tmp_path / "in_float64.py"
    driver.write_text(
        "import runpy, sys, torch\n"
        "torch.set_default_dtype(torch.float64)\n"
        "sys.argv = sys.argv[1:]\n"
        'runpy.run_path(sys.argv[0], run_name="__main__")\n',
        encoding="utf-8",
    )
    recipe = [driver, repository / "recipes" / "train.py", *tiny_overrides, *chosen]
    one = run([sys.executable, *recipe, f"output_dir={tmp_path / 'one'}"], tmp_path)
    assert one.returncode == 0, one.stderr
    several = launch(
        repository / "accelerate_config.yaml",
        "--multi_gpu",
        "--num_processes",
        2,
        *recipe,
        f"output_dir={tmp_path / 'two'}",
    )
    two = run(several, tmp_path)
    assert two.returncode == 0, two.stderr
    final = [tmp_path / name / "checkpoints" / "step-000020" for name in ("one", "two")]
    weights = load_file(final[0] / f"{network}.safetensors").values()
    assert {weight.dtype for weight in weights} == {torch.float64}
    assert_same_weights(*final, tolerance=1e-6)
    losses = [read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("one", "two")]
    assert losses[1] == pytest.approx(losses[0], abs=1e-9), "the same global batch"
    assert two.stdout.count("new run in") == 1, "one process speaks"


@pytest.mark.launch
def test_two_processes_generate_the_images_of_one(tmp_path, repository, trained_root, run_recipe):
    roots = [shutil.copytree(trained_root, tmp_path / name) for name in ("one", "two")]
    arguments = ("--num-images", 5, "--top-k", 3, "--steps", 10, "--closed-form")
    assert run_recipe("generate_and_attribute", "--run", roots[0], *arguments) == 0
    recipe = (repository / "recipes" / "generate_and_attribute.py", "--run", roots[1], *arguments)
    # Under such a file a plain `Accelerator()` makes two processes that each believe to be the only one.
    config = tmp_path / "several.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 2\nuse_cpu: true\n",
        encoding="utf-8",
    )
    ended = run(launch(config, *recipe), tmp_path)
    assert ended.returncode == 0, ended.stderr
    one, two = map(RunFolder, roots)
    for kind in ("samples", "traces", "closed_form_traces"):
        parts = [path.name for path in sorted(getattr(two, kind).glob("part-*"))]
        assert parts == ["part-0.parquet", "part-1.parquet"]
    for number in range(5):
        images = [
            read_image(folder.samples / f"{number:05d}.png", image_size=8, channels=1).int() for folder in (one, two)
        ]
        assert (images[0] - images[1]).abs().max() <= 1
    first, second = (read_parts(folder.samples, ["sample"]) for folder in (one, two))
    assert [row["seed"] for row in second] == [row["seed"] for row in first] == list(range(5))
    traces = [read_parts(folder.traces, ["sample", "rank"]) for folder in (one, two)]
    for before, after in zip(*traces, strict=True):
        assert (before["sample"], before["rank"]) == (after["sample"], after["rank"])
        assert after["posterior"] == pytest.approx(before["posterior"], abs=1e-4)
    assert ended.stdout.count("5 samples in") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_main_job_runs_on_a_gpu_and_resumes(precision, tmp_path, run_recipe, tiny_overrides, capsys):
    root = tmp_path / "run"
    overrides = [*tiny_overrides, f"output_dir={root}", f"training.mixed_precision={precision}"]
    assert run_recipe("train", *overrides, "training.max_steps=5") == 0
    assert run_recipe("train", *overrides, "training.max_steps=10") == 0
    assert f"resumed {root} from step 5" in capsys.readouterr().out
    assert run_recipe("generate_and_attribute", "--run", root, "--num-images", 4, "--closed-form") == 0
    assert run_recipe("attribute", "--run", root, root / "samples" / "00000.png") == 0
    assert run_recipe("analyze", "--run", root) == 0
    losses = [row["denoising_loss"] for row in read_metrics(root / "metrics.jsonl") if "denoising_loss" in row]
    assert torch.tensor(losses).isfinite().all()
