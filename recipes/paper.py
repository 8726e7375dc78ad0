"""Check what is claimed of the paper: run the variants of recipes/paper/*.yaml and write their tables and figures.

provgen paper --quick
provgen paper --experiment alpha --experiment sharing
provgen paper --experiment fashion_alpha data.path=FOLDER
provgen paper --tables docs/paper

On two cores two processes of one thread each are faster than one of two:

OMP_NUM_THREADS=1 provgen paper --shard 1/2 & OMP_NUM_THREADS=1 provgen paper --shard 2/2; wait

The same command goes on where it was stopped; a run that was stopped starts again from its last checkpoint.
"""

import io
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from provgen import cli
from provgen.errors import InputError
from provgen.run import RunFolder, read_parquet
from provgen.studies.jobs import Shard
from provgen.studies.paper import measurement
from provgen.studies.paper.experiments import Experiment, VariantRun, load_experiment, read_description
from provgen.studies.paper.figure import plot_variants
from provgen.studies.paper.findings import findings_page, judge, overview
from provgen.studies.paper.measurement import is_trained, read_measured, write_measured
from provgen.studies.paper.table import METRICS, SCHEMA_VERSION, variants_table, with_ratios, write_rows
from provgen.training.checkpoint import list_checkpoints

EMBEDDED = "digits"
"""Settings whose images need no download: what runs if no experiment is named."""


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings of all variants as key=value.")] = None,
    experiment: Annotated[
        list[str] | None, typer.Option(help="Shipped name or YAML file; repeatable. Default: all on digits.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small versions, into OUTPUT/quick.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of runs, tables and figures.")] = Path("runs/paper"),
    shard: Annotated[str, typer.Option(help="Which share of the runs: 1/2 takes every other one.")] = "1/1",
    tables: Annotated[
        Path | None, typer.Option(help="Only write figures, tables and findings beside each table.parquet in here.")
    ] = None,
) -> None:
    """Train and measure every variant that is not measured yet; write tables, figures and findings."""
    share, root = Shard.parse(shard), output / "quick" if quick else output
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("paper runs in one process; start it without accelerate launch, once for each --shard")
    if tables is not None:
        remake_tables(tables)
        return
    experiments = [
        load_experiment(path, cli.recipes_folder(), quick=quick, overrides=overrides or [])
        for path in experiment_files(experiment or [])
    ]
    shared = share.share([run for chosen in experiments for run in chosen.runs()])
    waiting = [run for run in shared if read_measured(root / run.name, run.settings(root)) is None]
    seconds = {e.name: [row["seconds"] for row in measured_rows(e, root)] for e in experiments}
    cli.say(f"{len(shared)} runs into {root}, {len(shared) - len(waiting)} of them measured before")
    done = 0
    for chosen in experiments:
        for run in [run for run in waiting if run.experiment is chosen]:
            row = train_and_measure(run, root)
            done += 1
            seconds[chosen.name].append(row["seconds"])
            left = minutes_left(waiting[done:], seconds)
            cli.say(f"[{done}/{len(waiting)}] {run.name}: {summary(row, chosen)}; {left}")
        collect(chosen, root)
    write_overview(root)


def experiment_files(names: Sequence[str]) -> list[Path]:
    """Find the YAML files: those named, or all whose images are embedded.

    Raises:
        InputError: Two of the same name, which would share a folder.
    """
    shipped = cli.recipes_folder() / "paper"
    if not names:
        files = sorted(shipped.glob("*.yaml"))
        return [path for path in files if read_description(path, quick=False).config == EMBEDDED]
    paths = [Path(name) if Path(name).is_file() else shipped / f"{name}.yaml" for name in dict.fromkeys(names)]
    stem, count = Counter(path.stem for path in paths).most_common(1)[0]
    if count > 1:
        raise InputError(f"two experiments are named {stem}; rename one of the files")
    return paths


def train_and_measure(run: VariantRun, root: Path) -> dict[str, Any]:
    """Train a run unless it has finished, and measure it.

    Raises:
        InputError: The run in its folder has other settings, or was trained for longer.
    """
    start = time.perf_counter()
    folder, settings = RunFolder(root / run.name), run.settings(root)
    with redirect_stdout(io.StringIO()):
        done, wanted = last_step(folder), settings.training.max_steps
        if done > wanted:
            raise InputError(f"{folder.root} was trained for {done} steps, not {wanted}; use another --output")
        if not is_trained(folder, settings, done):
            cli.load_recipe("train")(config=run.experiment.config, overrides=run.overrides(root))
        row = with_ratios(measurement.measure_run(folder)) | {"seconds": time.perf_counter() - start}
    write_measured(folder.root, settings, row)
    return row


def last_step(folder: RunFolder) -> int:
    """Give the step of the last checkpoint; 0 if there is none."""
    saved = list_checkpoints(folder.checkpoints)
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


