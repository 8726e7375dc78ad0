"""The command line: `provgen COMMAND` runs a recipe file, the very same one that `accelerate launch` runs."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from provgen import __version__
from provgen.errors import InputError, printable

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

HELP = {"help_option_names": ["-h", "--help"]}
WIDE = 10_000
"""Columns of a table that no terminal shows: none is cut or folded."""

app = typer.Typer(
    name="provgen",
    no_args_is_help=True,
    context_settings=HELP,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="An image generator that can name its sources.",
)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"provgen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take what stands before a command."""


def _command(name: str, recipe: str) -> Callable[[typer.Context], None]:
    def command(context: typer.Context) -> None:
        with _in_one_line():  # loading a recipe takes seconds, in which one may stop it
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
    """Entry point of the `provgen` command and of `python -m provgen`."""
    with _closed_pipe_ends_silently():
        app(prog_name="provgen")


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

    Without any, a recipe that takes arguments shows its help. A user's mistake ends in one line and status 2, a defect
    of ours in one line and status 1, Ctrl-C and SIGTERM in one line and statuses 130 and 143. Set
    PROVGEN_TRACEBACK=1 to see where it came from.
    """
    application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    application.command(context_settings=HELP)(_guarded(recipe))
    command = typer.main.get_command(application)
    command.no_args_is_help = any(given.required or given.param_type_name == "argument" for given in command.params)
    with _closed_pipe_ends_silently():
        command(prog_name=prog_name, args=arguments)


def say(text: str) -> None:
    """Print a line; names and paths in it can do nothing to the terminal."""
    typer.echo(printable(text))


def print_table(table: Table) -> None:
    """Print a table, on a terminal as wide as that, elsewhere as wide as the table is."""
    Console(width=None if Console().is_terminal else WIDE).print(table)


def _guarded(recipe: Callable[..., None]) -> Callable[..., None]:
    """Make a recipe end in one line, whatever happens in it."""

    @wraps(recipe)
    def guarded(*args: Any, **options: Any) -> None:
        with _in_one_line():
            _require_finite(options)
            recipe(*args, **options)

    return guarded


def _require_finite(options: Mapping[str, Any]) -> None:
    """Refuse NaN and infinity, which pass every comparison with a bound or none."""
    for name, given in options.items():
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, float) and not isfinite(value):
                raise InputError(f"--{name.replace('_', '-')} must be a finite number, got {value}")


_INTACT = "what was saved before is intact, the same command starts or goes on"
_REPORT = "run again with PROVGEN_TRACEBACK=1 to see where, and report it"


class _Terminated(BaseException):
    """SIGTERM arrived; no handler of mistakes must catch it, but what is to be tidied up is."""


@contextmanager
def _in_one_line() -> Iterator[None]:
    """Turn what is raised into one line and an exit status."""
    try:
        with _sigterm_raises():
            yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except InputError as error:
        _stop(f"error: {error}", 2)
    except KeyboardInterrupt:
        _stop(f"stopped; {_INTACT}", 130)
    except _Terminated:
        _stop(f"terminated; {_INTACT}", 143)
    except Exception as error:  # noqa: BLE001 - the last catch
        _stop(*_unexpected(error))


def _unexpected(error: Exception) -> tuple[str, int]:
    """Say what to do about an error that no code of ours foresaw; gives the exit status too."""
    text = " ".join(str(error).split())
    said = f"{type(error).__name__}: {text[:_LONGEST]}{'…' * (len(text) > _LONGEST)}" if text else type(error).__name__
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return f"error: not enough memory ({said}); {_SMALLER}", 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"unexpected {said}; check this path; if nothing is wrong with it, {_REPORT}", 1
    return f"unexpected {said}; this is a bug in provgen: {_REPORT}", 1


_LONGEST = 300
"""Characters of an error that are shown; some of torch's list every weight of a network."""
_NO_MEMORY = ("out of memory", "not enough memory", "t allocate memory", "annot allocate memory")
_SMALLER = (
    "make smaller what is held at once: training.batch_size, generator.size, data.image_size or "
    "data.max_train_images in training, --batch-size or the number of images elsewhere"
)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end a block as an exception does, so that what is half written is removed."""

    def terminate(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the tidying up
        raise _Terminated

    # Python takes handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _closed_pipe_ends_silently() -> Iterator[None]:
    """End without a word when nobody reads what is printed, as in `provgen attribute ... | head -1`.

    The status is 141, that of a process which SIGPIPE ended, as `cat` and `git` have it: a pipeline has the status of
    `head`, and one who asks (`set -o pipefail`) learns that the output was cut.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # or the interpreter does it last of all, and complains
    except (BrokenPipeError, SystemExit) as error:
        # rich and typer turn a closed pipe into an exit of their own.
        cause = error if isinstance(error, BrokenPipeError) else error.__context__
        if not isinstance(cause, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _stop(message: str, status: int) -> None:
    if os.environ.get("PROVGEN_TRACEBACK") == "1":
        raise
    rank = os.environ.get("RANK")
    line = printable(" ".join(message.split()))
    sys.stderr.write(f"{line}\n" if rank is None else f"[process {rank}] {line}\n")
    sys.stderr.flush()
    sys.exit(status)
