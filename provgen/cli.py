"""The command line: `provgen COMMAND` runs a recipe file, the very same one that `accelerate launch` runs."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import typer

from provgen.errors import InputError

COMMANDS = {
    "demo": ("demo", "Train, generate, attribute and report on the embedded digits, in minutes."),
    "train": ("train", "Train an image generator together with its provenance network."),
    "generate": ("generate_and_attribute", "Generate images and trace each to the training images it comes from."),
    "attribute": ("attribute", "Trace images from outside to the training images of a run."),
    "analyze": ("analyze", "Write report.json and report.html of a run."),
    "retrain": ("retrain", "Train a run's generator again on random halves of its images, to test traces with."),
    "calibrate": ("calibrate", "Fit the weights of traces to subset models, and save them with the pipeline."),
    "faithfulness": ("faithfulness", "Compare attribution methods on retrained generators."),
    "faithfulness-table": ("faithfulness_table", "Make the table of attribution methods again, in seconds."),
    "leave-out": ("leave_out", "Train without the sources that a method names, and generate the same samples."),
    "planted": ("planted", "Trace images whose sources are known, beside the best that can be done."),
    "memorization-sweep": ("memorization_sweep", "Train on more and more images: where does copying end?"),
    "paper": ("paper", "Regenerate the paper's findings: tables and figures of many runs."),
}
"""Commands: the recipe file that each runs, and its help."""

app = typer.Typer(
    name="provgen",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An image generator that can name its sources.",
)


def _command(name: str, recipe: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        run(load_recipe(recipe), prog_name=f"provgen {name}", arguments=context.args)

    return command


for _name, (_recipe, _help) in COMMANDS.items():
    app.command(
        _name,
        help=_help,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(_command(_name, _recipe))


def main() -> None:
    """Entry point of the `provgen` command."""
    app()


def recipes_folder() -> Path:
    """Find the recipe files: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def find_config(path: Path | None) -> Path | None:
    """Give the settings file at `path`; a bare name that is no file here names a shipped one."""
    if path is None or path.is_file() or len(path.parts) != 1:
        return path
    shipped = recipes_folder() / path.with_suffix(".yaml")
    return shipped if shipped.is_file() else path


def load_recipe(name: str) -> Callable[..., None]:
    """Load a recipe file and give its `main`."""
    main: Callable[..., None] = runpy.run_path(str(recipes_folder() / f"{name}.py"))["main"]
    return main


def run(recipe: Callable[..., None], *, prog_name: str | None = None, arguments: list[str] | None = None) -> None:
    """Run a recipe's `main` with command-line arguments, by default those of this process.

    A user's mistake ends in one line and status 2, Ctrl-C in one line and status 130. Set PROVGEN_TRACEBACK=1
    to see where it came from.
    """
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command()(_in_one_line(recipe))
    application(prog_name=prog_name, args=arguments)


def _in_one_line(recipe: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can mend into one line and an exit status."""

    @wraps(recipe)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            recipe(*args, **kwargs)
        except InputError as error:
            _stop(f"error: {' '.join(str(error).split())}", 2)
        except KeyboardInterrupt:
            _stop("stopped; the same command goes on from the last checkpoint", 130)

    return guarded


def _stop(message: str, status: int) -> None:
    if os.environ.get("PROVGEN_TRACEBACK") == "1":
        raise
    rank = os.environ.get("RANK")
    sys.stderr.write(f"{message}\n" if rank is None else f"[process {rank}] {message}\n")
    sys.stderr.flush()
    sys.exit(status)
