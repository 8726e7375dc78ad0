"""From copying to generalizing: train on more and more images, and measure what each generator copies.

    provgen memorization-sweep --config digits output_dir=runs/sweep
    provgen memorization-sweep --config digits --size 16 --size 64 --size 256 --seeds 3 output_dir=runs/sweep
    provgen memorization-sweep --only-tables output_dir=docs/memorization

Two generators of every size that share no image sample from the same noise. Each is measured at several steps of its
training. Every process trains models of its own; the same command goes on where it was stopped, and --shard 1/2 and
--shard 2/2 may run side by side. Writes measured/, sweep.parquet, sweep.md, figures and report.html into the output
folder. With --only-tables they are made again in seconds.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from accelerate import Accelerator

from provgen import build, cli
from provgen.errors import InputError
from provgen.run import RunFolder, claim_folder
from provgen.settings import Settings
from provgen.settings_file import load_settings
from provgen.studies.faithfulness import retraining
from provgen.studies.jobs import Shard, missing_models
from provgen.studies.memorization import sweep
from provgen.studies.memorization.report import write_sweep_report

SIZES = [16, 32, 64, 128, 256, 512]

SHARES_OF_STEPS = (0.125, 0.25, 0.5, 1.0)
"""Parts of the training after which a generator is measured."""


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML settings, or the name of shipped ones.")] = None,
    size: Annotated[
        list[int] | None, typer.Option(help="Training images; repeatable. Default: 16 to 512, and all.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds of each.")] = 1,
    num_images: Annotated[int, typer.Option(min=20, help="Images that each generates.")] = 200,
    shard: Annotated[str, typer.Option(help="Which share of the models: 1/2 takes every other one.")] = "1/1",
    only_tables: Annotated[
        bool, typer.Option("--only-tables", help="Make tables and figures again of what is there; train nothing.")
    ] = False,
) -> None:
    """Train on more and more images; report what is copied, and what traces say of it."""
    settings = load_settings(cli.find_config(config), overrides or [])
    folder = sweep.SweepFolder(Path(settings.output_dir))
    if only_tables:
        measured = folder.load()
        if not measured:
            where = f"no models in {folder.root}"
            raise InputError(f"{where}; run `provgen memorization-sweep` without --only-tables first")
        print(write_sweep_report(folder.root, sweep.curves(measured)))
        return
    accelerator, share = build.make_accelerator(settings), Shard.parse(shard)
    data = build.open_data(settings, RunFolder(folder.root))
    require_sweepable(settings, data)
    num_train = len(data.train)
    sizes = size or [*(n for n in SIZES if data.train.num_classes <= n < num_train), num_train]
    models = sweep.plan(sizes, seeds, num_train=num_train, num_classes=data.train.num_classes)
    steps = sorted({max(1, round(part * settings.training.max_steps)) for part in SHARES_OF_STEPS})
    if accelerator.is_main_process:
        fingerprint = retraining.fingerprint(
            settings, num_images=num_images, steps=steps, resampled_below=list(sweep.RESAMPLED_BELOW)
        )
        claim_folder(folder.root, fingerprint)
    accelerator.wait_for_everyone()
    there = folder.measured()
    for model in missing_models(
        models, lambda model: (model, steps[-1]) in there, shard=share, accelerator=accelerator, folder=folder.root
    ):
        train_and_measure(model, settings, data, steps, folder, accelerator, num_images)
    if accelerator.is_main_process:
        report(folder, models)
    accelerator.end_training()


def report(folder: sweep.SweepFolder, models: Sequence[sweep.SweepModel]) -> None:
    """Write tables and figures of those models that are there; compact the folder when all are."""
    measured = {model: by_step for model, by_step in folder.load().items() if model in models}
    cli.say(f"{len(measured)} of {len(models)} models measured")
    if len(measured) == len(models):
        folder.compact()
    if measured:
        print(write_sweep_report(folder.root, sweep.curves(measured)))


def require_sweepable(settings: Settings, data: build.RunData) -> None:
    """Refuse what could only fail when everything is trained."""
    build.require_noise_levels(settings, "a sweep")
    if settings.provenance.coverage < 1:
        raise InputError(f"a sweep needs provenance.coverage=1, got {settings.provenance.coverage}")
    if not len(data.holdout):
        raise InputError("a sweep needs held-out images to compare with; raise data.holdout_fraction")


def train_and_measure(
    model: sweep.SweepModel,
    settings: Settings,
    data: build.RunData,
    steps: list[int],
    folder: sweep.SweepFolder,
    accelerator: Accelerator,
    num_images: int,
) -> None:
    """Train one generator, and measure it at every one of `steps`."""
    own = sweep.own_settings(settings, model)
    images = retraining.subset_data(data, sweep.images_of(data.train.labels, model))
    stream = build.make_stream(own, images.train)
    trainer = build.make_trainer(own, images, accelerator, is_shared=False)
    for step in range(steps[-1]):
        trainer.step(stream.batch(step).to(accelerator.device), step)
        if step + 1 in steps:
            is_last = step + 1 == steps[-1]
            folder.save(model, step + 1, sweep.measure(trainer, images, num_images=num_images, is_last=is_last))
    accelerator.free_memory()


if __name__ == "__main__":
    cli.run(main)
