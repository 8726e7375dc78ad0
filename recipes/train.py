"""Train an image generator together with its provenance network.

    provgen train --config recipes/digits.yaml training.max_steps=2000
    accelerate launch --config_file accelerate_config.yaml recipes/train.py --config recipes/digits.yaml

The same command resumes a run that was stopped or killed.
"""

from pathlib import Path
from typing import Annotated

import typer

from provgen import build, cli, evaluation
from provgen.run import RunFolder
from provgen.settings import Settings
from provgen.settings_file import load_settings
from provgen.training.checkpoint import resume_latest, save_checkpoint
from provgen.training.logging import TrainingProgress, check_finite, quality_table


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings as key=value.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML settings, or the name of shipped ones: digits, folder, ...")
    ] = None,
) -> None:
    """Train an image generator together with its provenance network; the same command resumes."""
    settings = load_settings(cli.find_config(config), overrides or [])
    training = settings.training
    accelerator = build.make_accelerator(settings)
    with accelerator.main_process_first():  # it downloads, the others find what it left
        data = build.open_data(settings, RunFolder(Path(settings.output_dir)))
    batches = build.make_batches(settings, data.train, accelerator)
    trainer = build.make_trainer(settings, data, accelerator)
    folder = build.start_run(settings, data, writes=accelerator.is_main_process)
    accelerator.wait_for_everyone()
    step = resume_latest(trainer, folder.checkpoints, data.manifest.fingerprint)
    build.make_trackers(folder, accelerator, start_step=step)
    has_provenance, temperatures = "provenance" in trainer.networks, None
    probe = (
        evaluation.make_probe(trainer.generator, settings, data)
        if accelerator.is_main_process and has_provenance
        else None
    )

    with TrainingProgress(step, training.max_steps, is_shown=accelerator.is_main_process) as progress:
        progress.say(f"{len(data.train)} training and {len(data.holdout)} held-out images from {settings.data.source}")
        progress.say(f"resumed {folder.root} from step {step}" if step else f"new run in {folder.root}")
        while step < training.max_steps:
            batch = batches.batch(step).share(accelerator.process_index, accelerator.num_processes)
            losses = trainer.step(batch.to(accelerator.device), step)
            step += 1
            is_last = step == training.max_steps
            saves = step % training.checkpoint_every == 0 or is_last
            if step % training.log_every == 0 or saves:
                means = {name: float(accelerator.reduce(loss, "mean")) for name, loss in losses.items()}
                check_finite(means, step, folder.checkpoints)
                accelerator.log(means, step=step)
                progress.update(step, means)
            if probe is not None and (step % training.evaluate_every == 0 or is_last):
                progress.say(f"step {step}: fitting temperatures{' and credit' * is_last}, and measuring the index")
                measured, temperatures = evaluation.evaluate(probe, trainer, data)
                progress.show(quality_table(measured["index_quality"], step))
                accelerator.log(measured, step=step)
            if saves and accelerator.is_main_process:
                # The checkpoint last: once it is there, everything else of its step is. Temperatures are those of the
                # last evaluation, which is the last step's when training ends: a fit takes long with many images.
                evaluation.save_pipeline(trainer, data, folder, temperatures=temperatures, has_credit=is_last)
                save_checkpoint(trainer, folder.checkpoints, step, data.manifest.fingerprint)
            if saves:
                accelerator.wait_for_everyone()
        progress.say(f"trained {step} steps; {following(settings, can_sample=trainer.generator.can_sample)}")
    accelerator.end_training()


def following(settings: Settings, *, can_sample: bool) -> str:
    """Say what can be done with the run."""
    if settings.provenance.index_head == "none":
        return "no provenance network"
    command = "generate" if can_sample else "attribute"
    return f"next: provgen {command} --run {settings.output_dir}"


if __name__ == "__main__":
    cli.run(main)
