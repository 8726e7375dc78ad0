"""Leave out the sources that a method names, train again, generate from the same noise: does the sample change?

    provgen leave-out --run runs/digits

Methods are tuned as `provgen faithfulness` found; run that first. Writes outcomes/, rankings/, table.md and
effects.parquet into RUN/leave_out; `provgen faithfulness-table` puts the effects beside the LDS. The same command
goes on where it was stopped; --shard 1/2 and --shard 2/2 may run side by side. What a method names under its tuned
setting is found out once and kept: another machine rounds otherwise. After another calibration, run faithfulness first.
With --only-table the table is made again in a second.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch import Tensor

from provgen import build, cli
from provgen.data.images import to_unit_range
from provgen.errors import InputError
from provgen.run import RunFolder, claim_folder, require_run
from provgen.settings import Settings
from provgen.settings_file import load_settings
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.attributor import Attributor
from provgen.studies.faithfulness.leave_out import (
    NOTHING,
    LeaveOutFolder,
    LeftOut,
    Outcome,
    plan,
    share_of_class,
    strongest_first,
    write_table,
)
from provgen.studies.faithfulness.methods import make_methods, trace_queries
from provgen.studies.faithfulness.retraining import QueryImages, RetrainedFolder
from provgen.studies.faithfulness.tuning import Tuned
from provgen.studies.jobs import Shard, missing_models

METHODS = [
    "random", "random of the class", "pixel kernel", "closed form, trajectory", "calibrated trace, trajectory",
    "D-TRAK, 100 timesteps",
]  # fmt: skip


def main(
    run: Annotated[Path, typer.Option(help="Run folder that `provgen faithfulness` has been run on.")],
    num_queries: Annotated[int, typer.Option(min=2, help="Generated images.")] = 20,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Share of the training images left out; repeatable. Default: 0.05, 0.2."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each.")] = 2,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable. Default: six of them.")] = None,
    shard: Annotated[str, typer.Option(help="Which share of the models: 1/2 takes every other one.")] = "1/1",
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Make the table again of what is there; train nothing.")
    ] = False,
) -> None:
    """Train without what a method names; report how far the sample moves, and its loss."""
    names, shares, folder = method or METHODS, share or [0.05, 0.2], LeaveOutFolder(RunFolder(run).leave_out)
    if wrong := [value for value in shares if not 0 < value <= 0.9]:
        raise InputError(f"--share must be above 0 and at most 0.9, got {wrong[0]}")
    if only_table:
        outcomes = folder.load()
        if not outcomes:
            raise InputError(f"no models in {folder.root}; run `provgen leave-out` without --only-table first")
        made = {model.method for model in outcomes}
        print(write_table(folder.root, outcomes, method or [name for name in METHODS if name in made]))
        return
    portion, accelerator = Shard.parse(shard), build.make_accelerator(load_settings(require_run(run).config, []))
    trained = build.open_trained_run(run, accelerator.device)
    tuned, methods = tuned_methods(trained, names)
    samples = RetrainedFolder(trained.folder.retrained).load().queries["generated"]
    if accelerator.is_main_process:
        claim_folder(folder.root, retraining.fingerprint(trained.settings))
    accelerator.wait_for_everyone()
    # Samples that no method was tuned on.
    others = [n for n in range(len(samples.images)) if n not in set(tuned.calibration_queries)][:num_queries]
    rankings = ranked_sources(trained, tuned, methods, samples, others, folder)
    left_out = examples_left_out(rankings, plan(names, shares, others, seeds), len(trained.data.train))
    train_missing(left_out, trained, samples, folder, portion, accelerator)
    if accelerator.is_main_process:
        outcomes = measured(folder, left_out)
        if len(outcomes) == len(left_out):
            folder.compact()
        counts = [sum(model.method != NOTHING for model in models) for models in (outcomes, left_out)]
        table = write_table(folder.root, outcomes, names) if outcomes else "no query has every model yet"
        print(f"{counts[0]} of {counts[1]} models measured\n\n{table}")
        cli.say(f"table in {folder.root}")
    accelerator.end_training()


def tuned_methods(trained: build.TrainedRun, names: Sequence[str]) -> tuple[Tuned, dict[str, tuple[Attributor, Any]]]:
    """Read how methods were tuned; give these methods and their settings by name.

    Raises:
        InputError: One of them was not, or the pipeline was calibrated since.
    """
    folder = trained.folder.faithfulness
    tuned = Tuned.load(folder / "tuned.json")
    tuned.require(names)
    methods = {method.name: method for method in make_methods(trained, folder, num_timesteps=tuned.timesteps)}
    return tuned, {name: (methods[name].attributor, tuned.setting(methods[name])) for name in names}


def examples_left_out(
    rankings: Mapping[str, Mapping[int, Tensor]], planned: Sequence[LeftOut], num_train: int
) -> dict[LeftOut, Tensor]:
    """Give the examples that each model is trained without, int64 (left_out,), models without nothing first."""
    nothing = {LeftOut(seed=m.seed, share=0.0, query=m.query, method=NOTHING) for m in planned}
    left_out = {model: torch.empty(0, dtype=torch.int64) for model in sorted(nothing)}
    for model in planned:
        left_out[model] = rankings[model.method][model.query][: max(1, round(model.share * num_train))]
    return left_out


def measured(folder: LeaveOutFolder, left_out: Mapping[LeftOut, Tensor]) -> dict[LeftOut, Outcome]:
    """Read the models that have been measured without these very examples."""
    kept = folder.load()
    return {m: kept[m] for m, examples in left_out.items() if m in kept and torch.equal(kept[m].left_out, examples)}


def train_missing(
    left_out: Mapping[LeftOut, Tensor],
    trained: build.TrainedRun,
    samples: QueryImages,
    folder: LeaveOutFolder,
    shard: Shard,
    accelerator: Accelerator,
) -> None:
    """Train the models that are not there; one without nothing makes the samples of all queries."""
    groups: dict[int | LeftOut, list[LeftOut]] = {}
    for model in left_out:
        groups.setdefault(model.seed if model.method == NOTHING else model, []).append(model)
    kept = measured(folder, left_out)
    for group in missing_models(
        list(groups.values()),
        lambda group: all(model in kept for model in group),
        shard=shard,
        accelerator=accelerator,
        folder=folder.root,
        describe=lambda group: str(group[0]),
    ):
        mask = torch.ones(len(trained.data.train), dtype=torch.bool)
        mask[left_out[group[0]]] = False
        # With the run's own seed first.
        settings = retraining.subset_settings(trained.settings, seed=trained.settings.training.seed + group[0].seed)
        network = retraining.train_generator(settings, retraining.subset_data(trained.data, mask), accelerator)
        for model in group:
            folder.save(model, outcome(network, settings, trained, samples, model.query, left_out[model]))


def ranked_sources(
    trained: build.TrainedRun,
    tuned: Tuned,
    methods: Mapping[str, tuple[Attributor, Any]],
    samples: QueryImages,
    queries: Sequence[int],
    folder: LeaveOutFolder,
) -> dict[str, dict[int, Tensor]]:
    """Order training examples by what tuned methods say, int64 (train,) by name and sample; kept from then on."""
    rankings = {name: folder.load_rankings(name, tuned.ranking_key(name)) for name in methods}
    missing = [name for name in methods if not set(queries) <= set(rankings[name])]
    if not missing:
        return rankings
    traced = trace_queries(trained, {"generated": samples})["generated"]
    train = trained.data.train
    distances = torch.cdist(traced.images.flatten(1), to_unit_range(train.images).flatten(1))
    for name in missing:
        attributor, setting = methods[name]
        attributor.fit(train)
        order = strongest_first(attributor.attribute(traced, only=setting).under(setting), distances)
        rankings[name] = {query: order[query] for query in queries} | rankings[name]
        folder.save_rankings(name, tuned.ranking_key(name), rankings[name])
    return rankings


def outcome(
    network: Any, settings: Settings, trained: build.TrainedRun, samples: QueryImages, query: int, left_out: Tensor
) -> Outcome:
    """Make a sample again, and measure the loss on it."""
    label, train = int(samples.labels[query]), trained.data.train
    sample = QueryImages(images=samples.images[[query]], labels=samples.labels[[query]])
    losses = retraining.query_losses(network, settings, train, {"generated": sample})
    return Outcome(
        left_out=left_out,
        share_of_class=share_of_class(left_out, train.labels, label),
        image=retraining.regenerate(network, trained, label=label, seed=query),
        loss=float(losses["generated"].mean()),
    )


if __name__ == "__main__":
    cli.run(main)
