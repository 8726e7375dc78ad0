"""Compare attribution methods by the linear datamodeling score, on the subset models of `provgen retrain`.

    provgen faithfulness --run runs/digits

Every method, and a mixture of all, is tuned on the same few subset models and queries and reported on the rest. Writes
retrained.parquet and retrained.md into RUN/faithfulness; gradients are kept there, and the same command goes on where
it was stopped.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from provgen import build, cli, faithfulness, runs
from provgen.analysis.calibration_split import Split, Tuned, reported, tune
from provgen.analysis.datamodeling import LdsComparison, noise_ceiling
from provgen.attribution.attributor import Cost
from provgen.attribution.mixture import fit_mixture
from provgen.errors import InputError
from provgen.report.faithfulness_table import LdsRow, markdown_table, write_parquet
from provgen.retrained_files import KINDS, RetrainedFolder
from provgen.run_folder import atomic_path

REFERENCES = {
    "generated": ("random", "pixel kernel", "provenance network, trajectory"),
    "holdout": ("random", "pixel kernel", "provenance network, noised"),
}
"""Methods that every other is compared with, pair by pair."""


def main(
    run: Annotated[Path, typer.Option(help="Run folder whose subset models have been trained.")],
    calibration_subsets: Annotated[int, typer.Option(help="Subset models that methods are tuned on.")] = 16,
    timesteps: Annotated[
        list[int] | None, typer.Option(help="Noise levels of gradient methods; repeatable. Default: 10.")
    ] = None,
    models: Annotated[str, typer.Option(help="Folder of subset models in the run.")] = "retrained",
    resamples: Annotated[int, typer.Option(min=10, help="Bootstrap resamples of the intervals.")] = 1000,
) -> None:
    """Write the table of methods: LDS with interval and ceiling, seconds and bytes."""
    accelerator = build.make_accelerator()
    if accelerator.num_processes > 1:
        raise InputError("faithfulness runs in one process; start it without accelerate launch")
    trained = runs.open_trained_run(run, accelerator.device)
    retrained = RetrainedFolder(run / models).load()
    losses = retrained.losses
    seeds, num_queries, num_subsets = losses["generated"].shape
    print(f"{num_subsets} subset models of {seeds} seeds, {num_queries} queries of either kind", flush=True)
    split = Split.draw(num_subsets, num_queries, calibration=calibration_subsets, seed=0)
    queries = faithfulness.trace_queries(trained, retrained.queries)
    folder, steps = run / "faithfulness", tuple(timesteps or [10])
    methods = faithfulness.make_methods(trained, folder, num_timesteps=steps)

    chosen_scores: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
    settings: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
    costs: dict[str, Cost] = {}
    for name, method in methods.items():
        scores, costs[name] = faithfulness.score(method, trained.data.train, queries)
        for kind in KINDS:
            if kind == "holdout" and name.endswith("trajectory"):
                continue  # they have none
            outputs = -losses[kind].mean(dim=0)
            settings[kind][name] = chosen = tune(scores[kind], retrained.masks, outputs, split)
            chosen_scores[kind][name] = scores[kind].of(chosen)
        print(f"{name}: {costs[name].fit_seconds:.0f} s to set up", flush=True)

    rows = []
    for kind in KINDS:
        mixed, weights = mixtures(chosen_scores[kind], retrained.masks, -losses[kind].mean(dim=0), split)
        settings[kind] |= weights
        predicted = {
            name: reported(some, retrained.masks, split)
            for name, some in (chosen_scores[kind] | mixed).items()
        }
        outputs = -losses[kind][:, ~split.queries][:, :, ~split.subsets]
        compared = LdsComparison(predicted, outputs.mean(dim=0), seed=0, resamples=resamples)
        ceiling = noise_ceiling(outputs, seed=0, resamples=resamples) if seeds > 1 else None
        rows += [
            LdsRow(
                method=name,
                queries=kind,
                setting=settings[kind][name],
                lds=compared.estimate(name),
                over={other: compared.difference(name, other) for other in REFERENCES[kind]},
                ceiling=ceiling,
                cost=costs.get(name),
            )
            for name in predicted
        ]
    calibration = split.queries.nonzero().flatten().tolist()
    tuned = Tuned(
        calibration_queries=calibration,
        timesteps=steps,
        settings={name: settings["generated"][name] for name in methods},
    )
    tuned.save(folder / "tuned.json")
    write_parquet(folder / f"{models}.parquet", rows)
    with atomic_path(folder / f"{models}.md") as partial:
        partial.write_text(markdown_table(rows), encoding="utf-8")
    print(f"{markdown_table(rows)}\ntables in {folder}")


def mixtures(
    scores: Mapping[str, Tensor], masks: Tensor, outputs: Tensor, split: Split
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Mix the evidence of all methods, and of all but the provenance network, as calibration says.

    Returns:
        Scores (query, train) of both, and their weights in words.
    """
    mixed, words = {}, {}
    everything = [name for name in scores if name not in ("random", "same class")]
    without = [name for name in everything if not name.startswith("provenance network")]
    for title, names in (("mixture", everything), ("mixture without the provenance network", without)):
        evidence = {name: scores[name] for name in names}
        seen = {name: some[split.queries] for name, some in evidence.items()}
        mixture = fit_mixture(seen, masks[split.subsets], outputs[split.queries][:, split.subsets])
        mixed[title] = mixture(evidence)
        ranked = sorted(mixture.weights.items(), key=lambda item: -item[1])
        words[title] = "; ".join(f"{weight:.2f} {name}" for name, weight in ranked if weight >= 0.005)
    return mixed, words


if __name__ == "__main__":
    cli.run(main)
