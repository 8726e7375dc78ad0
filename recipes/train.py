"""Train an image generator together with its provenance network.

    provgen train --config recipes/digits.yaml training.max_steps=2000
    accelerate launch --config_file accelerate_config.yaml recipes/train.py --config recipes/digits.yaml

The same command resumes a run that was stopped or killed.
"""

from pathlib import Path
from typing import Annotated

import typer
from accelerate import Accelerator

from provgen import build, cli, evaluation
from provgen.data.batches import BatchStream
from provgen.run import RunFolder, only_writer
from provgen.settings import Settings
from provgen.settings_file import load_settings
from provgen.training.checkpoint import resume_latest, save_checkpoint
from provgen.training.logging import TrainingProgress, check_finite, quality_table
from provgen.training.trainer import CoTrainer, StopSignals


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML settings, or the name of shipped ones: digits, folder, ...")
    ] = None,
) -> None:
    """Train an image generator together with its provenance network; the same command resumes."""
    settings = load_settings(cli.find_config(config), overrides or [])
    accelerator, folder = build.make_accelerator(settings), RunFolder(Path(settings.output_dir))
    with accelerator.main_process_first():  # it downloads, the others find what it left
        data = build.open_data(settings, folder)
    batches = build.make_batches(settings, data.train, accelerator)
    trainer = build.make_trainer(settings, data, accelerator)
    lock = only_writer(folder.root, "provgen train", writes=accelerator.is_main_process)
    with lock, StopSignals(build.steps_between_stops(settings)) as signals:
        build.start_run(settings, data, writes=accelerator.is_main_process)
        accelerator.wait_for_everyone()
        train(settings, data, batches, trainer, accelerator, signals)
    accelerator.end_training()
    if signals.received is not None:
        raise SystemExit(128 + signals.received)


def train(
    settings: Settings,
    data: build.RunData,
    batches: BatchStream,
    trainer: CoTrainer,
    accelerator: Accelerator,
    signals: StopSignals,
) -> None:
    """Train from the newest checkpoint to the last step, or to a signal."""
    training, folder, made_by = settings.training, RunFolder(Path(settings.output_dir)), build.made_by(settings, data)
    step = resume_latest(trainer, folder.checkpoints, made_by)
    build.make_trackers(folder, accelerator, start_step=step)
    writes, temperatures = accelerator.is_main_process, None
    has_provenance = "provenance" in trainer.networks
    probe = evaluation.make_probe(trainer.generator, settings, data) if writes and has_provenance else None

    with TrainingProgress(step, training.max_steps, is_shown=writes) as progress:
        progress.say(f"{len(data.train)} training and {len(data.holdout)} held-out images from {settings.data.source}")
        progress.say(f"resumed {folder.root} from step {step}" if step else f"new run in {folder.root}")
        if step and probe is not None and not evaluation.has_whole_pipeline(folder):
            progress.say(f"{folder.pipeline} is missing or damaged; writing it again from the checkpoint")
            evaluation.save_pipeline(trainer, data, folder, temperatures=None, has_credit=step >= training.max_steps)
        while step < training.max_steps:
            batch = batches.batch(step).share(accelerator.process_index, accelerator.num_processes)
            losses = trainer.step(batch.to(accelerator.device), step)
            step += 1
            is_last = step == training.max_steps
            is_due, stops = step % training.checkpoint_every == 0 or is_last, signals.stop(step, accelerator)
            logs = step % training.log_every == 0 or is_due
            if logs or stops:
                means = {name: float(accelerator.reduce(loss, "mean")) for name, loss in losses.items()}
                check_finite(means, step, folder.checkpoints)
                progress.update(step, means)
                if logs:  # a run that was stopped has logged what one that was not has
                    accelerator.log(means, step=step)
            if probe is not None and (step % training.evaluate_every == 0 or is_last):
                progress.say(f"step {step}: fitting temperatures{' and credit' * is_last}, and measuring the index")
                measured, temperatures = evaluation.evaluate(probe, trainer, data)
                progress.show(quality_table(measured["index_quality"], step))
                accelerator.log(measured, step=step)
            if is_due and writes:
                # The checkpoint last: once it is there, everything else of its step is. Temperatures are those of the
                # last evaluation, which is the last step's when training ends: a fit takes long with many images.
                evaluation.save_pipeline(trainer, data, folder, temperatures=temperatures, has_credit=is_last)
            if (is_due or stops) and writes:
                save_checkpoint(trainer, folder.checkpoints, step, made_by)
            if is_due or stops:
                accelerator.wait_for_everyone()
            if stops:
                break
        progress.say(ending(settings, step, can_sample=trainer.generator.can_sample))


def ending(settings: Settings, step: int, *, can_sample: bool) -> str:
    """Say how far training came, and what can be done with the run."""
    most = settings.training.max_steps
    if step < most:
        return f"stopped after {step} of {most} steps, which are saved; the same command goes on"
    if step > most:
        return f"{settings.output_dir} has done {step} steps, more than training.max_steps={most}; nothing to do"
    return f"trained {step} steps; {following(settings, can_sample=can_sample)}"


def following(settings: Settings, *, can_sample: bool) -> str:
    """Say what can be done with the run."""
    if settings.provenance.index_head == "none":
        return "no provenance network"
    command = "generate" if can_sample else "attribute"
    return f"next: provgen {command} --run {settings.output_dir}"


if __name__ == "__main__":
    cli.run(main)
