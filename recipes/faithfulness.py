"""Compare attribution methods by the linear datamodeling score, on the subset models of `provgen retrain`.

    provgen faithfulness --run runs/digits

Every method, and an ensemble of all, is tuned on the same few subset models and queries and reported on the rest.
The command writes retrained.parquet, .md and .png into RUN/faithfulness, and predictions.parquet, of which
`provgen faithfulness-table` makes them again. It keeps gradients there, and goes on where it was stopped.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor

from provgen import build, cli
from provgen.data.dataset import ImageSet
from provgen.errors import InputError
from provgen.models.credit import CreditHead
from provgen.run import only_writer
from provgen.studies.faithfulness import comparison
from provgen.studies.faithfulness.attributor import Method, MethodLabel, Queries, Role
from provgen.studies.faithfulness.leave_out import read_moved
from provgen.studies.faithfulness.methods import TunedScores, make_methods, trace_queries, tuned_scores
from provgen.studies.faithfulness.retraining import KINDS, Retrained, RetrainedFolder
from provgen.studies.faithfulness.tuning import Split, Tuned, best_in_hindsight, fields_of, fit_ensemble, tune
from provgen.tracing.calibrate import AttributionScores, S

ENSEMBLE = MethodLabel(name="ensemble", uses_provenance=True, role=Role.ENSEMBLE)
WITHOUT_NETWORK = MethodLabel(name="ensemble without the provenance network", role=Role.ENSEMBLE)


def main(
    run: Annotated[Path, typer.Option(help="Run folder whose subset models have been trained.")],
    calibration_subsets: Annotated[int, typer.Option(help="Subset models that methods are tuned on.")] = 16,
    timesteps: Annotated[
        list[int] | None, typer.Option(help="Noise levels of gradient methods; repeatable. Default: 10.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help='Methods left out, by the start of their names, such as "TRAK"; repeatable.'),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Methods added to an earlier table, by the start of their names; repeatable."),
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the intervals.")] = 1000,
) -> None:
    """Write the table of methods: LDS with interval and ceiling, seconds and bytes."""
    accelerator = build.make_accelerator()
    if accelerator.num_processes > 1:
        raise InputError("faithfulness runs in one process; start it without accelerate launch")
    trained = build.open_trained_run(run, accelerator.device)
    with only_writer(trained.folder.faithfulness, "provgen faithfulness"):
        compare_methods(trained, calibration_subsets, timesteps, skip, only, resamples)


def compare_methods(
    trained: build.TrainedRun,
    calibration_subsets: int,
    timesteps: list[int] | None,
    skip: list[str] | None,
    only: list[str] | None,
    resamples: int,
) -> None:
    """Tune methods on some subset models, and hold what they predict to the others; write what was found."""
    models = RetrainedFolder(trained.folder.retrained)
    retrained = models.load()
    seeds, num_queries, num_subsets = retrained.losses["generated"].shape
    cli.say(f"{num_subsets} subset models of {seeds} seeds, {num_queries} queries of either kind")
    split = Split.first(retrained.subsets, num_queries, calibration=calibration_subsets)
    require_calibration(trained.pipeline.credit, calibration_subsets)
    queries = trace_queries(trained, retrained.queries)
    folder, steps = trained.folder.faithfulness, timesteps or [10]
    methods = without(make_methods(trained, folder, num_timesteps=steps), skip or [])
    before = Tuned(calibration_queries=split.queries.nonzero().flatten().tolist(), timesteps=[], settings={})
    earlier = None
    if only:
        earlier, before = comparison.Predictions.load(folder / "predictions.parquet"), Tuned.load(folder / "tuned.json")
    if earlier is not None:
        methods = added(methods, only or [], earlier, calibration_subsets)
    tuned = tune_methods(methods, trained.data.train, queries, retrained, split)
    rows = [row for kind in KINDS for row in predictions_of(kind, tuned, models.masks())]
    if earlier is not None:
        rows = comparison.with_added(earlier.rows, rows)
    else:
        rows += [row for kind in KINDS for row in ensembles_of(kind, tuned, models.masks(), retrained, split)]
    levels = steps if earlier is None else timesteps or []
    before.with_added(settings_of(tuned), levels).save(folder / "tuned.json")
    predictions = comparison.Predictions(rows=rows, calibration_subsets=calibration_subsets)
    predictions.save(folder / "predictions.parquet")
    moved = read_moved(trained.folder.leave_out / "effects.parquet")
    table = comparison.compare(predictions, models, moved=moved, resamples=resamples)
    print(comparison.write_tables(table, folder, "retrained", calibration_subsets=calibration_subsets))


def tune_methods(
    methods: Sequence[Method], train: ImageSet, queries: Mapping[str, Queries], retrained: Retrained, split: Split
) -> dict[MethodLabel, TunedScores]:
    """Fit every method and tune it on the calibration part, for each kind of query by itself."""
    outputs = {kind: -losses.mean(dim=0) for kind, losses in retrained.losses.items()}

    def choose(kind: str, scores: AttributionScores[S]) -> S:
        return tune({kind: scores}, retrained.masks, outputs, split)

    def look_back(kind: str, scores: AttributionScores[S]) -> float:
        return best_in_hindsight(scores, retrained.masks, outputs[kind], split)

    tuned = {}
    for method in methods:
        # Held-out images have no trajectory.
        asked = {k: q for k, q in queries.items() if method.label.along != "trajectory" or q.trajectory is not None}
        tuned[method.label] = tuned_scores(method.attributor, train, asked, choose, look_back)
        cli.say(f"{method.name}: {tuned[method.label].cost.fit_seconds:.0f} s to set up")
    return tuned


def without(methods: Sequence[Method], skipped: Sequence[str]) -> list[Method]:
    """Leave out the methods whose names start so.

    Raises:
        InputError: There is none, or others are compared with it.
    """
    for start in skipped:
        matching = [method for method in methods if method.name.startswith(start)]
        if not matching or any(method.label.is_reference for method in matching):
            names = "; ".join(method.name for method in methods if not method.label.is_reference)
            raise InputError(f"--skip {start!r} must be the start of one of: {names}")
    return [method for method in methods if not method.name.startswith(tuple(skipped))]


def added(
    methods: Sequence[Method], only: Sequence[str], earlier: comparison.Predictions, calibration_subsets: int
) -> list[Method]:
    """Choose the methods whose names start so, to be added to earlier predictions.

    Raises:
        InputError: There is none, or the earlier ones were tuned on another number of subset models.
    """
    if earlier.calibration_subsets != calibration_subsets:
        raise InputError(
            f"the earlier table was tuned on {earlier.calibration_subsets} subset models, and --calibration-subsets is "
            f"{calibration_subsets}; give the same number, or leave out --only to make the table anew"
        )
    for start in only:
        if not any(method.name.startswith(start) for method in methods):
            names = "; ".join(method.name for method in methods)
            raise InputError(f"--only {start!r} must be the start of one of: {names}")
    return [method for method in methods if method.name.startswith(tuple(only))]


def require_calibration(credit: CreditHead | None, calibration_subsets: int) -> None:
    """Refuse to report on subset models that the weights were calibrated on.

    Raises:
        InputError: It was calibrated on another number of them.
    """
    if credit is not None and credit.config.calibration_subsets not in (0, calibration_subsets):
        raise InputError(
            f"the run was calibrated on {credit.config.calibration_subsets} subset models, and "
            f"--calibration-subsets is {calibration_subsets}; give both the same number"
        )


def settings_of(tuned: Mapping[MethodLabel, TunedScores]) -> dict[str, dict[str, Any]]:
    """Give the settings that were chosen, which leaving sources out goes by, by name of the method."""
    return {label.name: fields_of(method.settings["generated"]) for label, method in tuned.items()}


def predictions_of(
    kind: str, tuned: Mapping[MethodLabel, TunedScores], masks: Tensor
) -> Iterator[comparison.Prediction]:
    """Give what every method predicts of all subsets, masks (subset, train), for one kind of query."""
    for label, method in tuned.items():
        if kind in method.scores:
            yield comparison.predict(
                method.scores[kind],
                masks,
                label=label,
                queries=kind,
                setting=str(method.settings[kind]),
                cost=method.cost,
                hindsight=method.hindsight[kind],
            )


def ensembles_of(
    kind: str, tuned: Mapping[MethodLabel, TunedScores], masks: Tensor, retrained: Retrained, split: Split
) -> Iterator[comparison.Prediction]:
    """Give what ensembles of the methods predict, with the provenance network and without."""
    methods = {label: method for label, method in tuned.items() if kind in method.scores}
    outputs = -retrained.losses[kind].mean(dim=0)[split.queries][:, split.subsets]
    for title in (ENSEMBLE, WITHOUT_NETWORK):
        chosen = {
            label.name: method.scores[kind]
            for label, method in methods.items()
            if label.role != Role.CHANCE and (title.uses_provenance or not label.uses_provenance)
        }
        calibration = {name: values[split.queries] for name, values in chosen.items()}
        ensemble = fit_ensemble(calibration, retrained.masks[split.subsets], outputs)
        yield comparison.predict(ensemble(chosen), masks, label=title, queries=kind, setting=str(ensemble), cost=None)


if __name__ == "__main__":
    cli.run(main)
