"""Fit how much credit each training image gets, on the subset models of `provgen retrain`.

    provgen retrain --run runs/digits --num-subsets 16 --seeds 1
    provgen calibrate --run runs/digits

Weights of later traces are shares of credit: how much less would be known of the image without each training image, by
a Gaussian process on what the provenance network sees, on pixels, and on gradients of the generator's last layer, which
its forward pass gives. How much each of them and each noise level counts is what predicts subset models best.
Posteriors stay what they are. Subset models beyond those it is calibrated on are for `provgen faithfulness`, which says
what the weights are worth.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from provgen import build, cli
from provgen.errors import InputError
from provgen.run import atomic_path, only_writer
from provgen.studies.faithfulness.credit import traced_images
from provgen.studies.faithfulness.methods import trace_queries
from provgen.studies.faithfulness.retraining import RetrainedFolder
from provgen.studies.faithfulness.tuning import Split, tune
from provgen.tracing import calibrate


def main(
    run: Annotated[Path, typer.Option(help="Run folder whose subset models have been trained.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=build.MOVED_HELP)] = None,
    calibration_subsets: Annotated[int, typer.Option(help="Subset models to calibrate on.")] = 16,
) -> None:
    """Choose kernel, ridge and levels by what they predict of subset models; save the credit head with the pipeline."""
    accelerator = build.make_accelerator()
    if accelerator.num_processes > 1:
        raise InputError("calibrate runs in one process; start it without accelerate launch")
    trained = build.open_trained_run(run, accelerator.device, overrides)
    pipeline, retrained = trained.pipeline, RetrainedFolder(trained.folder.retrained).load()
    outputs = {kind: -losses.mean(dim=0) for kind, losses in retrained.losses.items()}
    split = Split.first(retrained.subsets, len(outputs["generated"]), calibration=calibration_subsets, left=0)
    queries = trace_queries(trained, retrained.queries)

    head = calibrate.fit_credit_head(
        traced_images(pipeline, trained.data.train, queries),
        partial(tune, masks=retrained.masks, outputs=outputs, split=split),
        calibration_subsets=calibration_subsets,
        progress_bar=partial(track, description="fitting processes", console=Console(stderr=True), transient=True),
    )
    pipeline.register_modules(credit=head.to(pipeline.device))
    with only_writer(trained.folder.root, "provgen calibrate"), atomic_path(trained.folder.pipeline) as path:
        pipeline.save_pretrained(path)
    cli.say(f"calibrated on {calibration_subsets} subset models: {head.process}; saved in {trained.folder.pipeline}")


if __name__ == "__main__":
    cli.run(main)
