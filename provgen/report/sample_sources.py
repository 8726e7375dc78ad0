"""The picture of a run's samples beside their sources, from its files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from provgen.data.dataset import ImageSet
from provgen.data.images import read_image, to_pil
from provgen.data.manifest import Manifest
from provgen.report.exports import group_traces
from provgen.report.sample_grid import sample_grid
from provgen.run_folder import RunFolder


def draw_samples(
    folder: RunFolder,
    samples: Sequence[Mapping[str, Any]],
    traces: Sequence[Mapping[str, Any]],
    train: ImageSet,
    captions: Sequence[str] | None = None,
) -> Image.Image:
    """Draw samples with their sources, each source with its class and weight.

    Args:
        folder: Where the PNGs lie.
        samples: Rows of `samples/`.
        traces: Rows of `traces/`, sorted by sample and rank.
        train: The training images.
        captions: What stands under each sample; its class without them.
    """
    groups = group_traces(traces)
    rows = [groups[sample["sample"]] for sample in samples]
    return sample_grid(
        [Image.open(folder.root / sample["path"]) for sample in samples],
        [[to_pil(train.images[source["example_index"]]) for source in row] for row in rows],
        [[_source_caption(source, train) for source in row] for row in rows],
        captions or [_class_name(sample["class_label"], train) for sample in samples],
    )


def load_pixels(folder: RunFolder, samples: Sequence[Mapping[str, Any]], manifest: Manifest) -> Tensor:
    """Read the PNGs of samples as uint8 (sample, channel, height, width)."""
    paths = [folder.root / sample["path"] for sample in samples]
    images = [read_image(path, image_size=manifest.image_size, channels=manifest.channels) for path in paths]
    return torch.stack(images)


def _source_caption(source: Mapping[str, Any], train: ImageSet) -> str:
    name = _class_name(int(train.labels[source["example_index"]]), train)
    percent = f"{100 * source['weight']:.0f} %"
    return f"{name}\n{percent}" if name else percent


def _class_name(label: int | None, train: ImageSet) -> str:
    return "" if label is None or label >= train.num_classes else train.class_names[label]
