"""Leave out the sources that a method names, train again, generate from the same noise: does the sample change?

    provgen leave-out --run runs/digits

Methods are tuned as `provgen faithfulness` found; run that first. Writes a small file for every model and table.md into
RUN/leave_out. The same command goes on where it was stopped; parts 1/2 and 2/2 may run side by side.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from torch import Tensor

from provgen import build, cli, evaluation, faithfulness, retraining, runs
from provgen.analysis.leave_out import strongest
from provgen.data.dataset import ImageSet
from provgen.experiments import Part
from provgen.leave_out_files import LeaveOutFolder, LeftOut, Outcome, plan
from provgen.report.leave_out_table import effect_table, leave_out_effects
from provgen.retrained_files import RetrainedFolder
from provgen.run_folder import atomic_path

METHODS = [
    "random",
    "pixel kernel",
    "closed form, trajectory",
    "provenance network, trajectory",
    "D-TRAK, 10 timesteps",
]
REFERENCES = ("random", "pixel kernel")
SEED = 2000
"""Training seed of the first model of each kind."""


def main(
    run: Annotated[Path, typer.Option(help="Run folder that `provgen faithfulness` has been run on.")],
    num_queries: Annotated[int, typer.Option(min=2, help="Generated images.")] = 20,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Share of the training images left out; repeatable. Default: 0.05, 0.2."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each.")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: five of them.")] = None,
    part: Annotated[str, typer.Option(help="Which share of the models: 1/2 takes every other one.")] = "1/1",
) -> None:
    """Train without what a method names; report how far the sample moves, and its loss."""
    portion, accelerator = Part.parse(part), build.make_accelerator()
    trained, names, shares = (
        runs.open_trained_run(run, accelerator.device),
        method or METHODS,
        share or [0.05, 0.2],
    )
    tuned = faithfulness.Tuned.load(run / "faithfulness" / "tuned.json")
    tuned.require(names)
    retrained = RetrainedFolder(run / "retrained").load()
    count = retrained.losses["generated"].shape[1]
    samples = retraining.make_queries(trained, count)["generated"]
    split = faithfulness.Split.draw(
        len(retrained.masks), count, calibration=tuned.calibration_subsets, seed=0
    )
    # Those that no method was tuned on.
    queries = (~split.queries).nonzero().flatten()[:num_queries]

    planned = plan(names, shares, queries.tolist(), seeds)
    mine = portion.share(planned)[accelerator.process_index :: accelerator.num_processes]
    folder = LeaveOutFolder(run / "leave_out")
    waiting = [model for model in mine if not folder.has(model)]
    print(
        f"{len(mine)} models into {folder.root}, {len(mine) - len(waiting)} of them measured before",
        flush=True,
    )
    ranked = rank_sources(trained, tuned, names, samples, run / "faithfulness") if waiting else {}
    start = time.perf_counter()
    for done, model in enumerate(waiting, start=1):
        left_out = strongest(ranked[model.method][model.query], round(model.share * len(trained.data.train)))
        folder.save(model, left_out, train_without(trained, left_out, model, samples, accelerator))
        left = (time.perf_counter() - start) / done * (len(waiting) - done) / 60
        print(f"[{done}/{len(waiting)}] {model}; about {left:.0f} min left", flush=True)
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        outcomes = dict(folder.measured(planned))
        table = leave_out_table(trained, samples, outcomes, names, shares)
        with atomic_path(folder.root / "table.md") as partial:
            partial.write_text(table, encoding="utf-8")
        print(f"{len(outcomes)} of {len(planned)} models measured\n\n{table}\ntable in {folder.root}")
    accelerator.end_training()


def rank_sources(
    trained: runs.TrainedRun, tuned: faithfulness.Tuned, names: Sequence[str], samples: ImageSet, folder: Path
) -> dict[str, Tensor]:
    """Score all training examples for every sample, as tuned: (query, train) by method."""
    queries = faithfulness.trace_queries(trained, {"generated": samples})["generated"]
    timesteps = sorted({int(name.split()[-2]) for name in tuned.settings if name.endswith("timesteps")})
    methods = faithfulness.make_methods(trained, folder, num_timesteps=tuple(timesteps))
    ranked = {}
    for name in names:
        methods[name].fit(trained.data.train)
        ranked[name] = methods[name].attribute(queries).of(tuned.settings[name])
    return ranked


def train_without(
    trained: runs.TrainedRun, left_out: Tensor, model: LeftOut, samples: ImageSet, accelerator: Accelerator
) -> Outcome:
    """Train without some examples, and generate the sample again."""
    mask = torch.ones(len(trained.data.train), dtype=torch.bool)
    mask[left_out] = False
    settings = retraining.subset_settings(trained.settings, seed=SEED + model.seed)
    network = retraining.train_generator(settings, retraining.subset_data(trained.data, mask), accelerator)
    sample = samples.select(torch.tensor([model.query]))
    return Outcome(
        image=retraining.regenerate(network, trained, label=int(sample.labels[0]), seed=model.query),
        loss=float(evaluation.losses(network, settings, sample)[0]),
    )


def leave_out_table(
    trained: runs.TrainedRun,
    samples: ImageSet,
    outcomes: Mapping[LeftOut, Outcome],
    names: Sequence[str],
    shares: Sequence[float],
) -> str:
    """Compare methods over the queries of which every method has every seed."""
    lines = []
    for some in shares:
        found = {model: outcome for model, outcome in outcomes.items() if model.share == some}
        for title, effects in leave_out_effects(found, samples.images, names).items():
            lines.append(f"{some:.0%} of {len(trained.data.train)} training images left out: {title}\n")
            lines.append(effect_table(effects, [name for name in REFERENCES if name in names]))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
