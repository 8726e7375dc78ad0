"""Make the table of attribution methods again, in seconds, from what a comparison kept.

    provgen faithfulness-table runs/digits
    provgen faithfulness-table docs/faithfulness/digits

After more subset models, another training seed of some, or `provgen leave-out`. Methods stay tuned as they were.
"""

from pathlib import Path
from typing import Annotated

import typer

from provgen import cli
from provgen.run import RunFolder
from provgen.studies.faithfulness import comparison
from provgen.studies.faithfulness.leave_out import read_moved
from provgen.studies.faithfulness.retraining import RetrainedFolder


def main(
    folder: Annotated[Path, typer.Argument(help="Run folder, or what was kept of one.")],
    models: Annotated[str, typer.Option(help="Folder of subset models in it.")] = "retrained",
    first_subset: Annotated[
        int,
        typer.Option(min=0, help="Report on subset models from this number on, such as those trained later."),
    ] = 0,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the intervals.")] = 1000,
) -> None:
    """Hold what methods predicted to the subset models; write table and figure."""
    run, retrained = RunFolder(folder), RetrainedFolder(folder / models)
    predictions = comparison.Predictions.load(run.faithfulness / "predictions.parquet")
    moved = read_moved(run.leave_out / "effects.parquet")
    if first_subset or retrained.root != run.retrained:
        predictions = predictions.without_hindsight()  # it was looked back on the others
    rows = comparison.compare(predictions, retrained, moved=moved, resamples=resamples, first_subset=first_subset)
    name = f"{models}_from_{first_subset}" if first_subset else models
    subsets = predictions.calibration_subsets
    print(comparison.write_tables(rows, run.faithfulness, name, calibration_subsets=subsets))


if __name__ == "__main__":
    cli.run(main)
