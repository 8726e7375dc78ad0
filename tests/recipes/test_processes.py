"""The recipes in processes of their own: killed and resumed, on two processes, on a GPU."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from provgen.data.images import read_image
from provgen.run import RunFolder
from provgen.tracing.records import read_parts
from provgen.training.logging import read_metrics


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
