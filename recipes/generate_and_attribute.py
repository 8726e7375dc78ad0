"""Generate images and trace each to the training images it comes from.

    provgen generate --run runs/digits --num-images 64 --top-k 8
    accelerate launch --config_file accelerate_config.yaml recipes/generate_and_attribute.py --run runs/digits

Writes samples/ (PNGs that carry their sources, grid.png, part-PROCESS.parquet) and traces/ into the run folder.
"""

import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from provgen import build, cli
from provgen.attribution.scores import check_top_k
from provgen.errors import InputError
from provgen.report import exports
from provgen.report.sample_sources import draw_samples

GRID_SAMPLES = 32


def main(
    run: Annotated[Path, typer.Option(help="Run folder of a trained generator.")],
    num_images: Annotated[int, typer.Option(min=1, help="Images to generate.")] = 64,
    top_k: Annotated[int, typer.Option(help="Sources per image.")] = 8,
    steps: Annotated[int, typer.Option(help="DDIM sampling steps, at least 10.")] = 50,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time on each process.")] = 64,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 1.0,
    class_name: Annotated[str | None, typer.Option(help="Only this class; all in turn without it.")] = None,
    closed_form: Annotated[bool, typer.Option(help="Also trace by the closed form.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first image; each has its own.")] = 0,
) -> None:
    """Generate images and trace each along its own sampling trajectory."""
    accelerator = build.make_accelerator()
    trained = build.open_trained_run(run)
    pipeline, train, folder = trained.pipeline, trained.data.train, trained.folder
    pipeline.set_progress_bar_config(disable=not accelerator.is_main_process, leave=False, desc="sampling")
    check_top_k(top_k, len(train))
    if class_name is not None and class_name not in train.class_names:
        known = ", ".join(train.class_names) or "none, the data set has no labels"
        raise InputError(f"unknown class {class_name!r}; the classes are: {known}")
    classes = (
        [train.class_names.index(class_name)] if class_name else list(range(train.num_classes)) or [None]
    )
    staged = exports.staging_folder(folder)
    if accelerator.is_main_process:
        shutil.rmtree(staged.root, ignore_errors=True)
        staged.samples.mkdir(parents=True)
    accelerator.wait_for_everyone()

    sample_rows, trace_rows, closed_rows = [], [], []
    mine = torch.arange(accelerator.process_index, num_images, accelerator.num_processes)
    for numbers in (part.tolist() for part in mine.split(batch_size) if len(part)):
        seeds, labels = [seed + n for n in numbers], [classes[n % len(classes)] for n in numbers]
        output = pipeline(
            labels,
            generator=[torch.Generator().manual_seed(s) for s in seeds],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            top_k=top_k,
            closed_form=trained.closed_form() if closed_form else None,
            output_type="pt",
        )
        names = [f"samples/{n:05d}.png" for n in numbers]
        for query, name in enumerate(names):
            exports.save_sample(
                output.images[query],
                staged.root / name,
                seed=seeds[query],
                sources=exports.source_records(output.attribution, query, pipeline.manifest),
                fingerprint=pipeline.manifest.fingerprint,
            )
        sample_rows += exports.sample_rows(
            output.attribution,
            output.closed_form,
            samples=numbers,
            seeds=seeds,
            class_labels=labels,
            paths=names,
        )
        trace_rows += exports.trace_rows(output.attribution, numbers)
        if output.closed_form is not None:
            closed_rows += exports.trace_rows(output.closed_form, numbers)

    process = accelerator.process_index
    exports.write_part(staged.samples, process, sample_rows, exports.SAMPLE_SCHEMA)
    exports.write_part(staged.traces, process, trace_rows, exports.TRACE_SCHEMA)
    if closed_form:
        exports.write_part(staged.closed_form_traces, process, closed_rows, exports.TRACE_SCHEMA)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        samples = exports.read_parts(staged.samples, ["sample"])[:GRID_SAMPLES]
        traces = exports.read_parts(staged.traces, ["sample", "rank"])
        draw_samples(staged, samples, traces, train).save(staged.samples / "grid.png")
        exports.publish(folder)
        print(f"{num_images} samples in {folder.samples}, their sources in {folder.traces}")
        print(f"look at {folder.samples / 'grid.png'}; next: provgen analyze --run {run}")
    accelerator.end_training()


if __name__ == "__main__":
    cli.run(main)
