"""What do traces say of copies, held-out images, noise, and noised training images of a run?

    python benchmarks/traces_by_size.py runs/photos

Images are traced as from outside, told no class, by the network. Prints the mean largest posterior and weight, the
median effective number of sources of either, how often the image itself is first by either, the median explained
share, and what the images are said to be. The last table counts beliefs of 0.9 and more whose parent is known.
"""

from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from provgen import build, cli
from provgen.data.images import to_uint8, to_unit_range
from provgen.report.format import markdown_table
from provgen.tracing.attribution import Attribution

BANDWIDTHS = (0.05, 0.1, 0.25, 0.5, 1.0)
"""Standard deviations of noise on training images in [-1, 1]."""

SURE = 0.9


def main(
    run: Annotated[Path, typer.Argument(help="Run folder of a trained generator.")],
    images: Annotated[int, typer.Option(min=1, help="Of every kind.")] = 100,
) -> None:
    """Print both tables."""
    trained = build.open_trained_run(run, torch.device("cpu"))
    train, holdout, num_train = trained.data.train, trained.data.holdout, int(trained.data.covered.sum())
    random = torch.Generator().manual_seed(0)
    own = torch.randperm(len(train), generator=random)[:images]
    known = holdout.images[torch.randperm(len(holdout), generator=random)[:images]]
    noise = torch.randint(256, (images, *train.images.shape[1:]), dtype=torch.uint8, generator=random)
    rows = []
    for name, pixels in (("copies", train.images[own]), ("held-out", known), ("noise", noise)):
        traced = trained.pipeline.attribute(pixels, top_k=num_train)
        rows.append([name, *summary(traced, own if name == "copies" else None)])
    header = ["images", "largest posterior", "weight", "sources by posterior", "weight", "itself first", "by weight"]
    print(f"{run}: {len(train)} images, window {trained.pipeline.window}")
    print(markdown_table([*header, "explained", "said to be"], rows))
    sure = []
    for bandwidth in BANDWIDTHS:
        noised = to_unit_range(train.images[own])
        noised = noised + bandwidth * torch.randn(noised.shape, generator=random)
        traced = trained.pipeline.attribute(to_uint8(noised.clamp(-1, 1)), top_k=min(8, num_train))
        sure.append([bandwidth, *(reliable(traced, values, own) for values in (traced.posterior, traced.weight))])
    print(markdown_table(["bandwidth", f"posterior of {SURE} and more: right", "weight"], sure))


def summary(traced: Attribution, own: Tensor | None) -> list[object]:
    """Summarise traces of all sources; `own` are the images themselves, int64 (query,), if they are known."""
    both, supports = (traced.posterior, traced.weight), Counter[str]()
    supports.update(str(traced.explained.support(query)) for query in range(len(traced)))
    first = [traced.example_index.gather(1, values.argmax(dim=1, keepdim=True))[:, 0] for values in both]
    return [
        *(f"{float(values.max(dim=1).values.mean()):.3f}" for values in both),
        *(f"{float(torch.special.entr(values).sum(dim=1).exp().median()):.0f}" for values in both),
        *(None if own is None else f"{float((found == own).float().mean()):.2f}" for found in first),
        f"{float(traced.explained.share.median()):.2f}",
        ", ".join(f"{count} {support}" for support, count in supports.items()),
    ]


def reliable(traced: Attribution, values: Tensor, parents: Tensor) -> str:
    """Count how many of the sure sources are the parent."""
    is_sure, is_parent = values >= SURE, traced.example_index == parents[:, None]
    return f"{int((is_sure & is_parent).sum())} of {int(is_sure.sum())}, largest {float(values.max()):.2f}"


if __name__ == "__main__":
    cli.run(main)
