"""Requests and mistakes of a user: each ends with one line, and nothing that was there is lost."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from PIL import Image
from rich.table import Table

from provgen import __version__, build, cli
from provgen.errors import InputError, printable
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


HOSTILE = "\x1b]0;PWNED\x07\x1b[31m"


def test_names_can_do_nothing_to_the_terminal(trained_root, tmp_path, trained, run_recipe, capsys):
    """Neither that of a file that is traced nor that of one that is none."""
    good, bad = tmp_path / f"{HOSTILE}.png", tmp_path / f"{HOSTILE}.txt"
    Image.fromarray(trained.data.train.images[7, 0].numpy()).save(good)
    bad.write_text("no image")
    assert run_recipe("attribute", "--run", trained_root, good) == 0
    assert run_recipe("attribute", "--run", trained_root, bad) == 2
    said = capsys.readouterr()
    for text, name in ((said.out, ".png"), (said.err, ".txt")):
        assert not {"\x1b", "\x07"} & set(text)
        assert rf"\x1b]0;PWNED\x07\x1b[31m{name}" in text


def test_classes_and_credits_can_do_nothing_to_the_terminal(tmp_path, tiny_overrides, run_recipe, capsys):
    photos, root = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for number in range(12):
        Image.new("L", (8, 8), 20 * number).save(photos / f"{number}.png")
    rows = [f"{number}.png,{HOSTILE}{number % 2},\u202eevil,CC\x9b" for number in range(12)]
    (photos / "metadata.csv").write_text("\n".join(["file_name,label,contributor,license", *rows]))
    settings = ("data.source=folder", f"data.path={photos}", "data.image_size=8", "data.holdout_fraction=0.25")
    assert run_recipe("train", *tiny_overrides, *settings, f"output_dir={root}", "training.batch_size=4") == 0
    assert run_recipe("attribute", "--run", root, photos / "1.png", "--top-k", 3) == 0
    assert run_recipe("attribute", "--run", root, photos / "1.png", "--class-name", "absent") == 2
    said = capsys.readouterr()
    assert not {"\x1b", "\x07", "\u202e", "\x9b"} & set(said.out + said.err)
    for text in (said.out, said.err):
        assert r"\x1b]0;PWNED\x07\x1b[31m0" in text
    assert r"\u202eevil" in said.out
    assert r"CC\x9b" in said.out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mb\x07", r"a\x1b[31mb\x07"),
        ("\x9b\x7f\n\t", r"\x9b\x7f\n\t"),
        ("\u202eabc\u2066\ufeff", r"\u202eabc\u2066\ufeff"),
        ("\udce9.png", r"\udce9.png"),
        ("日本語 क्\u200dष 👩\u200d🔬 naïve", "日本語 क्\u200dष 👩\u200d🔬 naïve"),
    ],
)
def test_control_and_format_characters_become_visible(text, expected):
    assert printable(text) == expected


def test_a_table_is_neither_cut_nor_folded_where_there_is_no_terminal(capsys):
    table = Table("source", "class")
    table.add_row("x" * 300, "y" * 300)
    cli.print_table(table)
    assert [line.count("x") + line.count("y") for line in capsys.readouterr().out.splitlines()].count(600) == 1


def ended(recipe, *arguments):
    """Run a function as a recipe; give its exit status."""
    with pytest.raises(SystemExit) as caught:
        cli.run(recipe, arguments=list(arguments))
    return caught.value.code or 0


def raising(error):
    def recipe(share: float = 0.5) -> None:
        raise error

    return recipe


@pytest.mark.parametrize(
    ("error", "status", "expected"),
    [
        (KeyError(0), 1, "unexpected KeyError: 0; this is a bug in provgen: run again with PROVGEN_TRACEBACK=1 to see"),
        (AssertionError(), 1, "unexpected AssertionError; this is a bug in provgen"),
        (RuntimeError("two\nlines " + "x" * 5000), 1, "unexpected RuntimeError: two lines xxx"),
        (EOFError("cut"), 1, "unexpected EOFError: cut; this is a bug in provgen"),
        (PermissionError(13, "Permission denied", "/some/file"), 1, "denied: '/some/file'; check this path"),
        (MemoryError(), 2, "error: not enough memory (MemoryError); make smaller"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "training.batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "training.batch_size"),
        (InputError("wrong; mend it"), 2, "error: wrong; mend it\n"),
        (KeyboardInterrupt(), 130, "stopped; what was saved before is intact, the same command starts or goes on\n"),
    ],
)
def test_whatever_is_raised_ends_in_one_line(error, status, expected, capsys):
    assert ended(raising(error)) == status
    said = capsys.readouterr()
    assert expected in said.err
    assert len(said.err.splitlines()) == 1
    assert len(said.err) < 600
    assert "disk" not in said.err
    assert said.out == ""


def test_the_traceback_is_shown_to_one_who_asks(monkeypatch):
    monkeypatch.setenv("PROVGEN_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.run(raising(KeyError(0)), arguments=[])


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_options_that_are_no_finite_numbers_are_refused(value, assert_one_line):
    assert ended(raising(AssertionError("not reached")), "--share", value) == 2
    assert_one_line(f"--share must be a finite number, got {value}")


@pytest.mark.parametrize("option", ["--guidance-scale", "--resample-below"])
def test_a_run_is_not_touched_by_an_option_that_is_no_number(option, trained_root, tmp_path, run_recipe):
    root = copy_of(trained_root, tmp_path)
    before = sorted(root.rglob("*"))
    assert run_recipe("generate_and_attribute", "--run", root, "--num-images", 1, option, "nan") == 2
    assert sorted(root.rglob("*")) == before


def test_too_strong_a_guidance_keeps_the_samples_there_are(trained_root, tmp_path, run_recipe, assert_one_line, capsys):
    root = copy_of(trained_root, tmp_path)
    arguments = ("--run", root, "--num-images", 2, "--steps", 10, "--top-k", 2)
    assert run_recipe("generate_and_attribute", *arguments) == 0
    before = read_parts(RunFolder(root).samples, ["sample"])
    capsys.readouterr()
    assert run_recipe("generate_and_attribute", *arguments, "--guidance-scale", 1e30) == 2
    assert_one_line("sampling gave pixels that are not finite; guidance_scale=1e+30 is too large")
    assert read_parts(RunFolder(root).samples, ["sample"]) == before


def test_sigterm_ends_in_one_line_after_tidying_up(capsys):
    """And what was done with the signal before is done with it afterwards."""
    tidied, before = [], signal.getsignal(signal.SIGTERM)

    def recipe() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(60)
        except Exception:  # noqa: BLE001
            tidied.append("an exception that a handler of mistakes would catch")
        finally:
            tidied.append("finally")

    assert ended(recipe) == 143
    assert tidied == ["finally"]
    expected = "terminated; what was saved before is intact, the same command starts or goes on\n"
    assert capsys.readouterr().err == expected
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_recipe_runs_outside_of_the_main_thread_too(capsys):
    """Where Python takes no handlers of signals."""
    done = []
    thread = threading.Thread(target=lambda: done.append(ended(raising(KeyError(0)))))
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("name", ["train", "attribute", "generate_and_attribute"])
def test_a_recipe_without_arguments_shows_its_help_and_starts_nothing(name, run_recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_recipe(name) == 2
    said = capsys.readouterr()
    assert "Usage:" in said.out + said.err
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_needs_no_arguments_runs_without(capsys):
    assert ended(lambda: cli.say("ran")) == 0
    assert capsys.readouterr().out == "ran\n"


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["train", "-h"], ["generate", "--help"]])
def test_help_has_a_short_name_everywhere(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["provgen", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert f"Usage: {' '.join(['provgen', *arguments[:-1]])} " in capsys.readouterr().out


@pytest.mark.launch
def test_the_package_runs_as_a_module(repository):
    command = [sys.executable, "-m", "provgen", "--version"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"provgen {__version__}\n", "")


@pytest.mark.launch
@pytest.mark.parametrize("count", [1, 5000])
@pytest.mark.parametrize("way", ["print(text)", "rich.console.Console().print(text)", "sys.stdout.write(text)"])
def test_a_closed_pipe_is_no_error(count, way, repository):
    """Whether it is found closed while printing or at the end, and whoever prints."""
    program = f"""
import sys, rich.console
from provgen import cli
def main() -> None:
    text = "word " * 20
    for _ in range({count}): {way}
cli.run(main, arguments=[])
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
