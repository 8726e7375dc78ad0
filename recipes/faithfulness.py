"""Compare attribution methods by the linear datamodeling score, on the subset models of `provgen retrain`.

    provgen faithfulness --run runs/digits

Every method is tuned on the same few subset models and queries and reported on the rest. Writes table.parquet and
table.md into RUN/faithfulness; gradients are kept there, and the same command goes on where it was stopped.
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from provgen import build, cli, faithfulness, retraining, runs
from provgen.analysis.datamodeling import LdsComparison, noise_ceiling
from provgen.errors import InputError
from provgen.report.faithfulness_table import LdsRow, markdown_table, write_parquet
from provgen.retrained_files import KINDS, RetrainedFolder

REFERENCES = ("random", "pixel kernel")
"""Methods that every other is compared with, pair by pair."""


def main(
    run: Annotated[Path, typer.Option(help="Run folder whose subset models have been trained.")],
    calibration_subsets: Annotated[int, typer.Option(help="Subset models that methods are tuned on.")] = 16,
    timesteps: Annotated[
        list[int] | None, typer.Option(help="Noise levels of gradient methods; repeatable. Default: 10.")
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the intervals.")] = 1000,
) -> None:
    """Write the table of methods: LDS with interval and ceiling, seconds and bytes."""
    accelerator = build.make_accelerator()
    if accelerator.num_processes > 1:
        raise InputError("faithfulness runs in one process; start it without accelerate launch")
    trained = runs.open_trained_run(run, accelerator.device)
    retrained = RetrainedFolder(run / "retrained").load()
    num_queries = retrained.losses["generated"].shape[1]
    images = retraining.make_queries(trained, num_queries)
    queries = faithfulness.trace_queries(trained, images)
    split = faithfulness.Split.draw(
        len(retrained.masks), num_queries, calibration=calibration_subsets, seed=0
    )
    outputs = {kind: -retrained.losses[kind].mean(dim=0) for kind in KINDS}

    folder = run / "faithfulness"
    methods = faithfulness.make_methods(trained, folder, num_timesteps=tuple(timesteps or [10]))
    predicted: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
    settings: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    costs = {}
    for name, method in methods.items():
        costs[name] = found = faithfulness.score(method, trained.data.train, queries)
        for kind in KINDS:
            scores = found.scores[kind]
            settings[kind][name] = chosen = faithfulness.tune(scores, retrained.masks, outputs[kind], split)
            predicted[kind][name] = faithfulness.reported(scores.of(chosen), retrained.masks, split)
        print(f"{name}: {found.fit_seconds + found.seconds_per_query * 2 * num_queries:.0f} s", flush=True)

    rows = []
    for kind in KINDS:
        measured = outputs[kind][~split.queries][:, ~split.subsets]
        compared = LdsComparison(predicted[kind], measured, seed=0, resamples=resamples)
        losses = retrained.losses[kind][:, ~split.queries][:, :, ~split.subsets]
        ceiling = noise_ceiling(-losses) if len(losses) > 1 else None
        rows += [
            LdsRow(
                method=name,
                queries=kind,
                setting=settings[kind][name],
                lds=compared.estimate(name),
                over={other: compared.difference(name, other) for other in REFERENCES},
                ceiling=ceiling,
                fit_seconds=costs[name].fit_seconds,
                seconds_per_query=costs[name].seconds_per_query,
                stored_bytes=costs[name].stored_bytes,
            )
            for name in methods
        ]
    tuned = faithfulness.Tuned(calibration_subsets=calibration_subsets, settings=settings["generated"])
    tuned.save(folder / "tuned.json")
    write_parquet(folder / "table.parquet", rows)
    (folder / "table.md").write_text(markdown_table(rows), encoding="utf-8")
    print(markdown_table(rows))
    print(f"tables in {folder}")


if __name__ == "__main__":
    cli.run(main)
