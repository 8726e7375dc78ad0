"""What README, CONTRIBUTING and the pages of docs/ show: links lead somewhere, and commands parse or run."""

import ast
import os
import re
import runpy
import shlex
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
import yaml
from PIL import Image

from provgen.settings_file import load_settings

ROOT = Path(__file__).resolve().parents[1]
DATA_FOLDERS = {"faithfulness", "memorization", "paper"}
"""Folders of docs/ that hold what studies wrote, no pages."""

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"] + [
    path
    for path in sorted((ROOT / "docs").rglob("*.md"))
    if path.relative_to(ROOT / "docs").parts[0] not in DATA_FOLDERS
]
SHORT_TRAINING = (
    "generator.size=tiny", "provenance.width=8", "data.holdout_fraction=0.2", "data.image_size=8",
    "training.max_steps=4", "training.batch_size=8", "training.warmup_steps=1", "training.checkpoint_every=4",
    "training.evaluate_every=4",
)  # fmt: skip
SHORTER = {"train": SHORT_TRAINING, "generate_and_attribute": ("--num-images", "6", "--steps", "10")}
"""What is appended to a command of a recipe; a setting or option that is given twice has its last value."""


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def shell_lines(path: Path) -> list[str]:
    """List the command lines of a page's ```sh blocks, without comments and with continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip()]


def recipe_call(line: str) -> tuple[str, list[str]] | None:
    """Name the recipe of a command line, and give its arguments; None if the line runs no recipe."""
    words = shlex.split(line, comments=True)
    for place, word in enumerate(words):
        if word == "provgen" or word.endswith("/provgen"):
            command = words[place + 1]
            return {"generate": "generate_and_attribute"}.get(command, command.replace("-", "_")), words[place + 2 :]
        if found := re.fullmatch(r"recipes/(\w+)\.py", word):
            return found[1], words[place + 1 :]
    return None


CALLS = [
    pytest.param(*call, id=f"{path.relative_to(ROOT)} line {number} {call[0]}")
    for path in PAGES
    for number, line in enumerate(shell_lines(path), start=1)
    if (call := recipe_call(line)) is not None
]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_and_images_exist(path):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8")))
    relative = [target for target in targets if "://" not in target and not target.startswith("#")]
    missing = [target for target in relative if not (path.parent / target.split("#")[0]).exists()]
    assert missing == []


def test_pages_of_the_site_link_to_one_another_only():
    docs = ROOT / "docs"
    for path in (page for page in PAGES if page.is_relative_to(docs)):
        for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
            if "://" not in target:
                assert (path.parent / target.split("#")[0]).resolve().is_relative_to(docs), f"{path}: {target}"


def test_every_page_is_in_the_navigation():
    def leaves(node):
        for entry in node if isinstance(node, list) else node.values():
            yield from [entry] if isinstance(entry, str) else leaves(entry)

    listed = set(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    docs = ROOT / "docs"
    assert listed == {str(page.relative_to(docs)) for page in PAGES if page.is_relative_to(docs)}


def test_paths_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`((?:provgen|recipes|tests|benchmarks|docs)/[\w./-]*)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(prose.split()) <= 800


@pytest.mark.parametrize(("recipe", "arguments"), CALLS)
def test_commands_parse(recipe, arguments):
    main = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"]
    application = typer.Typer(add_completion=False)
    application.command()(main)
    context = typer.main.get_command(application).make_context(recipe, list(arguments))
    overrides = list(context.params.get("overrides") or [])
    config = context.params.get("config")
    if "overrides" in context.params:
        shipped = ROOT / "recipes" / f"{Path(config).stem}.yaml" if config else None
        load_settings(shipped, overrides)


def test_python_blocks_of_pages_are_valid():
    for path in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
            ast.parse(block)


def test_the_package_loads_torch_only_when_asked(tmp_path):
    code = (
        "import sys, provgen\n"
        "assert provgen.__version__ and 'torch' not in sys.modules\n"
        "names = [name for name in provgen.__all__ if name != '__version__']\n"
        "assert all(callable(getattr(provgen, name)) for name in names) and 'torch' in sys.modules\n"
        "assert not hasattr(provgen, 'no_such_name')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def environment() -> dict[str, str]:
    """Give a shell in which `provgen`, `accelerate` and `python3` are those of the tests, on the CPU."""
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "PROVGEN_", "MASTER_"))
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    here = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**kept, **here, "COLUMNS": "200"}


def write_photos(folder: Path) -> None:
    """Write class folders as the tutorial shows them, with metadata, and an image from outside."""
    draws = np.random.default_rng(0)
    for name, level in (("cats", 60), ("dogs", 160)):
        (folder / "photos" / name).mkdir(parents=True)
        for number in range(1, 13):
            pixels = draws.integers(level, level + 60, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{number:03d}.jpg")
    rows = "file_name,label,contributor,license\ncats/001.jpg,cats,Ada,CC-BY-4.0\n"
    (folder / "photos" / "metadata.csv").write_text(rows, encoding="utf-8")
    Image.fromarray(draws.integers(0, 255, (30, 30), dtype=np.uint8)).save(folder / "unknown.png")


def write_clothes(folder: Path) -> None:
    """Write a small set in the format of Fashion-MNIST, so that nothing is downloaded."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 255, (40, 28, 28), dtype=np.uint8)
    labels = np.arange(40, dtype=np.uint8) % 10
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", labels)):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        (folder / name).write_bytes(header + array.tobytes())


@pytest.fixture
def workspace(tmp_path) -> Path:
    """A folder in which the commands of README and tutorial can run as they stand."""
    for name in ("recipes", "accelerate_config.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_photos(tmp_path)
    write_clothes(tmp_path / "clothes")
    return tmp_path


def shortened(line: str) -> str:
    """Append what makes a command short; a launched one gets a port that is free now."""
    recipe, arguments = recipe_call(line)
    more = list(SHORTER.get(recipe, ()))
    if recipe == "train" and any("fashion_mnist" in word for word in arguments):
        more.append("data.path=clothes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return f"{line} {shlex.join(more)}".replace("accelerate launch", f"accelerate launch --main_process_port {port}")


@pytest.mark.launch
@pytest.mark.parametrize("page", ["README.md", "docs/tutorial.md"])
def test_commands_run_one_after_the_other(page, workspace):
    ran = 0
    for line in shell_lines(ROOT / page):
        if "python3 -m venv" in line or line.startswith(". "):
            continue  # .ci/run runs those of the README as they stand; this shell has the environment already
        command = shortened(line)
        done = subprocess.run(
            ["bash", "-euc", command], cwd=workspace, env=environment(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        ran += 1
    assert ran >= 4
    assert (workspace / "runs/photos/report.html").is_file()
    assert (workspace / "runs/photos/samples/grid.png").is_file()


def test_the_command_lines_of_the_readme_are_those_that_ci_looks_for():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    patterns = re.findall(r"grep -E '(\^python3[^']*)' README\.md", script)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [len(re.findall(pattern, readme, flags=re.MULTILINE)) for pattern in patterns] == [1, 1]
