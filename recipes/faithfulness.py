"""Compare attribution methods by the linear datamodeling score, on the subset models of `provgen retrain`.

    provgen faithfulness --run runs/digits

Every method, and a mixture of all, is tuned on the same few subset models and queries and reported on the rest. Writes
retrained.parquet, .md and .png into RUN/faithfulness, and predictions.parquet, of which `provgen faithfulness-table`
makes them again. Gradients are kept there, and the same command goes on where it was stopped.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from provgen import build, cli
from provgen.data.dataset import ImageSet
from provgen.errors import InputError
from provgen.models.credit import CreditHead
from provgen.studies.faithfulness import comparison
from provgen.studies.faithfulness.attributor import AttributionScores, Attributor, Queries
from provgen.studies.faithfulness.leave_out import read_moved
from provgen.studies.faithfulness.methods import TunedScores, make_methods, trace_queries, tuned_scores
from provgen.studies.faithfulness.retraining import KINDS, Retrained, RetrainedFolder
from provgen.studies.faithfulness.tuning import Split, Tuned, fit_ensemble, tune


def main(
    run: Annotated[Path, typer.Option(help="Run folder whose subset models have been trained.")],
    calibration_subsets: Annotated[int, typer.Option(help="Subset models that methods are tuned on.")] = 16,
    timesteps: Annotated[
        list[int] | None, typer.Option(help="Noise levels of gradient methods; repeatable. Default: 10.")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help='Methods left out, by the start of their names, such as "TRAK, 100"; repeatable.'),
    ] = None,
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the intervals.")] = 1000,
) -> None:
    """Write the table of methods: LDS with interval and ceiling, seconds and bytes."""
    accelerator = build.make_accelerator()
    if accelerator.num_processes > 1:
        raise InputError("faithfulness runs in one process; start it without accelerate launch")
    trained = build.open_trained_run(run, accelerator.device)
    models = RetrainedFolder(run / "retrained")
    retrained, masks = models.load(), models.masks()
    seeds, num_queries, num_subsets = retrained.losses["generated"].shape
    print(f"{num_subsets} subset models of {seeds} seeds, {num_queries} queries of either kind", flush=True)
    split = Split.first(retrained.subsets, num_queries, calibration=calibration_subsets)
    require_calibration(trained.pipeline.credit, calibration_subsets)
    queries = trace_queries(trained, retrained.queries)
    folder, steps = run / "faithfulness", tuple(timesteps or [10])
    methods = without(make_methods(trained, folder, num_timesteps=steps), skip or [])
    tuned = tune_methods(methods, trained.data.train, queries, retrained, split)
    predictions = [
        row for kind in KINDS for row in predictions_of(kind, tuned, masks, ensembles_of(kind, tuned, retrained, split))
    ]
    chosen = Tuned(
        calibration_queries=split.queries.nonzero().flatten().tolist(),
        timesteps=steps,
        settings={name: some.settings["generated"] for name, some in tuned.items()},
    )
    chosen.save(folder / "tuned.json")
    kept = comparison.Predictions(rows=predictions, calibration_subsets=calibration_subsets)
    kept.save(folder / "predictions.parquet")
    moved = read_moved(run / "leave_out" / "effects.parquet")
    rows = comparison.compare(kept, models, moved=moved, resamples=resamples)
    print(comparison.write_tables(rows, folder, "retrained"))


def tune_methods(
    methods: Mapping[str, Attributor],
    train: ImageSet,
    queries: Mapping[str, Queries],
    retrained: Retrained,
    split: Split,
) -> dict[str, TunedScores]:
    """Fit every method and tune it on the calibration part, for each kind of query by itself."""
    outputs = {kind: -losses.mean(dim=0) for kind, losses in retrained.losses.items()}

    def choose(kind: str, scores: AttributionScores) -> str:
        return tune({kind: scores}, retrained.masks, outputs, split)

    tuned = {}
    for name, method in methods.items():
        # Held-out images have no trajectory.
        asked = {kind: some for kind, some in queries.items() if kind == "generated" or not is_along(name)}
        tuned[name] = tuned_scores(method, train, asked, choose)
        print(f"{name}: {tuned[name].cost.fit_seconds:.0f} s to set up", flush=True)
    return tuned


def without(methods: Mapping[str, Attributor], skipped: Sequence[str]) -> dict[str, Attributor]:
    """Leave out the methods whose names start so.

    Raises:
        InputError: There is none, or others are compared with it.
    """
    for start in skipped:
        found = [name for name in methods if name.startswith(start)]
        if not found or set(found) & set(comparison.REFERENCES):
            names = "; ".join(name for name in methods if name not in comparison.REFERENCES)
            raise InputError(f"--skip {start!r} must be the start of one of: {names}")
    return {name: method for name, method in methods.items() if not name.startswith(tuple(skipped))}


def is_along(name: str) -> bool:
    """Whether a method follows the sampling trajectory."""
    return name.endswith("trajectory")


def require_calibration(credit: CreditHead | None, calibration_subsets: int) -> None:
    """Refuse to report on subset models that the weights were calibrated on.

    Raises:
        InputError: It was calibrated on another number of them.
    """
    if credit is not None and credit.config.calibration_subsets != calibration_subsets:
        raise InputError(
            f"the run was calibrated on {credit.config.calibration_subsets} subset models, and "
            f"--calibration-subsets is {calibration_subsets}; give both the same number"
        )


def ensembles_of(
    kind: str, tuned: Mapping[str, TunedScores], retrained: Retrained, split: Split
) -> dict[str, tuple[Tensor, str]]:
    """Mix the evidence of all methods, and of all but the provenance network, as calibration says.

    Returns:
        Scores (query, train) of both, and their weights in words.
    """
    outputs = -retrained.losses[kind].mean(dim=0)
    scores = {name: some.scores[kind] for name, some in tuned.items() if kind in some.scores}
    everything = [name for name in scores if name not in ("random", "same class")]
    rivals = [name for name in everything if "provenance" not in name and "calibrated" not in name]
    combined = {}
    for title, names in (("ensemble", everything), ("ensemble without the provenance network", rivals)):
        evidence = {name: scores[name] for name in names}
        seen = {name: some[split.queries] for name, some in evidence.items()}
        ensemble = fit_ensemble(seen, retrained.masks[split.subsets], outputs[split.queries][:, split.subsets])
        ranked = sorted(ensemble.weights.items(), key=lambda item: -item[1])
        words = "; ".join(f"{weight:.2f} {name}" for name, weight in ranked if weight >= 0.005)
        combined[title] = (ensemble(evidence), words)
    return combined


def predictions_of(
    kind: str, tuned: Mapping[str, TunedScores], masks: Tensor, combined: Mapping[str, tuple[Tensor, str]]
) -> list[comparison.Prediction]:
    """Give what every method and ensemble predicts of all subsets for one kind of query."""
    methods = [
        comparison.predict(
            some.scores[kind], masks, method=name, queries=kind, setting=some.settings[kind], cost=some.cost
        )
        for name, some in tuned.items()
        if kind in some.scores
    ]
    return methods + [
        comparison.predict(scores, masks, method=name, queries=kind, setting=words, cost=None)
        for name, (scores, words) in combined.items()
    ]


if __name__ == "__main__":
    cli.run(main)
