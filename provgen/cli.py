"""The command line: `provgen COMMAND` runs a recipe file, the very same one that `accelerate launch` runs."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from provgen.errors import InputError

PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    name="provgen",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An image generator that can name its sources.",
)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def demo(context: typer.Context) -> None:
    """Train, generate, attribute and report on the embedded digits, in minutes."""
    run_recipe("demo", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train an image generator together with its provenance network."""
    run_recipe("train", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def generate(context: typer.Context) -> None:
    """Generate images and trace each to the training images it comes from."""
    run_recipe("generate_and_attribute", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def attribute(context: typer.Context) -> None:
    """Trace images from outside to the training images of a run."""
    run_recipe("attribute", context.args)


@app.command(context_settings=PASS_THROUGH, add_help_option=False)
def analyze(context: typer.Context) -> None:
    """Write report.json and report.html of a run."""
    run_recipe("analyze", context.args)


def main() -> None:
    """Entry point of the `provgen` command."""
    app()


def recipes_folder() -> Path:
    """Find the recipe files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def run_recipe(name: str, arguments: list[str]) -> None:
    """Run a recipe file in this process, as `python recipes/NAME.py ARGUMENTS` would."""
    command = {"generate_and_attribute": "generate"}.get(name, name)
    sys.argv = [f"provgen {command}", *arguments]
    runpy.run_path(str(recipes_folder() / f"{name}.py"), run_name="__main__")


def call_recipe(name: str, **arguments: Any) -> None:
    """Call the `main` of a recipe file with values instead of a command line."""
    runpy.run_path(str(recipes_folder() / f"{name}.py"))["main"](**arguments)


def run(recipe: Callable[..., None]) -> None:
    """Run a recipe's `main` with arguments from the command line.

    A user's mistake ends in one line and status 2, Ctrl-C in one line and status 130. Set PROVGEN_TRACEBACK=1
    to see where it came from.
    """
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(recipe)
    try:
        application()
    except InputError as error:
        _stop(f"error: {' '.join(str(error).split())}", 2)
    except KeyboardInterrupt:
        _stop("stopped; the same command goes on from the last checkpoint", 130)


def _stop(message: str, status: int) -> None:
    if os.environ.get("PROVGEN_TRACEBACK") == "1":
        raise
    # A process of many prints once: the others fail on the same input.
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{message}\n")
    sys.stderr.flush()
    sys.exit(status)
