"""Trace images from outside to the training images of a run.

provgen attribute --run runs/digits photo.png --top-k 8 --json
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from rich.text import Text

from provgen import build, cli
from provgen.data.images import read_image
from provgen.errors import InputError, printable
from provgen.tracing.records import explained_record, source_records


def main(
    images: Annotated[
        list[str], typer.Argument(help="Image files; and data.path=FOLDER, where the images have moved.")
    ],
    run: Annotated[Path, typer.Option(help="Run folder of a trained generator.")],
    top_k: Annotated[int, typer.Option(help="Sources per image.")] = 8,
    class_name: Annotated[str | None, typer.Option(help="Class of the images, if known.")] = None,
    trace_every: Annotated[int, typer.Option(min=1, help="Use one of so many noise levels.")] = 1,
    closed_form: Annotated[bool, typer.Option(help="By the closed form instead of the network.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the noise the images are traced with.")] = 0,
) -> None:
    """Trace images from outside; they are noised to the sampler's levels and given to the network."""
    overrides = [given for given in images if given.startswith("data.path=")]
    paths = [Path(given).expanduser() for given in images if given not in overrides]
    if not paths:
        raise InputError("no images to attribute; give at least one file")
    trained = build.open_trained_run(run, build.make_accelerator().device, overrides)
    manifest = trained.data.manifest
    label = None if class_name is None else trained.data.train.class_index(class_name)
    size, channels, max_bytes = manifest.image_size, manifest.channels, trained.settings.data.max_bytes
    pixels = [read_image(path, image_size=size, channels=channels, max_bytes=max_bytes) for path in paths]
    attribution = trained.pipeline.attribute(
        torch.stack(pixels),
        top_k=top_k,
        trace_every=trace_every,
        class_labels=[label] * len(paths),
        closed_form=trained.closed_form() if closed_form else None,
        seed=seed,
    )
    results = [
        {
            "image": str(path),
            **explained_record(attribution.explained, query),
            "entropy_nats": round(float(attribution.entropy[query]), 6),
            "mass_not_shown": round(float(attribution.mass_not_shown[query]), 6),
            "sources": source_records(attribution, query, manifest),
        }
        for query, path in enumerate(paths)
    ]
    if as_json:
        method = "closed form" if closed_form else "provenance network"
        print(json.dumps({"schema_version": 2, "run": str(run), "method": method, "images": results}, indent=2))
        return
    for query, result in enumerate(results):
        cli.say(f"{result['image']}: {attribution.explained.describe(query)}")
        cli.print_table(source_table(result))


def source_table(result: dict[str, Any]) -> Table:
    """Lay out the sources of one image, given as its JSON record."""
    # Text, not str: a name in square brackets is no markup.
    title = Text(f"entropy {result['entropy_nats']:.2f} nats")
    caption = f"posterior not shown: {result['mass_not_shown']:.1%}"
    table = Table(title=title, caption=caption, title_justify="left")
    for heading in ("source", "class", "contributor", "licence"):
        table.add_column(heading, overflow="fold")
    for heading in ("index", "posterior", "weight"):
        table.add_column(heading, justify="right")
    for source in result["sources"]:
        texts = [source["path"], source["class_name"], source["contributor"], source["license"]]
        numbers = [str(source["example_index"]), f"{source['posterior']:.1%}", f"{source['weight']:.1%}"]
        table.add_row(*[Text(printable(text or "")) for text in texts], *numbers)
    return table


if __name__ == "__main__":
    cli.run(main)
