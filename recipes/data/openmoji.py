"""Rasterise the OpenMoji drawings into an image folder with classes, designers and licence.

    pip install 'provgen[openmoji]' && npm pack openmoji && tar xzf openmoji-*.tgz
    python recipes/data/openmoji.py package openmoji32 --size 32
    provgen train --config recipes/folder.yaml data.path=openmoji32 data.image_size=32 output_dir=runs/openmoji

OpenMoji (openmoji.org) is CC BY-SA 4.0: credit the designers, whose names are in metadata.csv. Base drawings only,
without skin tones; classes are the groups of Unicode and of OpenMoji.
"""

import csv
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track

from provgen import cli
from provgen.errors import InputError
from provgen.run import atomic_path

LICENSE = "CC BY-SA 4.0"
LEFT_OUT = {"component"}
"""Groups of parts such as hair and skin tones, which are no drawings of their own."""


def main(
    package: Annotated[Path, typer.Argument(help="Unpacked npm package `openmoji`.")],
    output: Annotated[Path, typer.Argument(help="Folder to write; must not be there yet.")],
    size: Annotated[int, typer.Option(min=8, max=1024, help="Height and width in pixels.")] = 32,
) -> None:
    """Write one PNG for every base drawing, on white."""
    if output.exists():
        raise InputError(f"{output} exists; remove it or choose another folder")
    drawings = base_drawings(package)
    with atomic_path(output) as partial:
        metadata = [draw(package, drawing, partial, size) for drawing in track(drawings, "rasterising")]
        with (partial / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["file_name", "label", "contributor", "license"])
            writer.writeheader()
            writer.writerows(metadata)
    designers = {entry["contributor"] for entry in metadata}
    print(f"{len(metadata)} drawings by {len(designers)} designers in {output}")


def base_drawings(package: Path) -> list[dict[str, Any]]:
    """Read the catalogue of the package, and leave out skin tones and parts.

    Raises:
        InputError: `package` is not the package.
    """
    catalogue = package / "data" / "openmoji.json"
    if not catalogue.is_file():
        raise InputError(f"{catalogue} is missing; unpack the npm package `openmoji` and name its folder")
    entries: list[dict[str, Any]] = json.loads(catalogue.read_text(encoding="utf-8"))
    return [
        entry
        for entry in entries
        if not entry["skintone"] and not entry["skintone_combination"] and entry["group"] not in LEFT_OUT
    ]


def draw(package: Path, drawing: dict[str, Any], output: Path, size: int) -> dict[str, str]:
    """Write one drawing as PNG; give its row of metadata.csv."""
    try:
        import resvg_py
    except ImportError as error:
        raise InputError("rasterising needs resvg-py; pip install 'provgen[openmoji]'") from error
    group, code = drawing["group"], drawing["hexcode"]
    path = package / "color" / "svg" / f"{code}.svg"
    try:
        png = resvg_py.svg_to_bytes(
            svg_path=str(path), width=size, height=size, background="#ffffff", skip_system_fonts=True
        )
    except (ValueError, OSError) as error:
        raise InputError(f"cannot draw {path}: {error}; unpack the package again") from error
    name = f"{group}/{code}.png"
    (output / group).mkdir(parents=True, exist_ok=True)
    (output / name).write_bytes(bytes(png))
    return {
        "file_name": name, "label": group, "contributor": drawing["openmoji_author"], "license": LICENSE,
    }  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