def measured_rows(experiment: Experiment, root: Path) -> list[dict[str, Any]]:
    """Make the rows of all runs of an experiment that are measured so far, by whatever process."""
    pairs = [(run, read_measured(root / run.name, run.settings(root))) for run in experiment.runs()]
    return [run.row(metrics) for run, metrics in pairs if metrics is not None]


def summary(row: Mapping[str, Any], experiment: Experiment) -> str:
    """Write the first few metrics of a run in a line."""
    shown = [name for name in experiment.description.figure if row.get(name) is not None][:3]
    numbers = [f"{METRICS[name].title} {row[name]:{METRICS[name].format}}" for name in shown]
    return ", ".join([f"{row['seconds']:.0f} s", *numbers])


def minutes_left(waiting: Sequence[VariantRun], seconds: Mapping[str, list[float]]) -> str:
    """Estimate from the runs of the same experiment; from all if it has none yet."""
    every = [second for times in seconds.values() for second in times]
    left = sum(fmean(seconds[run.experiment.name] or every) for run in waiting)
    return f"about {left / 60:.0f} min left"


def collect(experiment: Experiment, root: Path) -> None:
    """Write table, figure and findings of an experiment from all of its runs that are measured."""
    folder, total = root / experiment.name, len(experiment.runs())
    rows: list[dict[str, Any]] = []
    # Another process may finish a run meanwhile, and must not be left out by whoever writes last.
    while len(newer := measured_rows(experiment, root)) > len(rows):
        rows = newer
        with published(folder) as new:
            write_rows(new / "table.parquet", rows)
            write_tables(experiment, rows, new)
    where = f"; tables in {folder}" if rows else ""
    cli.say(f"{experiment.name}: {len(rows)} of {total} runs measured{where}")


def remake_tables(root: Path) -> None:
    """Write figure, table and findings again from every kept `table.parquet` or `tables.parquet` at or below a folder.

    Raises:
        InputError: There is none, or no shipped experiment has such a name.
    """
    files = sorted(root.rglob("table*.parquet"))
    if not files:
        raise InputError(f"no table.parquet or tables.parquet at or below {root}; give a folder such as docs/paper")
    for path in files:
        rows = read_parquet(path, version=SCHEMA_VERSION).to_pylist()
        own = path.parent.resolve().name  # The table of one experiment is named by its folder alone.
        for name in dict.fromkeys(row.get("experiment", own) for row in rows):
            folder = path.parent if own == name else path.parent / name
            remake_table(name, [row for row in rows if row.get("experiment", own) == name], folder)


def remake_table(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write figure, table and findings of one shipped experiment again."""
    experiment = load_experiment(cli.recipes_folder() / "paper" / f"{name}.yaml", cli.recipes_folder())
    for key in {"variant", "seed", *experiment.variants[0].values} - set(rows[0]):
        raise InputError(f"the kept rows of {name} have no column {key}; they are no table of this experiment")
    folder.mkdir(exist_ok=True)
    with published(folder) as new:
        write_tables(experiment, rows, new)
    cli.say(f"{name}: tables in {folder}")


def write_tables(experiment: Experiment, rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write table, figure and findings of an experiment into a folder."""
    said, planned = experiment.description, [variant.values for variant in experiment.variants]
    findings = [finding for claim in said.claims for finding in judge(rows, claim, planned)]
    seeds = "seed 0" if said.seeds == 1 else f"seeds 0 to {said.seeds - 1}"
    settings = ", ".join([said.config, *(pair for pair in experiment.common if "data.path" not in pair)])
    facts = f"{len(rows)} of {len(experiment.runs())} runs measured, {seeds}; settings: {settings}"
    (folder / "table.md").write_text(variants_table(rows, said.table), encoding="utf-8")
    plot_variants(rows, said.figure, x=said.x, lines=said.lines).savefig(folder / "figure.png", dpi=130)
    page = findings_page(said.title, said.question, facts, said.claims, findings)
    (folder / "findings.md").write_text(page, encoding="utf-8")


def write_overview(root: Path) -> None:
    """Collect all experiments that have tables on one page."""
    pages = {
        path.parent.name: (path.read_text(encoding="utf-8"), (path.parent / "table.md").read_text(encoding="utf-8"))
        for path in sorted(root.glob("*/findings.md"))
    }
    if pages:
        with published(root) as new:
            (new / "README.md").write_text(overview(pages), encoding="utf-8")
        cli.say(f"all together in {root / 'README.md'}")


@contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Give a folder to write to, of this process alone; move its files into `folder` when the block ends well."""
    with TemporaryDirectory(dir=folder, prefix=".tables-") as name:
        yield Path(name)
        for path in Path(name).iterdir():
            path.replace(folder / path.name)


if __name__ == "__main__":
    cli.run(main)
