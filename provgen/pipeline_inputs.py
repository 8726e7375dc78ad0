"""What users hand to a pipeline, checked and turned into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from PIL import Image
from torch import Tensor

from provgen.data.images import from_pil
from provgen.errors import InputError


def check_options(guidance_scale: float, output_type: str, trace_every: int) -> None:
    """Refuse what no sampler and no caller can use.

    Raises:
        InputError: An unknown `output_type`, a guidance scale that is not finite, or steps that are no number of steps.
    """
    if output_type not in ("pil", "pt"):
        raise InputError(f"output_type must be pil or pt, got {output_type!r}")
    if not isfinite(guidance_scale):
        raise InputError(f"guidance_scale must be a finite number, got {guidance_scale}")
    check_trace_every(trace_every)


def check_trace_every(trace_every: int) -> None:
    """Refuse what is no number of steps.

    Raises:
        InputError: Below 1.
    """
    if trace_every < 1:
        raise InputError(f"trace_every must be at least 1, got {trace_every}")


def check_redraws(redraw_below: float | None, max_redraws: int, *, is_traced: bool) -> None:
    """Refuse redraws that could never end, or that have no trace to go by.

    Raises:
        InputError: No positive bound, no redraw at all, or no trace.
    """
    if redraw_below is None:
        return
    if not is_traced:
        raise InputError("redraw_below looks at traces; give top_k as well, or leave it out")
    if redraw_below <= 0 or max_redraws < 1:
        raise InputError(
            f"redraw_below must be positive and max_redraws at least 1, got {redraw_below} and {max_redraws}"
        )


def read_count(
    class_labels: Sequence[int | None] | Tensor | None,
    batch_size: int,
    generator: torch.Generator | list[torch.Generator] | None,
) -> int:
    """Give the number of images asked for: one per label, `batch_size` without labels.

    Raises:
        InputError: None at all, a single label that is no list, or another number of generators.
    """
    if isinstance(class_labels, int):
        raise InputError(f"class_labels must be a list with one class per image, got {class_labels}")
    count = batch_size if class_labels is None else len(class_labels)
    if count < 1:
        raise InputError(f"the number of images must be at least 1, got {count}")
    if isinstance(generator, list) and len(generator) != count:
        raise InputError(f"give one generator per image: {count} images, {len(generator)} generators")
    return count


def read_labels(class_labels: Sequence[int | None] | Tensor | None, count: int, null_label: int) -> Tensor:
    """Turn one class label per image, None for no class, into int64 (query,); without any, all are null.

    Raises:
        InputError: The wrong number of labels, or one that is no class.
    """
    if class_labels is None:
        return torch.full((count,), null_label)
    given = class_labels.tolist() if isinstance(class_labels, Tensor) else list(class_labels)
    if len(given) != count:
        raise InputError(
            f"give one class label per image, None for no class: {count} images, {len(given)} labels"
        )
    labels = [null_label if label is None else label for label in given]
    allowed = range(null_label + 1)
    if bad := [label for label in labels if not isinstance(label, int) or label not in allowed]:
        classes = (
            f"0 to {null_label - 1}, or None for no class" if null_label else "None, there are no classes"
        )
        raise InputError(f"class labels must be {classes}, got {bad[0]!r}")
    return torch.tensor(labels)


def read_pixels(images: Sequence[Image.Image] | Tensor, *, channels: int, size: int) -> Tensor:
    """Turn images into uint8 (query, channel, height, width); PIL images are resized and converted.

    Raises:
        InputError: No images, or a tensor of another type or shape.
    """
    if len(images) == 0:
        raise InputError("no images to attribute; give at least one")
    if not isinstance(images, Tensor):
        return torch.stack([from_pil(image, image_size=size, channels=channels) for image in images])
    wanted = (channels, size, size)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
        raise InputError(
            f"images must be uint8 of shape (query, {', '.join(map(str, wanted))}), "
            f"got {images.dtype} of shape {tuple(images.shape)}"
        )
    return images
