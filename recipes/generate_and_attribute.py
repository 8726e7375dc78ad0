"""Generate images and trace each to the training images it comes from.

    provgen generate --run runs/digits --num-images 64 --top-k 8
    accelerate launch --config_file accelerate_config.yaml recipes/generate_and_attribute.py --run runs/digits

Writes samples/ into the run folder: PNGs that carry their sources, grid.png, part-PROCESS.parquet, and traces/.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from provgen import build, cli, evaluation
from provgen.data.dataset import ImageSet
from provgen.generators.classifier import no_generator
from provgen.pipeline import ProvenancePipelineOutput
from provgen.report.grid import draw_samples
from provgen.run import RunFolder, only_writer
from provgen.tracing import records
from provgen.tracing.attribution import check_top_k
from provgen.tracing.records import SampleWriter, staging

GRID_SAMPLES = 32


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a trained generator.")],
    overrides: Annotated[list[str] | None, typer.Argument(help=build.MOVED_HELP)] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images to generate.")] = 64,
    top_k: Annotated[int, typer.Option(help="Sources per image.")] = 8,
    steps: Annotated[int, typer.Option(help="DDIM sampling steps, at least 10.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time on each process.")] = 64,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    class_name: Annotated[str | None, typer.Option(help="Only this class; all in turn without it.")] = None,
    trace_every: Annotated[int, typer.Option(min=1, help="Trace every so many sampling steps.")] = 1,
    resample_below: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Draw samples again, up to four times, whose sources are surer than those of all but this share of "
            "held-out images, such as 0.01.",
        ),
    ] = None,
    closed_form: Annotated[bool, typer.Option(help="Also trace by the closed form.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the first image; each has its own.")] = 0,
) -> None:
    """Generate images and trace each along its own sampling trajectory."""
    accelerator = build.make_accelerator()
    trained = build.open_trained_run(run, accelerator.device, overrides)
    pipeline, train, folder = trained.pipeline, trained.data.train, trained.folder
    if not pipeline.generator.can_sample:
        raise no_generator(num_images)
    # None: a bar on a terminal, nothing in a log file.
    is_silent = None if accelerator.is_main_process else True
    pipeline.set_progress_bar_config(disable=is_silent, leave=False, desc="sampling")
    check_top_k(top_k, int(trained.data.covered.sum()))
    is_conditional = pipeline.generator.is_class_conditional
    labels = evaluation.classes_in_turn(train, num_images, is_conditional=is_conditional)
    if class_name is not None:
        labels = [train.class_index(class_name)] * num_images
    limit = None
    if resample_below is not None:
        limit = evaluation.late_entropy_limit(pipeline, trained.data.holdout, resample_below)
    sample = partial(
        pipeline,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        top_k=top_k,
        trace_every=trace_every,
        resample_below=limit,
        closed_form=trained.closed_form() if closed_form else None,
        output_type="pt",
    )
    asked = {
        "seed": seed,
        "num_images": num_images,
        "top_k": top_k,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "class_name": class_name,
        "trace_every": trace_every,
        "resample_below": resample_below,
        "closed_form": closed_form,
        "fingerprint": pipeline.manifest.fingerprint,
        "weights": trained.weights,
    }
    writer = SampleWriter(folder, pipeline.manifest, accelerator.process_index, asked)
    of_process = torch.arange(num_images)[accelerator.process_index :: accelerator.num_processes]
    writes = accelerator.is_main_process
    with only_writer(folder.root, "provgen generate", writes=writes), staging(folder, writes=writes):
        accelerator.wait_for_everyone()
        for numbers in of_process.split(batch_size):
            write_samples(sample, writer, numbers.tolist(), labels, seed)
        writer.close()
        accelerator.wait_for_everyone()
        if writes:
            publish_samples(writer, folder, train, tells_resamplings=resample_below is not None)
            cli.say(f"look at {folder.samples / 'grid.png'}; next: provgen analyze --run {run}")
    accelerator.end_training()


def write_samples(
    sample: Callable[..., ProvenancePipelineOutput],
    writer: SampleWriter,
    numbers: list[int],
    labels: list[int | None],
    first_seed: int,
) -> None:
    """Generate the images of these numbers, each from a seed of its own, and write them with their sources."""
    if not numbers:
        return  # more processes than images
    seeds, given = [first_seed + number for number in numbers], [labels[number] for number in numbers]
    output = sample(given, generator=[torch.Generator().manual_seed(seed) for seed in seeds])
    writer.add(
        output.images,
        output.attribution,
        output.closed_form,
        samples=numbers,
        seeds=seeds,
        class_labels=given,
        resamplings=output.resamplings.tolist(),
    )


def publish_samples(writer: SampleWriter, folder: RunFolder, train: ImageSet, *, tells_resamplings: bool) -> None:
    """Draw the grid, put everything in the place of earlier samples, and say so."""
    samples = records.read_parts(writer.staged.samples, ["sample"])
    traces = records.read_parts(writer.staged.traces, ["sample", "rank"])
    grid = draw_samples(writer.staged, samples[:GRID_SAMPLES], traces, train)
    grid.save(writer.staged.samples / "grid.png")
    writer.publish()
    cli.say(f"{len(samples)} samples in {folder.samples}, their sources in {folder.traces}")
    cli.say(support_line([sample["support"] for sample in samples]))
    if tells_resamplings:
        cli.say(f"{sum(sample['resamplings'] > 0 for sample in samples)} of them were resampled")


def support_line(supports: Sequence[str]) -> str:
    """Say how many samples are copies, and how many have no sources."""
    copies, none = supports.count("copy"), supports.count("no sources")
    return f"{copies} of them are copies; {none} have no sources: training images explain too little of them"


if __name__ == "__main__":
    cli.run(main)
