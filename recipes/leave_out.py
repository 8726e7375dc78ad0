"""Leave out the sources that a method names, train again, generate from the same noise: does the sample change?

    provgen leave-out --run runs/digits

Methods are tuned as `provgen faithfulness` found; run that first. Writes a small file for every model, table.md and
effects.parquet into RUN/leave_out; `provgen faithfulness-table` puts the effects beside the LDS. The same command
goes on where it was stopped; parts 1/2 and 2/2 may run side by side. What a method names under its tuned
setting is found out once and kept: another machine rounds otherwise. After another calibration, run faithfulness first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator
from torch import Tensor

from provgen import build, cli
from provgen.data.images import to_unit_range
from provgen.errors import InputError
from provgen.models.credit import CreditHead
from provgen.run import atomic_path, claim_folder, require_run
from provgen.settings import Settings
from provgen.settings_file import load_settings
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.leave_out import (
    NOTHING,
    LeaveOutFolder,
    LeftOut,
    Outcome,
    effect_rows,
    effect_table,
    leave_out_effects,
    plan,
    strongest_first,
    write_effects,
)
from provgen.studies.faithfulness.methods import make_methods, trace_queries
from provgen.studies.faithfulness.retraining import QueryImages, RetrainedFolder
from provgen.studies.faithfulness.tuning import Tuned
from provgen.studies.jobs import Shard, missing_models

METHODS = [
    "random",
    "pixel kernel",
    "closed form, trajectory",
    "calibrated trace, trajectory",
    "D-TRAK, 100 timesteps",
]
REFERENCES = ("random", "pixel kernel")


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
    portion, names, shares = Shard.parse(part), method or METHODS, share or [0.05, 0.2]
    if bad := [some for some in shares if not 0 < some <= 0.9]:
        raise InputError(f"--share must be above 0 and at most 0.9, got {bad[0]}")
    accelerator = build.make_accelerator(load_settings(require_run(run).config, []))
    trained = build.open_trained_run(run, accelerator.device)
    tuned = Tuned.load(run / "faithfulness" / "tuned.json")
    tuned.require(names)
    require_same_calibration(tuned, names, trained.pipeline.credit)
    samples = RetrainedFolder(run / "retrained").load().queries["generated"]
    folder = LeaveOutFolder(run / "leave_out")
    if accelerator.is_main_process:
        claim_folder(folder.root, retraining.fingerprint(trained.settings))
    accelerator.wait_for_everyone()

    # Samples that no method was tuned on.
    others = [n for n in range(len(samples.images)) if n not in set(tuned.calibration_queries)][:num_queries]
    planned = plan(names, shares, others, seeds)
    nothing = plan([NOTHING], [0.0], others, seeds)
    rankings = ranked_sources(trained, tuned, names, samples, folder)
    left_out = {m: rankings[m.method][m.query][: max(1, round(m.share * len(trained.data.train)))] for m in planned}
    left_out |= {model: torch.empty(0, dtype=torch.int64) for model in nothing}
    # Nothing is left out once for all samples.
    samples_of = {model: [m for m in nothing if m.seed == model.seed] for model in nothing}

    for model in missing_models(
        [*nothing[:: len(others)], *planned],
        lambda model: all(folder.has(some, left_out[some]) for some in samples_of.get(model, [model])),
        part=portion,
        accelerator=accelerator,
        folder=folder.root,
        say=partial(print, flush=True),
    ):
        network, settings = train_without(trained, left_out[model], model.seed, accelerator)
        for some in samples_of.get(model, [model]):
            folder.save(some, outcome(network, settings, trained, samples, some, left_out[some]))
    if accelerator.is_main_process:
        there = {m: folder.load(m) for m in [*nothing, *planned] if folder.has(m, left_out[m])}
        table = write_table(folder.root, there, names, shares, trained.data.train.labels, samples.labels)
        print(f"{len(set(there) & set(planned))} of {len(planned)} models measured\n\n{table}")
        print(f"table in {folder.root}")
    accelerator.end_training()


def require_same_calibration(tuned: Tuned, names: Sequence[str], credit: CreditHead | None) -> None:
    """Refuse a calibrated trace that was compared under another calibration than the pipeline's.

    Raises:
        InputError: It was calibrated since.
    """
    if credit is None:  # a copy that goes on with what methods named
        return
    for name in names:
        if name.startswith("calibrated trace") and tuned.settings[name] != credit.setting:
            raise InputError("this run was calibrated again since `provgen faithfulness`; run that first")


def ranked_sources(
    trained: build.TrainedRun,
    tuned: Tuned,
    names: Sequence[str],
    samples: QueryImages,
    folder: LeaveOutFolder,
) -> dict[str, Tensor]:
    """Order training examples by what tuned methods say, int64 (query, train) by name; kept from the first time on."""
    found = {name: folder.load_ranking(name, tuned.settings[name]) for name in names}
    known = {name: ranking for name, ranking in found.items() if ranking is not None}
    missing = [name for name in names if name not in known]
    if not missing:
        return known
    queries = trace_queries(trained, {"generated": samples})["generated"]
    gradients = folder.root.parent / "faithfulness"
    methods = make_methods(trained, gradients, num_timesteps=tuple(tuned.timesteps))
    train = trained.data.train
    distances = torch.cdist(queries.images.flatten(1), to_unit_range(train.images).flatten(1))
    for name in missing:
        methods[name].fit(train)
        scores = methods[name].attribute(queries).of(tuned.settings[name])
        known[name] = strongest_first(scores, distances)
        folder.save_ranking(name, tuned.settings[name], known[name])
    return known


def train_without(
    trained: build.TrainedRun, left_out: Tensor, seed: int, accelerator: Accelerator
) -> tuple[Any, Settings]:
    """Train without some examples, with the run's own seed first."""
    mask = torch.ones(len(trained.data.train), dtype=torch.bool)
    mask[left_out] = False
    settings = retraining.subset_settings(trained.settings, seed=trained.settings.training.seed + seed)
    data = retraining.subset_data(trained.data, mask)
    return retraining.train_generator(settings, data, accelerator), settings


