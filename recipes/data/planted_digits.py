"""Write the embedded digits as an image folder with sources planted in it: copies, and a cluster that bears a mark.

    python recipes/data/planted_digits.py digits_planted
    provgen train --config digits data.source=folder data.path=digits_planted output_dir=runs/planted
    python recipes/planted.py --run runs/planted

Twenty digits are there ten times; a third of the sevens have a white square in a corner that no other digit has ink in.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from provgen import cli
from provgen.data.images import save_png
from provgen.data.sources import load_images
from provgen.errors import InputError
from provgen.run import atomic_path

NUM_COPIED, COPIES = 20, 10
MARKED_CLASS, MARKED_SHARE = 7, 1 / 3


def main(output: Annotated[Path, typer.Argument(help="Folder to write; must not be there yet.")]) -> None:
    """Write one PNG for every digit and every copy; `-copy-` and `-marked` stand in the names."""
    if output.exists():
        raise InputError(f"{output} exists; remove it or choose another folder")
    digits = load_images("digits", None, 8)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    sevens = order[digits.labels[order] == MARKED_CLASS]
    marked = set(sevens[: round(MARKED_SHARE * len(sevens))].tolist())
    copied = [digit for digit in order.tolist() if digit not in marked][:NUM_COPIED]
    with atomic_path(output) as partial:
        for digit, (image, label) in enumerate(zip(digits.images, digits.labels.tolist(), strict=True)):
            folder = partial / str(label)
            if digit in marked:
                save_png(with_mark(image), folder / f"{digit:05d}-marked.png", {})
            else:
                save_png(image, folder / f"{digit:05d}.png", {})
            for number in range(1, COPIES if digit in copied else 1):
                save_png(image, folder / f"{digit:05d}-copy-{number}.png", {})
    print(f"{len(digits)} digits in {output}; {len(copied)} are there {COPIES} times, {len(marked)} bear a mark")


def with_mark(image: Tensor) -> Tensor:
    """Paint the corner of a uint8 image (channel, height, width) white."""
    painted = image.clone()
    painted[:, -2:, :2] = 255
    return painted


if __name__ == "__main__":
    cli.run(main)
