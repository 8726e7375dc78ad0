"""Train the generator of a run again on random halves of its images, and measure how each does on queries.

    provgen retrain --run runs/digits --num-subsets 64 --seeds 2
    accelerate launch --config_file accelerate_config.yaml recipes/retrain.py --run runs/digits

Every process trains models of its own. The same command goes on where it was stopped, model by model; several may run
side by side with --shard 1/2 and --shard 2/2. Writes masks.npz, queries.npz and losses/ into RUN/retrained.
"""

from pathlib import Path
from typing import Annotated

import typer

from provgen import build, cli
from provgen.data.splits import subset_masks
from provgen.run import require_run
from provgen.settings_file import load_settings
from provgen.studies.faithfulness import retraining
from provgen.studies.faithfulness.retraining import RetrainedFolder
from provgen.studies.jobs import Shard, missing_models

SEED = 1000
"""Training seed of the first model of a subset; runs that are explained have small ones."""


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a trained generator.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=build.MOVED_HELP)] = None,
    num_subsets: Annotated[int, typer.Option(min=2, help="Subsets of the training images.")] = 64,
    fraction: Annotated[float, typer.Option(min=0.01, max=0.99, help="Size of each, as a share.")] = 0.5,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each subset.")] = 2,
    num_queries: Annotated[int, typer.Option(min=2, help="Generated images, and held-out ones.")] = 100,
    keep_epochs: Annotated[
        bool, typer.Option("--keep-epochs", help="Fewer steps for fewer images; otherwise the same steps.")
    ] = False,
    shard: Annotated[str, typer.Option(help="Which share of the models: 1/2 takes every other one.")] = "1/1",
) -> None:
    """Train subset models and measure their losses on generated and held-out queries; the same command resumes."""
    share, accelerator = Shard.parse(shard), build.make_accelerator(load_settings(require_run(run).config, []))
    trained = build.open_trained_run(run, accelerator.device, overrides)
    train = trained.data.train
    folder = RetrainedFolder(trained.folder.retrained_epochs if keep_epochs else trained.folder.retrained)
    masks = subset_masks(train.labels, num_subsets=num_subsets, fraction=fraction, seed=0)
    if accelerator.is_main_process:
        queries = folder.queries() or retraining.make_queries(trained, num_queries)
        options = {"fraction": fraction, "keep_epochs": keep_epochs, "num_queries": num_queries}
        folder.start(masks, queries, retraining.fingerprint(trained.settings, **options))
    accelerator.wait_for_everyone()
    queries = folder.queries() or {}

    models = [(subset, seed) for seed in range(seeds) for subset in range(num_subsets)]
    measured = folder.measured()
    waiting = missing_models(
        models,
        lambda model: model in measured,
        shard=share,
        accelerator=accelerator,
        folder=folder.root,
        describe=lambda model: f"subset {model[0]}, seed {model[1]}",
    )
    for subset, seed in waiting:
        settings = retraining.subset_settings(
            trained.settings, seed=SEED + seed, share_of_steps=fraction if keep_epochs else 1.0
        )
        data = retraining.subset_data(trained.data, masks[subset])
        network = retraining.train_generator(settings, data, accelerator)
        folder.save(subset, seed, retraining.query_losses(network, settings, train, queries))
    if accelerator.is_main_process:
        measured = folder.measured()
        if measured.issuperset(models):
            folder.compact()
        cli.say(f"{len(measured)} of {len(models)} models measured in {folder.root}")
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