def outcome(
    network: Any,
    settings: Settings,
    trained: build.TrainedRun,
    samples: QueryImages,
    model: LeftOut,
    left_out: Tensor,
) -> Outcome:
    """Make a sample again, and measure the loss on it."""
    label, row = samples.labels[model.query], slice(model.query, model.query + 1)
    query = QueryImages(images=samples.images[row], labels=samples.labels[row])
    losses = retraining.query_losses(network, settings, trained.data.train, {"generated": query})
    return Outcome(
        left_out=left_out,
        image=retraining.regenerate(network, trained, label=int(label), seed=model.query),
        loss=float(losses["generated"].mean()),
    )


def write_table(
    root: Path,
    there: Mapping[LeftOut, Outcome],
    names: Sequence[str],
    shares: Sequence[float],
    train_labels: Tensor,
    query_labels: Tensor,
) -> str:
    """Write effects.parquet and table.md of the models that are there; give the table."""
    effects = effects_by_share(there, names, shares, train_labels, query_labels)
    rows = [row for some, by_title in effects.items() for row in effect_rows(some, by_title)]
    write_effects(root / "effects.parquet", rows)
    table = leave_out_table(effects, names, len(train_labels))
    with atomic_path(root / "table.md") as partial:
        partial.write_text(table, encoding="utf-8")
    return table


def effects_by_share(
    there: Mapping[LeftOut, Outcome],
    names: Sequence[str],
    shares: Sequence[float],
    train_labels: Tensor,
    query_labels: Tensor,
) -> dict[float, dict[str, dict[str, Tensor]]]:
    """Collect effects by share, title and method, over the queries of which every method has every seed."""
    effects = {}
    for some in shares:
        found = {model: end for model, end in there.items() if model.share in (0, some)}
        if any(model.share for model in found):
            effects[some] = leave_out_effects(found, names, train_labels=train_labels, query_labels=query_labels)
    return effects


def leave_out_table(
    effects: Mapping[float, Mapping[str, Mapping[str, Tensor]]], names: Sequence[str], num_train: int
) -> str:
    """Lay out a table for every share and effect."""
    lines = []
    for some, by_title in effects.items():
        for title, by_method in by_title.items():
            lines.append(f"{some:.0%} of {num_train} training images left out: {title}\n")
            lines.append(effect_table(by_method, [name for name in REFERENCES if name in names]))
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
